"""TensorBoard, wandb and trackio, through accelerate."""

import contextlib
import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from litconvert.common.files import read_json, write_whole
from litconvert.common.listener import Listener
from litconvert.common.versions import is_installed
from litconvert.errors import UsageError
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import RunDirectory

PROJECT = "litconvert"
IDENTITY = "trackers.json"


def tracker_packages(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose package is missing: accelerate would leave it out without a word."""
    for name in names:
        if not is_installed(name):
            raise UsageError(
                f"distill.trackers names {name}, which is not installed; install it with `pip install {name}`, or "
                "leave it out: metrics.csv has every step in any case"
            )


def start_tracker(name: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """accelerate's tracker of a name, begun.

    Args:
        folder: for those that write files.
        options: of its package.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    tracker = kind(PROJECT, **place, **options)
    tracker.start()
    return tracker


class Trackers:
    """Where a run's metrics go besides metrics.csv. A run that goes on is the same one there, with every step once.

    On all processes; only the main one writes. A tracker that fails is given up with a note, and training goes on.

    Args:
        run: read for where it stands, so before `truncate_metrics`.
        recipe: kept by those trackers that keep a config.
        listener: told of a tracker that failed.
        is_main: this is the main process.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe, listener: Listener, *, is_main: bool = True) -> None:
        self.listener, self.trackers = listener, list[Any]()
        self.given: dict[str, int] = {}
        if not recipe.distill.trackers or not is_main:
            return
        record = run.path / IDENTITY
        if not record.is_file():
            # Of this folder, not of its inputs: the same inputs, run again elsewhere, are another run.
            write_whole(record, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        name = f"{run.path.resolve().name}-{read_json(record)['id']}"
        latest = run.latest_checkpoint()
        step = latest[1].global_step if latest else 0
        # trackio would keep a step that is logged again twice, so what it has been given is left out.
        self.given = {"trackio": run.last_step()}
        config = recipe.model_dump(mode="json")
        options: dict[str, dict[str, Any]] = {
            # Steps from here on that an earlier process wrote are hidden.
            "tensorboard": {"purge_step": step + 1},
            # wandb goes on at the step after the last it has, and drops those before.
            "wandb": {"id": name, "name": name, "resume": "allow", "dir": str(run.path), "config": config},
            "trackio": {"name": name, "resume": "allow", "config": config},
        }
        for tracker in recipe.distill.trackers:
            with self._failures(tracker), _stdout_to_stderr():
                self.trackers.append(start_tracker(tracker, run.path / "logs", options[tracker]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's metrics, by name."""
        for tracker in list(self.trackers):
            if step > self.given.get(tracker.name, 0):
                with self._failures(tracker.name, tracker):
                    tracker.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Write what is buffered. Not accelerate's `end_training`, which ends the group of processes too."""
        for tracker in list(self.trackers):
            with self._failures(tracker.name, tracker), _stdout_to_stderr():
                # accelerate ends trackio's run in a way that trackio does not notice: it would end it again when the
                # process exits, and say so on stdout.
                module = sys.modules.get(tracker.name) if tracker.name == "trackio" else None
                (module or tracker).finish()
        self.trackers = []

    @contextlib.contextmanager
    def _failures(self, name: str, tracker: Any = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a service's client may raise anything, and no metric is worth the run
            self.trackers = [one for one in self.trackers if one is not tracker]
            reason = " ".join(str(error).split()) or type(error).__name__
            self.listener.note(f"{name}: nothing more is logged there ({reason}); metrics.csv has every step")


def _stdout_to_stderr() -> contextlib.redirect_stdout[Any]:
    """Stdout is for data: trackio and wandb say hello there."""
    return contextlib.redirect_stdout(sys.stderr)
