"""Starting a run from another run's weights: which ones, whether they fit, and what is recorded of their origin."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.conversion.directory import is_checkpoint
from litconvert.conversion.provenance import Provenance
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import OpenSource, open_student
from litconvert.model.config import RESIZABLE, ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Start
from litconvert.runs.directory import RunDirectory, model_of
from litconvert.training.engine import Engine


@dataclass(frozen=True)
class WarmStart:
    """Weights of another run.

    Attributes:
        path: what was asked for, absolute: RUN or RUN@STEP.
        step: that they were trained to, over all stages.
        weights: `ema` or `model`.
        sha256: of the files that hold them.
        lineage: how they were trained, as their own record says.
        source: the weights; None where the run is past its start and does not need them any more.
    """

    path: str
    step: int
    weights: str
    sha256: str
    lineage: Mapping[str, Any]
    source: OpenSource | None

    @property
    def run(self) -> str:
        """The folder of that run."""
        return _folder(self.path)

    @property
    def inputs(self) -> dict[str, Any]:
        """What counts of it among a run's inputs."""
        return inputs_of({"sha256": self.sha256, "weights": self.weights})

    @property
    def record(self) -> dict[str, Any]:
        """For the run's own record and its model's."""
        return {"path": self.path, "step": self.step, **self.inputs, "lineage": dict(self.lineage)}

    def give(self, model: LiTTransformer2DModel) -> None:
        """Put the weights into a model, in its own dtype."""
        if self.source is not None:
            state = {name: self.source.values(name).clone() for name in self.source.reading.origins}
            model.load_state_dict(state, strict=True)


def inputs_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of a start among a run's inputs, from its record."""
    return {key: record[key] for key in ("sha256", "weights")}


def open_start(
    engine: Engine,
    asked: Start,
    run: RunDirectory,
    config: ModelConfig,
    goes_on: Callable[[Mapping[str, Any]], bool],
    is_finished: Callable[[Mapping[str, Any]], bool],
) -> WarmStart:
    """The weights that a run starts from; of a run that goes on, those that it did start from.

    RUN without a step means its latest model once, when the run begins. One process decides which that is.

    Args:
        run: that starts from them.
        config: of its student.
        goes_on: whether the run that is there goes on if it started from this.
        is_finished: whether it is finished then.

    Raises UsageError for weights of another model, LitconvertError when what a run started from is gone too early.
    """
    if asked.path is None:
        raise UsageError("distill.start names no run to start from; give it with --from, or as distill.start.path")
    path = _absolute(asked.path)
    chosen: tuple[dict[str, Any] | None, str | None] = (None, None)
    if engine.is_main:
        chosen = _choose(path, asked.weights, run, goes_on, is_finished)
    recorded, place = engine.from_main(chosen)
    if recorded is not None and place is None:
        return WarmStart(
            **{key: recorded[key] for key in ("path", "step", "weights", "sha256", "lineage")}, source=None
        )
    start = _open(path, place, asked.weights, config)
    if recorded is not None and start.sha256 != recorded["sha256"]:
        raise LitconvertError(
            f"{run.path} has no checkpoint to go on from, and the weights of step {recorded['step']} that it started "
            "from are gone; begin it again in another folder"
        )
    if len(set(engine.from_all(start.sha256))) > 1:
        raise LitconvertError(
            f"{place} is not the same on all processes; wait until the file system that they share shows it to all, "
            "then run the same command again"
        )
    return start


def _choose(
    path: str,
    weights: str,
    run: RunDirectory,
    goes_on: Callable[[Mapping[str, Any]], bool],
    is_finished: Callable[[Mapping[str, Any]], bool],
) -> tuple[dict[str, Any] | None, str | None]:
    """The recorded start of a run that goes on, and the folder of the weights where they are needed."""
    recorded = (run.record() or {}).get("start")
    same = recorded is not None and (recorded["path"], recorded["weights"]) == (path, weights)
    if recorded is None or not same or not goes_on(inputs_of(recorded)):
        return None, model_of(path, raw=weights == "model")
    if run.latest_checkpoint() is not None or is_finished(inputs_of(recorded)):
        return recorded, None
    # Without a checkpoint it begins again, from the very same weights, though the other run may have gone on.
    try:
        return recorded, model_of(f"{_folder(path)}@{recorded['step']}", raw=weights == "model")
    except UsageError:
        return recorded, model_of(path, raw=weights == "model")


def _folder(path: str) -> str:
    """RUN of RUN@STEP."""
    return path if os.path.exists(path) else path.rpartition("@")[0] or path


def _absolute(path: str) -> str:
    """RUN or RUN@STEP with RUN absolute."""
    folder, _, step = path.rstrip("/").rpartition("@")
    if os.path.exists(path) or not folder:
        return str(Path(path).resolve())
    return f"{Path(folder).resolve()}@{step}"


def check_start(asked: Start, config: ModelConfig) -> None:
    """Raise UsageError for what `open_start` would refuse, without reading the weights."""
    if asked.path is not None:
        path = _absolute(asked.path)
        _fitting(path, model_of(path, raw=asked.weights == "model"), asked.weights, config)


def _open(path: str, folder: str, weights: str, config: ModelConfig) -> WarmStart:
    lineage, source = _fitting(path, folder, weights, config)
    return WarmStart(path, int(lineage.get("steps", 0)), weights, source.checkpoint.sha256(), lineage, source)


def _fitting(path: str, folder: str, weights: str, config: ModelConfig) -> tuple[Mapping[str, Any], OpenSource]:
    """How the weights in a folder were trained, and they themselves, headers only."""
    if not Path(folder).is_dir():
        raise UsageError(
            f"--from {path}: no such run; name the folder of a run, or RUN@STEP for one of its checkpoints"
        )
    provenance = Provenance.read(Path(folder))
    source = open_student(folder, weights if is_checkpoint(Path(folder)) else "auto")
    if weights == "model" and source.checkpoint.weights != "model":
        raise UsageError(
            f"--from {path}: a finished model holds its moving average alone; name a checkpoint (RUN@STEP) for the raw "
            "weights"
        )
    for key, mine in config.values.items():
        theirs = source.config.values[key]
        # A student may start from the weights of one at another size.
        if key not in RESIZABLE and theirs != mine:
            raise UsageError(
                f"--from {path}: its model has {key}={theirs}, the student {mine}; start from a run of the same model"
            )
    return provenance.trained, source
