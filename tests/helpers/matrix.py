"""Every way to train, one run after the other in one launch: `test_processes` has two processes call `main`."""

import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import litconvert

OBJECTIVES = {
    "hybrid": "{objective: hybrid, steps: 8, batch_size: 8, learning_rate: 1.0e-3}",
    "features": "{objective: hybrid, steps: 8, batch_size: 8, learning_rate: 1.0e-3, feature_weight: 0.5}",
}


@dataclass(frozen=True)
class Way:
    """One way to train the same: how states are spread, in which precision, in how many parts, and what."""

    sharded: bool
    precision: str
    parts: int
    objective: str

    @property
    def name(self) -> str:
        """Of its run directory."""
        spread = "sharded" if self.sharded else "parallel"
        return f"{spread}-{self.precision}-{self.parts}-{self.objective}"

    @property
    def overrides(self) -> list[str]:
        """Over the recipe."""
        return [
            f"distill.stages=[{OBJECTIVES[self.objective]}]",
            f"distill.mixed_precision={self.precision}",
            f"distill.gradient_accumulation_steps={self.parts}",
        ]


WAYS = [Way(*one) for one in product((False, True), ("no", "bf16"), (1, 2), OBJECTIVES)]


def main() -> None:
    """Train in all ways: STUDENT DATA FOLDER."""
    student, data, folder = map(Path, sys.argv[1:])
    for way in WAYS:
        os.environ["ACCELERATE_USE_FSDP"] = str(way.sharded).lower()
        litconvert.distill(student, folder / way.name, data=data, overrides=way.overrides)


def with_a_stale_view() -> None:
    """`litconvert` with these arguments; all processes but the first see of each run its oldest checkpoint alone."""
    import litconvert.cli.app
    from litconvert.runs.directory import RunDirectory

    if os.environ["RANK"] != "0":
        kept = RunDirectory.kept_steps
        RunDirectory.kept_steps = lambda self: kept(self)[:1]  # type: ignore[method-assign]
    litconvert.cli.app.main()
