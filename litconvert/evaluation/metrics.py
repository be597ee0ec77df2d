"""Distances of two sets of pictures in the features of a network, in float64.

None depends on the size of batches or blocks, nor on how the pictures were split over processes, beyond the rounding of
sums in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from litconvert.common.device import default_device
from litconvert.errors import LitconvertError, UsageError

# Rows of features at a time: two blocks of 2048 features and their products are 100 MB.
BLOCK = 2048
NEIGHBOURS = 3


def _workplace() -> torch.device:
    """Where blocks are computed: the device, but on a Mac the CPU, since its GPU has no float64."""
    device = default_device()
    return torch.device("cpu") if device.type == "mps" else device


def _blocks(features: Tensor, center: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """Rows of features (N, D), so many at a time, in float64 where they are computed; and the first one's number."""
    device = _workplace()
    for start in range(0, len(features), BLOCK):
        block = features[start : start + BLOCK].to(device).double()
        yield start, block if center is None else block - center.to(device)


def _checked(features: Tensor, least: int) -> Tensor:
    """Raises LitconvertError for features that are no numbers, UsageError for fewer rows than are needed."""
    if len(features) < least:
        raise UsageError(f"{len(features)} pictures are too few for this distance: give {least} at least")
    if not features.isfinite().all():
        raise LitconvertError("a picture's features are NaN or infinite; use another network (--features)")
    return features


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of features seen so far, float64 on the CPU; `+` joins those of two sets.

    Attributes:
        count: rows.
        mean: (D,).
        scatter: sum of (x - mean)(x - mean)^T, (D, D).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features (N, D), block by block."""
        _checked(features, 1)
        total: Moments | None = None
        for _, block in _blocks(features):
            mean = block.mean(0)
            centered = block - mean
            some = cls(len(block), mean.cpu(), (centered.T @ centered).cpu())
            total = some if total is None else total + some
        assert total is not None
        return total

    def __add__(self, other: "Moments") -> "Moments":
        """Chan's update, which loses nothing where the mean is far from 0."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def statistics(self) -> "Statistics":
        """Mean and unbiased covariance. Raises UsageError for fewer than two rows."""
        if self.count < 2:
            raise UsageError("a covariance needs two pictures at least")
        return Statistics(self.mean, self.scatter / (self.count - 1))


@dataclass(frozen=True)
class Statistics:
    """A Gaussian: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def _root(covariance: Tensor) -> Tensor:
    """A with A A^T = C, (D, rank). Directions whose variance is rounding are left out: their roots would not be small.

    Raises LitconvertError for what is no covariance.
    """
    values, vectors = torch.linalg.eigh(covariance.to(_workplace()))
    noise = float(values[-1]) * len(values) * torch.finfo(torch.float64).eps
    if float(values[0]) < -1e-6 * max(float(values[-1]), 0.0):
        raise LitconvertError("the statistics hold no covariance: it has a negative eigenvalue")
    kept = values > noise
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500).

    ||mu_1 - mu_2||^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). With C_i = A_i A_i^T the trace of the root is the sum of the
    singular values of A_1^T A_2. That is exact to rounding where covariances are singular, of which the eigenvalues of
    C_1 C_2 lose half of their digits.
    """
    if first.mean.shape != second.mean.shape:
        raise UsageError(
            f"statistics of {len(first.mean)} features cannot be compared with those of {len(second.mean)}: they are "
            "of different networks (--features)"
        )
    overlap = torch.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = float((first.mean - second.mean).square().sum() + traces - 2 * overlap.cpu())
    return max(distance, 0.0)  # below it by rounding alone


def kernel_distance(reference: Tensor, samples: Tensor) -> float:
    """Kernel distance (KID; Bińkowski et al., arXiv 1801.01401) of features (M, D) and (N, D), over all pairs at once.

    The unbiased estimate of the squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3. It may be negative.
    """
    for features in (reference, samples):
        _checked(features, 2)
    m, n = len(reference), len(samples)
    within = _kernel_sum(reference, None) / (m * (m - 1)) + _kernel_sum(samples, None) / (n * (n - 1))
    return within - 2 * _kernel_sum(reference, samples) / (m * n)


def _kernel_sum(first: Tensor, second: Tensor | None) -> float:
    """Sum of k over all pairs of two sets; with one set, over its pairs of different rows."""
    total = torch.zeros((), dtype=torch.float64, device=_workplace())
    for start, x in _blocks(first):
        for other, y in _blocks(first if second is None else second):
            if second is not None:
                total += _kernel(x @ y.T, x.shape[1]).sum()
            elif other == start:
                total += _kernel(x @ y.T, x.shape[1]).sum() - _kernel(x.square().sum(1), x.shape[1]).sum()
            elif other > start:
                total += 2 * _kernel(x @ y.T, x.shape[1]).sum()
    return float(total)


def _kernel(product: Tensor, width: int) -> Tensor:
    kernel: Tensor = (product / width + 1) ** 3
    return kernel


def inception_score(logits: Tensor, split_size: int | None = None) -> float:
    """Inception score (Salimans et al., arXiv 1606.03498) of logits (N, K): exp E[KL(p(y|x) || p(y))].

    Args:
        split_size: the mean of the scores of so many pictures at a time, in their order, as the ADM evaluator does with
            5000; None: of all at once.
    """
    _checked(logits, 1)
    size = split_size or len(logits)
    scores = [_score_of(logits[start : start + size]) for start in range(0, len(logits), size)]
    return sum(scores) / len(scores)


def _score_of(logits: Tensor) -> float:
    count, entropies = len(logits), torch.zeros((), dtype=torch.float64)
    marginal = torch.zeros(logits.shape[1], dtype=torch.float64)
    for _, block in _blocks(logits):
        log_shares = block.log_softmax(1)
        shares = log_shares.exp()
        marginal += shares.sum(0).cpu()
        entropies += (shares * log_shares).sum().cpu()
    marginal /= count
    return float((entropies / count - torch.special.xlogy(marginal, marginal).sum()).exp())


def precision_recall(reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al., arXiv 1904.06991) of features (M, D) and (N, D).

    Precision is the share of samples that lie, for some reference picture, no farther from it than its k-th nearest
    reference picture; recall the share of reference pictures that lie so for the samples.
    """
    for features in (reference, samples):
        _checked(features, neighbours + 1)
    center = reference.double().mean(0)  # squared distances lose less to rounding
    inner, outer = (_radii(features, neighbours, center) for features in (reference, samples))
    precise = torch.zeros(len(samples), dtype=torch.bool, device=inner.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=inner.device)
    for start, x in _blocks(reference, center):
        for other, y in _blocks(samples, center):
            distances = _squared_distances(x, y)
            rows, columns = slice(start, start + len(x)), slice(other, other + len(y))
            precise[columns] |= (distances <= inner[rows, None]).any(0)
            recalled[rows] |= (distances <= outer[None, columns]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


def _radii(features: Tensor, neighbours: int, center: Tensor) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, (N,), and what its rounding may come to."""
    radii = []
    for start, x in _blocks(features, center):
        nearest = torch.full((len(x), neighbours), torch.inf, dtype=torch.float64, device=x.device)
        for other, y in _blocks(features, center):
            distances = _squared_distances(x, y)
            if other == start:
                distances.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, distances], 1).topk(neighbours, dim=1, largest=False).values
        # A picture that is there twice is at distance 0, which rounding may not turn into outside.
        radii.append(nearest[:, -1] + 1e-13 * (x.square().sum(1) + nearest[:, -1]))
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) and (M, D) to (N, M)."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
