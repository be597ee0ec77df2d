"""What the user sees: data on stdout, everything else on stderr."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from litconvert.errors import LitconvertError, system_cause

if TYPE_CHECKING:
    from litconvert.conversion import ConversionPlan
    from litconvert.estimate import StageEstimate
    from litconvert.line import LineResult
    from litconvert.sources import Findings, OpenSource

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
_settings = {"quiet": False}
# What `pip install 'litconvert[distill]'` brings.
DISTILLATION_PACKAGES = ("datasets", "matplotlib", "pyarrow", "torchmetrics")


def be_quiet(quiet: bool) -> None:
    """-q: errors alone on stderr."""
    _settings["quiet"] = quiet


def is_quiet() -> bool:
    """Whether -q was given."""
    return _settings["quiet"]


def is_live() -> bool:
    """Whether stderr is a terminal that can draw over what it has drawn."""
    return err.is_terminal and err.is_interactive


def note(message: str) -> None:
    """A line on stderr."""
    if not _settings["quiet"]:
        err.print(message, markup=False, soft_wrap=True)


def data(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def line(text: str) -> None:
    """A line of data on stdout, as it is."""
    sys.stdout.write(text + "\n")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = (), title: str = ""
) -> None:
    """A table on stdout; the columns in `numbers` are right-aligned."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        made.add_column(header, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    out.print(made)


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, plain lines where there is no terminal; call what it gives with (done, total, remark)."""
    if _settings["quiet"]:

        def silent(done: int, total: int, remark: str = "") -> None: ...

        yield silent
        return
    if not is_live():
        last = [-1]

        def plain(done: int, total: int, remark: str = "") -> None:
            tenth = 10 * done // max(total, 1)
            if tenth != last[0]:
                last[0] = tenth
                note(f"{description}: {done}/{total} {remark}".rstrip())

        yield plain
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=err, transient=False) as bar:
        task = bar.add_task(description, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            bar.update(task, completed=done, total=total, remark=remark)

        yield show


def count(value: int | float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def size(nbytes: int) -> str:
    """Bytes as MB or GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def show_source(source: "OpenSource", findings: "Findings | None" = None) -> None:
    """What a checkpoint is, and with `findings` what its values showed."""
    from litconvert.sources import describe

    facts = describe(source)
    config = facts["config"]
    weights = f"{facts['weights']} (of {', '.join(facts['sets'])})" if facts["weights"] else "the only set"
    side = config["sample_size"]
    rows = [
        ("recognised as", f"{facts['title']}, {facts['layout']} layout, because {facts['because']}"),
        ("weights", weights),
        ("tensors", f"{facts['tensors']}, {size(facts['bytes'])}, {facts['dtype']}"),
        ("parameters", count(facts["parameters"])),
        (
            "size",
            f"{config['num_layers']} layers, width {config['hidden_size']}, {config['num_attention_heads']} heads",
        ),
        ("attention", _attention(config)),
        (
            "latent",
            f"{config['in_channels']} x {side} x {side}, patch {config['patch_size']}, "
            f"{config['out_channels']} output channels",
        ),
        ("condition", _condition(config)),
        ("predicts", _prediction(config)),
        *(("assumed", text) for text in facts["unsure"]),
        *((("to download", size(facts["download_bytes"])),) if facts["download_bytes"] else ()),
    ]
    if findings is not None:
        rows += [("values", text) for text in findings.facts]
        rows += [("looks wrong", text) for text in (*findings.odd, *findings.broken)]
    table(("", ""), rows, title=facts["path"])


def _condition(config: Mapping[str, Any]) -> str:
    if config["caption_channels"] is None:
        return f"{config['num_classes']} classes{' and a null class' if config['null_class'] else ''}"
    text = f"captions of up to {config['caption_tokens']} tokens, {config['caption_channels']} channels"
    text += ", null caption stored" if config["null_caption"] else ", no null caption stored"
    text += ", micro-conditions" if config["micro_conditions"] else ""
    return f"{text}, positions interpolated by {config['interpolation_scale']:g}"


def _attention(config: Mapping[str, Any]) -> str:
    kinds = config["attention"]
    text = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    if "linear" in kinds:
        size = config["linear_conv_size"]
        text += f" ({config['linear_num_heads']} heads, {config['linear_kernel']}, eps {config['linear_eps']:g}, "
        text += f"convolution {size} x {size})" if size else "no convolution)"
    return text


def _prediction(config: Mapping[str, Any]) -> str:
    if config["prediction"] == "velocity":
        return f"velocity, data at t = {config['data_timestep']}"
    return "noise and variance" if config["out_channels"] == 2 * config["in_channels"] else "noise"


def show_plan(plan: "ConversionPlan", *, tensors: bool = False) -> None:
    """The plan: the four groups, parameters, multiply-accumulates, and with `tensors` every tensor."""
    from litconvert.sources import describe

    facts = describe(plan.source)
    line(f"{facts['path']}: {facts['title']}, {facts['layout']} layout, because {facts['because']}")
    for text in facts["unsure"]:
        line(f"assumed: {text}")
    line(f"recipe: {plan.recipe_name or 'none, the defaults'} (--recipe chooses another)")
    if facts["download_bytes"]:
        line(f"to be downloaded first: {size(facts['download_bytes'])}")
    line("")
    groups, totals = plan.groups, plan.totals
    rows: list[tuple[Any, ...]] = [
        (fate, g["source_tensors"] or "-", g["student_tensors"] or "-", count(g["parameters"]), size(g["bytes"]))
        for fate, g in groups.items()
    ]
    sides = ("total", totals["source_tensors"], totals["student_tensors"], "", "")
    table(("", "source", "student", "numbers", "bytes"), [*rows, sides], numbers=(1, 2, 3, 4), title="Tensors")
    line("")
    rows = [
        ("source", count(totals["source_parameters"]), count(totals["source_parameters_with_pos_embed"])),
        ("student", count(totals["student_parameters"]), count(totals["student_parameters_with_pos_embed"])),
    ]
    table(("", "parameters", "with the fixed pos_embed"), rows, numbers=(1, 2))
    line("")
    macs = [
        (row["image_size"], row["tokens"], f"{row['source_macs'] / 1e9:,.2f}", f"{row['student_macs'] / 1e9:,.2f}",
         f"{row['ratio']:.2f}")
        for row in plan.macs
    ]  # fmt: skip
    table(("image", "tokens", "GMACs before", "after", "ratio"), macs, numbers=(0, 1, 2, 3, 4))
    line("A ratio is arithmetic, not speed: linear attention saves nothing where images are small.")
    if tensors:
        line("")
        rows = [
            (entry.fate, entry.target or "-", _place(entry.source, entry.rows, len(entry.copies)), entry.shape)
            for entry in plan.entries
        ]
        table(("fate", "student", "source", "shape"), rows)


def _place(name: str | None, rows: tuple[int, int] | None, copies: int) -> str:
    if name is None:
        return "-"
    return name + (f"[{rows[0]}:{rows[1]}]" if rows else "") + (f" ({copies} copies)" if copies > 1 else "")


def show_scores(results: Mapping[str, Any]) -> None:
    """Metrics of each model: mean and spread over seeds."""
    rows = []
    for name, scores in results["models"].items():
        distance, accuracy = scores["frechet_distance"], scores["class_accuracy"]
        rows.append((name, _spread(distance, "{:.2f}"), _spread(accuracy, "{:.1%}")))
    title = f"{results['num_samples']} samples a seed, {len(results['seeds'])} seeds, "
    title += f"{results['scheduler']} in {results['steps']} steps"
    table(("", "Fréchet distance to the teacher", "read as the class asked for"), rows, numbers=(1, 2), title=title)


def _spread(score: Mapping[str, Any], form: str) -> str:
    spread = score["standard_deviation"]
    return form.format(score["mean"]) + (f" ± {form.format(spread)}" if spread is not None else "")


def show_result(result: "LineResult") -> None:
    """One screen: what became of the tensors, what was measured, and where everything is."""
    line("")
    groups, totals = result.plan.groups, result.plan.totals
    counts = ", ".join(f"{g['student_tensors'] or g['source_tensors']} {fate}" for fate, g in groups.items())
    line(f"Tensors: {counts}")
    line(f"Parameters: {count(totals['source_parameters'])} before, {count(totals['student_parameters'])} after")
    ratios = ", ".join(f"{row['ratio']:.2f} at {row['image_size']}px" for row in result.plan.macs)
    line(f"Multiply-accumulates, before over after: {ratios}")
    if result.scores is not None:
        line("")
        show_scores(result.scores)
    line("")
    rows: list[tuple[str, Any]] = [
        ("model", result.run / "model"),
        ("samples on the same noise", result.run / "comparison.png"),
        ("loss curves", result.run / "curves.png"),
        ("every step", result.run / "metrics.csv"),
    ]
    if result.url is not None:
        rows.append(("published", result.url))
    for name, path in rows:
        line(f"{name}: {path}")


def fail(error: BaseException) -> int:
    """Print an error as its message alone; returns the exit code. A traceback only with LITCONVERT_DEBUG=1."""
    if os.environ.get("LITCONVERT_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, LitconvertError):
        err.print(f"litconvert: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        err.print("litconvert: interrupted; run the same command to go on", markup=False)
        return 130
    cause = system_cause(error)
    if isinstance(error, ModuleNotFoundError) and error.name in DISTILLATION_PACKAGES:
        cause = f"{error.name} is not installed; install what distillation needs: pip install 'litconvert[distill]'"
    if cause is None and _is_out_of_memory(error):
        cause = (
            "out of memory; lower the batch size of what was at work: data.synthesize.batch_size, "
            "data.encode.batch_size, sample.batch_size or evaluate.batch_size"
        )
    message = cause or f"unexpected {type(error).__name__}: {error} (LITCONVERT_DEBUG=1 shows where; please report it)"
    err.print(f"litconvert: {message}", markup=False, soft_wrap=True)
    return 1


def _is_out_of_memory(error: BaseException) -> bool:
    """`estimate.is_out_of_memory`, where torch is loaded at all: nothing else takes so much."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from litconvert.estimate import is_out_of_memory

    return is_out_of_memory(error)


def show_estimates(estimates: Sequence["StageEstimate"]) -> None:
    """Memory and time of stages, side by side."""
    first = estimates[0]
    kinds = {kind: None for estimate in estimates for kind in estimate.memory}  # in order, each once
    rows: list[tuple[Any, ...]] = [
        ("parameters trained", *(count(estimate.parameters) for estimate in estimates)),
        ("samples at a time", *(estimate.micro_batch for estimate in estimates)),
        *((kind, *(size(estimate.memory.get(kind, 0)) for estimate in estimates)) for kind in kinds),
        ("memory at the peak", *(size(estimate.peak) for estimate in estimates)),
        ("time of a step", *(_time(estimate.step_seconds) for estimate in estimates)),
        ("time of the stage", *(_time(estimate.seconds) for estimate in estimates)),
    ]
    headers = ("", *(f"{estimate.stage}: {estimate.objective}" for estimate in estimates))
    precision = "bf16 autocast" if first.bf16 else "float32"
    split = f", one of {first.processes} processes" if first.processes > 1 else ""
    title = f"On this device: {first.device}, {precision}{split}"
    table(headers, rows, numbers=tuple(range(1, len(headers))), title=title)
    line(f"Memory free here: {size(first.available)}.")
    for estimate in estimates:
        if estimate.advice is not None:
            line(f"Stage {estimate.stage} does not fit: {estimate.advice}.")
    line("Activations are counted, blocks timed now. Left out: reading data, checkpoints, pictures, torch.compile.")


def _time(seconds: float) -> str:
    from litconvert.live import duration

    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)
