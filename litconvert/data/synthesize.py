"""The training set that the teacher draws, for classes or for prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import digest_of, read_json, require_space, write_whole
from litconvert.common.listener import SILENT, Listener, Task
from litconvert.common.quantities import size, span
from litconvert.common.seeds import generator_of
from litconvert.conversion.plan import resolve_for
from litconvert.conversion.solve_plan import rate_of
from litconvert.data.dataset import ConditionKind, read_record
from litconvert.data.prompts import StoredPrompts, read_prompts, store_prompts
from litconvert.data.shards import Assembly, is_finished, shard_writer
from litconvert.errors import UsageError
from litconvert.families.sources import OpenSource, open_teacher, read_model
from litconvert.model.compilation import compile_for
from litconvert.model.config import ModelConfig, is_pixel_space
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import count_macs, count_parameters
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions
from litconvert.sampling.draw import SamplerSettings, draw, make_scheduler
from litconvert.sampling.parts import launched_group, written


def synthesis_inputs(recipe: Recipe, teacher: OpenSource, prompts: Sequence[str]) -> Inputs:
    """What determines the drawn data. What hints make of the teacher's file is in its config.

    The size of a batch changes rounding alone.
    """
    left_out, sha256 = {"prompts", "batch_size"}, teacher.checkpoint.sha256()
    values: dict[str, Any] = {
        "teacher": {
            "sha256": sha256,
            "weights": teacher.checkpoint.weights,
            "config": teacher.config.given,
        },
        "data": {"synthesize": given(recipe.data.synthesize, exclude=left_out)},
        "diffusion": given(recipe.diffusion),
    }
    first: dict[str, Any] = {
        "source": sha256,
        "weights": teacher.checkpoint.weights,
        "config": teacher.config.values,
        "synthesize": recipe.data.synthesize.model_dump(exclude=left_out),
        "timesteps": recipe.diffusion.num_timesteps,
    }
    if prompts and recipe.source.text_encoder is not None:
        values |= {"prompts": digest_of(prompts), "source": {"text_encoder": given(recipe.source.text_encoder)}}
        first |= {"prompts": prompts, "text_encoder": recipe.source.text_encoder.model_dump()}
    return Inputs(values, digest_of(first))


def synthesize(
    source: str | Path | None,
    out: str | Path,
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Let the teacher draw the training set. Every launched process must call it; each draws its share.

    Args:
        source: the teacher; None: the recipe's source.
        out: the dataset folder. One drawn from the same inputs is left as it is; an interrupted one is continued.
        recipe, overrides: as for `plan`; the section is `data.synthesize`. Without a recipe it is the packaged one for
            what the source is, or else the defaults.
        force: replace an `out` that was made from other inputs.
        listener: hears in the first process what to know, and of the samples that it draws.

    Returns: the dataset folder.
    """
    return synthesize_resolved(resolve_for(recipe, overrides, source), Path(out), listener, force=force, name="draw")


def synthesize_resolved(
    resolved: ResolvedRecipe,
    out: Path,
    listener: Listener = SILENT,
    *,
    force: bool = False,
    name: str = "teacher draws the training set",
    estimate: bool = True,
) -> Path:
    """`synthesize` for a recipe that is resolved already.

    Args:
        name: what the listener hears the work called.
        estimate: tell a listener that wants it what drawing will take.
    """
    recipe = resolved.recipe
    settings = recipe.data.synthesize
    opened = open_teacher(recipe)
    config = opened.config
    make_scheduler(settings.scheduler, recipe.diffusion.num_timesteps, config.prediction)  # refuses before the work
    prompts = _prompts(recipe) if config.reads_captions else []
    inputs, precision = synthesis_inputs(recipe, opened, prompts), _precision(recipe)
    if is_finished(out, inputs, force=force):
        if launched_group().process == 0:
            listener.note(f"already done: {out}")
            drawn_in = read_record(out).get("precision", precision)
            if drawn_in != precision:
                listener.note(f"it was drawn in {drawn_in}, not in {precision}; remove it to draw it again")
        return out
    if estimate and listener.wants_estimates and launched_group().process == 0:
        listener.note(drawing_cost(recipe, config))
    shape = (config.in_channels, config.sample_size, config.sample_size)
    require_space(out, 2 * 4 * settings.num_samples * int(torch.Size(shape).numel()))
    shards = -(-settings.num_samples // settings.shard_size)
    assembly = Assembly(out, inputs, shards, launched_group(), listener, force=force)
    with written(out), assembly.begun():
        recipe = _as_begun(assembly, recipe)
        stored = None
        if prompts:
            path = assembly.folder / "prompts.safetensors"
            assembly.once(path, lambda: store_prompts(path, recipe, prompts, config.caption_tokens))
            stored = StoredPrompts(path, prompts)
        if assembly.own:
            _draw_shards(assembly, _read_drawing(opened, recipe, stored, assembly.group.device), name)
        facts = _facts(recipe, shape[0], "class" if stored is None else "caption")
        return assembly.join(lambda shards: facts, stored.write_null if stored else lambda folder: None)


def _precision(recipe: Recipe) -> str:
    return "bf16" if uses_bf16(recipe.sampling.mixed_precision) else "float32"


def _as_begun(assembly: Assembly, recipe: Recipe) -> Recipe:
    """The recipe with the precision that the set was begun in: one that goes on is not drawn in two."""
    begun, now = assembly.folder / "precision.json", _precision(recipe)
    assembly.once(begun, lambda: write_whole(begun, json.dumps({"precision": now}) + "\n"))
    precision = read_json(begun)["precision"]
    if precision != now and assembly.group.process == 0:
        assembly.listener.note(f"goes on in {precision}, as it was begun; to draw in {now}, remove {assembly.folder}")
    update = {"mixed_precision": "bf16" if precision == "bf16" else "no"}
    return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=update)})


def drawing_cost(recipe: Recipe, config: ModelConfig) -> str:
    """What drawing the training set takes here, in a sentence; a product of matrices is timed for it."""
    settings = recipe.data.synthesize
    passes = settings.num_samples * settings.steps * (2 if settings.guidance != 1 else 1)
    dtype = torch.bfloat16 if uses_bf16(recipe.sampling.mixed_precision) else torch.float32
    seconds = passes * count_macs(config, config.sample_size) / rate_of(str(default_device()), dtype)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    disk = 4 * settings.num_samples * int(torch.Size(shape).numel())
    return (
        f"the teacher draws {settings.num_samples:,} samples in {settings.steps} steps: about {span(seconds)}, "
        f"{size(4 * count_parameters(config))} of memory for its weights, {size(disk)} of disk"
    )


def _prompts(recipe: Recipe) -> list[str]:
    """What a teacher of captions draws. Raises UsageError where nothing encodes them, and for prompts that are none."""
    if recipe.source.text_encoder is None:
        raise UsageError(
            "the teacher draws captions, and no text encoder is named: give one "
            "(--set source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS)"
        )
    return read_prompts(recipe.data.synthesize.prompts)


def _facts(recipe: Recipe, in_channels: int, condition: ConditionKind) -> dict[str, Any]:
    """What the record says of the data."""
    vae, encoder = recipe.source.vae, recipe.source.text_encoder
    return {
        "kind": "latents",
        "condition": condition,
        "pixels": vae is None and is_pixel_space(in_channels),
        "precision": _precision(recipe),
        "vae": vae.model_dump() if vae else None,
        "text_encoder": encoder.model_dump() if encoder and condition == "caption" else None,
    }


@dataclass(frozen=True)
class Drawing:
    """A teacher that is read, and what it draws: a class for each sample, or else prompts.

    Attributes:
        labels: (num_samples,) int64; None: it draws prompts.
        prompts: encoded; None: it draws classes.
    """

    model: LiTTransformer2DModel
    recipe: Recipe
    labels: Tensor | None
    prompts: StoredPrompts | None

    @property
    def sampler(self) -> SamplerSettings:
        """How it draws."""
        settings = self.recipe.data.synthesize
        return SamplerSettings.of(self.recipe, settings, seed=settings.seed, batch_size=settings.batch_size)

    def columns(self, samples: range) -> dict[str, Any]:
        """The columns of some samples, one batch."""
        if self.prompts is not None:
            captions = self.prompts.captions(samples, null=not self.model.config.null_caption)
            return {"latent": self._draw(captions, samples.start).numpy(), **self.prompts.columns(samples)}
        assert self.labels is not None
        labels = self.labels[samples.start : samples.stop]
        return {"latent": self._draw(labels, samples.start).numpy(), "class_label": labels.numpy()}

    def _draw(self, conditions: Tensor | Captions, first: int) -> Tensor:
        """One batch (N, C, H, W), each sample from the noise of its index in the whole set."""
        return torch.cat(list(draw(self.model, conditions, self.sampler, first=first)))


def _read_drawing(opened: OpenSource, recipe: Recipe, prompts: StoredPrompts | None, device: torch.device) -> Drawing:
    """Read the teacher, and choose the classes where there are no prompts."""
    settings = recipe.data.synthesize
    model = read_model(opened, torch.float32).to(device)
    labels = None
    if prompts is None:
        generator = generator_of(settings.seed, "labels")
        labels = torch.randint(model.config.num_classes, (settings.num_samples,), generator=generator)
    return Drawing(model, recipe, labels, prompts)


def _draw_shards(assembly: Assembly, drawing: Drawing, name: str) -> None:
    """Draw the shards of this process that are not there yet."""
    settings, group = drawing.recipe.data.synthesize, assembly.group
    shards = {
        index: range(settings.num_samples)[index * settings.shard_size : (index + 1) * settings.shard_size]
        for index in range(group.process, assembly.count, group.processes)
    }
    total = sum(map(len, shards.values()))
    left = [len(shards[index]) for index in assembly.own]
    compile_for(sum(map(drawing.sampler.passes_of, left)), [drawing.model], drawing.recipe.sampling.compile)
    with assembly.task(name, total) as task:
        task.advance(total - sum(left))
        for index in assembly.own:
            with assembly.make(index) as folder:
                _write_shard(folder, drawing, shards[index], task)


def _write_shard(folder: Path, drawing: Drawing, samples: range, task: Task) -> None:
    """Draw the samples of one shard into its folder, batch by batch."""
    size = drawing.recipe.data.synthesize.batch_size
    with shard_writer(folder, "class" if drawing.prompts is None else "caption", "float32") as writer:
        for start in range(samples.start, samples.stop, size):
            some = range(start, min(start + size, samples.stop))
            writer.write(drawing.columns(some))
            task.advance(len(some))
