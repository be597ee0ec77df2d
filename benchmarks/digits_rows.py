"""The rows of the digits table: how a student starts, how it is trained after that, and with which seeds.

Two arms are solved: `fresh` is recipe `digits` as it is, `inherited` keeps the teacher's Q, K, V and heads. `paper` is
recipe `digits-paper`, which starts at random. A seed s is that of fresh weights, of the noise of calibration and of the
local steps; images are drawn from 1 + s, and what is scored from 100 + s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from litconvert.conversion.solve_plan import LOCAL_STEPS, STATES, STATES_PER_IMAGE
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe

COMMON = (
    "data.synthesize.num_samples=1024",
    "evaluate.num_samples=1000",
    "evaluate.reference_seed=99",
    "evaluate.batch_size=50",  # rounding alone; it is faster on a CPU than more at a time
    "sample.num_images=1",  # nobody looks at the pictures of these runs
    "distill.checkpoint_every=100000",
)
SEEDS, CLAIM_SEEDS, SEARCH_SEED = (0, 1, 2), (0, 1, 2, 3, 4, 5), 7
# In the order of importance, in which they are measured.
GROUPS = ("curve", "floor", "sizes", "walks", "factors")
LENGTHS = (50, 100, 200, 300, 800)
CLAIMED = 300  # steps, of which docs/results.md claims something
PAPER_STEPS = 800
LOCAL = (0, 50, 100, 200, 400, 800)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
WALKS = (1, 2, 3)
FLOOR = "floor"


@dataclass(frozen=True)
class Arm:
    """One way to start.

    Attributes:
        title: in tables and plots.
        recipe: packaged.
        overrides: of it.
        rates: learning rates, of which the best is chosen for each number of steps, on a seed of its own.
    """

    title: str
    recipe: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...]


ARMS = {
    "fresh": Arm("fresh Q, K, V, O", "digits", (), (1.5e-5, 5e-5, 1.5e-4)),
    "inherited": Arm(
        "Q, K, V inherited",
        "digits",
        ("inherit.attention=q+k+v", "student.num_attention_heads=6"),
        (1.5e-5, 5e-5, 1.5e-4),
    ),
    "paper": Arm("the paper's recipe", "digits-paper", (), (5e-4, 1e-3, 2e-3)),
}
SOLVED = ("fresh", "inherited")


@dataclass(frozen=True)
class Start:
    """A student before training; those of one name and seed are one.

    Attributes:
        arm: of ARMS.
        overrides: of its recipe, beside the arm's.
        variant: what of solving is left out, of `digits_variants.VARIANTS`.
    """

    name: str
    arm: str
    overrides: tuple[str, ...] = ()
    variant: str | None = None


@dataclass(frozen=True)
class Training:
    """The stage after it.

    Attributes:
        rate: None: the best of the arm's on the search seed, at as many steps.
        overrides: of the stage.
    """

    steps: int
    rate: float | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        group: of GROUPS.
        label: what differs from the arm as it is.
        start: None: the teacher itself is scored.
        training: None: the student is scored as it starts.
    """

    name: str
    group: str
    label: str
    start: Start | None
    training: Training | None = None
    seeds: tuple[int, ...] = SEEDS

    @property
    def searched(self) -> tuple[str, ...]:
        """The rows whose best rate is this one's."""
        if self.start is None or self.training is None or self.training.rate is not None:
            return ()
        return tuple(search_name(self.start.arm, self.training.steps, rate) for rate in ARMS[self.start.arm].rates)


def search_name(arm: str, steps: int, rate: float) -> str:
    return f"{arm}-{steps}-at-{rate_text(rate)}"


def rate_text(rate: float) -> str:
    """`1.5e-4`."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@cache
def recipe_of(arm: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """An arm's recipe, resolved."""
    return resolve(ARMS[arm].recipe, (*COMMON, *ARMS[arm].overrides, *overrides)).recipe


def solving_defaults(arm: str) -> tuple[int, int, int]:
    """States, local steps and states per image of a solved arm as it is."""
    settings = recipe_of(arm).solve
    assert settings is not None
    local_steps = LOCAL_STEPS if settings.local_steps is None else settings.local_steps
    return settings.states or STATES, local_steps, settings.states_per_image or STATES_PER_IMAGE


def local_name(arm: str, local_steps: int) -> str:
    """The row of an arm with so many local steps."""
    if local_steps == 0:
        return f"{arm}-closed"
    return f"{arm}-0" if local_steps == solving_defaults(arm)[1] else f"{arm}-local-{local_steps}"


def states_name(arm: str, states: int) -> str:
    """The row of an arm with so many states."""
    return f"{arm}-0" if states == solving_defaults(arm)[0] else f"{arm}-states-{states}"


def walks_name(arm: str, walks: int) -> str:
    """The row of an arm with so many walks."""
    return f"{arm}-0" if walks == 1 else f"{arm}-walks-{walks}"


def _solved(name: str, group: str, label: str, arm: str, *overrides: str, variant: str | None = None) -> Row:
    """A row of a student as it is solved."""
    return Row(name, group, label, Start(name, arm, overrides, variant))


def _curve() -> Iterator[Row]:
    """The curve over end-to-end steps: starts, then the search for rates, then what is trained at the best."""
    for arm in SOLVED:
        yield Row(f"{arm}-0", "curve", "0 steps", Start(arm, arm), seeds=CLAIM_SEEDS)
    for arm in reversed(SOLVED):
        closed = Start(f"{arm}-closed", arm, ("solve.local_steps=0",))
        seeds = CLAIM_SEEDS if arm == "inherited" else SEEDS
        yield Row(closed.name, "curve", "closed form alone", closed, seeds=seeds)
    claimed_first = sorted(LENGTHS, key=lambda steps: steps not in (CLAIMED, PAPER_STEPS))
    for steps in claimed_first:
        for name, settings in ARMS.items():
            for rate in settings.rates:
                row = search_name(name, steps, rate)
                label = f"{steps} steps at {rate_text(rate)}"
                yield Row(row, "curve", label, Start(name, name), Training(steps, rate), (SEARCH_SEED,))
        for name in ARMS:
            claimed = steps == (PAPER_STEPS if name == "paper" else CLAIMED)
            seeds = CLAIM_SEEDS if claimed else SEEDS
            yield Row(f"{name}-{steps}", "curve", f"{steps} steps", Start(name, name), Training(steps), seeds)


def _sizes() -> Iterator[Row]:
    """The curves over local steps and over states; where they meet the arm as it is, its own row is theirs."""
    for arm in SOLVED:
        states, local_steps, _ = solving_defaults(arm)
        for count in LOCAL:
            if count not in (0, local_steps):
                name, label = local_name(arm, count), f"{count} local steps"
                yield _solved(name, "sizes", label, arm, f"solve.local_steps={count}")
        for count in SIZES:
            if count != states:
                yield _solved(states_name(arm, count), "sizes", f"{count} states", arm, f"solve.states={count}")


def _walks() -> Iterator[Row]:
    for walks in WALKS[1:]:
        for arm in SOLVED:
            yield _solved(walks_name(arm, walks), "walks", f"{walks} walks", arm, f"solve.walks={walks}")


def _factors() -> Iterator[Row]:
    """One factor at a time, each in the arms in which it says something."""
    group = "factors"
    for arm in SOLVED:
        yield _solved(f"{arm}-steps-alone", group, "local steps alone, no closed form", arm, variant="steps alone")
        yield _solved(f"{arm}-own-target", group, "own target, not the repairing one", arm, variant="own target")
    closed = "solve.local_steps=0"
    name, label = "inherited-own-target-closed", "own target, closed form alone"
    yield _solved(name, group, label, "inherited", closed, variant="own target")
    name, label = "inherited-o-closed", "O solved, not the convolution; closed form alone"
    yield _solved(name, group, label, "inherited", closed, variant="O alone")
    for arm, weights in ((arm, weights) for weights in ((0, 0), (0.5, 0.05)) for arm in SOLVED):
        noise, variance = weights
        lambdas = (f"distill.stages.0.noise_weight={noise}", f"distill.stages.0.variance_weight={variance}")
        name, label = f"{arm}-{CLAIMED}-lambda-{noise}", f"{CLAIMED} steps at lambda {noise} and {variance}"
        yield Row(name, group, label, Start(arm, arm), Training(CLAIMED, overrides=lambdas))
    for arm, choices in (("fresh", (1, 2, 3, 6)), ("inherited", (2, 6))):
        for heads in _others(arm, choices, recipe_of(arm).student.num_attention_heads):
            name, label = f"{arm}-heads-{heads}", f"{heads} head{'s' * (heads > 1)}"
            yield _solved(name, group, label, arm, f"student.num_attention_heads={heads}")
    for kernel in ("gelu", "focused"):
        yield _solved(f"fresh-{kernel}", group, f"kernel {kernel}", "fresh", f"student.kernel={kernel}")
    for arm, sides in (("fresh", (0, 3, 5, 7)), ("inherited", (0, 5))):
        for side in _others(arm, sides, recipe_of(arm).student.conv_size):
            label = f"convolution of {side} x {side}" if side else "no convolution"
            yield _solved(f"{arm}-convolution-{side}", group, label, arm, f"student.conv_size={side}")
    for count in _others("fresh", (1, 4, 16), solving_defaults("fresh")[2]):
        label = f"{count} state{'s' * (count > 1)} of each image"
        yield _solved(f"fresh-per-image-{count}", group, label, "fresh", f"solve.states_per_image={count}")
    for arm in SOLVED:
        yield _solved(f"{arm}-low-noise", group, "more states near images", arm, "solve.timestep_power=1.5")


def _others(arm: str, values: Sequence[int], own: int) -> list[int]:
    """Without the value that the arm has as it is."""
    assert own in values, f"{arm} has {own}, which is none of {values}"
    return [value for value in values if value != own]


def all_rows() -> dict[str, Row]:
    """Every row by its name, in the order of importance."""
    floor = Row(FLOOR, "floor", "the teacher against itself", None, seeds=CLAIM_SEEDS)
    rows = {row.name: row for row in (*_curve(), floor, *_sizes(), *_walks(), *_factors())}
    return dict(sorted(rows.items(), key=lambda item: GROUPS.index(item[1].group)))
