"""Writing a model in the layout of the original code or of diffusers, so that a user can move either way."""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.checkpoints.checkpoint import Extent
from litconvert.checkpoints.writing import write_safetensors, write_weights
from litconvert.common.files import refuse_source, require_space, whole_directory, whole_file
from litconvert.common.tensors import TensorInfo
from litconvert.conversion.directory import WEIGHTS_STEM
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.family import Family
from litconvert.families.layout import Layout
from litconvert.families.pixart import variant_of
from litconvert.families.registry import families
from litconvert.families.sources import OpenSource
from litconvert.model.shapes import BUFFERS, model_tensors, position_embedding

PICKLES = (".pt", ".pth")
TARGETS = ("original", "diffusers")


def write_layout(
    source: OpenSource,
    out: Path,
    to: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 10_000_000_000,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[str], int]:
    """Write a source's weights, exactly as they are, under the names of another layout.

    Args:
        source: softmax, KV-compressed or linear; linear layers are written in LiT's public layout.
        out: for `original` a file, .pt, .pth or .safetensors; for `diffusers` a folder.
        to: `original` or `diffusers`.
        force: replace an `out` that exists.
        dry_run: check everything and write nothing.
        max_shard_bytes: of the files of a diffusers folder.
        on_tensor: called after each tensor with how many are written, and of how many.

    Returns: what the layout cannot say, in sentences; and how many tensors it has.

    Raises UsageError for what the layout cannot hold.
    """
    config = source.reading.config
    family = _family_of(source)
    layout = family.layouts.get(to)
    if layout is None:
        raise UsageError(
            f"{source.checkpoint.source}: {family.title} has no {to} layout; there is "
            f"{' and '.join(family.layouts) or 'none'}"
        )
    _require_place(source, family, layout)
    refuse_source(out, source.checkpoint.files)
    if out.exists() and not force:
        raise LitconvertError(f"{out} exists; choose another path, or replace it with --force")
    if to == "diffusers" and out.exists() and not _is_a_model(out):
        raise LitconvertError(
            f"{out} holds other things than a diffusers model; remove it yourself, or choose another path"
        )
    if to == "original" and out.suffix not in (*PICKLES, ".safetensors"):
        raise UsageError(f"{out}: the original layout is one file; name it .pth, .pt or .safetensors")
    source.check_recomputed()
    names, tensors = _targets(source, layout)
    if to == "original":
        tensors["pos_embed"] = TensorInfo(tuple(position_embedding(config).shape), source.dtype())
    placed = {ours for group in names.values() for ours in group}
    lost = [f"left out, there is no place for it: {name}" for name in model_tensors(config) if name not in placed]
    result = [*lost, *_unsaid(config, family, to)], len(tensors)
    require_space(out.parent, sum(info.nbytes for info in tensors.values()))
    if dry_run:
        return result
    done = [0]

    def count(name: str) -> None:
        done[0] += 1
        on_tensor(done[0], len(tensors))

    def produce(name: str) -> Tensor | Extent | Iterator[Tensor]:
        if name not in names:
            return position_embedding(config).to(tensors[name].dtype)
        if len(names[name]) == 1:
            return source.checked(names[name][0], tensors[name].dtype)
        return torch.cat([source.values(ours).to(tensors[name].dtype) for ours in names[name]])

    if to == "diffusers":
        assert family.diffusers_config is not None
        described = {"_diffusers_version": version("diffusers"), **family.diffusers_config(config)}
        with whole_directory(out) as folder:
            (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
            metadata = {"format": "pt"}
            write_weights(
                folder,
                WEIGHTS_STEM,
                tensors,
                produce,
                metadata,
                max_shard_bytes=max_shard_bytes,
                on_tensor=count,
            )
    elif out.suffix == ".safetensors":
        with whole_file(out) as temporary:
            write_safetensors(temporary, tensors, produce, {"format": "pt"}, on_tensor=count)
    else:
        with whole_file(out) as temporary:
            _write_pickle(temporary, tensors, source, names, family.container, count)
    return result


def _is_a_model(folder: Path) -> bool:
    """Whether a folder holds a diffusers model and nothing else, so that it may be replaced."""
    return folder.is_dir() and all(
        path.name == "config.json" or path.name.startswith(WEIGHTS_STEM) for path in folder.iterdir()
    )


def _unsaid(config: Mapping[str, Any], family: Family, to: str) -> list[str]:
    """What determines the function and has no place in the layout, with the hint that restores it."""
    usual: dict[str, Any] = {"timestep_freq_shift": 0.0, "norm_eps": 1e-6}
    if "linear" in config["attention"]:
        usual |= {"linear_kernel": "relu", "linear_eps": 1e-6}
    if config["prediction"] == "velocity":
        usual |= {"data_timestep": 1}
    hints = [f"{key}={config[key]}" for key, value in usual.items() if config[key] != value]
    if family.name == "sit":
        hints.insert(0, "family=sit")
    notes = [f"the layout does not say it: read it back with --set source.{hint}" for hint in hints]
    if family.name == "dit" and to == "diffusers" and config["timestep_freq_shift"] != 1:
        notes.append(
            "diffusers' DiT embeds timesteps with a shift of 1, and these weights were trained with "
            f"{config['timestep_freq_shift']:g}: there its outputs differ, as those of the released DiT folders do"
        )
    return notes


def _family_of(source: OpenSource) -> Family:
    """The family whose layouts a source can be written in: its own or, for our directories, that of its config."""
    known, config = families(), source.reading.config
    if source.reading.family != "litconvert":
        return known[source.reading.family]
    if config["caption_channels"] is not None:
        return known[variant_of(config)]
    return known["sit" if config["prediction"] == "velocity" else "dit"]


def _require_place(source: OpenSource, family: Family, layout: Layout) -> None:
    """Refuse attention that the layout has no form for."""
    kinds = source.reading.config["attention"]
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
    config = source.reading.config
    shapes, origins = model_tensors(config), layout.origins(config)
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


def _write_pickle(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    source: OpenSource,
    names: Mapping[str, list[str]],
    container: str | None,
    on_tensor: Callable[[str], None],
) -> None:
    """A state dict as torch.save writes it: views of the source's file, but for what had to be fused."""
    state = {}
    for name, info in tensors.items():
        if name in names:
            parts = [source.values(ours).to(info.dtype) for ours in names[name]]
            # Contiguous and alone in its storage, or torch.save would write the whole of a fused source tensor.
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            state[name] = value.clone() if value.untyped_storage().nbytes() != info.nbytes else value
        else:
            state[name] = position_embedding(source.reading.config).to(info.dtype)
        on_tensor(name)
    content: dict[str, Any] = {container: state} if container else state
    torch.save(content, path)
