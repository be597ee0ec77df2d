"""What is seen of a run while it trains: a display on a terminal, lines in a log."""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from litconvert import console
from litconvert.run_directory import TERMS

if TYPE_CHECKING:
    from litconvert.trainer import StepReport

# A log gets a line at most so often: two a minute are 20,000 in a week.
SECONDS_BETWEEN_LINES = 30.0


class TrainingDisplay:
    """Shows a run's steps; this one shows nothing, which is what -q asks for."""

    def draw(self, done: int, total: int) -> None:
        """So many samples of the training set are drawn."""

    def step(self, report: "StepReport") -> None:
        """A step is done."""


@contextmanager
def training_display(description: str = "distil") -> Iterator[TrainingDisplay]:
    """What suits where stderr goes: a live display, or plain lines where it is no terminal, or nothing with -q."""
    if console.is_quiet():
        yield TrainingDisplay()
    elif not console.is_live():
        yield _Lines(description)
    else:
        with Live(console=console.err, refresh_per_second=4) as live:
            yield _LiveDisplay(description, live)


def loss_terms(metrics: Mapping[str, float]) -> list[str]:
    """`loss 0.153`, then the terms it is the sum of, where there are several."""
    terms = [name for name in TERMS if name in metrics]
    names = ["loss", *terms] if len(terms) > 1 else ["loss"]
    return [f"{name.replace('_', ' ')} {metrics[name]:.3g}" for name in names if name in metrics]


def conditions(metrics: Mapping[str, float]) -> list[str]:
    """Learning rate, speed, memory and the time left, as far as they are known."""
    forms: Mapping[str, Callable[[float], str]] = {
        "learning_rate": lambda value: f"learning rate {value:.2e}",
        "gradient_norm": lambda value: f"gradient norm {value:.3g}",
        "images_per_second": lambda value: f"{value:,.0f} images/s" if value >= 100 else f"{value:.3g} images/s",
        "flops_utilization": lambda value: f"MFU {value:.1%}",
        "memory_bytes": lambda value: f"memory {console.size(int(value))}",
        "eta_seconds": lambda value: f"ETA {duration(value)}",
    }
    return [form(metrics[name]) for name, form in forms.items() if name in metrics]


def duration(seconds: float) -> str:
    """3d 04:05:06, without the days where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}"
    return f"{days}d {hours:02}:{minutes:02}:{rest:02}" if days else clock


class _Lines(TrainingDisplay):
    """One line for the first and the last step of each stage, and in between at most one every so often."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.written = float("-inf")

    def draw(self, done: int, total: int) -> None:
        if self._due() or done >= total:
            self._write(f"{self.description}: {done}/{total} samples drawn")

    def step(self, report: "StepReport") -> None:
        if self._due() or report.step in (1, report.steps):
            place = f"{report.stage} {report.step}/{report.steps}"
            if report.total_steps != report.steps:
                place += f" ({report.global_step}/{report.total_steps} in all)"
            shown = ", ".join((*loss_terms(report.metrics), *conditions(report.metrics)))
            self._write(f"{self.description}: {place}: {shown}")

    def _due(self) -> bool:
        return time.monotonic() - self.written >= SECONDS_BETWEEN_LINES

    def _write(self, text: str) -> None:
        self.written = time.monotonic()
        console.note(text)


class _LiveDisplay(TrainingDisplay):
    """A bar for the stage and one for the run, then the loss terms and the conditions, in 80 columns."""

    def __init__(self, description: str, live: Live) -> None:
        self.live = live
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), console=console.err
        )
        self.stage = self.bars.add_task(description, total=None)
        self.run = self.bars.add_task("in all", total=None, visible=False)

    def draw(self, done: int, total: int) -> None:
        self.bars.update(self.stage, description="samples drawn", completed=done, total=total)
        self.live.update(self.bars)

    def step(self, report: "StepReport") -> None:
        stage = report.stage.replace("_", " ")
        self.bars.update(self.stage, description=stage, completed=report.step, total=report.steps)
        several = report.total_steps != report.steps
        self.bars.update(self.run, completed=report.global_step, total=report.total_steps, visible=several)
        below = (_rows(loss_terms(report.metrics)), _rows(conditions(report.metrics)))
        self.live.update(Group(self.bars, *(Text(rows) for rows in below)))


def _rows(items: list[str]) -> str:
    """Items side by side; a line ends between two of them, not within one."""
    # textwrap does not break at this space, which rich does.
    glued = "  ".join(item.replace(" ", "\u00a0") for item in items)
    return textwrap.fill(glued, console.err.width).replace("\u00a0", " ")
