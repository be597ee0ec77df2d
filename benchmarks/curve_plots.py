"""The curves of two small teachers: tables as Markdown, and the plots of docs/results.md.

python -m benchmarks.curve_plots [FOLDER]     of the results in a folder; default: benchmarks/results/curve
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from PIL import Image

from benchmarks.curve_rows import CURVES, DIGITS, EMOJI, FLOOR, RESULTS, SEARCH_SEED, Curve, Results, Row
from benchmarks.digits_plots import markdown_table, spread
from benchmarks.digits_results import paired
from benchmarks.digits_rows import rate_text
from litconvert.common.files import whole_file

COLOURS = {"fresh": "#0072b2", "inherited": "#d55e00", "closed": "#56b4e9", "few": "#cc79a7"}
COLOURS |= {"long": "#e69f00", "paper": "#555555", "lower": "#aaaaaa", "loss": "#009e73", "even": "#cc79a7"}
DISTANCES = {
    "principal_distance": "Fréchet distance, 64 directions",
    "frechet_distance": "Fréchet distance, all features",
}
DOCS = Path(__file__).parents[1] / "docs" / "pictures"
SHEET = (("paper", 0), ("paper", 800), ("closed", 0), ("inherited", 0), ("inherited", 500))


def results_of(curve: Curve, folder: Path) -> Results:
    return Results(folder / curve.name)


def rows_of(curve: Curve) -> list[Row]:
    """The floor, then every arm over its steps."""
    rows = [Row(arm, steps) for arm, settings in curve.arms.items() for steps in settings.lengths]
    return [Row(FLOOR), *rows]


def label(curve: Curve, row: Row) -> str:
    if row.arm == FLOOR:
        return "the teacher against itself"
    return f"{curve.arms[row.arm].title}, {row.steps} steps"


def seconds(curve: Curve, results: Results, row: Row) -> dict[int, float]:
    """Of the walk and of the training, by seed."""
    parts = [results.values(row, f"{part}_core_seconds", curve.seeds) for part in ("walk", "training")]
    return {seed: sum(part[seed] for part in parts) for seed in parts[0]}


def curve_table(curve: Curve, results: Results) -> str:
    """Every row that was measured, over its seeds."""
    lines = []
    for row in rows_of(curve):
        found = [list(results.values(row, key, curve.seeds).values()) for key in DISTANCES]
        if not found[0]:
            continue
        rates = results.values(row, "learning_rate", curve.seeds) if row.steps else {}
        line = [label(curve, row), ", ".join(sorted(map(rate_text, {*rates.values()})))]
        line += [spread(values, "{:.2f}" if mean(values) < 10 else "{:.1f}") for values in found]
        if row.arm == FLOOR:
            line += ["", ""]
        else:
            errors = results.values(row, "agreement.noise.error", curve.seeds).values()
            line += [spread(errors, "{:.4f}"), f"{mean(seconds(curve, results, row).values()):.0f}"]
        lines.append([*line, str(len(found[0]))])
    heads = ["student, end-to-end steps of 16 images", "rate", "64 directions", "all features"]
    return markdown_table([*heads, "noise error", "seconds of one core", "seeds"], lines)


def rates_table(curve: Curve, results: Results) -> str:
    """What rates were chosen by."""
    lines = []
    for row in (row for arm in curve.arms for row in curve.searched(arm)):
        values = [results.values(row, key, [SEARCH_SEED]).get(SEARCH_SEED) for key in DISTANCES]
        if None not in values:
            lines.append([label(curve, row), rate_text(row.rate or 0), *(f"{value:.1f}" for value in values)])
    return markdown_table(["student", "rate", "64 directions", "all features"], lines)


def claim(curve: Curve, results: Results, first: Row, second: Row, key: str = "principal_distance") -> str:
    """A row's distance as a share of another's, and their difference by seed."""
    mine, theirs = (results.values(row, key, curve.seeds) for row in (first, second))
    seeds = sorted({*mine} & {*theirs})
    if len(seeds) < 2:
        return ""
    a, b = [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    times = [mean(seconds(curve, results, row).values()) for row in (first, second)]
    return (
        f"{label(curve, first)} ({times[0]:.0f} s) against {label(curve, second)} ({times[1]:.0f} s), "
        f"{DISTANCES[key]}: {mean(a) / mean(b):.2f} of it, {paired(a, b)}"
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def points(curve: Curve, results: Results, key: str) -> dict[str, list[tuple[float, float]]]:
    """Error of the noise and distance of every student and seed, by arm."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows_of(curve)[1:]:
        errors = results.values(row, "agreement.noise.error", curve.seeds)
        values = results.values(row, key, curve.seeds)
        found.setdefault(row.arm, []).extend((errors[seed], values[seed]) for seed in errors)
    return found


def foretelling(curve: Curve, results: Results) -> str:
    """How well the error of the noise ranks students by distance, and the distance as a power of it."""
    both = [point for arm in points(curve, results, "principal_distance").values() for point in arm]
    if len(both) < 3:
        return ""
    errors, values = zip(*both, strict=True)
    line = np.polyfit(np.log(errors), np.log(values), 1)
    residual = np.log(values) - np.polyval(line, np.log(errors))
    return (
        f"{curve.name}: {len(both)} students, rank correlation {rank_correlation(errors, values):.2f}; distance ~ "
        f"error^{line[0]:.2f}, within a factor of {np.exp(np.abs(residual).max()):.2f}"
    )


def _line(axes: Any, arm: str, title: str, data: Iterable[tuple[float, Sequence[float]]]) -> None:
    """Means over seeds, and the range of the seeds."""
    known = sorted((x, values) for x, values in data if values)
    if not known:
        return
    x = [one for one, _ in known]
    means = [mean(values) for _, values in known]
    reach = [
        [m - min(values) for m, (_, values) in zip(means, known, strict=True)],
        [max(values) - m for m, (_, values) in zip(means, known, strict=True)],
    ]
    axes.errorbar(x, means, reach, fmt="o-", color=COLOURS[arm], label=title, capsize=2, markersize=4, linewidth=1.5)


def plot_curve(curve: Curve, results: Results, out: Path) -> None:
    """Distance over steps and over time, and errors by timestep."""
    figure = Figure(figsize=(11, 4.6), dpi=110)
    steps, time, timestep = figure.subplots(1, 3)
    key = "principal_distance"
    for arm, settings in curve.arms.items():
        rows = [Row(arm, count) for count in settings.lengths]
        values = {row: list(results.values(row, key, curve.seeds).values()) for row in rows}
        _line(steps, arm, settings.title, ((float(row.steps), found) for row, found in values.items()))
        timed = ((mean(seconds(curve, results, row).values()), found) for row, found in values.items() if found)
        _line(time, arm, settings.title, timed)
    floor = list(results.values(Row(FLOOR), key, curve.seeds).values())
    for axes in (steps, time):
        if floor:
            axes.axhline(mean(floor), color="#009e73", linestyle="--", linewidth=1, label="the teacher against itself")
        axes.set(ylabel=DISTANCES[key], yscale="log")
        ticks = [2, 5, 10, 20, 50, 100, 200]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    steps.set_xticks([0, 100, 300, 500, 800])
    steps.set_xlabel("end-to-end steps of 16 images")
    time.set_xlabel("seconds of one core, the walk counted in")
    for row, style in ((Row("paper", 800), "-"), (Row("inherited", 0), "--"), (Row("inherited", 500), "-")):
        found = [record for seed in curve.seeds if (record := results.read(row, seed)) is not None]
        if found:
            lines = np.mean([record["agreement"]["noise"]["by_timestep"] for record in found], axis=0)
            name = label(curve, row)
            timestep.plot(range(50, 1000, 100), lines, style, color=COLOURS[row.arm], label=name)
    timestep.set(yscale="log", xlabel="timestep (0: clean image)", ylabel="relative squared error of the noise")
    timestep.legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.legend(*steps.get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8)
    _save(figure, out, tight=False)


def plot_foretelling(folder: Path, out: Path) -> None:
    """Distance over the error of the noise, for both teachers."""
    figure = Figure(figsize=(9, 5.2), dpi=110)
    titles = {EMOJI.name: "colour emoji", DIGITS.name: "digits"}
    for axes, curve in zip(figure.subplots(1, 2), CURVES.values(), strict=True):
        results = results_of(curve, folder)
        for arm, found in points(curve, results, "principal_distance").items():
            if found:
                axes.scatter(*zip(*found, strict=True), s=16, color=COLOURS[arm], label=curve.arms[arm].title)
        axes.set(xscale="log", yscale="log", title=titles[curve.name])
        axes.set(xlabel="relative squared error of the noise", ylabel=DISTANCES["principal_distance"])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        if axes.collections:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    _save(figure, out)


def sheet(curve: Curve, results: Results, out: Path) -> None:
    """Samples on the same noise, one row a student."""
    paths: Mapping[str, Path] = {
        label(curve, row).replace(" against itself", ""): results.folder / f"{row.name}.png"
        for row in (Row(FLOOR), *(Row(*one) for one in SHEET))
    }
    there = {title: np.asarray(Image.open(path)) for title, path in paths.items() if path.is_file()}
    if not there:
        return
    figure = Figure(figsize=(9, 0.85 * len(there)), dpi=110)
    for axes, (title, image) in zip(np.atleast_1d(figure.subplots(len(there), 1)), there.items(), strict=True):
        axes.imshow(image, interpolation="nearest", cmap="gray")
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.axis("off")
    figure.tight_layout(pad=0.3)
    _save(figure, out, tight=False)


def _save(figure: Figure, out: Path, *, tight: bool = True) -> None:
    matplotlib.use("Agg")
    if tight:
        figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png")


def markdown(folder: Path) -> str:
    """All tables and sentences."""
    parts = []
    for curve in CURVES.values():
        results = results_of(curve, folder)
        parts.append(f"### {curve.name}\n\n{curve_table(curve, results)}")
        if any(settings.searches for settings in curve.arms.values()):
            parts.append(f"Rates were chosen by:\n\n{rates_table(curve, results)}")
    results = results_of(EMOJI, folder)
    lengths = EMOJI.arms["inherited"].lengths
    pairs = [(Row("inherited", steps), Row(arm, 800)) for arm in ("paper", "lower") for steps in lengths]
    claims = [claim(EMOJI, results, *pair, key) for pair in pairs for key in DISTANCES]
    claims += [foretelling(curve, results_of(curve, folder)) for curve in CURVES.values()]
    return "\n\n".join([*parts, *filter(None, claims)])


def show(folder: Path) -> None:
    """Print the tables, and draw the plots beside the results; those of the committed ones for docs/."""
    print(markdown(folder))
    place = DOCS if folder == RESULTS else folder
    plot_curve(EMOJI, results_of(EMOJI, folder), place / "emoji-curve.png")
    sheet(EMOJI, results_of(EMOJI, folder), place / "emoji-samples.png")
    plot_foretelling(folder, place / "agreement.png")
    print(f"\n{place}")


if __name__ == "__main__":
    show(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RESULTS)
