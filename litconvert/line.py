"""The whole line for one recipe: convert, latents, distil, sample, evaluate, push; what is done already is skipped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from litconvert import console
from litconvert.conversion import ConversionPlan, carry_out, plan_conversion, with_source
from litconvert.distillation import check_model, distill
from litconvert.errors import UsageError
from litconvert.estimate import StageEstimate
from litconvert.evaluation import evaluate, evaluation_passes, reference_samples
from litconvert.files import digest_of, read_json, write_whole
from litconvert.inputs import Inputs, given
from litconvert.launch import launched_processes
from litconvert.live import duration, training_display
from litconvert.model_directory import read_provenance
from litconvert.recipe import Recipe, Source
from litconvert.recipe_files import resolve
from litconvert.run_directory import RunDirectory, model_of
from litconvert.sources import open_source, open_teacher, read_model
from litconvert.synthesis import synthesize_resolved


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
        from litconvert.publishing import push

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

    with training_display() as show:
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
            on_step=show.step,
            on_draw=show.draw,
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
    return f"{console.size(int(peak_bytes))} and {duration(seconds) if seconds >= 60 else f'{seconds:.3g} s'}"


def score_run(run: str | Path, recipe: Recipe, *, weights: str = "auto", force: bool = False) -> dict[str, Any]:
    """Metrics of a run's model and of the teacher against itself, kept beside it and in the model's record.

    Args:
        run: RUN, for its finished model or else its latest checkpoint, RUN@STEP, or the model directory itself.
        recipe: its `evaluate` section, its source and teacher.
        weights: of a checkpoint, `ema`, `model` (the raw weights, whose scores are no part of its record) or `auto`.
        force: measure again.
    """
    folder = Path(model_of(str(run), raw=weights == "model"))
    record = read_provenance(folder)
    raw, settings = weights == "model", recipe.evaluate
    inputs = Inputs(
        {"model": record["digest"], "evaluate": given(settings), "weights": "model" if raw else "ema"},
        digest_of({"model": record["digest"], "evaluate": settings.model_dump(mode="json")}),
    )
    place = folder.parent if folder.name == "model" else folder
    kept = place / ("evaluation-raw.json" if raw else "evaluation.json")
    if kept.is_file() and not force:
        found = read_json(kept)
        if inputs.made(found):
            return found
    student = read_model(open_source(Source(path=str(folder)), weights), torch.float32)
    teacher = read_model(open_teacher(recipe), torch.float32)
    with console.progress("evaluate") as show:
        total, done = evaluation_passes(settings, models=2), [0]

        def on_step() -> None:
            done[0] += 1
            show(done[0], total, "")

        reference = reference_samples(teacher, recipe, on_step)
        models = {"student": student, "teacher against itself": teacher}
        scores = {"digest": inputs.digest, **evaluate(models, reference, recipe, on_step=on_step)}
    write_whole(kept, json.dumps(scores, indent=2) + "\n")
    if not raw:
        record["metrics"] = _metrics(scores)
        write_whole(folder / "litconvert.json", json.dumps(record, indent=2) + "\n")
    return scores


def _metrics(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as a model's record has them."""
    protocol = {key: scores[key] for key in ("num_samples", "seeds", "scheduler", "steps")}
    mine, floor = scores["models"]["student"], scores["models"]["teacher against itself"]
    return {
        "frechet_distance": {**mine["frechet_distance"], **protocol},
        "class_accuracy": {**mine["class_accuracy"], **protocol},
        "teacher_frechet_distance": {**floor["frechet_distance"], **protocol},
        "teacher_class_accuracy": {**floor["class_accuracy"], **protocol},
    }


def compare(run: Path) -> Path | None:
    """comparison.png: teacher, student before and student after, on the same noise, one above the other."""
    paths = [run / "samples" / f"{name}.png" for name in ("teacher", "before", "after")]
    if not all(path.is_file() for path in paths):
        return None
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(paths), 1, figsize=(7, 9.2))
    titles = ("teacher (softmax)", "student before distillation (linear)", "student after distillation (linear)")
    for panel, path, title in zip(panels, paths, titles, strict=True):
        panel.imshow(np.asarray(Image.open(path)), cmap="gray", vmin=0, vmax=255)
        panel.set_title(title)
        panel.axis("off")
    figure.tight_layout()
    out = run / "comparison.png"
    figure.savefig(out, dpi=100)
    pyplot.close(figure)
    return out
