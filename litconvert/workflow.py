"""The whole line for one recipe: convert, latents, distil, sample, evaluate, push; what is done already is skipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.cli import terminal as console
from litconvert.cli.live import screen
from litconvert.common.launch import launched_processes
from litconvert.common.quantities import duration, size
from litconvert.conversion.convert import carry_out
from litconvert.conversion.plan import ConversionPlan, plan_conversion
from litconvert.data.synthesize import synthesize_resolved
from litconvert.distillation.distillation import distill
from litconvert.errors import UsageError
from litconvert.estimates.stage import StageEstimate
from litconvert.evaluation.scores import score_run
from litconvert.families.sources import open_source
from litconvert.recipe.resolve import resolve, with_source
from litconvert.runs.directory import RunDirectory
from litconvert.runs.plots import compare
from litconvert.training.checks import check_model


@dataclass(frozen=True)
class LineResult:
    """Where everything is, and what was measured."""

    plan: ConversionPlan
    run: Path
    scores: dict[str, Any] | None
    url: str | None


def run_line(
    recipe: str, out: Path, *, source: str | None = None, overrides: Sequence[str] = (), force: bool = False
) -> LineResult:
    """Run a recipe from checkpoint to result in `out`: student/, latents/, distilled/ and evaluation.json.

    Raises UsageError where several processes were launched.
    """
    if launched_processes() > 1:
        raise UsageError(
            "`run` is of one process, and several were launched: `litconvert convert` first, then launch `latents "
            "synthesize` and `distill`"
        )
    resolved = with_source(resolve(recipe, overrides), source)
    settings = resolved.recipe
    plan = plan_conversion(open_source(settings.source, settings.inherit.weights), settings)
    check_model(plan.config, settings)
    student = carry_out(plan, out / "student", force=force)
    console.note(f"converted: {student}")
    data = settings.data.path
    if data is None:
        with console.progress("teacher draws the training set") as show:
            data = str(
                synthesize_resolved(
                    resolved, out / "latents", force, lambda done, all_: show(done, all_, ""), console.note
                )
            )
    run = distill_with_progress(student, out / "distilled", recipe, None, data, overrides, force)
    scores = None
    if settings.evaluate.features is not None:
        scores = score_run(run, settings, force=force)
    compare(run)
    url = None
    if settings.publish.repo_id is not None:
        from litconvert.publishing.push import push

        url = push(run, settings.publish.repo_id, private=settings.publish.private, pipeline=settings.publish.pipeline)
    return LineResult(plan, run, scores, url)


def distill_with_progress(
    student: Path,
    out: Path,
    recipe: str | None,
    teacher: str | None,
    data: str | Path | None,
    overrides: Sequence[str],
    force: bool,
    start: str | None = None,
) -> Path:
    """`distill`, seen while it runs."""
    estimates: list[StageEstimate] = []

    def on_estimates(found: Sequence[StageEstimate]) -> None:
        estimates.extend(found)
        for one in found:
            console.note(f"stage {one.stage}, {one.objective}: about {_taken(one.peak, one.seconds)}")
            if one.advice is not None:
                console.note(f"stage {one.stage} may not fit: {one.advice}")

    listener = screen()
    with listener.training("distil"):
        run = distill(
            student,
            out,
            recipe,
            teacher=teacher,
            data=data,
            start=start,
            overrides=overrides,
            force=force,
            on_estimates=None if console.is_quiet() else on_estimates,
            on_step=listener.step,
            on_note=console.note,
        )
    usage = RunDirectory(run).read_usage()
    for one in estimates:
        if (used := usage.get(str(one.stage))) is not None:
            foreseen = _taken(one.peak, one.seconds)
            console.note(f"stage {one.stage} took {_taken(used['peak_bytes'], used['seconds'])}; estimated: {foreseen}")
    return run


def _taken(peak_bytes: float, seconds: float) -> str:
    """`1.2 GB and 3.4 s`."""
    return f"{size(int(peak_bytes))} and {duration(seconds) if seconds >= 60 else f'{seconds:.3g} s'}"
