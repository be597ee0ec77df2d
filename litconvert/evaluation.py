"""How good a student is: its samples against its teacher's own, in the features of a classifier."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litconvert.errors import UsageError
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.recipe import Evaluate, Recipe
from litconvert.sampling import draw


class DigitsClassifier(nn.Module):
    """A small MLP on 16x16 digits: its 64 ReLU features give the Fréchet distance, its verdict the class accuracy."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(256, self.num_features)
        self.classes = nn.Linear(self.num_features, 10)

    def extract(self, images: Tensor) -> Tensor:
        """Features (N, 64) of images (N, 1, 16, 16) in [-1, 1]."""
        return F.relu(self.features(images.flatten(1).to(self.features.weight.dtype)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.classes(self.extract(images))
        return logits


class _Features(nn.Module):
    """The classifier as torchmetrics wants a feature extractor."""

    num_features = DigitsClassifier.num_features

    def __init__(self, classifier: DigitsClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.extract(images)


def load_classifier() -> DigitsClassifier:
    """The classifier that ships with litconvert; `litconvert/assets/train_digits_classifier.py` made it."""
    from safetensors.torch import load_file

    model = DigitsClassifier()
    model.load_state_dict(load_file(Path(__file__).parent / "assets" / "digits-classifier.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def frechet_distance(reference: Tensor, samples: Tensor) -> float:
    """Fréchet distance of two sets of images (N, 1, 16, 16), clamped to [-1, 1], in the classifier's features.

    ||mu_1 - mu_2||^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), float64, through torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(load_classifier()))
    metric.set_dtype(torch.float64)
    metric.update(reference.clamp(-1, 1), real=True)
    metric.update(samples.clamp(-1, 1), real=False)
    return float(metric.compute())


def class_accuracy(samples: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier reads as the class asked for."""
    from torchmetrics.functional.classification import multiclass_accuracy

    logits = load_classifier()(samples.clamp(-1, 1))
    return float(multiclass_accuracy(logits, labels, num_classes=10, average="micro"))


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
