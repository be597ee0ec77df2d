"""The plots of a run: its loss curves, and its error by timestep."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litconvert.common.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Longer curves are drawn smoothed, over the values as they are.
SMOOTHED_FROM = 50
# No screen shows more points side by side; a longer curve is drawn at every so many steps.
POINTS = 2000
MEASUREMENTS = 30
PANEL_WIDTH, PANEL_HEIGHT = 7.6, 4.2


def plot_curves(rows: Iterable[Mapping[str, str]], terms: Sequence[str], out: Path) -> None:
    """The loss and its terms against the step, log, a panel a stage.

    Args:
        rows: of metrics.csv, in order; read once, and kept as numbers.
        terms: the columns besides `loss`; a term has one colour in all panels.
        out: a PNG, written whole. Nothing is written where there are no rows.
    """
    columns = ("step", "loss", *terms)
    stages: dict[str, dict[str, array[float]]] = {}
    for row in rows:
        mine = stages.setdefault(row["stage"], {name: array("d") for name in columns})
        for name in columns:
            mine[name].append(float(row.get(name) or "nan"))
    if not stages:
        return
    figure, panels = _panels(len(stages))
    colours = {term: f"C{index}" for index, term in enumerate(terms)} | {"loss": "black"}
    for panel, (stage, numbers) in zip(panels, stages.items(), strict=True):
        values = {name: np.asarray(numbers[name]) for name in columns}
        drawn = [term for term in terms if _tells(values[term], values["loss"])]
        for name in (*drawn, "loss"):
            _curve(panel, values["step"], values[name], name.replace("_", " "), colours[name], bold=name == "loss")
        title = stage.split(":", 1)[-1].replace("_", " ")
        panel.set(title=f"{title}, {len(values['step']):,} steps", xlabel="step", yscale="log")
        panel.grid(alpha=0.25, which="both", linewidth=0.5)
        # In the order in which the curves end, beside them: over them it would hide some.
        handles, labels = panel.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: -float(labels[index].rsplit(" ", 1)[1]))
        panel.legend(
            [handles[index] for index in order],
            [labels[index] for index in order],
            title="at the end",
            loc="upper left",
            bbox_to_anchor=(1.01, 1.02),
            frameon=False,
            alignment="left",
        )
    panels[0].set_ylabel("loss and its weighted terms")
    _save(figure, out)


def plot_timestep_errors(measurements: Mapping[int, Sequence[tuple[float, float]]], out: Path) -> None:
    """The error against the timestep, log, a line a measurement, coloured from the first step to the last.

    Args:
        measurements: of each step, (middle of the bucket, error).
        out: a PNG, written whole. Nothing is written where there are no measurements.
    """
    if not measurements:
        return
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = sorted(measurements)
    if len(steps) > MEASUREMENTS:
        steps = [steps[round(index)] for index in np.linspace(0, len(steps) - 1, MEASUREMENTS)]
    figure, (panel,) = _panels(1)
    # Without the palest yellow, which white swallows.
    palette = ListedColormap(colormaps["viridis_r"](np.linspace(0.15, 1, 256)))
    scale = Normalize(steps[0] - (len(steps) == 1), steps[-1])
    for step in steps:
        middles, errors = np.asarray(measurements[step], dtype=float).T
        last = step == steps[-1]
        panel.plot(
            middles, errors, "o-", color=palette(scale(step)), linewidth=2 if last else 1, markersize=4 if last else 3
        )
    panel.set(title="error against the teacher", xlabel="timestep", ylabel="relative squared error", yscale="log")
    panel.grid(alpha=0.25, which="both", linewidth=0.5)
    bar = figure.colorbar(ScalarMappable(scale, palette), ax=panel, label="step")
    if len(steps) <= 6:
        bar.set_ticks(steps, labels=[f"{step:,}" for step in steps])
    _save(figure, out)


def _panels(count: int) -> tuple["Figure", list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, count, figsize=(PANEL_WIDTH * count, PANEL_HEIGHT), squeeze=False)
    return figure, list(panels[0])


def _save(figure: "Figure", out: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    with whole_file(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _tells(term: NDArray[np.float64], loss: NDArray[np.float64]) -> bool:
    """Whether the term was there, and is not all of the loss."""
    there = ~np.isnan(term)
    return bool(there.any() and (term[there] != loss[there]).any())


def _curve(
    panel: Any, steps: NDArray[np.float64], values: NDArray[np.float64], name: str, colour: str, *, bold: bool
) -> None:
    """A curve with its last value in the legend; a long one as a running median over its faint values."""
    there = (values > 0) & np.isfinite(values)  # a log axis shows no other
    steps, values = steps[there], values[there]
    if not len(values):
        return
    width = 2.0 if bold else 1.3
    every = -(-len(values) // POINTS)
    if len(values) <= SMOOTHED_FROM:
        panel.plot(steps, values, color=colour, linewidth=width, label=f"{name} {values[-1]:.3g}")
        return
    panel.plot(steps[::every], values[::every], color=colour, linewidth=0.6, alpha=0.25)
    middles, medians = running_median(steps, values)
    panel.plot(middles, medians, color=colour, linewidth=width, label=f"{name} {medians[-1]:.3g}")


def running_median(
    steps: NDArray[np.float64], values: NDArray[np.float64], points: int = 200
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The median of the values within 2 % of the curve's length to both sides (at least 5 values), at so many points.

    A median follows a jump where it happens, and a single outlier, which the loss at a small timestep often is, does
    not move it.
    """
    reach = max(5, len(values) // 50)
    centres = np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))
    medians = [np.median(values[max(0, centre - reach) : centre + reach + 1]) for centre in centres]
    return steps[centres], np.asarray(medians)


def compare(run: Path) -> Path | None:
    """comparison.png: teacher, student before and student after, on the same noise, one above the other."""
    paths = [run / "samples" / f"{name}.png" for name in ("teacher", "before", "after")]
    if not all(path.is_file() for path in paths):
        return None
    parts = []
    for path in paths:
        with Image.open(path) as picture:
            parts.append(picture.convert(picture.mode))
    width, height = max(part.width for part in parts), sum(part.height for part in parts)
    sheet = Image.new(parts[0].mode, (width, height), "white")
    for index, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:index])))
    out = run / "comparison.png"
    with whole_file(out) as temporary:
        sheet.save(temporary, format="PNG")
    return out
