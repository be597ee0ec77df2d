"""Scores of models: samples drawn from several seeds, measured against those of the teacher."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from litconvert.cli import terminal as console
from litconvert.common.files import digest_of, read_json, write_whole
from litconvert.conversion.directory import read_provenance
from litconvert.errors import UsageError
from litconvert.evaluation.metrics import class_accuracy, frechet_distance
from litconvert.families.sources import open_source, open_teacher, read_model
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.schema import Evaluate, Recipe, Source
from litconvert.runs.directory import model_of
from litconvert.sampling.draw import draw


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Every class as often as every other, (count,) int64."""
    return torch.arange(count) % num_classes


def _samples(
    model: LiTTransformer2DModel, recipe: Recipe, seed: int, on_step: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    settings = recipe.evaluate
    labels = balanced_labels(settings.num_samples, model.config.num_classes)
    batches = draw(
        model,
        settings,
        labels,
        seed=seed,
        batch_size=settings.batch_size,
        num_timesteps=recipe.diffusion.num_timesteps,
        on_step=on_step,
    )
    return torch.cat(list(batches)), labels


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
    """Batches times steps of an evaluation of so many models, for the progress bar."""
    return -(-settings.num_samples // settings.batch_size) * settings.steps * (1 + models * len(settings.seeds))


def reference_samples(
    teacher: LiTTransformer2DModel, recipe: Recipe, on_step: Callable[[], None] = lambda: None
) -> Tensor:
    """The teacher's samples that students are held against, drawn from `evaluate.reference_seed`.

    Raises UsageError when the recipe names no features, or features of other images.
    """
    settings, config = recipe.evaluate, teacher.config
    if settings.features is None:
        raise UsageError("no metric is known for this data: set evaluate.features (digits is the one there is)")
    if (config.in_channels, config.sample_size, config.num_classes) != (1, 16, 10):
        raise UsageError(
            f"evaluate.features=digits scores 1x16x16 images of 10 classes; the teacher draws {config.in_channels}x"
            f"{config.sample_size}x{config.sample_size} of {config.num_classes}: set evaluate.features=null"
        )
    return _samples(teacher, recipe, settings.reference_seed, on_step)[0]


def evaluate(
    models: dict[str, LiTTransformer2DModel],
    reference: Tensor,
    recipe: Recipe,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score each model against the teacher's reference samples, on noise independent of the reference's.

    Args:
        models: by name; put the teacher among them for the floor that no student can pass.
        reference: from `reference_samples`.

    Returns: {"num_samples", "seeds", "reference_seed", "scheduler", "steps", "models": {name: {"frechet_distance":
    {"mean", "standard_deviation", "values"}, "class_accuracy": {...}}}}.
    """
    settings = recipe.evaluate

    def scores(model: LiTTransformer2DModel) -> Iterator[tuple[float, float]]:
        for seed in settings.seeds:
            images, labels = _samples(model, recipe, seed, on_step)
            yield frechet_distance(reference, images), class_accuracy(images, labels)

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


def score_run(run: str | Path, recipe: Recipe, *, weights: str = "auto", force: bool = False) -> dict[str, Any]:
    """Metrics of a run's model and of the teacher against itself, kept beside it and in the model's record.

    Args:
        run: RUN, for its finished model or else its latest checkpoint, RUN@STEP, or the model directory itself.
        recipe: its `evaluate` section, its source and teacher.
        weights: of a checkpoint, `ema`, `model` (the raw weights, whose scores are no part of its record) or `auto`.
        force: measure again.
    """
    folder = Path(model_of(str(run), raw=weights == "model"))
    record = read_provenance(folder)
    raw, settings = weights == "model", recipe.evaluate
    inputs = Inputs(
        {"model": record["digest"], "evaluate": given(settings), "weights": "model" if raw else "ema"},
        digest_of({"model": record["digest"], "evaluate": settings.model_dump(mode="json")}),
    )
    place = folder.parent if folder.name == "model" else folder
    kept = place / ("evaluation-raw.json" if raw else "evaluation.json")
    if kept.is_file() and not force:
        found = read_json(kept)
        if inputs.made(found):
            return found
    student = read_model(open_source(Source(path=str(folder)), weights), torch.float32)
    teacher = read_model(open_teacher(recipe), torch.float32)
    with console.progress("evaluate") as show:
        total, done = evaluation_passes(settings, models=2), [0]

        def on_step() -> None:
            done[0] += 1
            show(done[0], total, "")

        reference = reference_samples(teacher, recipe, on_step)
        models = {"student": student, "teacher against itself": teacher}
        scores = {"digest": inputs.digest, **evaluate(models, reference, recipe, on_step=on_step)}
    write_whole(kept, json.dumps(scores, indent=2) + "\n")
    if not raw:
        record["metrics"] = _metrics(scores)
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
