"""Starting a run from another run's weights: which ones, whether they fit, and what is recorded of their origin."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.errors import LitconvertError, UsageError
from litconvert.model_directory import is_checkpoint, read_provenance
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.recipe import Source, Start
from litconvert.run_directory import RunDirectory, model_of
from litconvert.sources import OpenSource, open_source

# A student may start from the weights of one at another size.
RESIZABLE = ("sample_size", "interpolation_scale")


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
        return {"sha256": self.sha256, "weights": self.weights}

    @property
    def record(self) -> dict[str, Any]:
        """For the run's own record and its model's."""
        return {"path": self.path, "step": self.step, **self.inputs, "lineage": dict(self.lineage)}

    def give(self, model: LiTTransformer2DModel) -> None:
        """Put the weights into a model, in its own dtype."""
        if self.source is not None:
            state = {name: self.source.values(name).clone() for name in self.source.reading.origins}
            model.load_state_dict(state, strict=True)


def open_start(asked: Start, run: RunDirectory, config: Mapping[str, Any], *, again: bool) -> WarmStart:
    """The weights that a run starts from, or did start from: RUN without a step means its latest only once.

    Args:
        run: that starts from them.
        config: of its student.
        again: the run is begun anew, whatever is recorded of its start.

    Raises UsageError for weights of another model, LitconvertError when what a run started from is gone too early.
    """
    if asked.path is None:
        raise UsageError("distill.start names no run to start from; give it with --from, or as distill.start.path")
    path = _absolute(asked.path)
    recorded = None if again else (run.record() or {}).get("start")
    if recorded is None or (recorded["path"], recorded["weights"]) != (path, asked.weights):
        return _open(path, path, asked.weights, config)
    if run.latest_checkpoint() is not None or run.model.is_dir():
        kept = {key: recorded[key] for key in ("path", "step", "weights", "sha256", "lineage")}
        return WarmStart(**kept, source=None)
    # Begun and stopped before its first checkpoint: the very same weights, though the other run may have gone on.
    try:
        start = _open(path, f"{_folder(path)}@{recorded['step']}", asked.weights, config)
    except UsageError:
        start = _open(path, path, asked.weights, config)
    if start.sha256 != recorded["sha256"]:
        raise LitconvertError(
            f"{run.path} had not saved anything yet, and the weights of step {recorded['step']} that it started from "
            f"are gone; begin it again with --force"
        )
    return start


def _folder(path: str) -> str:
    """RUN of RUN@STEP."""
    return path if os.path.exists(path) else path.rpartition("@")[0] or path


def _absolute(path: str) -> str:
    """RUN or RUN@STEP with RUN absolute."""
    folder, _, step = path.rstrip("/").rpartition("@")
    if os.path.exists(path) or not folder:
        return str(Path(path).resolve())
    return f"{Path(folder).resolve()}@{step}"


def _open(path: str, place: str, weights: str, config: Mapping[str, Any]) -> WarmStart:
    folder = model_of(place)
    if not Path(folder).is_dir():
        raise UsageError(
            f"--from {path}: no such run; name the folder of a run, or RUN@STEP for one of its checkpoints"
        )
    provenance = read_provenance(Path(folder))
    source = open_source(Source(path=folder), weights if is_checkpoint(Path(folder)) else "auto")
    if weights == "model" and source.checkpoint.weights != "model":
        raise UsageError(
            f"--from {path}: a finished model holds its moving average alone; name a checkpoint (RUN@STEP) for the raw "
            "weights"
        )
    for key, mine in config.items():
        theirs = source.reading.config[key]
        if key not in RESIZABLE and theirs != mine:
            raise UsageError(
                f"--from {path}: its model has {key}={theirs}, the student {mine}; start from a run of the same model"
            )
    lineage = provenance.get("distillation") or provenance.get("training") or {}
    return WarmStart(path, int(lineage.get("steps", 0)), weights, source.checkpoint.sha256(), lineage, source)
