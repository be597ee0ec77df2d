"""The training set that the teacher draws, for classes or for prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.common.files import digest_of, require_space
from litconvert.common.seeds import generator_of
from litconvert.conversion.plan import resolve_for
from litconvert.data.dataset import Condition
from litconvert.data.prompts import StoredPrompts, read_prompts, store_prompts
from litconvert.data.shards import Assembly, is_finished, launched_group, shard_writer, written
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import OpenSource, open_teacher, read_model
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import given_config, is_pixel_space
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions
from litconvert.sampling.draw import draw, make_scheduler


def synthesis_inputs(recipe: Recipe, teacher: OpenSource, prompts: Sequence[str]) -> Inputs:
    """What determines the drawn data. What hints make of the teacher's file is in its config.

    The size of a batch changes rounding alone.
    """
    left_out, sha256 = {"prompts", "batch_size"}, teacher.checkpoint.sha256()
    values: dict[str, Any] = {
        "teacher": {
            "sha256": sha256,
            "weights": teacher.checkpoint.weights,
            "config": given_config(teacher.reading.config),
        },
        "data": {"synthesize": given(recipe.data.synthesize, exclude=left_out)},
        "diffusion": given(recipe.diffusion),
    }
    first: dict[str, Any] = {
        "source": sha256,
        "weights": teacher.checkpoint.weights,
        "config": teacher.reading.config,
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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Let the teacher draw the training set. Every launched process must call it; each draws its share.

    Args:
        source: the teacher; None: the recipe's source.
        out: the dataset folder. One drawn from the same inputs is left as it is; an interrupted one is continued.
        recipe, overrides: as for `plan`; the section is `data.synthesize`. Without a recipe it is the packaged one for
            what the source is, or else the defaults.
        force: replace an `out` that was made from other inputs.
        on_progress: called in the first process, with the samples it has drawn and those it will have.
        on_note: told in the first process what to know.

    Returns: the dataset folder.
    """
    return synthesize_resolved(resolve_for(recipe, overrides, source), Path(out), force, on_progress, on_note)


def synthesize_resolved(
    resolved: ResolvedRecipe,
    out: Path,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """`synthesize` for a recipe that is resolved already."""
    recipe = resolved.recipe
    settings = recipe.data.synthesize
    opened = open_teacher(recipe)
    config = opened.reading.config
    make_scheduler(settings.scheduler, recipe.diffusion.num_timesteps, config["prediction"])  # refuses before the work
    prompts: list[str] = []
    if config["caption_channels"] is not None:
        if recipe.source.text_encoder is None:
            raise UsageError(
                "the teacher draws captions, and no text encoder is named: give one "
                "(--set source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS)"
            )
        prompts = read_prompts(settings.prompts)
    inputs = synthesis_inputs(recipe, opened, prompts)
    if is_finished(out, inputs, force=force):
        return out
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    require_space(out.parent, 2 * 4 * settings.num_samples * int(torch.Size(shape).numel()))
    assembly = Assembly(out, inputs, -(-settings.num_samples // settings.shard_size), launched_group(), on_note)
    with written(out), assembly.begun():
        stored = None
        if prompts:
            path = assembly.folder / "prompts.safetensors"
            assembly.once(path, lambda: store_prompts(path, recipe, prompts, config["caption_tokens"]))
            stored = StoredPrompts(path, prompts)
        if assembly.own:
            _draw_shards(assembly, opened, recipe, stored, on_progress)
        condition: Condition = "class" if stored is None else "caption"
        vae = recipe.source.vae
        facts = {
            "kind": "latents",
            "condition": condition,
            "pixels": vae is None and is_pixel_space(shape[0]),
            "vae": vae.model_dump() if vae else None,
        }
        return assembly.join(lambda shards: facts, stored.write_null if stored else lambda folder: None)


def _draw_shards(
    assembly: Assembly,
    opened: OpenSource,
    recipe: Recipe,
    stored: StoredPrompts | None,
    on_progress: Callable[[int, int], None],
) -> None:
    settings, group = recipe.data.synthesize, assembly.group
    model = read_model(opened, torch.float32).to(group.device)
    labels = None
    if stored is None:
        generator = generator_of(settings.seed, "labels")
        labels = torch.randint(model.config.num_classes, (settings.num_samples,), generator=generator)
    own = {
        index: range(settings.num_samples)[index * settings.shard_size : (index + 1) * settings.shard_size]
        for index in range(group.process, assembly.shards, group.processes)
    }
    total = sum(map(len, own.values()))
    done = total - sum(len(own[index]) for index in assembly.own)
    if group.process == 0:
        on_progress(done, total)
    for index in assembly.own:

        def write(folder: Path, samples: range = own[index]) -> None:
            nonlocal done
            with shard_writer(folder, "class" if stored is None else "caption", "float32") as writer:
                for start in range(samples.start, samples.stop, settings.batch_size):
                    some = range(start, min(start + settings.batch_size, samples.stop))
                    condition = labels[some.start : some.stop] if labels is not None else None
                    captions = stored.captions(some, null=not model.config.null_caption) if stored else None
                    latents = _draw(model, recipe, condition if captions is None else captions, some.start)
                    columns = {"class_label": condition.numpy()} if condition is not None else {}
                    writer.write({"latent": latents.numpy(), **columns, **(stored.columns(some) if stored else {})})
                    done += len(some)
                    if group.process == 0:
                        on_progress(done, total)

        assembly.make(index, write)


def _draw(model: LiTTransformer2DModel, recipe: Recipe, condition: Tensor | Captions | None, first: int) -> Tensor:
    """One batch (N, C, H, W), each sample from the noise of its index in the whole set."""
    assert condition is not None
    settings = recipe.data.synthesize
    batches = draw(
        model,
        settings,
        condition,
        seed=settings.seed,
        batch_size=settings.batch_size,
        num_timesteps=recipe.diffusion.num_timesteps,
        first=first,
    )
    latents = torch.cat(list(batches))
    if not torch.isfinite(latents).all():
        raise LitconvertError(
            "the teacher drew NaN or infinite values; check the checkpoint with `litconvert inspect --weights`"
        )
    return latents
