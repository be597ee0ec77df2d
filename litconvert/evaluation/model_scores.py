"""How good any model is: its samples against pictures, stored statistics or its teacher's own, and its agreement."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from litconvert.common.device import default_device, float32_convolutions, uses_bf16
from litconvert.common.files import refuse_existing, refuse_source, require_writable
from litconvert.common.listener import SILENT, UNSEEN, Listener, Task
from litconvert.common.quantities import span
from litconvert.conversion.solve_plan import rate_of
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.agreement import AgreementImages, agreement
from litconvert.evaluation.drawing import (
    AGREEMENT_IMAGES,
    Drawn,
    EvaluationRequest,
    Samples,
    kept_file,
    recipe_for,
    samples_of,
)
from litconvert.evaluation.image_sets import (
    ImageSet,
    NpzFile,
    check_reference,
    folder_of_pictures,
    read_npz,
    read_pictures,
    seen,
    write_statistics,
)
from litconvert.evaluation.metrics import (
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from litconvert.evaluation.networks import DEFAULT, ClipScore, FeatureNetwork, Outputs, open_network
from litconvert.evaluation.scores import Score, to_json
from litconvert.families.sources import OpenSource, read_model
from litconvert.model.compilation import compile_for
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.model.shapes import count_macs
from litconvert.recipe.schema import Recipe
from litconvert.sampling.draw import make_scheduler
from litconvert.sampling.parts import Group, launched_group
from litconvert.sampling.request import open_models

# Pictures that the ADM evaluator takes an Inception score of at a time.
ADM_SPLIT = 5000
# Inputs at a time: two models' residual streams behind all blocks are held.
AGREEMENT_BATCH = 16


def evaluate_model(asked: EvaluationRequest, listener: Listener = SILENT) -> dict[str, Any]:
    """Measure a model: distances of its samples to pictures, and its agreement with its teacher.

    Samples are drawn as `sampling.mixed_precision` says and are a function of the seed and their number. Features and
    agreement are float32, convolutions on a GPU too.

    Returns: {"model", "teacher", "reference": {"name", "count"}, "features": {"name", "kind"}, "settings", "models":
    {name: {metric: {"mean", "standard_deviation", "values"}}}, "agreement"}; what was not asked for is None.

    Raises UsageError for what cannot be meant, before anything is drawn.
    """
    asked.check()
    _check_saved(asked)
    # First of all: from here on each process has a device of its own.
    group = launched_group() if asked.samples else None
    device = default_device() if group is None else group.device
    with float32_convolutions(), TemporaryDirectory() as folder:
        if asked.is_drawn:
            return _evaluate_file(asked, listener)
        recipe = recipe_for(asked)
        sources = open_models(
            asked.model, asked.teacher, recipe, asked.overrides, asked.num_attention_heads, asked.weights
        )
        if asked.save_statistics is not None:
            refuse_source(asked.save_statistics, [file for source in sources for file in source.checkpoint.files])
        for source in sources:  # refuses before the work
            make_scheduler(recipe.evaluate.scheduler, recipe.diffusion.num_timesteps, source.config.prediction)
        if asked.clip and not sources[-1].config.reads_captions:
            raise UsageError(f"--clip says how well pictures fit their captions, and {asked.model} draws classes")
        measures = not asked.agreement_only and (group is None or group.process == 0)
        network = open_network(_features(asked, sources[-1])) if measures else None
        reference = None if network is None else _given_reference(asked, network, sources[-1], listener)
        _check_counts(recipe, network, reference)
        if (cost := _cost(asked, recipe, sources, 1 if group is None else group.processes)) is not None:
            listener.note(cost)
        samples = replace(samples_of(asked, recipe, sources, Path(folder)), kept=asked.samples)
        listener.note(f"reading {' and '.join(source.checkpoint.source for source in sources)}")
        names = ["model"] if asked.teacher is None else ["teacher", "student"]
        models = [
            Drawn(name, read_model(source, torch.float32).to(device), source)
            for name, source in zip(names, sources, strict=True)
        ]
        _compile(asked, samples, models, 1 if group is None else group.processes)
        if group is not None:
            if asked.save_statistics is not None:
                refuse_source(asked.save_statistics, samples.files(models))
            _keep_all(samples, models, group, listener, reference=_draws_reference(asked))
            if group.process:
                return {}
        report: dict[str, Any] = {
            **_facts(asked, recipe),
            **({} if network is None else _measure(asked, samples, models, (network, reference), listener)),
            "agreement": _agree(samples, models, listener) if asked.teacher else None,
        }
        return report


def _check_saved(asked: EvaluationRequest) -> None:
    """Refuse before the work to write statistics over what is there, over what is read, and where nothing can be."""
    if asked.save_statistics is None:
        return
    given = [path for path in (asked.reference, asked.prompts, asked.embeddings) if path is not None]
    pictures = folder_of_pictures(asked.images) if asked.images is not None else []
    refuse_source(asked.save_statistics, [*given, *pictures, *([Path(asked.model)] if asked.is_drawn else [])])
    refuse_existing(asked.save_statistics, force=asked.force)
    require_writable(asked.save_statistics)


def _check_counts(recipe: Recipe, network: FeatureNetwork | None, reference: ImageSet | None) -> None:
    """Refuse before the work to draw fewer samples than can be measured against pictures."""
    pictures = reference is None or reference.outputs is not None
    if network is not None and recipe.evaluate.num_samples < (least := NEIGHBOURS + 1 if pictures else 2):
        raise UsageError(
            f"{recipe.evaluate.num_samples} samples are too few to be measured: draw {least} at least (--num-samples)"
        )


def _draws_reference(asked: EvaluationRequest) -> bool:
    """Whether the teacher's own samples are what others are held against."""
    return not (asked.agreement_only or asked.images or asked.reference)


def _sets_left(asked: EvaluationRequest, recipe: Recipe, name: str) -> int:
    """How many sets of samples of a model are to be drawn: one a seed, without those that are kept already."""
    seeds = [] if asked.agreement_only else list(recipe.evaluate.seeds)
    if name == "teacher" and _draws_reference(asked):
        seeds.append(recipe.evaluate.reference_seed)
    return sum(asked.samples is None or not kept_file(asked.samples, name, seed).exists() for seed in seeds)


def _compile(asked: EvaluationRequest, samples: Samples, models: Sequence[Drawn], processes: int) -> None:
    """Compile the models that are to draw so much that it is repaid, or as the recipe says."""
    settings, sampler = samples.recipe.evaluate, samples.sampler(0)
    for drawn in models:
        sets = _sets_left(asked, samples.recipe, drawn.name)
        passes = sets * sampler.passes_of(settings.num_samples) // processes
        if drawn.name == "teacher":
            passes += sampler.passes_of(AGREEMENT_IMAGES)
        compile_for(passes, [drawn.model], samples.recipe.sampling.compile)


def _keep_all(samples: Samples, models: Sequence[Drawn], group: Group, listener: Listener, *, reference: bool) -> None:
    """Every process draws its share of all sets: each model's of each seed and, where it is asked for, the teacher's
    that they are held against."""
    settings = samples.recipe.evaluate
    wanted = [(drawn, seed) for drawn in models for seed in settings.seeds]
    if reference:
        wanted.insert(0, (models[0], settings.reference_seed))
    for drawn, seed in wanted:
        samples.keep(drawn, seed, group, listener)


def _features(asked: EvaluationRequest, source: OpenSource) -> str:
    """The network: the one asked for, or the one for such pictures."""
    if asked.features is not None:
        return asked.features
    if asked.protocol is not None:
        return "inception"
    config = source.config
    return "digits" if (config.in_channels, config.sample_size, config.num_classes) == (1, 16, 10) else DEFAULT


def _cost(asked: EvaluationRequest, recipe: Recipe, sources: Sequence[OpenSource], processes: int) -> str | None:
    """What drawing takes here, in a sentence; a product of matrices is timed for it. None: nothing is to be drawn."""
    settings, guided = recipe.evaluate, 2 if recipe.evaluate.guidance != 1 else 1
    names = ["model"] if asked.teacher is None else ["teacher", "student"]
    count = settings.num_samples * sum(_sets_left(asked, recipe, name) for name in names)
    agreeing = AGREEMENT_IMAGES if asked.teacher else 0
    if not count + agreeing:
        return None
    macs = max(count_macs(source.config, source.config.sample_size) for source in sources)
    dtype = torch.bfloat16 if uses_bf16(recipe.sampling.mixed_precision) else torch.float32
    passes = (count / processes + agreeing) * settings.steps * guided
    seconds = passes * macs / rate_of(str(default_device()), dtype)
    return f"{count + agreeing:,} samples are drawn in {settings.steps} steps: about {span(seconds)}"


def _facts(asked: EvaluationRequest, recipe: Recipe) -> dict[str, Any]:
    """What was measured, and how samples were drawn."""
    settings = recipe.evaluate.model_dump(mode="json", exclude={"features"})
    precision = "bf16" if uses_bf16(recipe.sampling.mixed_precision) else "float32"
    return {
        "model": asked.model,
        "teacher": asked.teacher,
        "reference": None,
        "features": None,
        "settings": {**settings, "protocol": asked.protocol, "precision": precision},
        "models": None,
    }


def _measure(
    asked: EvaluationRequest,
    samples: Samples,
    models: Sequence[Drawn],
    against: tuple[FeatureNetwork, ImageSet | None],
    listener: Listener,
) -> dict[str, Any]:
    """The distances of each model's samples, a set from each seed, to a reference; None: the teacher draws it."""
    network, reference = against
    settings = samples.recipe.evaluate
    clip = ClipScore(asked.clip) if asked.clip else None
    sets = len(models) * len(settings.seeds) + (reference is None)
    each = samples.sampler(0).steps_of(settings.num_samples) if samples.kept is None else settings.num_samples
    with listener.task("draw and measure" if samples.kept is None else "measure", sets * each) as task:
        if reference is None:
            outputs, _ = _drawn(models[0], samples, settings.reference_seed, network, None, task)
            reference = ImageSet.of("the teacher's own samples", outputs)
        if asked.save_statistics is not None:
            write_statistics(reference, network, asked.save_statistics)
        split = ADM_SPLIT if asked.protocol == "dit" else None
        scores: dict[str, Any] = {}
        for drawn in models:
            found: list[dict[str, float]] = []
            for seed in settings.seeds:
                outputs, fits = _drawn(drawn, samples, seed, network, clip, task)
                task.advance(0, "distances")
                found.append({**compare(ImageSet.of(drawn.name, outputs), reference, split), **fits})
            scores[drawn.name] = {key: to_json(Score(tuple(one[key] for one in found))) for key in found[0]}
    return {**_against(reference, network), "models": scores}


def _against(reference: ImageSet, network: FeatureNetwork) -> dict[str, Any]:
    return {
        "reference": {"name": reference.name, "count": reference.count},
        "features": {"name": network.name, "kind": network.kind},
    }


def _given_reference(
    asked: EvaluationRequest, network: FeatureNetwork, source: OpenSource, listener: Listener
) -> ImageSet | None:
    """The pictures or statistics that were given; None: the teacher draws them.

    Raises UsageError for what samples cannot be held against.
    """
    config = source.config
    side = config.sample_size * (1 if config.is_pixel_space else VAE_FACTOR)
    channels = 1 if config.in_channels == 1 else 3
    if asked.reference is not None:
        listener.note(f"reading {asked.reference}")
        reference = read_npz(asked.reference, network)
    elif asked.images is not None:
        reference = _folder(asked.images, side, "L" if channels == 1 else "RGB", network, listener)
    else:
        return None
    check_reference(reference, network, (side, side, channels))
    return reference


def _folder(folder: Path, side: int, mode: str, network: FeatureNetwork, listener: Listener) -> ImageSet:
    paths = folder_of_pictures(folder)
    with listener.task("look at the pictures", len(paths)) as task:
        return ImageSet.of(str(folder), seen(read_pictures(paths, side, mode), network, task))


def _drawn(
    drawn: Drawn,
    samples: Samples,
    seed: int,
    network: FeatureNetwork,
    clip: ClipScore | None,
    task: Task = UNSEEN,
) -> tuple[Outputs, dict[str, float]]:
    """What the network makes of a set of samples, and how well it fits its captions."""
    parts, fits = [], []
    for some, batch in samples.pictures(drawn, seed, task):
        parts.append(network(batch))
        if clip is not None:
            fits.append(clip(batch, samples.texts(some)))
    return Outputs.joined(parts), {"clip_score": float(torch.cat(fits).mean())} if fits else {}


def compare(samples: ImageSet, reference: ImageSet, split: int | None = None) -> dict[str, float]:
    """Every distance that the two sets allow, by name.

    `frechet_distance` always; `kernel_distance`, `precision` and `recall` where the reference has pictures;
    `spatial_frechet_distance` (sFID) in Inception's features; `inception_score`, of so many at a time (`split`), where
    the network knows classes.

    Raises LitconvertError where one is no finite number.
    """
    assert samples.outputs is not None
    found = {"frechet_distance": frechet_distance(reference.pooled, samples.pooled)}
    if samples.spatial is not None and reference.spatial is not None:
        found["spatial_frechet_distance"] = frechet_distance(reference.spatial, samples.spatial)
    if reference.outputs is not None:
        theirs, mine = reference.outputs.features, samples.outputs.features
        found["kernel_distance"] = kernel_distance(theirs, mine)
        found["precision"], found["recall"] = precision_recall(theirs, mine)
    if samples.outputs.logits is not None:
        found["inception_score"] = inception_score(samples.outputs.logits, split)
    for name, value in found.items():
        if not math.isfinite(value):
            raise LitconvertError(
                f"the {name.replace('_', ' ')} of {samples.name} to {reference.name} is {value}: features or "
                "statistics are too large to be measured; get the reference again, or use another network (--features)"
            )
    return found


def _agree(samples: Samples, models: Sequence[Drawn], listener: Listener) -> dict[str, Any]:
    """The student's agreement with the teacher, on images that the teacher draws."""
    settings, (teacher, student) = samples.recipe.evaluate, (drawn.model for drawn in models)
    count = AGREEMENT_IMAGES
    with listener.task("draw for agreement", samples.sampler(0).steps_of(count)) as task:
        batches = list(samples.latents(teacher, settings.reference_seed, count, task))
    images = AgreementImages(
        torch.cat([batch for _, batch in batches]),
        samples.conditions(range(count)),
        samples.recipe.diffusion.num_timesteps,
        settings.reference_seed,
        min(settings.batch_size, AGREEMENT_BATCH),
    )
    with listener.task("agreement", images.passes()) as task:
        return agreement(teacher, student, images, task)


def _evaluate_file(asked: EvaluationRequest, listener: Listener) -> dict[str, Any]:
    """Samples that are drawn already, against pictures."""
    network = open_network(asked.features or ("inception" if asked.protocol else DEFAULT))
    file = NpzFile(Path(asked.model))
    listener.note(f"reading {asked.model}")
    _, *sides = next(file.pictures()).shape
    shape = (sides[0], sides[1], sides[2])
    samples = ImageSet.of(asked.model, seen(file.pictures(), network))
    if asked.reference is not None:
        reference = read_npz(asked.reference, network)
    else:
        assert asked.images is not None
        reference = _folder(asked.images, shape[0], "RGB", network, listener)
    check_reference(reference, network, shape)
    if asked.save_statistics is not None:
        write_statistics(reference, network, asked.save_statistics)
    found = compare(samples, reference, ADM_SPLIT if asked.protocol == "dit" else None)
    return {
        "model": asked.model,
        "teacher": None,
        **_against(reference, network),
        "settings": {"num_samples": samples.count, "protocol": asked.protocol},
        "models": {"model": {key: to_json(Score((value,))) for key, value in found.items()}},
        "agreement": None,
    }
