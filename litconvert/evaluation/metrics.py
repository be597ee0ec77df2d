"""How good a student is: its samples against its teacher's own, in the features of a classifier."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """The classifier that ships with litconvert; `benchmarks/train_digits_classifier.py` made it."""
    from safetensors.torch import load_file

    model = DigitsClassifier()
    model.load_state_dict(
        load_file(Path(__file__).parents[1] / "assets" / "digits-classifier.safetensors"), strict=True
    )
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
