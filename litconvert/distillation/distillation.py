"""Distillation: what a run is made of, whether that fits together, and what is left. The loop is in `trainer`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litconvert.common.listener import StepReport
from litconvert.conversion.directory import (
    read_provenance,
    refuse_changed_source,
)
from litconvert.conversion.plan import plan_conversion
from litconvert.data.dataset import open_latents
from litconvert.data.synthesize import synthesize_resolved
from litconvert.distillation.teaching import Teachers, open_outputs
from litconvert.distillation.warm_start import check_start, open_start
from litconvert.errors import UsageError
from litconvert.estimates.stage import StageEstimate, estimate_stages
from litconvert.families.sources import open_source, read_model
from litconvert.model.attention_layers import linear_layers
from litconvert.recipe.resolve import ResolvedRecipe, read_recorded, resolve
from litconvert.recipe.schema import AttentionTransfer, Recipe, Source, Start
from litconvert.runs.directory import RunDirectory, is_run, model_of
from litconvert.runs.trackers import tracker_packages
from litconvert.training.checks import check_data, check_model, check_source, check_teacher
from litconvert.training.engine import Engine
from litconvert.training.fitting import begin, fit_and_write, refuse_inputs_in, trained_record
from litconvert.training.optimization import trained_names
from litconvert.training.run_inputs import File, RunInputs, goes_on, is_finished

# Of a student's source: where its files are now, and what decodes and encodes beside it.
MOVABLE = ("path", "vae", "text_encoder", "license")


def _value(dump: Any, key: str) -> Any:
    """What a dotted key stands for in a dumped recipe; None where there is no such thing."""
    for part in key.split("."):
        if isinstance(dump, Mapping):
            dump = dump.get(part)
        elif isinstance(dump, (list, tuple)) and part.isdigit() and int(part) < len(dump):
            dump = dump[int(part)]
        else:
            return None
    return dump


def resolve_run(
    student: Path, recipe: str | None, overrides: Sequence[str], teacher: str | None, start: str | None = None
) -> tuple[ResolvedRecipe, Recipe]:
    """The run's recipe, with the source that the student was converted from; and the student's own recipe."""
    recorded = read_recorded(student / "recipe.yaml")
    resolved = resolve(recipe or str(student / "recipe.yaml"), overrides)
    update: dict[str, Any] = {"student": recorded.student, "inherit": recorded.inherit}
    keys = [one.partition("=")[0] for one in overrides]
    moved = {}
    for key in keys:
        section, *rest = key.split(".")
        if section == "source" and rest and rest[0] in MOVABLE:
            moved[rest[0]] = getattr(resolved.recipe.source, rest[0])
        elif section in ("source", "student", "inherit"):
            asked, made = (_value(one.model_dump(), key) for one in (resolved.recipe, recorded))
            if asked != made:
                raise UsageError(f"{key} is {made} in {student}; to have {asked}, convert the source again with it")
    update["source"] = recorded.source.model_copy(update=moved)
    distill = resolved.recipe.distill
    if teacher is not None:
        base = distill.teacher or Source(license=recorded.source.license)
        distill = distill.model_copy(update={"teacher": base.model_copy(update={"path": teacher})})
    if start is not None:
        base_start = distill.start or Start()
        distill = distill.model_copy(update={"start": base_start.model_copy(update={"path": start})})
    update["distill"] = distill
    merged = resolved.recipe.model_copy(update=update)
    return ResolvedRecipe(resolved.name, merged, resolved.origins), recorded


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
    on_estimates: Callable[[Sequence[StageEstimate]], None] | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_draw: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Teach a converted student with its softmax teacher. Called again with the same inputs, it goes on where it was.

    Args:
        student: model directory that `convert` wrote.
        out: run directory: recipe.yaml, metrics.csv, curves.png, samples/, checkpoints/, model/.
        recipe: name or path; None: the one recorded in the student.
        teacher: another checkpoint for the stages after attention transfer; None: the recipe's, or else the source.
        data: dataset folder; None: the recipe's, or else the teacher draws it into a folder `out`-latents.
        start: RUN or RUN@STEP, another run whose weights are trained on with a new optimiser; None: the recipe's, or
            else the student's own.
        overrides: `key=value`, over the recipe. Stages of a run that is there may be given more steps.
        force: replace a run of other inputs.
        on_estimates: where it is given, called on the main process with what each stage will take, before models are
            read; what they took is in usage.json afterwards.
        on_step, on_draw, on_note: for the console.

    Returns: the run directory.

    Raises UsageError for inputs that do not fit, LitconvertError when it had to stop, Interrupted after a signal.
    """
    student, out = Path(student), Path(out)
    if is_run(student) or model_of(str(student)) != str(student):
        raise UsageError(
            f"{student} is a run, not a student: give it as --from {student} beside the student that it was trained "
            "from"
        )
    provenance = read_provenance(student)
    refuse_inputs_in(out, student, data)
    resolved, recorded = resolve_run(student, recipe, overrides, teacher, start)
    settings = resolved.recipe
    run = RunDirectory(out)
    tracker_packages(settings.distill.trackers)
    student_source = open_source(Source(path=str(student)))
    config = student_source.reading.config
    check_model(config, settings)
    engine = Engine(settings.distill.mixed_precision)
    settings = with_settled_models(engine, settings)
    source = open_source(settings.source, settings.inherit.weights)
    teacher_source = open_source(settings.distill.teacher) if settings.distill.teacher else source
    source_file = File.of(source)
    refuse_changed_source(student, provenance, settings.source.path, source_file.sha256)
    check_teacher(config, teacher_source.reading.config, settings)
    check_source(config, source.reading.config, settings, is_teacher=teacher_source is source)
    names = list(student_source.reading.origins)
    for index, stage in enumerate(settings.distill.stages):
        trained_names(config, names, stage, f"distill.stages.{index}")
    asked = settings.distill.start
    if asked is not None and run.record() is None:
        check_start(asked, config)  # before data is drawn
    folder = data or settings.data.path
    if folder is None:
        # Beside the run, not in it: the run's own digest is known only once the data is drawn.
        folder = out.parent / f"{out.name}-latents"
        synthesize_resolved(resolved, Path(folder), force, on_draw, on_note)
    dataset = open_latents(folder)
    check_data(config, dataset, settings)

    teacher_file = source_file if teacher_source is source else File.of(teacher_source)
    wanted = RunInputs(
        student={"sha256": student_source.checkpoint.sha256()},
        files={"source": source_file, "teacher": teacher_file},
        data=dataset.digest,
        texts=dataset.condition == "text",
        recipe=settings,
    )
    warm = None
    if asked is not None:
        warm = open_start(
            engine,
            asked,
            run,
            config,
            goes_on=lambda start: goes_on(run, replace(wanted, start=start)),
            is_finished=lambda start: is_finished(run, replace(wanted, start=start)),
        )
        refuse_inputs_in(out, warm.run)
        wanted = replace(wanted, start=warm.inputs)
    if begin(engine, run, wanted, {} if warm is None else {"start": warm.record}, force=force, on_note=on_note):
        return out
    if on_estimates is not None and engine.is_main:
        # Before the models are read: what this process takes now counts as its libraries.
        files = {id(one): one.nbytes for one in (student_source, source, teacher_source)}
        on_estimates(
            estimate_stages(
                settings,
                config,
                teacher_source.reading.config,
                source.reading.config,
                mapped_bytes=sum(files.values()),
                processes=engine.processes,
                sharded=engine.sharded,
            )
        )
    stages = settings.distill.stages
    needs_source = any(isinstance(stage, AttentionTransfer) for stage in stages)
    model = read_model(student_source, torch.float32)
    if warm is not None:
        warm.give(model)
    teacher_model = read_model(teacher_source, torch.float32)
    source_model = (
        None if not needs_source else teacher_model if teacher_source is source else read_model(source, torch.float32)
    )
    entries = plan_conversion(source, recorded).entries
    layers = linear_layers(model)
    channels = model.config.in_channels if model.config.prediction == "velocity" else model.config.out_channels
    sizes = [(len(bucket), (channels, *bucket.shape[1:])) for bucket in dataset.buckets]
    outputs = open_outputs(settings.distill, run.path / "teacher-outputs", sizes)
    teachers = Teachers(engine, source_model, teacher_model, layers, settings.distill, outputs)
    fit_and_write(
        engine,
        model,
        config,
        teachers,
        dataset,
        settings,
        run,
        fresh=frozenset(entry.target for entry in entries if entry.fate == "fresh" and entry.target),
        dtypes={name: info.dtype for name, info in student_source.checkpoint.tensors.items()},
        record={
            **provenance,
            "metrics": {},  # of what is trained here nothing is measured yet
            **wanted.inputs.record,
            "distillation": {
                **trained_record(settings, dataset),
                "teacher": {
                    "path": teacher_source.checkpoint.source,
                    "weights": teacher_file.weights,
                    "sha256": teacher_file.sha256,
                    "license": (settings.distill.teacher or settings.source).license.model_dump(),
                },
                # A student that was distilled before it became one, and the run whose weights it was given.
                **({"student": provenance["distillation"]} if provenance.get("distillation") else {}),
                **({} if warm is None else {"start": warm.record}),
            },
        },
        on_step=on_step,
        on_note=on_note,
    )
    return out


def with_settled_models(engine: Engine, recipe: Recipe) -> Recipe:
    """The recipe with runs (RUN, RUN@STEP) as the models they stand for, as the main process sees them."""

    def settled(source: Source) -> Source:
        path = source.path
        if path is None:
            return source
        return source.model_copy(update={"path": engine.from_main(model_of(path) if engine.is_main else None)})

    teacher = recipe.distill.teacher and settled(recipe.distill.teacher)
    distill = recipe.distill.model_copy(update={"teacher": teacher})
    return recipe.model_copy(update={"source": settled(recipe.source), "distill": distill})
