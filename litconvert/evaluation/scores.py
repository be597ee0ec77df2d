"""Scores of models: samples from several seeds, measured against the teacher's; those of a run are kept beside it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import read_json, write_whole
from litconvert.common.listener import SILENT, UNSEEN, Listener, Task
from litconvert.conversion.provenance import Provenance
from litconvert.errors import UsageError
from litconvert.evaluation.metrics import Moments, frechet_distance
from litconvert.evaluation.networks import load_classifier
from litconvert.families.companions import local_model
from litconvert.families.sources import open_student, open_teacher, read_model
from litconvert.model.compilation import compile_for
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.schema import Evaluate, Recipe
from litconvert.runs.directory import model_of
from litconvert.sampling.draw import SamplerSettings, draw


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Every class as often as every other, (count,) int64."""
    return torch.arange(count) % num_classes


def _samples(model: LiTTransformer2DModel, recipe: Recipe, seed: int, task: Task) -> tuple[Tensor, Tensor]:
    """As many as the recipe asks for, of every class as many, and their classes."""
    settings = recipe.evaluate
    labels = balanced_labels(settings.num_samples, model.config.num_classes)
    sampler = SamplerSettings.of(recipe, settings, seed=seed, batch_size=settings.batch_size)
    return torch.cat(list(draw(model, labels, sampler, task=task))), labels


def digits_distance(reference: Tensor, samples: Tensor) -> float:
    """Fréchet distance of two sets of images (N, 1, 16, 16), clamped to [-1, 1], in the classifier's features."""
    classifier = load_classifier()
    first, second = (Moments.of(classifier.extract(images.clamp(-1, 1))).statistics for images in (reference, samples))
    return frechet_distance(first, second)


def class_accuracy(samples: Tensor, labels: Tensor) -> float:
    """Share of images that the digits classifier reads as the class asked for."""
    verdicts = load_classifier()(samples.clamp(-1, 1)).argmax(1)
    return float((verdicts == labels).double().mean())


@dataclass(frozen=True)
class Score:
    """One metric over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def standard_deviation(self) -> float | None:
        """Of the sample; None with one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


def evaluation_passes(settings: Evaluate, models: int) -> int:
    """Batches times steps of an evaluation of so many models, which a task of it is as long as."""
    return -(-settings.num_samples // settings.batch_size) * settings.steps * (1 + models * len(settings.seeds))


def check_features(settings: Evaluate, config: ModelConfig) -> None:
    """Raises UsageError when the recipe names no features, or features of other images than the model draws."""
    otherwise = "measure its samples with `litconvert evaluate MODEL` and --teacher, --images or --reference"
    if settings.features is None:
        raise UsageError(f"scores of a run are for the digits, whose recipe has evaluate.features=digits; {otherwise}")
    if (config.in_channels, config.sample_size, config.num_classes) != (1, 16, 10):
        raise UsageError(
            f"evaluate.features=digits scores 1x16x16 images of 10 classes; the model draws {config.in_channels}x"
            f"{config.sample_size}x{config.sample_size} of {config.num_classes}: set evaluate.features=null, and "
            f"{otherwise}"
        )


def reference_samples(teacher: LiTTransformer2DModel, recipe: Recipe, task: Task = UNSEEN) -> Tensor:
    """The teacher's samples that students are held against, drawn from `evaluate.reference_seed`.

    Raises UsageError as `check_features` does.
    """
    check_features(recipe.evaluate, teacher.config)
    return _samples(teacher, recipe, recipe.evaluate.reference_seed, task)[0]


def evaluate(
    models: dict[str, LiTTransformer2DModel],
    reference: Tensor,
    recipe: Recipe,
    task: Task = UNSEEN,
) -> dict[str, Any]:
    """Score each model against the teacher's reference samples, on noise independent of the reference's.

    Args:
        models: by name; put the teacher among them for the floor that no student can pass.
        reference: from `reference_samples`.
        task: advances with each step of the sampler.

    Returns: {"num_samples", "seeds", "reference_seed", "scheduler", "steps", "models": {name: {"frechet_distance":
    {"mean", "standard_deviation", "values"}, "class_accuracy": {...}}}}.
    """
    settings = recipe.evaluate

    def scores(model: LiTTransformer2DModel) -> Iterator[tuple[float, float]]:
        for seed in settings.seeds:
            images, labels = _samples(model, recipe, seed, task)
            yield digits_distance(reference, images), class_accuracy(images, labels)

    results: dict[str, Any] = {}
    for name, model in models.items():
        distances, accuracies = zip(*scores(model), strict=True)
        results[name] = {"frechet_distance": to_json(Score(distances)), "class_accuracy": to_json(Score(accuracies))}
    return {
        "num_samples": settings.num_samples,
        "seeds": list(settings.seeds),
        "reference_seed": settings.reference_seed,
        "scheduler": settings.scheduler,
        "steps": settings.steps,
        "models": results,
    }


def to_json(score: Score) -> dict[str, Any]:
    """A score as plain data."""
    return {"mean": score.mean, "standard_deviation": score.standard_deviation, "values": list(score.values)}


def score_run(
    run: str | Path, recipe: Recipe, *, weights: str = "auto", force: bool = False, listener: Listener = SILENT
) -> dict[str, Any]:
    """Metrics of a run's model and of the teacher against itself, kept beside it and in the model's record.

    Args:
        run: RUN, for its finished model or else its latest checkpoint, RUN@STEP, the model directory itself, or the Hub
            id of one, of which the scores are kept nowhere.
        recipe: its `evaluate` section, its source and teacher.
        weights: of a checkpoint, `ema`, `model` (the raw weights, whose scores are no part of its record) or `auto`.
        force: measure again.
        listener: hears of the samples that are drawn.
    """
    raw, settings = weights == "model", recipe.evaluate
    named = model_of(str(run), raw=raw)
    folder = local_model(named, listener)
    provenance = Provenance.read(folder)
    mine = open_student(folder, weights)
    check_features(settings, mine.config)
    theirs = open_teacher(recipe)
    inputs = Inputs(
        {
            "model": provenance.digest,
            "weights": "model" if raw else "ema",
            "teacher": {"sha256": theirs.checkpoint.sha256(), "weights": theirs.checkpoint.weights},
            "evaluate": given(settings),
            "diffusion": given(recipe.diffusion, include={"num_timesteps"}),
            # As it is on this device.
            "sampling": {"mixed_precision": "bf16" if uses_bf16(recipe.sampling.mixed_precision) else "no"},
        }
    )
    place = folder.parent if folder.name == "model" else folder
    kept = place / ("evaluation-raw.json" if raw else "evaluation.json")
    is_here = Path(named).is_dir()
    if is_here and kept.is_file() and not force:
        found = read_json(kept)
        if inputs.made(found):
            listener.note(f"already done: {kept}")
            return found
    listener.note(f"reading {folder} and its teacher")
    student, teacher = (read_model(one, torch.float32).to(default_device()) for one in (mine, theirs))
    sampler = SamplerSettings.of(recipe, settings, seed=0, batch_size=settings.batch_size)
    # The teacher draws the reference, too.
    for model, sets in ((student, len(settings.seeds)), (teacher, len(settings.seeds) + 1)):
        compile_for(sets * sampler.passes_of(settings.num_samples), [model], recipe.sampling.compile)
    models = {"student": student, "teacher against itself": teacher}
    with listener.task("evaluate", evaluation_passes(settings, len(models))) as task:
        reference = reference_samples(teacher, recipe, task)
        scores = {"digest": inputs.digest, **evaluate(models, reference, recipe, task)}
    if not is_here:
        listener.note(f"not kept: {named} is on the Hub")
        return scores
    write_whole(kept, json.dumps(scores, indent=2) + "\n")
    if not raw:
        measured = replace(provenance, metrics=_metrics(scores))
        # What is no part of a model's record stays: that the folder came from the Hub.
        record = {**read_json(folder / "litconvert.json"), **measured.record}
        write_whole(folder / "litconvert.json", json.dumps(record, indent=2) + "\n")
    return scores


def _metrics(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as a model's record has them."""
    protocol = {key: scores[key] for key in ("num_samples", "seeds", "scheduler", "steps")}
    mine, floor = scores["models"]["student"], scores["models"]["teacher against itself"]
    return {
        "frechet_distance": {**mine["frechet_distance"], **protocol},
        "class_accuracy": {**mine["class_accuracy"], **protocol},
        "teacher_frechet_distance": {**floor["frechet_distance"], **protocol},
        "teacher_class_accuracy": {**floor["class_accuracy"], **protocol},
    }
