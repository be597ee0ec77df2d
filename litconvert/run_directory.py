"""What a distillation leaves on disk while it runs: metrics.csv, curves.png, samples and checkpoints."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.errors import LitconvertError, system_cause
from litconvert.files import read_json, write_whole

TERMS = ("attention", "noise", "variational_bound", "teacher_noise", "teacher_variance")
COLUMNS = ("step", "stage", "loss", *TERMS, "gradient_norm", "learning_rate", "ema_decay", "seconds")
RECORD = "run.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is: the stage, the steps done in it, and the steps done in all."""

    stage: int = 0
    step: int = 0
    global_step: int = 0


class RunDirectory:
    """The files of one run. Everything in it but the run's own record can be rebuilt by running on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.csv"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.model = path / "model"

    def start(self, digest: str, recipe_yaml: str, *, force: bool) -> None:
        """Create the directory, or continue it when it is of the same inputs.

        Raises LitconvertError when it holds something else, unless `force` replaces it.
        """
        record = self.path / RECORD
        found = read_json(record).get("digest") if record.is_file() else None
        if self.path.exists() and found != digest:
            if found is not None and not force:
                raise LitconvertError(
                    f"{self.path} holds a run of other inputs (recipe, student, teacher or data); "
                    "choose another path, or replace it with --force"
                )
            # Not even --force deletes what is not a run.
            if found is None and (not self.path.is_dir() or any(self.path.iterdir())):
                raise LitconvertError(f"{self.path} exists and is not a run of litconvert; choose another path")
        try:
            if found not in (None, digest):
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LitconvertError(f"cannot write {self.path}: {system_cause(error) or error}") from error
        write_whole(self.path / "recipe.yaml", recipe_yaml)
        write_whole(record, json.dumps({"format": 1, "digest": digest}, indent=2) + "\n")

    def latest_checkpoint(self) -> tuple[Path, Progress] | None:
        """The newest checkpoint and where it stands."""
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        return (found[-1], Progress(**read_json(found[-1] / "progress.json"))) if found else None

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
            final = self.checkpoints / f"step-{progress.global_step:08d}"
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
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

    def truncate_metrics(self, global_step: int) -> None:
        """Forget rows after a checkpoint, so that a resumed run has every step once."""
        rows = [row for row in self.read_metrics() if int(row["step"]) <= global_step]
        lines = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in rows)]
        write_whole(self.metrics, "\n".join(lines) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One step's row."""
        try:
            with self.metrics.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writerow(
                    {key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()}
                )
        except OSError as error:
            raise LitconvertError(f"cannot write {self.metrics}: {system_cause(error) or error}") from error

    def read_metrics(self) -> list[dict[str, str]]:
        """All complete rows; a row that a killed process left half-written is skipped."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("seconds") and row["step"].isdigit()]

    def plot_curves(self) -> None:
        """curves.png: the loss and its terms, a panel a stage."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = self.read_metrics()
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        if not stages:
            return
        figure, panels = pyplot.subplots(1, len(stages), figsize=(5.5 * len(stages), 4), squeeze=False)
        for panel, stage in zip(panels[0], stages, strict=True):
            mine = [row for row in rows if row["stage"] == stage]
            steps = [int(row["step"]) for row in mine]
            for term in ("loss", *TERMS):
                values = [float(row[term]) if row[term] else float("nan") for row in mine]
                if any(value == value for value in values) and (
                    term == "loss" or any(row[term] != row["loss"] for row in mine)
                ):
                    panel.plot(steps, values, label=term.replace("_", " "), linewidth=2 if term == "loss" else 1)
            panel.set(title=stage.split(":", 1)[-1].replace("_", " "), xlabel="step", yscale="log")
            panel.grid(alpha=0.3)
            panel.legend()
        panels[0][0].set_ylabel("weighted loss term")
        figure.tight_layout()
        figure.savefig(self.path / "curves.png", dpi=100)
        pyplot.close(figure)
