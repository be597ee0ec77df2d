"""The scores of the digits against their closed forms, and the shipped weights against what they were made from."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from litconvert.errors import UsageError
from litconvert.evaluation.networks import load_classifier
from litconvert.evaluation.scores import (
    Score,
    balanced_labels,
    class_accuracy,
    digits_distance,
    evaluate,
    evaluation_passes,
    reference_samples,
    to_json,
)
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Recipe
from tests.helpers.listener import Advances

ASSETS = Path(__file__).parents[2] / "litconvert" / "assets"


def random_images(count: int, seed: int, spread: float = 0.5) -> Tensor:
    return spread * torch.randn((count, 1, 16, 16), generator=torch.Generator().manual_seed(seed))


def closed_form(first: Tensor, second: Tensor) -> float:
    """|mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) in the classifier's features, with scipy in float64."""
    linalg = pytest.importorskip("scipy.linalg")
    classifier = load_classifier().double()
    features = [classifier.extract(images.clamp(-1, 1).double()).numpy() for images in (first, second)]
    (mean_1, mean_2), (c_1, c_2) = ([f(x) for x in features] for f in (lambda x: x.mean(0), lambda x: np.cov(x.T)))
    root = linalg.sqrtm(c_1 @ c_2)
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(c_1 + c_2 - 2 * root.real))


@pytest.mark.parametrize(("count", "spread"), [(500, 0.5), (200, 2.0)])
def test_the_frechet_distance_is_its_closed_form(count: int, spread: float) -> None:
    first, second = random_images(count, 0), random_images(count, 1, spread) + 0.1
    assert digits_distance(first, second) == pytest.approx(closed_form(first, second), rel=1e-5)


def test_a_set_is_at_no_distance_from_itself_and_at_the_same_from_either_side() -> None:
    first, second = random_images(300, 0), random_images(300, 1) + 0.2
    assert digits_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert digits_distance(first, second) == pytest.approx(digits_distance(second, first), rel=1e-6)
    assert digits_distance(first, second) > 1e-2


def test_values_beyond_the_range_of_images_count_as_its_bounds() -> None:
    images, reference = 3 * random_images(100, 0), random_images(100, 1)
    distance = digits_distance(reference, images)
    assert distance == pytest.approx(digits_distance(reference, images.clamp(-1, 1)), rel=1e-9)
    labels = balanced_labels(100, 10)
    assert class_accuracy(images, labels) == class_accuracy(images.clamp(-1, 1), labels)


def unseen_digits() -> tuple[Tensor, Tensor]:
    """The real digits that the classifier was not trained on."""
    pytest.importorskip("sklearn")
    from benchmarks.train_digits_classifier import TEST_IMAGES, digits

    images, labels = digits()
    return images[:TEST_IMAGES], labels[:TEST_IMAGES]


def test_the_classifier_reads_real_digits_and_is_right() -> None:
    images, labels = unseen_digits()
    assert class_accuracy(images, labels) > 0.95
    # The share is of the labels asked for, not of anything that looks like a digit.
    assert class_accuracy(images, (labels + 1) % 10) < 0.05


@pytest.mark.slow
def test_the_training_script_gives_the_shipped_classifier() -> None:
    images, labels = unseen_digits()
    from benchmarks.train_digits_classifier import train

    with safe_open(ASSETS / "digits-classifier.safetensors", "pt") as stored:
        recorded = float(stored.metadata()["test_accuracy"])
    model, accuracy = train()
    assert class_accuracy(images, labels) == pytest.approx(recorded, abs=1e-4)
    assert accuracy == pytest.approx(recorded, abs=0.01)
    # Bit for bit where it was trained; elsewhere the same features up to rounding, which training amplifies.
    with torch.inference_mode():
        mine, shipped = model.extract(images), load_classifier().extract(images)
    assert (mine - shipped).norm() < 0.05 * shipped.norm()


def test_the_shipped_teacher_is_the_checkpoints_ema_rounded_to_half_precision(shared: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(shared / "dit-digits.pt", weights_only=True, mmap=True)
    shipped = load_file(ASSETS / "dit-digits.safetensors")
    assert set(checkpoint["ema"]) - set(shipped) == {"pos_embed"}  # a formula gives it
    for name, value in shipped.items():
        assert value.dtype == torch.float16
        assert torch.equal(value.view(torch.int16), checkpoint["ema"][name].half().view(torch.int16)), name


def test_labels_are_balanced() -> None:
    assert torch.bincount(balanced_labels(30, 10)).tolist() == [3] * 10
    assert balanced_labels(3, 2).tolist() == [0, 1, 0]


def test_a_score_has_its_mean_and_the_samples_standard_deviation() -> None:
    score = Score((1.0, 2.0, 6.0))
    assert score.mean == 3.0
    assert score.standard_deviation == pytest.approx(7**0.5)
    assert json.loads(json.dumps(to_json(Score((4.0,))))) == {"mean": 4.0, "standard_deviation": None, "values": [4.0]}


def digits_model(seed: int = 0, **changes: Any) -> LiTTransformer2DModel:
    """A small model of the digits' shape, with no weight zero."""
    config = {"sample_size": 16, "in_channels": 1, "out_channels": 2, "hidden_size": 16, "num_classes": 10}
    model: LiTTransformer2DModel = LiTTransformer2DModel(
        **config | changes, patch_size=4, num_layers=1, num_attention_heads=2
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    model.eval()
    return model


def recipe(**settings: Any) -> Recipe:
    usual = {"features": "digits", "num_samples": 80, "seeds": [1, 2, 3], "reference_seed": 9, "steps": 2}
    return Recipe.model_validate({"evaluate": {**usual, "batch_size": 64, **settings}})


def test_evaluation_scores_every_model_for_every_seed_on_noise_of_its_own() -> None:
    teacher, other, calls = digits_model(), digits_model(seed=1), list[int]()
    task = Advances(evaluation_passes(recipe().evaluate, 2), lambda done, total: calls.append(done))
    reference = reference_samples(teacher, recipe(), task)
    models = {"teacher": teacher, "other": other}
    results = evaluate(models, reference, recipe(), task)
    assert calls == list(range(1, task.total + 1))
    assert results["seeds"] == [1, 2, 3]
    assert (results["num_samples"], results["reference_seed"], results["steps"]) == (80, 9, 2)
    assert list(results["models"]) == ["teacher", "other"]
    floor, score = (results["models"][name]["frechet_distance"] for name in ("teacher", "other"))
    # The teacher against itself: a floor, not zero, since the noise is another; and another model is above it.
    assert min(floor["values"]) > 0
    assert len(set(floor["values"])) == 3
    assert min(score["values"]) > max(floor["values"])
    assert 0 <= results["models"]["other"]["class_accuracy"]["mean"] <= 1
    assert evaluate({"teacher": teacher}, reference, recipe())["models"]["teacher"]["frechet_distance"] == floor


def test_on_the_references_own_noise_the_teacher_would_score_zero() -> None:
    teacher = digits_model()
    reference = reference_samples(teacher, recipe())
    own = recipe(seeds=[9], reference_seed=10)
    assert evaluate({"teacher": teacher}, reference, own)["models"]["teacher"]["frechet_distance"]["mean"] < 1e-6


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (None, {}, r"scores of a run are for the digits.*--teacher, --images or --reference"),
        ("digits", {"num_classes": 11}, r"1x16x16 images of 10 classes.* draws 1x16x16 of 11"),
        ("digits", {"in_channels": 3, "out_channels": 6}, r"draws 3x16x16 of 10"),
        ("digits", {"sample_size": 8}, r"draws 1x8x8 of 10"),
    ],
)
def test_data_without_a_metric_is_refused(features: str | None, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reference_samples(digits_model(**changes), recipe(features=features))
    assert reference_samples(digits_model(), recipe(num_samples=2)).shape == (2, 1, 16, 16)
