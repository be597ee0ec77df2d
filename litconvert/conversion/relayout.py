"""Writing a model in the layout of the original code or of diffusers, so that a user can move either way."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.checkpoints.checkpoint import Extent
from litconvert.checkpoints.writing import LazyTensors, write_safetensors, write_weights
from litconvert.common.files import refuse_existing, refuse_source, require_file_name, require_space, whole_file
from litconvert.common.listener import SILENT, Listener, Task
from litconvert.common.outputs import DIFFUSERS_MODEL, at_work, contents, is_unfinished, refuse_foreign, whole_directory
from litconvert.common.tensors import TensorInfo
from litconvert.conversion.directory import WEIGHTS_STEM
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.family import Family
from litconvert.families.headers import HEADS_OF_WIDTH
from litconvert.families.layout import Layout
from litconvert.families.pixart import INTERPOLATION, variant_of
from litconvert.families.registry import families
from litconvert.families.sources import OpenSource
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import BUFFERS, model_tensors, position_embedding

PICKLES = (".pt", ".pth")
TARGETS = ("original", "diffusers")


@dataclass(frozen=True)
class LayoutPlan:
    """A source's weights, exactly as they are, under the names of another layout.

    Attributes:
        source: where the values are.
        out: for `original` a file, .pt, .pth or .safetensors; for `diffusers` a folder.
        to: `original` or `diffusers`.
        family: whose layout it is.
        parts: for each tensor of the layout, which of ours it is made of, row after row; none where a formula gives it.
        infos: header of every tensor of the layout.
        notes: what the layout cannot say, in sentences.
    """

    source: OpenSource
    out: Path
    to: str
    family: Family
    parts: Mapping[str, Sequence[str]]
    infos: Mapping[str, TensorInfo]
    notes: list[str]

    def write(self, *, max_shard_bytes: int, listener: Listener = SILENT) -> None:
        """Write it whole or not at all.

        Args:
            max_shard_bytes: of the files of a diffusers folder.
            listener: hears of each tensor that is written.
        """
        tensors, metadata = LazyTensors(self.infos, self._produce), {"format": "pt"}
        with listener.task("write", len(self.infos)) as task:
            if self.to == "diffusers":
                assert self.family.diffusers_config is not None
                config = self.family.diffusers_config(self.source.config)
                described = {"_diffusers_version": version("diffusers"), **config}
                with at_work(self.out, listener), whole_directory(self.out, DIFFUSERS_MODEL) as folder:
                    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
                    write_weights(folder, WEIGHTS_STEM, tensors, metadata, max_shard_bytes=max_shard_bytes, task=task)
            elif self.out.suffix == ".safetensors":
                with whole_file(self.out) as temporary:
                    write_safetensors(temporary, tensors, metadata, task=task)
            else:
                with whole_file(self.out) as temporary:
                    torch.save(self._state_dict(task), temporary)

    def _produce(self, name: str) -> Tensor | Extent | Iterator[Tensor]:
        """A tensor's values, for writing them as safetensors."""
        parts, dtype = self.parts[name], self.infos[name].dtype
        return self.source.checked(parts[0], dtype) if len(parts) == 1 else self._values(name)

    def _values(self, name: str) -> Tensor:
        """A tensor's values: computed, fused of several, or those of the source's file."""
        parts, dtype = self.parts[name], self.infos[name].dtype
        if not parts:
            return position_embedding(self.source.config).to(dtype)
        values = [self.source.values(ours).to(dtype) for ours in parts]
        return values[0] if len(values) == 1 else torch.cat(values)

    def _state_dict(self, task: Task) -> dict[str, Any]:
        """What torch.save writes: views of the source's file, but for what had to be fused."""
        state = {}
        for name, info in self.infos.items():
            value = self._values(name)
            # Contiguous and alone in its storage, or torch.save would write the whole of a fused source tensor.
            state[name] = value.clone() if value.untyped_storage().nbytes() != info.nbytes else value
            task.advance()
        return {self.family.container: state} if self.family.container else state


def plan_layout(source: OpenSource, out: Path, to: str, *, force: bool = False) -> LayoutPlan:
    """Check that a source can be written in another layout, and there. Arguments as of `write_layout`."""
    config = source.config
    family = _family_of(source)
    layout = family.layouts.get(to)
    if layout is None:
        raise UsageError(
            f"{source.checkpoint.source}: {family.title} has no {to} layout; there is "
            f"{' and '.join(family.layouts) or 'none'}"
        )
    _require_place(source, family, layout)
    refuse_source(out, source.checkpoint.files)
    _refuse_out(out, to, force=force)
    remarks = source.check_recomputed()
    parts, infos = _targets(source, layout)
    placed = {ours for group in parts.values() for ours in group}
    lost = [f"left out, there is no place for it: {name}" for name in model_tensors(config) if name not in placed]
    if to == "original":
        parts["pos_embed"] = []
        infos["pos_embed"] = TensorInfo(tuple(position_embedding(config).shape), source.dtype())
    lost += [f"left out, {what}: {name}" for name, what in source.reading.extra.items()]
    made = LayoutPlan(source, out, to, family, parts, infos, [*remarks, *lost, *_unsaid(config, family, to)])
    require_space(out, sum(info.nbytes for info in infos.values()))
    return made


def write_layout(
    source: OpenSource,
    out: Path,
    to: str,
    *,
    force: bool = False,
    max_shard_bytes: int = 10_000_000_000,
    listener: Listener = SILENT,
) -> tuple[list[str], int]:
    """Write a source's weights, exactly as they are, under the names of another layout.

    Args:
        source: softmax, KV-compressed or linear; linear layers are written in LiT's public layout.
        out: for `original` a file, .pt, .pth or .safetensors; for `diffusers` a folder.
        to: `original` or `diffusers`.
        force: replace an `out` that exists.
        max_shard_bytes: of the files of a diffusers folder.
        listener: hears of each tensor that is written.

    Returns: what the layout cannot say, in sentences; and how many tensors it has.

    Raises UsageError for what the layout cannot hold.
    """
    made = plan_layout(source, out, to, force=force)
    made.write(max_shard_bytes=max_shard_bytes, listener=listener)
    return made.notes, len(made.infos)


def _refuse_out(out: Path, to: str, *, force: bool) -> None:
    """Refuse to write where something is that is not to be replaced, and under a name that the layout has not."""
    if to == "original" and out.suffix not in (*PICKLES, ".safetensors"):
        raise UsageError(f"{out}: the original layout is one file; name it .pth, .pt or .safetensors")
    if to == "original":
        require_file_name(out)
        refuse_existing(out, force=force)
        return
    if not out.exists() or (out.is_dir() and not contents(out)):
        return
    if not out.is_dir():
        raise LitconvertError(f"{out} exists and is a file, and a folder is written; choose another path")
    if not force and not is_unfinished(out):
        raise LitconvertError(f"{out} exists; choose another path, or replace it with --force")
    refuse_foreign(out, DIFFUSERS_MODEL)


def _unsaid(config: ModelConfig, family: Family, to: str) -> list[str]:
    """What determines the function and has no place in the layout, with the hint that restores it."""
    usual: dict[str, Any] = {"timestep_freq_shift": 0.0, "norm_eps": 1e-6}
    if "linear" in config.attention:
        usual |= {"linear_kernel": "relu", "linear_eps": 1e-6}
    if config.predicts_velocity:
        usual |= {"data_timestep": 1}
    hints = [f"{key}={getattr(config, key)}" for key, value in usual.items() if getattr(config, key) != value]
    if to == "original":
        hints += _unsaid_by_the_original(config, family)
    if family.name == "sit":
        hints.insert(0, "family=sit")
    notes = [f"the layout does not say it: read it back with --set source.{hint}" for hint in hints]
    if family.name == "dit" and to == "diffusers" and config.timestep_freq_shift != 1:
        notes.append(
            "diffusers' DiT embeds timesteps with a shift of 1, and these weights were trained with "
            f"{config.timestep_freq_shift:g}: there its outputs differ, as those of the released DiT folders do"
        )
    return notes


def _unsaid_by_the_original(config: ModelConfig, family: Family) -> Iterator[str]:
    """Hints for what the original layouts do not say beside that, and would be read otherwise."""
    heads_count = config.reads_captions or set(config.attention) != {"linear"}
    if heads_count and config.num_attention_heads != HEADS_OF_WIDTH.get(config.hidden_size):
        yield f"num_attention_heads={config.num_attention_heads}"
    if config.num_classes is not None and not config.null_class:
        yield f"num_classes={config.num_classes}"
    released = INTERPOLATION.get(family.name)
    if released is not None and config.interpolation_scale != released.get(config.sample_size, 1.0):
        yield f"interpolation_scale={config.interpolation_scale:g}"


def _family_of(source: OpenSource) -> Family:
    """The family whose layouts a source can be written in: its own or, for our directories, that of its config."""
    known, config = families(), source.config
    if source.reading.family != "litconvert":
        return known[source.reading.family]
    if config.reads_captions:
        return known[variant_of(config)]
    return known["sit" if config.predicts_velocity else "dit"]


def _require_place(source: OpenSource, family: Family, layout: Layout) -> None:
    """Refuse attention that the layout has no form for."""
    kinds = source.config.attention
    if "linear" in kinds and layout.linear_rows is None:
        raise UsageError(
            f"{source.checkpoint.source}: {layout.name} has no linear {family.title}: a model directory of `litconvert "
            "convert` loads in diffusers as it is, and --to original writes LiT's public layout"
        )
    if "kv_compress" in kinds and not layout.kv_compress:
        raise UsageError(
            f"{source.checkpoint.source}: {layout.name} has no KV compression; write it with --to original"
        )


def _targets(source: OpenSource, layout: Layout) -> tuple[dict[str, list[str]], dict[str, TensorInfo]]:
    """For each tensor of the layout: which of ours it is made of, row after row; and its shape and dtype."""
    config = source.config
    shapes, origins = model_tensors(config), layout.origins(config.values)
    lost = [name for name in shapes if name not in origins and name not in BUFFERS]
    if lost:
        raise UsageError(f"{source.checkpoint.source}: the {layout.name} layout has no place for {lost[0]}")
    names: dict[str, list[str]] = {}
    for ours, origin in sorted(origins.items(), key=lambda item: item[1].part):
        for theirs in origin.names:
            names.setdefault(theirs, []).append(ours)
    tensors = {}
    for theirs, parts in names.items():
        found = [source.checkpoint.tensors[source.reading.origins[ours].names[0]].dtype for ours in parts]
        dtype = found[0]
        for other in found[1:]:
            dtype = torch.promote_types(dtype, other)
        rows = sum(shapes[ours].shape[0] for ours in parts)
        tensors[theirs] = TensorInfo((rows, *shapes[parts[0]].shape[1:]), dtype)
    return names, tensors
