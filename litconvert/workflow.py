"""What composes several rooms: distillation with its estimates, and the whole line for a recipe or a source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.common.launch import launched_processes
from litconvert.common.listener import SILENT, Listener
from litconvert.common.quantities import size, span
from litconvert.conversion.plan import ConversionPlan
from litconvert.conversion.plan import plan as plan_of
from litconvert.conversion.provenance import Provenance
from litconvert.data.synthesize import synthesize_resolved
from litconvert.distillation.distillation import Distillation, Request, fit, prepare
from litconvert.errors import UsageError
from litconvert.estimates.stage import StageEstimate, Workload, estimate_stages
from litconvert.evaluation.scores import score_run
from litconvert.publishing.push import push
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.sampling.captions import text_packages
from litconvert.solving.convert import convert_planned
from litconvert.training.checks import check_model, check_packages


def distill(
    student: str | Path,
    out: str | Path,
    recipe: str | None = None,
    *,
    teacher: str | None = None,
    data: str | Path | None = None,
    start: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Teach a converted student with its softmax teacher. Called again with the same inputs, it goes on where it was.

    Args:
        student: model directory that `convert` wrote.
        out: run directory: recipe.yaml, metrics.csv, curves.png, samples/, checkpoints/, model/.
        recipe: name or path; None: the one recorded in the student.
        teacher: another checkpoint than the source; None: the recipe's, or else the source.
        data: dataset folder; None: the recipe's, or else the teacher draws it into a folder `out`-latents.
        start: RUN or RUN@STEP, another run whose weights are trained on with a new optimiser; None: the recipe's, or
            else the student's own.
        overrides: `key=value`, over the recipe. Stages of a run that is there may be given more steps.
        force: replace a run of other inputs.
        listener: hears notes and steps; with `wants_estimates` what each stage will take, before models are read, and
            what it took (usage.json).

    Returns: the run directory.

    Raises UsageError for inputs that do not fit, LitconvertError when it had to stop, Interrupted after a signal.
    """
    asked = Request(Path(student), Path(out), recipe, teacher, data, start, overrides, force)
    prepared = prepare(asked, listener)
    estimates: list[StageEstimate] = []
    if prepared.finished and prepared.engine.is_main:
        listener.note(f"already done: {asked.out}")
    if not prepared.finished:
        if listener.wants_estimates and prepared.engine.is_main:
            listener.note("measuring what a step takes here")
            estimates = _estimates(prepared)
            _say_estimates(estimates, listener)
        fit(prepared, listener)
    if estimates:
        _say_usage(estimates, prepared.directory.read_usage(), listener)
    return asked.out


def _estimates(prepared: Distillation) -> list[StageEstimate]:
    """What each stage will take; before models are read, since what this process takes now counts as its libraries."""
    lineage, engine = prepared.lineage, prepared.engine
    return estimate_stages(
        Workload(
            prepared.recipe,
            lineage.config,
            teacher=lineage.teacher.config,
            mapped_bytes=lineage.nbytes,
            processes=engine.processes,
            sharded=engine.sharded,
        )
    )


def _say_estimates(estimates: Sequence[StageEstimate], listener: Listener) -> None:
    for one in estimates:
        listener.note(f"stage {one.stage}, {one.objective}: about {_taken(one.peak, one.seconds)}")
        if one.advice is not None:
            listener.note(f"stage {one.stage} may not fit: {one.advice}")


def _say_usage(estimates: Sequence[StageEstimate], usage: Mapping[str, Any], listener: Listener) -> None:
    """What was estimated beside what it came to."""
    for one in estimates:
        if (used := usage.get(str(one.stage))) is not None:
            taken, foreseen = _taken(used["peak_bytes"], used["seconds"]), _taken(one.peak, one.seconds)
            listener.note(f"stage {one.stage} took {taken}; estimated: {foreseen}")


def _taken(peak_bytes: float, seconds: float) -> str:
    """`1.2 GB and 3.4 s`."""
    return f"{size(int(peak_bytes))} and {span(seconds)}"


@dataclass(frozen=True)
class LineResult:
    """Where everything is, and what was measured."""

    plan: ConversionPlan
    run: Path
    scores: dict[str, Any] | None
    url: str | None


def run_line(
    recipe: str | None,
    out: Path,
    *,
    source: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    listener: Listener = SILENT,
) -> LineResult:
    """Run the line from checkpoint to result in `out`: student/, latents/, distilled/ and evaluation.json.

    What is done already is skipped.

    Args:
        recipe: name or path; None: that of the source, as `plan` takes it.
        source: file, folder, Hub id or `asset:NAME`; None: the recipe's.
        overrides: `key=value`, over the recipe.
        force: replace what was made from other inputs.
        listener: hears notes, tasks and steps.

    Raises UsageError for a source that no recipe is known for, and where several processes were launched.
    """
    if launched_processes() > 1:
        raise UsageError(
            "`run` is of one process, and several were launched: `litconvert convert` first, then launch `latents "
            "synthesize` and `distill`"
        )
    plan = plan_of(source, recipe, overrides)
    settings, name = plan.recipe, plan.recipe_name or "the defaults"
    if recipe is None and not settings.distill.stages:
        why = f"{name} has no stages" if plan.recipe_name else "there is no packaged recipe for what it is"
        raise UsageError(
            f"{source}: {why}; name a recipe that says how to train it (--recipe NAME; `litconvert recipes ls` lists "
            "the packaged ones)"
        )
    listener.note(f"recipe: {name}")
    if plan.unsolved_because is not None:
        listener.note(f"not solved: {plan.unsolved_because}")
    check_model(plan.config, settings)
    check_packages(settings)
    if plan.config.reads_captions and settings.data.path is None and settings.source.text_encoder is not None:
        text_packages()
    student = convert_planned(plan, out / "student", force=force, listener=listener)
    solve = Provenance.read(student).solve
    near = "" if solve is None else f"; its output is {solve['output']['after']:.2%} off its teacher's"
    listener.note(f"converted: {student}{near}")
    data = settings.data.path
    if data is None:
        drawn = ResolvedRecipe(name, settings, {})
        data = str(synthesize_resolved(drawn, out / "latents", listener, force=force))
    run = distill(student, out / "distilled", recipe, data=data, overrides=overrides, force=force, listener=listener)
    scores = None
    if settings.evaluate.features is not None:
        scores = score_run(run, settings, force=force, listener=listener)
    url = None
    if (repo_id := settings.publish.repo_id) is not None:
        publish = settings.publish
        url = push(run, repo_id, private=publish.private, pipeline=publish.pipeline, listener=listener)
    return LineResult(plan, run, scores, url)
