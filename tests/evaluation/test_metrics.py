"""Distances of two sets of features against closed forms, scipy and plain loops, whatever the blocks and the split."""

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation import metrics
from litconvert.evaluation.metrics import (
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(count: int, seed: int, width: int = 24, mean: float = 0.0) -> Tensor:
    """Correlated, far from centred, of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((width, width), generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    spread = torch.logspace(0, -3, width, dtype=torch.float64)
    return (torch.randn((count, width), generator=generator, dtype=torch.float64) * spread) @ mixing + mean


def frechet(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first).statistics, Moments.of(second).statistics)


def sum_of(parts: list[Moments]) -> Moments:
    return reduce(lambda one, other: one + other, parts)


def plain_kernel_distance(x: Tensor, y: Tensor) -> float:
    """The sums of the paper, pair by pair."""
    first, second, width = x.tolist(), y.tolist(), x.shape[1]

    def kernel(a: list[float], b: list[float]) -> float:
        return (math.fsum(p * q for p, q in zip(a, b, strict=True)) / width + 1) ** 3

    def within(rows: list[list[float]]) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return math.fsum(pairs) / (len(rows) * (len(rows) - 1))

    across = math.fsum(kernel(a, b) for a in first for b in second) / (len(first) * len(second))
    return within(first) + within(second) - 2 * across


def brute_force(reference: Tensor, samples: Tensor, neighbours: int) -> tuple[float, float]:
    """Precision and recall by sorting exact distances."""

    def inside(these: Tensor, of: Tensor) -> float:
        radii = [sorted(math.dist(a, b) for b in of.tolist())[neighbours] for a in of.tolist()]
        hits = [
            any(math.dist(a, b) <= radius for b, radius in zip(of.tolist(), radii, strict=True)) for a in these.tolist()
        ]
        return sum(hits) / len(hits)

    return inside(samples, reference), inside(reference, samples)


def plain_inception_score(logits: Tensor) -> float:
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    marginal = shares.mean(0)
    return float(np.exp((shares * (np.log(shares) - np.log(marginal))).sum(1).mean()))


def test_the_frechet_distance_of_gaussians_whose_axes_agree_is_its_closed_form() -> None:
    axes, _ = torch.linalg.qr(torch.randn((8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    one, two = torch.logspace(2, -6, 8, dtype=torch.float64), torch.logspace(-5, 1, 8, dtype=torch.float64)
    first = Statistics(torch.zeros(8, dtype=torch.float64), axes @ one.diag() @ axes.T)
    second = Statistics(torch.full((8,), 0.5, dtype=torch.float64), axes @ two.diag() @ axes.T)
    expected = 8 * 0.25 + float((one.sqrt() - two.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10 * float(one.sum()))


def test_the_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(400, 0).numpy(), features(300, 1, mean=0.1).numpy()
    first, second = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(first @ second).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(float(expected), rel=1e-6)


def test_fewer_pictures_than_features_lose_no_digits() -> None:
    x, y = features(12, 0, width=64), features(10, 1, width=64, mean=0.2)
    centred = [rows - rows.mean(0) for rows in (x, y)]
    # Of sets so small the trace of the root is a sum over the pictures, without a covariance.
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt(11 * 9)
    traces = sum(rows.square().sum() / (len(rows) - 1) for rows in centred)
    expected = float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * overlap)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_all_rows_whatever_the_split_even_far_from_zero() -> None:
    x = features(500, 0, mean=1e4)
    for parts in (x.split(500), x.split(7), x.split(64)[::-1]):
        joined = sum_of([Moments.of(part) for part in parts])
        assert joined.count == 500
        torch.testing.assert_close(joined.mean, x.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(joined.statistics.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-9)


def test_the_kernel_distance_is_the_unbiased_sum_over_all_pairs() -> None:
    x, y = features(23, 0, width=5), features(31, 1, width=5, mean=0.3)
    assert kernel_distance(x, y) == pytest.approx(plain_kernel_distance(x, y), rel=1e-9)
    assert kernel_distance(y, x) == pytest.approx(kernel_distance(x, y), rel=1e-9)
    # Without bias: of two sets of one kind it is below zero about as often as above.
    signs = [kernel_distance(features(40, seed), features(40, seed + 100)) > 0 for seed in range(30)]
    assert 6 <= sum(signs) <= 24


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(neighbours: int) -> None:
    reference, samples = features(60, 0, width=3), 0.4 * features(45, 1, width=3)
    found = precision_recall(reference, samples, neighbours)
    assert found == brute_force(reference, samples, neighbours)
    assert found[0] > found[1] > 0
    assert precision_recall(samples, reference, neighbours) == found[::-1]
    assert precision_recall(reference, reference, neighbours) == (1.0, 1.0)
    assert precision_recall(reference, reference + 1e3, neighbours) == (0.0, 0.0)


def test_a_picture_that_is_there_many_times_is_inside_of_itself() -> None:
    twice = features(4, 0).repeat(5, 1)
    assert precision_recall(twice, twice[torch.randperm(20, generator=torch.Generator().manual_seed(1))]) == (1.0, 1.0)


def test_the_inception_score_is_its_formula_and_lies_between_one_and_the_classes() -> None:
    logits = 3 * features(50, 0, width=6)
    assert inception_score(logits) == pytest.approx(plain_inception_score(logits), rel=1e-9)
    parts = [plain_inception_score(part) for part in logits.split(20)]
    assert inception_score(logits, split_size=20) == pytest.approx(sum(parts) / 3, rel=1e-9)
    certain = 1e4 * torch.eye(6, dtype=torch.float64)
    assert inception_score(certain) == pytest.approx(6, rel=1e-9)
    assert inception_score(certain[:1].repeat(9, 1)) == pytest.approx(1, rel=1e-9)


def all_measures(x: Tensor, y: Tensor) -> list[float]:
    found = [frechet(x, y), kernel_distance(x, y), *precision_recall(x, y), inception_score(torch.cat([x, y]))]
    assert len(set(found)) == 5
    return found


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_no_distance_depends_on_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(50, 0), features(61, 1, mean=0.05)
    whole = all_measures(x, y)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert all_measures(x, y) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("processes", [2, 3])
def test_no_distance_depends_on_which_process_saw_a_picture(processes: int) -> None:
    x, y = features(50, 0), features(61, 1, mean=0.05)
    # Gathered process by process, each of which has every n-th.
    gathered = [torch.cat([rows[first::processes] for first in range(processes)]) for rows in (x, y)]
    assert all_measures(*gathered) == pytest.approx(all_measures(x, y), rel=1e-9)
    joined = [sum_of([Moments.of(rows[first::processes]) for first in range(processes)]) for rows in (x, y)]
    assert frechet_distance(joined[0].statistics, joined[1].statistics) == pytest.approx(frechet(x, y), rel=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    x = features(10, 0)
    broken = x.clone()
    broken[3, 2] = math.nan
    refused: list[tuple[type[LitconvertError], str, Callable[[], object]]] = [
        (UsageError, "different networks", lambda: frechet(x, features(10, 1, width=5))),
        (UsageError, "two pictures", lambda: frechet(x[:1], x)),
        (UsageError, "too few", lambda: kernel_distance(x, x[:1])),
        (UsageError, "give 4 at least", lambda: precision_recall(x[:3], x)),
        (LitconvertError, "NaN", lambda: kernel_distance(broken, x)),
        (LitconvertError, "NaN", lambda: frechet(x, broken)),
        (LitconvertError, "no covariance", lambda: frechet_distance(*[Statistics(x[0], -torch.eye(24).double())] * 2)),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()
    assert frechet(x, features(10, 1)) > 0
    assert precision_recall(x[:4], x)[0] > 0
