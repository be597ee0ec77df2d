"""`sample` as a user asks for it: from a path and options to files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.device import default_device
from litconvert.common.files import refuse_existing, refuse_same, refuse_source, whole_file
from litconvert.common.launch import launched_processes
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import place_of, work_paths
from litconvert.errors import UsageError
from litconvert.families.companions import Companions, companions_of
from litconvert.families.sources import OpenSource, open_source, read_model
from litconvert.model.compilation import compile_for
from litconvert.model.config import ModelConfig
from litconvert.recipe.packaged import asset_of, recipe_of
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe, Source
from litconvert.runs.directory import model_of
from litconvert.sampling.captions import Captions, encode_prompts, read_embeddings, write_embeddings
from litconvert.sampling.draw import SamplerSettings, cycled, draw, make_scheduler
from litconvert.sampling.parts import launched_group, written, written_beside
from litconvert.sampling.picture_set import PictureSet, digest_of_conditions, first_of_parts, in_turn, save_npz
from litconvert.sampling.pictures import NUM_IMAGES, described, load_vae, to_images
from litconvert.sampling.sheets import Part, save_sheet

# Of the samples in an NPZ file, those that are on the sheet beside it.
NPZ_SHEET = 100
SHEET_SUFFIX = ".png"


def parse_classes(text: str | None, count: int, num_classes: int) -> Tensor:
    """`0,3,7` cycled to `count` labels (count,) int64; None: every class in turn."""
    if text is None:
        return torch.arange(count) % num_classes
    try:
        labels = torch.tensor([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UsageError(f"--classes {text!r}: write labels as 0,3,7") from error
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"--classes {text!r}: the model's classes are 0 to {num_classes - 1}")
    return labels[torch.arange(count) % len(labels)]


@dataclass(frozen=True)
class SampleRequest:
    """What a user asks to be drawn, and where it goes.

    Attributes:
        model, teacher: run (RUN, or RUN@STEP for one of its checkpoints) or model directory, or any checkpoint.
        out: PNG grid; the teacher's rows come first.
        recipe: whose `sample` section and VAE are used; None: the one recorded with the model, or else the packaged
            one for what it is. A diffusers pipeline's own VAE, T5 and scheduler are used where no recipe is named and
            the overrides name none.
        overrides: `key=value`, over the recipe.
        classes: labels such as `0,3,7`.
        prompts, negative_prompt: of a model of captions; none: the recipe's. T5 is freed before the model is read.
        embeddings: captions encoded earlier, instead of prompts.
        save_embeddings: where to write the captions, as `embeddings` reads them.
        npz: the model's images for the ADM evaluator.
        latents: undecoded latents as safetensors, instead of pictures.
        force: replace files that are there.
        num_attention_heads: a hint for the model and the teacher.
        weights: of the model, where it is a training checkpoint: `ema`, `model`, or `auto`, EMA if present.
    """

    model: str
    out: Path
    teacher: str | None = None
    recipe: str | None = None
    overrides: Sequence[str] = ()
    classes: str | None = None
    prompts: Sequence[str] = ()
    negative_prompt: str | None = None
    embeddings: Path | None = None
    save_embeddings: Path | None = None
    npz: Path | None = None
    latents: Path | None = None
    force: bool = False
    num_attention_heads: int | None = None
    weights: str = "auto"

    @property
    def written(self) -> list[Path]:
        """The files that are written."""
        pictures = (self.out, self.npz) if self.latents is None else (self.latents,)
        return [path for path in (*pictures, self.save_embeddings) if path is not None]


def sample_to_files(request: SampleRequest, listener: Listener = SILENT) -> list[Path]:
    """Draw samples of a model, and of a teacher on the same noise, and write them.

    Args:
        request: what is drawn, and where it goes.
        listener: told which checkpoint a run that is not finished is drawn from, and of each step.

    Returns: the files written.
    """
    if request.npz is not None and launched_processes() > 1:
        launched_group()  # first of all: from here on each process has a device of its own
    refuse_same(*request.written)
    _refuse_taken(request, [] if request.npz is None else work_paths(request.npz, "shards-"))
    path = model_of(request.model, raw=request.weights == "model")
    if path != request.model and Path(path).name != "model":
        listener.note(f"drawn from the checkpoint {path}")
    settings, beside, packaged = settings_of(
        request.model, request.recipe, request.overrides, request.num_attention_heads, request.weights
    )
    if packaged is not None:
        listener.note(f"recipe: {packaged} (--recipe chooses another)")
    for word, text in beside.used(settings):
        if word != "recipe":  # its settings are the title of the sheet
            listener.note(f"{word}: {text}")
    if request.npz is not None and request.latents is not None:
        raise UsageError("--npz needs decoded images and --latents skips decoding; give one of them")
    sources = open_models(
        request.model, request.teacher, settings, request.overrides, request.num_attention_heads, request.weights
    )
    read = [file for source in sources for file in source.checkpoint.files]
    for file in request.written:
        refuse_source(file, [*read, *([request.embeddings] if request.embeddings else [])])
    configs = [source.config for source in sources]
    chosen = settings.sample
    for config in configs:
        # Refuses before the work.
        make_scheduler(chosen.scheduler, settings.diffusion.num_timesteps, config.prediction)
    device = default_device()
    vae = load_vae(settings.source.vae).to(device) if settings.source.vae and request.latents is None else None
    if vae is None and request.latents is None and not configs[-1].is_pixel_space:
        to_images(torch.empty(1, configs[-1].in_channels, 1, 1), None)  # refuses, and says what to give
    conditions, count = _conditions(request, settings, configs)
    sampler = SamplerSettings.of(settings, chosen, seed=chosen.seed, batch_size=chosen.batch_size)
    ready = Ready(settings, sources, conditions, count, sampler, vae)
    if request.npz is not None:
        return _draw_many(request, ready, listener)
    if launched_processes() > 1 and launched_group().process:
        return []  # so few are drawn by the first process alone
    return _draw_few(request, ready, listener)


def begun_sheet(npz: Path | None) -> Path | None:
    """The sheet that an interrupted command was to write beside an NPZ file, if there was one and it is known."""
    files = () if npz is None else written_beside(work_paths(npz, "shards-"))
    return next((Path(os.path.relpath(file)) for file in sorted(files) if file.suffix == SHEET_SUFFIX), None)


def _refuse_taken(request: SampleRequest, folders: Sequence[Path]) -> None:
    """Raise LitconvertError for files that are there, but for those that an interrupted command wrote.

    Args:
        folders: where the parts of such a command are.
    """
    own = written_beside(folders)
    refuse_existing(*(path for path in request.written if place_of(path) not in own), force=request.force)


@dataclass(frozen=True)
class Ready:
    """All that drawing needs, but for the weights.

    Attributes:
        sources: the teacher, where one is asked for, and then the model.
        conditions: classes or captions, taken in turn until there are `count` of them.
    """

    recipe: Recipe
    sources: Sequence[OpenSource]
    conditions: Tensor | Captions
    count: int
    sampler: SamplerSettings
    vae: Any | None


def _draw_few(request: SampleRequest, ready: Ready, listener: Listener) -> list[Path]:
    """As many as are drawn at once: all on the sheet, or the model's latents."""
    # Undecoded, the model's alone are written.
    sources = ready.sources[-1:] if request.latents else ready.sources
    listener.note(f"reading {' and '.join(source.checkpoint.source for source in sources)}")
    models = [read_model(source, torch.float32).to(default_device()) for source in sources]
    compile_for(ready.sampler.passes_of(ready.count), models, ready.recipe.sampling.compile)
    conditions, sampler = cycled(ready.conditions, ready.count), ready.sampler
    latents, images = None, []
    with listener.task("sample", len(models) * sampler.steps_of(len(conditions))) as task:
        if request.latents is not None:
            latents = torch.cat(list(draw(models[-1], conditions, sampler, task=task)))
        else:
            images = [
                np.concatenate([to_images(batch, ready.vae) for batch in draw(model, conditions, sampler, task=task)])
                for model in models
            ]
    _write_captions(request, ready)
    if request.latents is not None and latents is not None:
        return _write_latents(request.latents, latents, conditions)
    _write_sheet(request, ready, images)
    return [request.out]


def _draw_many(request: SampleRequest, ready: Ready, listener: Listener) -> list[Path]:
    """The model's pictures into an NPZ file, drawn part by part, and the first of them on the sheet."""
    assert request.npz is not None
    sampling, group = ready.recipe.sampling, launched_group()
    if group.process == 0:
        listener.note(f"reading {' and '.join(source.checkpoint.source for source in ready.sources)}")
    *teachers, model = [read_model(source, torch.float32).to(group.device) for source in ready.sources]
    vae = None if ready.vae is None else ready.vae.to(group.device)
    pictures = PictureSet(model, in_turn(ready.conditions), ready.count, ready.sampler, vae, sampling.shard_size)
    passes = ready.sampler.passes_of(ready.count) // group.processes
    compile_for(passes, [model], sampling.compile)
    digest = pictures.digest(ready.sources[-1], digest_of_conditions(ready.conditions), ready.recipe)
    npz, parts = request.npz, pictures.make_parts(request.npz, digest, group, listener)
    sheet = range(min(NPZ_SHEET, ready.count))

    def refuse() -> None:
        _refuse_taken(request, [parts.folder])
        pictures.require_space(npz, parts)

    with written(request.npz), parts.begun(refuse):
        if group.process == 0:
            parts.record_beside(path for path in request.written if path != request.npz)
            _write_captions(request, ready)
        pictures.draw(parts)

        def join(folders: Sequence[Path]) -> None:
            shown = [replace(pictures, model=one).images(sheet) for one in teachers]
            _write_sheet(request, ready, [*shown, first_of_parts(folders, len(sheet))])
            # Last: who finds it finds all of it.
            save_npz(folders, pictures.labels, npz)

        parts.finish(join)
    return [request.out, request.npz]


def settings_of(
    model: str,
    recipe: str | None,
    overrides: Sequence[str],
    num_attention_heads: int | None = None,
    weights: str = "auto",
) -> tuple[Recipe, Companions, str | None]:
    """The settings of what draws a model: of the recipe that is named, or lies beside it, or is packaged for it.

    Args:
        model: run, model directory, any checkpoint or an asset.
        num_attention_heads: a hint for it.
        weights: of it.

    Returns: the recipe, what lies beside the model, and the packaged recipe's name where that one was taken unasked.
    """
    beside = companions_of(model_of(model, raw=weights == "model"))
    settings = beside.resolve(recipe, overrides).recipe
    if recipe is not None or beside.recipe is not None:
        return settings, beside, None
    packaged = asset_of(model).recipe
    if packaged is None:
        (source,) = open_models(model, None, settings, overrides, num_attention_heads, weights)
        packaged = recipe_of(source.reading.family, source.config.values)
    if packaged is not None:
        # Nobody chose it: what a pipeline says of itself goes before it.
        settings = beside.taken_into(resolve(packaged, overrides), named=None).recipe
    return settings, beside, packaged


def open_models(
    model: str,
    teacher: str | None,
    recipe: Recipe,
    overrides: Sequence[str] = (),
    num_attention_heads: int | None = None,
    weights: str = "auto",
) -> list[OpenSource]:
    """The teacher, where one is asked for, and then the model: headers only.

    Args:
        model, teacher: run, model directory, or any checkpoint.
        recipe: whose hints describe its own source; any other checkpoint takes those among the overrides.
        num_attention_heads: a hint for both.
        weights: of the model.

    Raises UsageError where the two cannot be drawn on the same noise and condition.
    """
    given = resolve(None, [one for one in overrides if one.startswith("source.")]).recipe.source

    def source_of(name: str) -> Source:
        # The recipe's hints describe its own source; any other checkpoint takes those given here, or tells for itself.
        told = recipe.source if recipe.source.path in (None, name, str(Path(name).resolve())) else given
        if (Path(name) / "litconvert.json").is_file():
            told = Source()  # its config.json says it all
        update = {"path": name, "num_attention_heads": num_attention_heads or told.num_attention_heads}
        return told.model_copy(update=update)

    sources = [open_source(source_of(model_of(teacher)))] if teacher else []
    sources.append(open_source(source_of(model_of(model, raw=weights == "model")), weights))
    values = sources[-1].config.values
    for source in sources:
        for key in ("in_channels", "sample_size", "num_classes", "caption_channels", "caption_tokens"):
            if (theirs := source.config.values[key]) != values[key]:
                raise UsageError(
                    f"{teacher} has {key}={theirs}, {model} has {values[key]}: they cannot share noise or condition"
                )
    return sources


def _conditions(
    request: SampleRequest, recipe: Recipe, configs: Sequence[ModelConfig]
) -> tuple[Tensor | Captions, int]:
    """The labels or captions that are drawn, taken in turn, and of how many images.

    Args:
        configs: of all models that are drawn, the one that was asked for last.

    Raises UsageError for labels of a model of captions, and for captions of a model of classes.
    """
    config, count = configs[-1], recipe.sample.num_images
    told = request.prompts or request.negative_prompt is not None
    if not config.reads_captions:
        if told or request.embeddings or request.save_embeddings:
            raise UsageError(f"{request.model} is a model of classes and reads no captions: choose with --classes")
        count = count or NUM_IMAGES
        return parse_classes(request.classes, count, config.classes), count
    if request.classes is not None:
        raise UsageError(f"{request.model} is a model of captions and has no classes: choose with --prompt")
    if request.embeddings is not None:
        if told:
            raise UsageError("--embeddings are captions encoded already: leave --prompt and --negative-prompt out")
        captions = read_embeddings(request.embeddings)
    else:
        shared = replace(config, null_caption=all(other.null_caption for other in configs))
        captions = encode_prompts(recipe, shared, request.prompts, request.negative_prompt)
    captions = captions.padded(config.caption_tokens, config.caption_width)
    return captions, count or len(captions)


def _write_captions(request: SampleRequest, ready: Ready) -> None:
    """The captions, where they are asked for."""
    if request.save_embeddings is not None:
        assert isinstance(ready.conditions, Captions)
        write_embeddings(ready.conditions, request.save_embeddings)


def _write_latents(path: Path, latents: Tensor, conditions: Tensor | Captions) -> list[Path]:
    """Undecoded latents, and their labels where they have any."""
    labels = {} if isinstance(conditions, Captions) else {"class_labels": conditions}
    with whole_file(path) as temporary:
        write_safetensors(temporary, LazyTensors.of({"latents": latents, **labels}), {"format": "pt"})
    return [path]


def _labels(conditions: Tensor | Captions, prompts: Sequence[str]) -> list[str]:
    """What each sample was asked for, as far as it is known: classes, or prompts in turn."""
    if isinstance(conditions, Captions):
        return [prompts[index % len(prompts)] for index in range(len(conditions))] if prompts else []
    return [str(int(label)) for label in conditions]


def _write_sheet(request: SampleRequest, ready: Ready, images: Sequence[NDArray[np.uint8]]) -> None:
    """The sheet of the first images of all models, the teacher first."""
    drawing = ready.recipe.sample
    titles = [f"{request.model}; {described(drawing)}"]
    if request.teacher is not None:
        titles = [f"Teacher: {request.teacher}; {described(drawing)}", f"Student: {titles[0]}"]
    prompts = (request.prompts or drawing.prompts) if request.embeddings is None else ()
    labels = _labels(cycled(ready.conditions, len(images[0])), prompts)
    parts = [Part(title, one, labels) for title, one in zip(titles, images, strict=True)]
    save_sheet(request.out, parts, scale=max(1, 64 // ready.sources[-1].config.sample_size))
