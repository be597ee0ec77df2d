"""What a function tells whoever called it while it works."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

# The terms that a loss may be the sum of, by their names in metrics.csv.
TERMS = (
    "noise",
    "variational_bound",
    "velocity",
    "teacher_noise",
    "teacher_variance",
    "teacher_velocity",
    "features",
)


@dataclass(frozen=True)
class StepReport:
    """A training step.

    Attributes:
        stage: what the stage learns (`hybrid`, ...).
        step, steps: of the stage, from 1.
        global_step, total_steps: of all stages.
        metrics: loss terms, learning rate, speed and so on, by the names of metrics.csv.
    """

    stage: str
    step: int
    steps: int
    global_step: int
    total_steps: int
    metrics: Mapping[str, float]


class Task(AbstractContextManager["Task"]):
    """Work of a known length, and how far it has come; nobody looks at this one."""

    def advance(self, count: int = 1, remark: str = "") -> None:
        """So many more parts are done; `remark` says what is at hand."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


# Of work that nobody has begun as a task.
UNSEEN = Task()


class Listener:
    """Hears what a function has to say, and shows it or not; this one is silent. A terminal's are in `cli.live`."""

    # Whether a run is to be estimated before it begins, which takes some seconds, and said in notes.
    wants_estimates = False

    def note(self, text: str) -> None:
        """A sentence for the user."""

    def task(self, name: str, total: int) -> Task:
        """Work of `total` parts begins; a context that ends with it."""
        return Task()

    def training(self, name: str) -> AbstractContextManager[None]:
        """Training begins, of which each step is told; a context that ends with it."""
        return nullcontext()

    def step(self, report: StepReport) -> None:
        """A training step is done."""


SILENT = Listener()
