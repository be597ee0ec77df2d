"""What a distillation leaves on disk while it runs: metrics.csv, timestep_errors.csv, their plots, checkpoints."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from litconvert.common.files import read_json, write_whole
from litconvert.common.listener import TERMS
from litconvert.common.outputs import (
    DATA_SET,
    RUN,
    UNFINISHED,
    at_work,
    contents,
    is_filled,
    place_of,
    refuse_foreign,
    refuse_stranger,
    remove,
)
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.runs.step_table import StepTable

COLUMNS = (
    "step",
    "stage",
    "loss",
    *TERMS,
    "gradient_norm",
    "learning_rate",
    "ema_decay",
    "skipped_steps",
    "seconds",
    "images_per_second",
    "memory_bytes",
    "flops_utilization",
)
# Of the console alone: a forecast is no record.
NOT_KEPT = ("eta_seconds",)
TIMESTEP_COLUMNS = ("step", "bucket_low", "bucket_high", "error")
RECORD = "run.json"
LATENTS = "latents"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Progress:
    """Where a run is: the stage, the steps done in it, the steps done in all, and those of them that were skipped."""

    stage: int = 0
    step: int = 0
    global_step: int = 0
    skipped_steps: int = 0


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, by what is in it; a copy may lack some of that."""
    return any(os.path.isfile(path / name) for name in (RECORD, "model/config.json"))


def model_of(path: str, *, raw: bool = False) -> str:
    """The model that a path means, where it is that of a run: RUN or RUN@STEP; any other path as it is.

    RUN is the run's finished model, or its latest checkpoint where that is newer or nothing is finished yet.

    Args:
        raw: its raw weights are wanted, which checkpoints alone hold.

    Raises UsageError for a run that holds no such model, and for a step whose checkpoint is not there.
    """
    folder, _, step = path.rstrip("/").rpartition("@")
    if folder and not os.path.exists(path) and is_run(Path(folder)):
        return str(_model_of_step(RunDirectory(Path(folder)), step, raw=raw))
    run = RunDirectory(Path(path))
    if not is_run(run.path):
        return path
    latest = run.latest_checkpoint()
    finished = run.finished_steps()
    if raw and latest is None and finished is not None:
        raise UsageError(f"{path}: its finished model holds the moving average alone, and no checkpoint is kept")
    if not raw and finished is not None and (latest is None or latest[1].global_step <= finished):
        return str(run.model)
    if latest is None:
        raise UsageError(f"{path}: the run has no model and no checkpoint yet; run the same command again to go on")
    return str(latest[0])


def _model_of_step(run: "RunDirectory", step: str, *, raw: bool) -> Path:
    kept = run.kept_steps()
    if step.isdecimal() and int(step) in kept:
        return run.checkpoint_of(int(step))
    if not raw and step.isdecimal() and int(step) == run.finished_steps():
        return run.model
    known = f"those of steps {', '.join(map(str, kept))}" if kept else "none"
    raise UsageError(
        f"{run.path}@{step}: no checkpoint of this step is there; the run keeps {known} (distill.keep_checkpoints says "
        "how many, distill.checkpoint_every how often)"
    )


def _remove(run: Path) -> None:
    """Empty a run's folder, its record last: what is left when that is interrupted is still known as one."""
    for path in contents(run):
        if path.name not in (RECORD, LATENTS):
            remove(path)
    (run / RECORD).unlink()


class RunDirectory:
    """The files of one run. Everything in it but the run's own record can be rebuilt by running on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.csv"
        self.timestep_errors = path / "timestep_errors.csv"
        self._metrics = StepTable(self.metrics, COLUMNS)
        self._timestep_errors = StepTable(self.timestep_errors, TIMESTEP_COLUMNS)
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.model = path / "model"

    def record(self) -> dict[str, Any] | None:
        """What the run was made from: run.json; None where there is no run.

        Raises LitconvertError for the run of a newer litconvert.
        """
        path = self.path / RECORD
        if not path.is_file():
            return None
        found = read_json(path)
        if found.get("format") not in range(1, FORMAT_VERSION + 1):
            raise LitconvertError(
                f"{path}: format {found.get('format')}, this litconvert reads up to {FORMAT_VERSION}; upgrade it"
            )
        return found

    def start(self, made_from: Mapping[str, Any], recipe_yaml: str, *, replace: bool = False) -> None:
        """Create the directory, or go on with it, which is kept to this process (`held`) where it is there.

        Args:
            made_from: for run.json.
            replace: remove the run that is there.

        Raises LitconvertError when something else than a run is there, which is never removed.
        """
        found = (self.path / RECORD).is_file()
        if self.path.exists() and not found and not (self.path.is_dir() and self._is_free()):
            refuse_stranger(self.path, "a run")
        if found and replace:
            refuse_foreign(self.path, RUN)
        # Of a new run, that no other command is filling the folder.
        with nullcontext() if found else at_work(self.path):
            try:
                if found and replace:
                    _remove(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / UNFINISHED).unlink(missing_ok=True)  # of one that was stopped
            except OSError as error:
                raise LitconvertError(f"cannot write {self.path}: {system_cause(error) or error}") from error
            # The record first: what a killed process leaves behind is then still known as a run.
            write_whole(self.path / RECORD, json.dumps({"format": FORMAT_VERSION, **made_from}, indent=2) + "\n")
            write_whole(self.path / "recipe.yaml", recipe_yaml)

    def _is_free(self) -> bool:
        """Whether a folder holds nothing but the training set that may be drawn before its run begins."""
        return all(path.name == LATENTS and (path / DATA_SET.record).is_file() for path in contents(self.path))

    @property
    def latents(self) -> Path:
        """Where the training set goes that the teacher draws: beside the run, since its inputs are known only then; in
        it where the run's folder has to stay where it is."""
        inside = place_of(self.path) / LATENTS
        if inside.is_dir() or is_filled(self.path):
            return inside
        return self.path.with_name(f"{self.path.name}-{LATENTS}")

    def checkpoint_of(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.checkpoints / f"step-{step:08d}"

    def kept_steps(self) -> list[int]:
        """The steps whose checkpoints are there, in order."""
        found = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else ()
        return sorted(int(path.name[5:]) for path in found if path.name[5:].isdecimal())

    def latest_checkpoint(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint and where it stands."""
        steps = self.kept_steps()
        if not steps:
            return None
        folder = self.checkpoint_of(steps[-1])
        return folder, Progress(**read_json(folder / "progress.json"))

    def finished_steps(self) -> int | None:
        """How many steps the finished model was trained for; None: there is none."""
        record = self.model / "litconvert.json"
        if not record.is_file():
            return None
        found = read_json(record)
        return int((found.get("distillation") or found.get("training") or {}).get("steps", 0))

    def save_checkpoint(self, progress: Progress, save: Callable[[Path], None], *, keep: int, main: bool) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest.

        `save` fills the folder and is called on every process; only the main one renames and drops.
        """
        partial = self.checkpoints / ".partial"
        try:
            if main:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
            save(partial)
            if not main:
                return
            write_whole(partial / "progress.json", json.dumps(progress.__dict__) + "\n")
            final = self.checkpoint_of(progress.global_step)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            self._drop(self.kept_steps()[:-keep])
        except Exception as error:  # torch, safetensors and Python each report a full disk in their own way
            shutil.rmtree(partial, ignore_errors=True)
            cause = system_cause(error)
            # torch's zip writer reports a full disk without the system's error number.
            if cause is None and isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
                cause = "the disk is full or the file-size limit was reached; free some space"
            if cause is None:
                raise
            raise LitconvertError(
                f"cannot save the checkpoint of step {progress.global_step}: {cause}; then run the same command again"
            ) from error

    def _drop(self, steps: Sequence[int]) -> None:
        """Remove checkpoints. Somebody may be reading one: that is no reason for the run to end."""
        for step in steps:
            folder = self.checkpoint_of(step)
            with suppress(OSError):
                folder.rename(folder.with_name(f".dropped-{folder.name}"))
        for dropped in self.checkpoints.glob(".dropped-step-*"):
            shutil.rmtree(dropped, ignore_errors=True)

    def truncate_metrics(self, global_step: int) -> None:
        """Forget rows after a checkpoint, of both tables, so that a resumed run has every step once."""
        self._metrics.replace(global_step + 1)
        if self.timestep_errors.is_file():
            self._timestep_errors.replace(global_step + 1)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One step's row. Loss terms are weighted: what a stage has not is left empty."""
        self._metrics.append({key: value for key, value in row.items() if key not in NOT_KEPT})

    def read_metrics(self) -> list[dict[str, str]]:
        """All complete rows; a row that a killed process left half-written is skipped."""
        return list(self._metrics.rows())

    def last_step(self) -> int:
        """The last step in metrics.csv, which may be after the latest checkpoint; 0: there is none."""
        return max((int(row["step"]) for row in self._metrics.rows()), default=0)

    def record_usage(self, stage: int, objective: str, peak_bytes: int) -> None:
        """usage.json: what a stage that is done has taken, most memory of the main process and seconds of its steps."""
        seconds = sum(float(row["seconds"]) for row in self._metrics.rows() if row["stage"] == f"{stage}:{objective}")
        earlier = self.read_usage()
        # The process that ends a stage may only have begun it again.
        most = max(peak_bytes, int(earlier.get(str(stage), {}).get("peak_bytes", 0)))
        usage = earlier | {str(stage): {"peak_bytes": most, "seconds": seconds}}
        write_whole(self.path / "usage.json", json.dumps(usage, indent=2) + "\n")

    def read_usage(self) -> dict[str, dict[str, float]]:
        """What `record_usage` wrote, by stage."""
        path = self.path / "usage.json"
        return read_json(path) if path.is_file() else {}

    def plot_curves(self) -> None:
        """curves.png: the loss and its terms, a panel a stage."""
        from litconvert.runs.plots import plot_curves

        plot_curves(self._metrics.rows(), TERMS, self.path / "curves.png")

    def append_timestep_errors(self, step: int, errors: Sequence[float], timesteps: float) -> None:
        """One measurement of `training.observer.timestep_errors`: its buckets are equal parts of [0, timesteps).

        It takes the place of an earlier one of this step. A bucket without samples (NaN) is left empty.
        """
        width = timesteps / len(errors)
        rows = [
            {
                "step": step,
                "bucket_low": bucket * width,
                "bucket_high": (bucket + 1) * width,
                "error": None if math.isnan(error) else error,
            }
            for bucket, error in enumerate(errors)
        ]
        self._timestep_errors.replace(step, rows)

    def error_summary(self) -> tuple[float, float] | None:
        """The student's error against its teacher before the run and after it, as means over the timesteps' parts.

        None where no teacher was compared with.
        """
        measured = groupby(self._timestep_errors.rows(), key=lambda row: row["step"])
        errors = ([float(row["error"]) for row in rows if row["error"]] for _, rows in measured)
        means = [fmean(found) for found in errors if found]
        return (means[0], means[-1]) if means else None

    def plot_timestep_errors(self) -> None:
        """timestep_errors.png: the error against the timestep, a line a measurement."""
        from litconvert.runs.plots import plot_timestep_errors

        measurements = {
            int(step): [
                ((float(row["bucket_low"]) + float(row["bucket_high"])) / 2, float(row["error"] or "nan"))
                for row in rows
            ]
            for step, rows in groupby(self._timestep_errors.rows(), key=lambda row: row["step"])
        }
        plot_timestep_errors(measurements, self.path / "timestep_errors.png")
