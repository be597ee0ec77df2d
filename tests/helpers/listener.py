"""A listener that calls functions, for tests that look at what is said or stop what is done."""

from collections.abc import Callable

from litconvert.common.listener import Listener, StepReport, Task


class Advances(Task):
    """Calls a function with what is done and the whole."""

    def __init__(self, total: int, call: Callable[[int, int], object]) -> None:
        self.total, self.call, self.done = total, call, 0

    def advance(self, count: int = 1, remark: str = "") -> None:
        self.done += count
        self.call(self.done, self.total)


class Hearing(Listener):
    """Calls a function for each kind of thing that is heard.

    Args:
        step: called with each training step's report.
        note: called with each note.
        task: called with what is done and the whole, of any task.
        estimates: ask for estimates.
    """

    def __init__(
        self,
        step: Callable[[StepReport], object] = lambda report: None,
        note: Callable[[str], object] = lambda text: None,
        task: Callable[[int, int], object] = lambda done, total: None,
        *,
        estimates: bool = False,
    ) -> None:
        self.on_step, self.on_note, self.on_task = step, note, task
        self.wants_estimates = estimates

    def step(self, report: StepReport) -> None:
        self.on_step(report)

    def note(self, text: str) -> None:
        self.on_note(text)

    def task(self, name: str, total: int) -> Task:
        return Advances(total, self.on_task)
