"""How a layer's output projection is solved at width 1152: exactly in chunks of channels, or by conjugate gradients.

    python -m benchmarks.projection [--states 72] [--widths 1152]

Per-channel gates give each output channel normal equations of its own. `exact` is litconvert's: Gram matrices by
sample, weighted and factorised a few channels at a time, in float64. `iterative`, made for this comparison, goes for
all channels at once: products with the features alone, preconditioned by one factorisation of the Gram matrix of all
samples, scaled channel by channel. Outputs of the two are compared. Written to benchmarks/results/projection.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import provenance
from litconvert.solving.closed_forms import ProjectionSums

RIDGE = 1e-4
MOST_STEPS = 200


def problem(states: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose spectrum falls off, gates that differ by sample and channel, and a target with noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(0, -3, width, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(width, width))[0]
    features = (normal(states, tokens, width) * scales) @ mixing + 0.1
    gate = 0.5 + 0.5 * normal(states, 1, width)
    target = gate * (features @ normal(width, width) / width**0.5) + 0.05 * normal(states, tokens, width)
    return features.to(dtype), gate.to(dtype), target.to(dtype)


def exact(features: Tensor, gate: Tensor, target: Tensor) -> Tensor:
    """(D, D + 1), the bias last."""
    width = features.shape[-1]
    sums = ProjectionSums(width, features.device)
    for first in range(0, len(features), 32):
        some = slice(first, first + 32)
        sums.add(features[some], gate[some], target[some])
    weight, bias = sums.solve(RIDGE, torch.zeros(width, width), torch.zeros(width))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def iterative(features: Tensor, gate: Tensor, target: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """The same by conjugate gradients in the dtype of the features, and how many steps it took."""
    inputs = F.pad(features, (0, 1), value=1.0)  # (N, T, P)
    flat, squared = inputs.flatten(0, 1), gate.square()
    strength = squared.mean(0)  # (1, D)
    by_sample = inputs.square().sum(1)  # (N, P), the diagonals of the Gram matrices
    ridge = RIDGE * (squared.squeeze(1).T @ by_sample).mean(1)  # (D,)
    gram = flat.double().T @ flat.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram).to(features.dtype)

    def times(solution: Tensor) -> Tensor:
        weighted = (inputs @ solution) * squared
        return flat.T @ weighted.flatten(0, 1) + solution * ridge

    def preconditioned(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(residual, factor) / strength

    right = flat.T @ (gate * target).flatten(0, 1)  # (P, D)
    solution, residual = torch.zeros_like(right), right
    direction = preconditioned(residual)
    product = (residual * direction).sum(0)
    first = product.clone()
    steps = 0
    while steps < MOST_STEPS:
        steps += 1
        moved = times(direction)
        length = product / (direction * moved).sum(0)
        solution = solution + direction * length
        residual = residual - moved * length
        steep = preconditioned(residual)
        following = (residual * steep).sum(0)
        if float((following / first).max()) < tolerance**2:
            break
        direction = steep + direction * (following / product)
        product = following
    return solution.T, steps


def main() -> None:
    """Solve both ways, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 1152])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width in arguments.widths:
        features, gate, target = problem(arguments.states, arguments.tokens, width, torch.float32)
        began = time.perf_counter()
        one = exact(features, gate, target)
        middle = time.perf_counter()
        other, steps = iterative(features, gate, target, 1e-5)
        ended = time.perf_counter()
        inputs = F.pad(features.double(), (0, 1), value=1.0)
        first, second = (gate * (inputs @ solution.double().T) for solution in (one, other))
        rows.append(
            {
                "width": width,
                "states": arguments.states,
                "tokens": arguments.tokens,
                "exact_seconds": round(middle - began, 2),
                "iterative_seconds": round(ended - middle, 2),
                "iterative_steps": steps,
                "outputs_differ_by": float((first - second).norm() / first.norm()),
            }
        )
        print(rows[-1], flush=True)
    result = {"threads": torch.get_num_threads(), **provenance(), "rows": rows}
    out = Path(__file__).parent / "results" / "projection.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
