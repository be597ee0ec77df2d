"""How a layer's output projection is solved at width 1152: exactly in chunks of channels, or by conjugate gradients.

    python -m benchmarks.projection [--states 72] [--widths 1152]

Per-channel gates give each output channel normal equations of its own. litconvert solves them exactly up to a width, a
few channels at a time in float64, and beyond it by conjugate gradients for all channels at once. Here both ways solve
one problem, and their outputs are compared. Written to benchmarks/results/projection.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import provenance
from litconvert.solving import closed_forms

RIDGE = 1e-4


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


def solved(problem: tuple[Tensor, Tensor, Tensor], exact_width: int) -> tuple[Tensor, float]:
    """(D, D + 1), the bias last, and the seconds it took; exact up to a width, iterative beyond it."""
    features, gate, target = problem
    width = features.shape[-1]
    with patch.object(closed_forms, "EXACT_WIDTH", exact_width):
        began = time.perf_counter()
        sums = closed_forms.ProjectionSums(width, features.device)
        for first in range(0, len(features), 32):
            some = slice(first, first + 32)
            sums.add(features[some], gate[some], target[some])
        weight, bias = sums.solve(RIDGE, torch.zeros(width, width), torch.zeros(width))
        return torch.cat([weight, bias.unsqueeze(1)], dim=1), time.perf_counter() - began


def main() -> None:
    """Solve both ways, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 1152])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width in arguments.widths:
        given = problem(arguments.states, arguments.tokens, width, torch.float32)
        (one, exact_seconds), (other, iterative_seconds) = solved(given, width), solved(given, 0)
        inputs = F.pad(given[0].double(), (0, 1), value=1.0)
        first, second = (given[1] * (inputs @ solution.T) for solution in (one, other))
        rows.append(
            {
                "width": width,
                "states": arguments.states,
                "tokens": arguments.tokens,
                "exact_seconds": round(exact_seconds, 2),
                "iterative_seconds": round(iterative_seconds, 2),
                "outputs_differ_by": float((first - second).norm() / first.norm()),
            }
        )
        print(rows[-1], flush=True)
    result = {"threads": torch.get_num_threads(), **provenance(), "rows": rows}
    out = Path(__file__).parent / "results" / "projection.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
