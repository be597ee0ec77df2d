"""The digits table's results as Markdown, and its curves as a PNG.

python -m benchmarks.digits_plots [FOLDER]     of the results in a folder; default: benchmarks/results/digits
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.digits_results import RESULTS, Results
from benchmarks.digits_rows import (
    ARMS,
    CLAIM_SEEDS,
    CLAIMED,
    FLOOR,
    LENGTHS,
    LOCAL,
    PAPER_STEPS,
    SEEDS,
    SIZES,
    SOLVED,
    WALKS,
    Row,
    all_rows,
    local_name,
    rate_text,
    states_name,
    walks_name,
)
from litconvert.common.files import whole_file

METRICS = ("frechet_distance", "class_accuracy")
CURVES = "curves.png"
CLAIMS = Path(__file__).parents[1] / "docs" / "pictures" / "digits.png"  # the README shows it
COLOURS = {"fresh": "#0072b2", "inherited": "#d55e00", "paper": "#555555"}
NOT_MEASURED = "not measured"
ROWS = all_rows()


def spread(values: Iterable[float], form: str) -> str:
    """`1.42 ± 0.08`: mean and standard deviation."""
    found = list(values)
    if not found:
        return NOT_MEASURED
    deviation = f" ± {form.format(stdev(found))}" if len(found) > 1 else ""
    return form.format(mean(found)) + deviation


def values_of(results: Results, name: str, key: str, seeds: Sequence[int] = CLAIM_SEEDS) -> list[float]:
    """One a seed, of those that the row has."""
    return list(results.values(name, key, seeds).values())


def distance(results: Results, name: str, seeds: Sequence[int] = CLAIM_SEEDS) -> str:
    return spread(values_of(results, name, "frechet_distance", seeds), "{:.2f}")


def classes(results: Results, name: str, seeds: Sequence[int] = CLAIM_SEEDS) -> str:
    return spread((100 * value for value in values_of(results, name, "class_accuracy", seeds)), "{:.1f}")


def cost(results: Results, name: str, unit: str) -> str:
    """`110 + 25`: of the walk and of training, as far as there were; the unit is `core_seconds` or `macs`, in 1e12."""
    if ROWS[name].start is None:
        return ""
    scale, form = (1.0, "{:.0f}") if unit == "core_seconds" else (1e12, "{:.1f}")
    found = (values_of(results, name, f"{part}_{unit}") for part in ("walk", "training"))
    means = [mean(values) / scale for values in found if any(values)]
    return " + ".join(form.format(value) for value in means)


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    ruled = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def curve_table(results: Results) -> str:
    """Over end-to-end steps, with the rates that were best."""
    rows = [(ROWS[FLOOR].label, FLOOR)]
    rows += [(f"{ARMS[arm].title}, closed form alone", f"{arm}-closed") for arm in SOLVED]
    for arm, settings in ARMS.items():
        rows += [(f"{settings.title}, {steps} steps", name) for steps, name in curve_of(arm).items()]
    lines = []
    for label, name in rows:
        training = ROWS[name].training
        rates = set(values_of(results, name, "learning_rate")) if training else ()
        costs = (cost(results, name, unit) for unit in ("core_seconds", "macs"))
        scores = (distance(results, name), classes(results, name))
        count = len(values_of(results, name, "frechet_distance"))
        lines.append([label, ", ".join(map(rate_text, sorted(rates))), *scores, *costs, str(count)])
    heads = ["start, and end-to-end steps of 16", "rate", "Fréchet distance", "classes, %"]
    return markdown_table([*heads, "walk + training, s", "the same, tera-MACs", "seeds"], lines)


def curve_of(arm: str) -> dict[int, str]:
    """An arm's rows over end-to-end steps."""
    return {steps: name for steps in (0, *LENGTHS) if (name := f"{arm}-{steps}") in ROWS}


def arms_table(results: Results, of: str, rows: Mapping[int, Mapping[str, str]]) -> str:
    """The walk alone, both arms side by side, of the seeds that all have; rows by what is counted, then by arm."""
    heads = [of]
    for arm in SOLVED:
        title = ARMS[arm].title
        heads += [f"{title}: distance", "classes, %", "walk, s"]
    lines = []
    for count, names in rows.items():
        line = [str(count)]
        for name in (names[arm] for arm in SOLVED):
            line += [distance(results, name, SEEDS), classes(results, name, SEEDS), cost(results, name, "core_seconds")]
        lines.append(line)
    return markdown_table(heads, lines)


def sizes_table(results: Results) -> str:
    """Over local steps, states and walks."""
    local = {count: {arm: local_name(arm, count) for arm in SOLVED} for count in LOCAL}
    states = {count: {arm: states_name(arm, count) for arm in SOLVED} for count in SIZES}
    walks = {count: {arm: walks_name(arm, count) for arm in SOLVED} for count in WALKS}
    parts = {"local steps": local, "states": states, "walks": walks}
    return "\n\n".join(arms_table(results, of, rows) for of, rows in parts.items())


def factors_table(results: Results) -> str:
    """One factor at a time, under the rows that they differ from; of the seeds that all have."""
    lines = []
    for arm in SOLVED:
        mine = [row for row in ROWS.values() if row.group == "factors" and row.start and row.start.arm == arm]
        for base in (f"{arm}-0", f"{arm}-closed", f"{arm}-{CLAIMED}"):
            start = None if base == f"{arm}-0" else f"{arm}-0"
            lines.append(_factor(results, base, f"**{ARMS[arm].title}, {ROWS[base].label}**", start))
            others = [row for row in mine if base_of(row) == base]
            lines += [_factor(results, row.name, f"{ARMS[arm].title}: {row.label}", base) for row in others]
    heads = ["one factor at a time", "Fréchet distance", "classes, %", "walk + training, s", "paired difference"]
    return markdown_table(heads, lines)


def base_of(row: Row) -> str:
    """The row that one of the factors differs from."""
    assert row.start is not None
    if row.training is not None:
        return f"{row.start.arm}-{row.training.steps}"
    return f"{row.start.arm}-closed" if "solve.local_steps=0" in row.start.overrides else f"{row.start.arm}-0"


def _factor(results: Results, name: str, label: str, base: str | None) -> list[str]:
    found = None if base is None else results.difference(name, base, SEEDS)
    scores = (distance(results, name, SEEDS), classes(results, name, SEEDS))
    return [label, *scores, cost(results, name, "core_seconds"), str(found or "")]


def claims(results: Results) -> str:
    """Paired differences of distances, by seed: below zero the first is nearer the teacher."""
    pairs = [(f"{arm}-0", f"paper-{PAPER_STEPS}") for arm in SOLVED]
    pairs += [(f"{arm}-{CLAIMED}", f"{arm}-0") for arm in SOLVED]
    lines = []
    for first, second in pairs:
        found = results.difference(first, second, CLAIM_SEEDS)
        lines.append([f"{titled(first)} - {titled(second)}", str(found or NOT_MEASURED)])
    return markdown_table(["difference of Fréchet distances", "mean and interval"], lines)


def titled(name: str) -> str:
    """`fresh Q, K, V, O, 0 steps`."""
    arm, _, steps = name.rpartition("-")
    return f"{ARMS[arm].title}, {steps} steps"


def markdown(results: Results) -> str:
    """All tables."""
    parts: dict[str, Callable[[Results], str]] = {
        "End-to-end steps": curve_table,
        "What is claimed": claims,
        "Local steps, states and walks": sizes_table,
        "One factor at a time": factors_table,
    }
    return "\n\n".join(f"### {title}\n\n{part(results)}" for title, part in parts.items())


def plot(results: Results, out: Path) -> None:
    """Distances over end-to-end steps and over seconds, over local steps and over states; a PNG, written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((steps, seconds), (local, states)) = pyplot.subplots(2, 2, figsize=(11, 8), sharey=True)
    for arm in ARMS:
        trained = curve_of(arm)
        _line(steps, results, arm, trained)
        _line(seconds, results, arm, {name: name for name in trained.values()}, at=lambda row: _seconds(results, row))
    for arm in SOLVED:
        _line(local, results, arm, {count: local_name(arm, count) for count in LOCAL})
        _line(states, results, arm, {count: states_name(arm, count) for count in SIZES})
    _axis(steps, "end-to-end steps of 16 images after the start, each at its best rate", (0, *LENGTHS), 50)
    _axis(local, "local steps of each layer, no end-to-end step", LOCAL, 25)
    _axis(states, "calibration states, no end-to-end step", SIZES)
    _ticks(seconds, "x")
    seconds.set_xlabel("seconds of one core, walk and training")
    for panel in (steps, seconds, local, states):
        _floor(panel, results)
        _ticks(panel, "y")
        panel.grid(alpha=0.25, linewidth=0.5)
    for panel in (steps, local):
        panel.set_ylabel("Fréchet distance to the teacher")
    steps.legend(frameon=False)
    figure.tight_layout()
    with whole_file(out) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    pyplot.close(figure)


def plot_claims(results: Results, out: Path) -> None:
    """What is claimed, a bar each, with the seconds that it took; a PNG, written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {
        f"{ARMS['paper'].title},\n{PAPER_STEPS} training steps": ("paper", f"paper-{PAPER_STEPS}"),
        "solved, all attention fresh,\nno training step": ("fresh", "fresh-0"),
        "solved, Q, K and V inherited,\nno training step": ("inherited", "inherited-0"),
    }
    figure, panel = pyplot.subplots(figsize=(7.2, 2.6))
    for place, (arm, name) in enumerate(bars.values()):
        values = values_of(results, name, "frechet_distance")
        panel.barh(place, mean(values), xerr=stdev(values), color=COLOURS[arm], capsize=3, height=0.6)
        text = f"{distance(results, name)}, {_seconds(results, name):.0f} s of one core"
        panel.text(mean(values) + stdev(values) + 0.04, place, text, va="center", fontsize=9)
    floor = mean(values_of(results, FLOOR, "frechet_distance"))
    panel.axvline(
        floor, color="#009e73", linestyle="--", linewidth=1.5, label=f"the teacher against itself: {floor:.2f}"
    )
    panel.set_yticks(range(len(bars)), labels=list(bars))
    panel.invert_yaxis()
    panel.set_xlim(0, 4.2)
    panel.set_xlabel("Fréchet distance to the teacher of digits (six seeds, lower is better)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower left", bbox_to_anchor=(floor / 4.2 - 0.02, 0.98))
    figure.tight_layout()
    with whole_file(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _seconds(results: Results, row: str) -> float:
    """Of the walk and of training, the mean over seeds."""
    return sum(mean(values_of(results, row, f"{part}_core_seconds")) for part in ("walk", "training"))


def _line(
    panel: Any,
    results: Results,
    arm: str,
    rows: Mapping[Any, str],
    at: Callable[[Any], float] = float,
) -> None:
    """An arm's means, and the standard deviation to both sides."""
    points = []
    for place, name in rows.items():
        values = values_of(results, name, "frechet_distance")
        if values:
            points.append((at(place), mean(values), stdev(values) if len(values) > 1 else 0.0))
    if not points:
        return
    x, y, deviation = zip(*sorted(points), strict=True)
    panel.errorbar(x, y, deviation, fmt="o-", color=COLOURS[arm], capsize=2, markersize=4, label=ARMS[arm].title)


def _ticks(panel: Any, which: str) -> None:
    """A logarithmic axis, `x` or `y`, on which powers of two are named."""
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    getattr(panel, f"set_{which}scale")("log", base=2)
    axis = getattr(panel, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _axis(panel: Any, label: str, ticks: Sequence[int], linear_to: int | None = None) -> None:
    """A logarithmic axis, linear up to a value where it begins at 0."""
    if linear_to is None:
        panel.set_xscale("log", base=2)
    else:
        panel.set_xscale("symlog", linthresh=linear_to)
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(label)
    if linear_to is not None:
        panel.set_xlim(-linear_to / 5, ticks[-1] * 1.2)


def _floor(panel: Any, results: Results) -> None:
    """The teacher against itself, as a band."""
    values = values_of(results, FLOOR, "frechet_distance")
    if not values:
        return
    deviation = stdev(values) if len(values) > 1 else 0.0
    panel.axhline(mean(values), color="#009e73", linewidth=1, linestyle="--", label=ROWS[FLOOR].label)
    panel.axhspan(mean(values) - deviation, mean(values) + deviation, color="#009e73", alpha=0.15, linewidth=0)


def show(results: Results) -> None:
    """Print the tables, and draw the curves beside the folder of results where there are any."""
    print(markdown(results))
    if any(results.folder.glob("*.json")):
        out = results.folder.parent / f"{results.folder.name}-{CURVES}"
        plot(results, out)
        print(f"\n{out}")
    if results.folder == RESULTS:
        plot_claims(results, CLAIMS)
        print(CLAIMS)


if __name__ == "__main__":
    show(Results(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RESULTS))
