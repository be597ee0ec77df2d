"""Making and training a student for a measurement, with what it took.

Seconds are of one core. `..._seconds` passed on the clock, and in `..._core_seconds` the core was at work: where other
processes take their share of it, these are the ones that compare.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litconvert
from benchmarks.tasks import core_share
from litconvert.conversion.provenance import Provenance
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import RunDirectory
from litconvert.runs.throughput import stage_work

UNTRAINED: dict[str, Any] = {
    "training_steps": 0,
    "training_macs": 0,
    "training_seconds": 0.0,
    "training_core_seconds": 0.0,
}


def make_student(source: str | Path | None, out: Path, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Convert, from the beginning: the seconds of a walk that was interrupted are not known. Returns what it took."""
    remove_student(out)
    with core_share() as share:
        litconvert.convert(source, out, recipe, overrides)
    solved = Provenance.read(out).solve
    if solved is None:
        return {"walk_seconds": 0.0, "walk_core_seconds": 0.0, "walk_macs": 0, "solve": None}
    return {
        "walk_seconds": solved["seconds"],
        "walk_core_seconds": round(solved["seconds"] * share[0], 1),
        "walk_macs": sum(solved["macs"].values()),
        "solve": {key: solved[key] for key in ("states", "local_steps", "walks", "bf16", "macs", "output")},
    }


def remove_student(out: Path) -> None:
    """A student, and what is left of a walk."""
    for folder in (out, *out.parent.glob(f".{out.name}.solving-*")):
        shutil.rmtree(folder, ignore_errors=True)


def train_student(
    student: Path, run: Path, data: Path, recipe: Recipe, overrides: Sequence[str], teacher: LiTTransformer2DModel
) -> tuple[LiTTransformer2DModel, dict[str, Any]]:
    """Distill with the recipe's one stage, which the overrides make of the recorded one; the run is removed.

    Returns: the model in float32, and what it took.
    """
    shutil.rmtree(run, ignore_errors=True)  # the seconds of an interrupted run are not known
    with core_share() as share:
        litconvert.distill(student, run, data=data, overrides=overrides)
    model: LiTTransformer2DModel = litconvert.load(run / "model").float()
    (stage,) = recipe.distill.stages
    seconds = sum(one["seconds"] for one in RunDirectory(run).read_usage().values())
    configs = (ModelConfig.of(one.config) for one in (model, teacher))
    found = {
        "training_steps": stage.steps,
        "learning_rate": stage.learning_rate,
        "training_seconds": round(seconds, 1),
        "training_core_seconds": round(seconds * share[0], 1),
        "training_macs": round(stage.steps * stage_work(recipe, *configs)[0] / 2),
    }
    shutil.rmtree(run)
    return model, found
