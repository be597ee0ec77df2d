"""What the digits table has measured: one JSON file for each row and seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.digits_rows import ARMS, SEARCH_SEED, search_name

RESULTS = Path(__file__).parent / "results" / "digits"
# Student's t that 2.5 % of values exceed, by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences, and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} (95 %: {self.low:+.2f} to {self.high:+.2f}, {self.pairs} seeds)"


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of first minus second, by Student's t; at least two pairs."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    centre = mean(differences)
    reach = QUANTILES[len(differences) - 1] * stdev(differences) / len(differences) ** 0.5
    return Interval(centre, centre - reach, centre + reach, len(differences))


@dataclass(frozen=True)
class Results:
    """A folder of results."""

    folder: Path = RESULTS

    def path(self, row: str, seed: int) -> Path:
        return self.folder / f"{row}-{seed}.json"

    def read(self, row: str, seed: int) -> dict[str, Any] | None:
        """What was measured; None: nothing yet."""
        path = self.path(row, seed)
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def values(self, row: str, key: str, seeds: Sequence[int]) -> dict[int, float]:
        """By seed, as far as it was measured: `frechet_distance`, `class_accuracy` or any number of the file."""
        found = {seed: result for seed in seeds if (result := self.read(row, seed)) is not None}
        metrics = {seed: result["models"][row] for seed, result in found.items()}
        return {
            seed: float(metrics[seed][key]["mean"] if key in metrics[seed] else result[key])
            for seed, result in found.items()
        }

    def difference(self, first: str, second: str, seeds: Sequence[int]) -> Interval | None:
        """Of the distances of two rows, by the seeds that both have; None: of fewer than two."""
        mine, theirs = (self.values(row, "frechet_distance", seeds) for row in (first, second))
        both = [seed for seed in seeds if seed in mine and seed in theirs]
        return paired([mine[seed] for seed in both], [theirs[seed] for seed in both]) if len(both) > 1 else None

    def best_rate(self, arm: str, steps: int) -> float:
        """The rate with the smallest distance on the search seed; all must be measured."""
        distances = {
            rate: self.values(search_name(arm, steps, rate), "frechet_distance", (SEARCH_SEED,))[SEARCH_SEED]
            for rate in ARMS[arm].rates
        }
        return min(distances, key=distances.__getitem__)
