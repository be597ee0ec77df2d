"""What is seen of work while it is done: bars on a terminal, lines in a log."""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from litconvert.cli import terminal as console
from litconvert.common.listener import TERMS, Listener, StepReport, Task
from litconvert.common.quantities import duration, size

# A log gets a line at most so often: two a minute are 20,000 in a week.
SECONDS_BETWEEN_LINES = 30.0
SECONDS_A_TENTH = 5.0


def screen() -> Listener:
    """What suits where stderr goes: a live display, or plain lines where it is no terminal, or nothing with -q."""
    if console.is_quiet():
        return Listener()
    return _Terminal() if console.is_live() else _Log()


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
        "memory_bytes": lambda value: f"memory {size(int(value))}",
        "eta_seconds": lambda value: f"ETA {duration(value)}",
    }
    return [form(metrics[name]) for name, form in forms.items() if name in metrics]


class _Log(Listener):
    """Lines: for work its tenths; of training the first and the last step of a stage, and one every so often."""

    wants_estimates = True

    def __init__(self) -> None:
        self.name = ""
        self.written = float("-inf")

    def note(self, text: str) -> None:
        console.note(text)

    def task(self, name: str, total: int) -> Task:
        return _Tenths(name, total)

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        self.name, self.written = name, float("-inf")
        yield

    def step(self, report: StepReport) -> None:
        if time.monotonic() - self.written < SECONDS_BETWEEN_LINES and report.step not in (1, report.steps):
            return
        self.written = time.monotonic()
        place = f"{report.stage} {report.step}/{report.steps}"
        if report.total_steps != report.steps:
            place += f" ({report.global_step}/{report.total_steps} in all)"
        console.note(f"{self.name}: {place}: {', '.join((*loss_terms(report.metrics), *conditions(report.metrics)))}")


class _Tenths(Task):
    """A line as work begins and as it ends, and one for each tenth in between that takes its time."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.tenth = name, total, 0, 0
        self.written = time.monotonic()

    def __enter__(self) -> Self:
        self._write("")
        return self

    def advance(self, count: int = 1, remark: str = "") -> None:
        self.done += count
        tenth = 10 * self.done // max(self.total, 1)
        slow = tenth != self.tenth and time.monotonic() - self.written >= SECONDS_A_TENTH
        if self.done and (self.done == self.total or slow):
            self.tenth = tenth
            self._write(remark)

    def _write(self, remark: str) -> None:
        self.written = time.monotonic()
        console.note(f"{self.name}: {self.done}/{self.total} {remark}".rstrip())


class _Terminal(Listener):
    """Bars that are drawn over, in 80 columns."""

    wants_estimates = True

    def __init__(self) -> None:
        self.steps: _Steps | None = None

    def note(self, text: str) -> None:
        console.note(text)

    def task(self, name: str, total: int) -> Task:
        return _Bar(name, total)

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        with Live(console=console.err, refresh_per_second=4) as live:
            self.steps = _Steps(name, live)
            yield

    def step(self, report: StepReport) -> None:
        if self.steps is not None:
            self.steps.show(report)


class _Bar(Task):
    """A bar of the work, on a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[remark]}"),
            console=console.err,
        )
        self.work = self.bar.add_task(name, total=total, remark="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def advance(self, count: int = 1, remark: str = "") -> None:
        self.bar.update(self.work, advance=count, remark=remark)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


class _Steps:
    """A bar for the stage and one for the run, then the loss terms and the conditions, in 80 columns."""

    def __init__(self, name: str, live: Live) -> None:
        self.live = live
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), console=console.err
        )
        self.stage = self.bars.add_task(name, total=None)
        self.run = self.bars.add_task("in all", total=None, visible=False)

    def show(self, report: StepReport) -> None:
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
