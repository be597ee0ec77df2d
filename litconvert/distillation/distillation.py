"""Distillation: what a run is made of, whether that fits together, and what is left. The loop is in `trainer`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from litconvert.common.hub import path_of
from litconvert.common.listener import SILENT, Listener
from litconvert.common.versions import versions
from litconvert.conversion.directory import refuse_changed_source
from litconvert.conversion.plan import plan_conversion
from litconvert.conversion.provenance import Provenance
from litconvert.conversion.solve_plan import solved_names
from litconvert.data.conditions import check_captions
from litconvert.data.dataset import LatentDataset, open_latents
from litconvert.data.synthesize import synthesize_resolved
from litconvert.distillation.teaching import Teacher, open_outputs
from litconvert.distillation.warm_start import WarmStart, check_start, open_start
from litconvert.errors import UsageError
from litconvert.families.companions import companions_of, local_model
from litconvert.families.sources import OpenSource, open_named_teacher, open_source_of, open_student, read_model
from litconvert.model.attention_layers import linear_layers
from litconvert.model.config import ModelConfig
from litconvert.recipe.resolve import ResolvedRecipe, read_recorded, resolve
from litconvert.recipe.schema import License, Recipe, Source, Start
from litconvert.runs.directory import RunDirectory, is_run, model_of
from litconvert.training.checks import check_data, check_model, check_packages, check_teacher
from litconvert.training.engine import Engine
from litconvert.training.fitting import begin, refuse_inputs_in, trained_record
from litconvert.training.fitting import fit as fit_and_write
from litconvert.training.objective import TrainingRun
from litconvert.training.optimization import trained_names
from litconvert.training.run_inputs import File, RunInputs, goes_on, is_finished
from litconvert.training.same_encoders import check_same_encoders, check_same_teacher

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


@dataclass(frozen=True)
class Request:
    """A distillation as it is asked for; see `litconvert.distill`."""

    student: Path
    out: Path
    recipe: str | None = None
    teacher: str | None = None
    data: str | Path | None = None
    start: str | None = None
    overrides: Sequence[str] = ()
    force: bool = False


@dataclass(frozen=True)
class Lineage:
    """A student, the softmax model it was converted from, and the one that teaches it, which is often the same.

    Attributes:
        student, source, teacher: recognised, headers only.
        source_file: the source's content.
        provenance: the student's litconvert.json.
    """

    student: OpenSource
    source: OpenSource
    teacher: OpenSource
    source_file: File
    provenance: Provenance

    @property
    def config(self) -> ModelConfig:
        """The student's."""
        return self.student.config

    @cached_property
    def files(self) -> dict[str, File]:
        """Content of source and teacher. A teacher of its own is read for it, and of the Hub downloaded."""
        teacher = self.source_file if self.teacher is self.source else File.of(self.teacher)
        return {"source": self.source_file, "teacher": teacher}

    @property
    def nbytes(self) -> int:
        """Bytes of their files, each counted once."""
        return sum({id(one): one.nbytes for one in (self.student, self.source, self.teacher)}.values())


@dataclass(frozen=True)
class Distillation:
    """A distillation that fits together and is begun: no weights are read yet.

    Attributes:
        engine: the processes.
        recipe: resolved, its models settled.
        recorded: the recipe that the student was converted by.
        directory: of the run.
        lineage: the models.
        data: the training set.
        inputs: what determines the run.
        warm: other weights than the student's to start from; None: there are none.
        finished: the run's model is there already.
    """

    engine: Engine
    recipe: Recipe
    recorded: Recipe
    directory: RunDirectory
    lineage: Lineage
    data: LatentDataset
    inputs: RunInputs
    warm: WarmStart | None
    finished: bool


def prepare(asked: Request, listener: Listener = SILENT) -> Distillation:
    """Begin a distillation, or go on with one: all that can be wrong with it is said now. Every process calls it.

    Raises UsageError for inputs that do not fit, LitconvertError for a run of other inputs.
    """
    student, out = asked.student, asked.out
    if is_run(student) or model_of(str(student)) != str(student):
        raise UsageError(
            f"{student} is a run, not a student: give it as --from {student} beside the student that it was trained "
            "from"
        )
    folder = local_model(student, listener)
    provenance = Provenance.read(folder)
    refuse_inputs_in(out, folder, asked.data)
    resolved, recorded = resolve_run(asked)
    for text in companions_of(folder).left_out():
        listener.note(f"not here and not used: {text}")
    run = RunDirectory(out)
    check_packages(resolved.recipe)
    opened = open_student(folder)
    check_model(opened.config, resolved.recipe)
    engine = Engine(resolved.recipe.distill.mixed_precision)
    recipe = with_settled_models(engine, resolved.recipe)
    lineage = _open_lineage(asked, opened, recipe, provenance)
    if recipe.distill.start is not None and run.record() is None:
        check_start(recipe.distill.start, lineage.config)  # before data is drawn
    data = _open_data(asked, resolved, recipe, lineage, listener)
    wanted = RunInputs(
        student={"sha256": opened.checkpoint.sha256()},
        files=lineage.files,
        data=data.digest,
        texts=data.condition == "text",
        recipe=recipe,
    )
    warm = _open_warm_start(engine, run, wanted, lineage.config)
    if warm is not None:
        refuse_inputs_in(out, warm.run)
        wanted = replace(wanted, start=warm.inputs)
    more = {} if warm is None else {"start": warm.record}
    finished = begin(engine, run, wanted, more, force=asked.force, listener=listener)
    return Distillation(engine, recipe, recorded, run, lineage, data, wanted, warm, finished)


def _open_lineage(asked: Request, student: OpenSource, recipe: Recipe, provenance: Provenance) -> Lineage:
    """The student's source and teacher, checked against it, and the stages against all of them."""
    config = student.config
    _require_here(asked, recipe)
    source = open_source_of(recipe)
    teacher = open_named_teacher(recipe, source)
    source_file = File.of(source)
    refuse_changed_source(asked.student, provenance, recipe.source.path, source_file.sha256)
    check_teacher(config, teacher.config, recipe, is_source=teacher is source)
    if recipe.distill.teacher is not None and recipe.distill.teacher.path is not None:
        check_same_teacher(recipe, companions_of(recipe.distill.teacher.path).resolve(None, ()).recipe)
    for index, stage in enumerate(recipe.distill.stages):
        trained_names(list(student.reading.origins), stage, f"distill.stages.{index}")
    return Lineage(student, source, teacher, source_file, provenance)


def _require_here(asked: Request, recipe: Recipe) -> None:
    """Refuse a source or teacher that is only where the student was made, and say how it is named here."""
    teacher = recipe.distill.teacher
    for path, what, option in (
        (recipe.source.path, "converted from", "--set source.path=PATH"),
        (teacher.path if teacher else None, "taught by", "--teacher PATH"),
    ):
        try:
            if path is not None:
                path_of(path)
        except UsageError as error:
            raise UsageError(f"{asked.student} was {what} {path}, which is not here: name it with {option}") from error


def _open_data(
    asked: Request, resolved: ResolvedRecipe, recipe: Recipe, lineage: Lineage, listener: Listener
) -> LatentDataset:
    """The training set, which the teacher draws where none is named."""
    folder = asked.data or recipe.data.path
    if folder is None:
        folder = RunDirectory(asked.out).latents
        synthesize_resolved(resolved, folder, listener, force=asked.force)
    data = open_latents(folder)
    check_data(lineage.config, data, recipe)
    check_captions(lineage.config, data, recipe)
    check_same_encoders(data, recipe)
    return data


def _open_warm_start(engine: Engine, run: RunDirectory, wanted: RunInputs, config: ModelConfig) -> WarmStart | None:
    """The weights of another run that the recipe starts from, if it does."""
    asked = wanted.recipe.distill.start
    if asked is None:
        return None
    return open_start(
        engine,
        asked,
        run,
        config,
        goes_on=lambda start: goes_on(run, replace(wanted, start=start)),
        is_finished=lambda start: is_finished(run, replace(wanted, start=start)),
    )


def fit(prepared: Distillation, listener: Listener = SILENT) -> None:
    """Read the models and train the student; the result is in the run's model/. Every process calls it."""
    lineage, recipe, data = prepared.lineage, prepared.recipe, prepared.data
    model = read_model(lineage.student, torch.float32)
    if prepared.warm is not None:
        prepared.warm.give(model)
    teacher = read_model(lineage.teacher, torch.float32)
    channels = model.config.in_channels if lineage.config.predicts_velocity else model.config.out_channels
    sizes = [(len(bucket), (channels, *bucket.shape[1:])) for bucket in data.buckets]
    outputs = open_outputs(recipe.distill, prepared.directory.path / "teacher-outputs", sizes)
    solved = solved_names(lineage.provenance.solve, list(lineage.student.reading.origins))
    entries = plan_conversion(lineage.source, prepared.recorded).entries
    # Another device would solve other tensors: what was solved is recorded, and what has no source was not inherited.
    not_inherited = {
        entry.target
        for entry in entries
        if entry.target and (entry.fate == "fresh" or (entry.fate == "solved" and entry.source is None))
    }
    training = TrainingRun(
        engine=prepared.engine,
        recipe=recipe,
        directory=prepared.directory,
        data=data,
        model=model,
        objective=Teacher(prepared.engine, teacher, linear_layers(model), recipe.distill, outputs),
        fresh=frozenset(not_inherited - solved),
        solved=solved,
        dtypes={name: info.dtype for name, info in lineage.student.checkpoint.tensors.items()},
        provenance=_provenance(prepared),
        name="distil",
    )
    fit_and_write(training, listener)


def _provenance(prepared: Distillation) -> Provenance:
    """That of the result: the student's, taught."""
    lineage, recipe, warm = prepared.lineage, prepared.recipe, prepared.warm
    teacher, before = lineage.files["teacher"], lineage.provenance.distillation
    taught = {
        **trained_record(recipe, prepared.data),
        "teacher": {
            "path": lineage.teacher.checkpoint.source,
            "weights": teacher.weights,
            "sha256": teacher.sha256,
            "license": (recipe.distill.teacher or recipe.source).license.model_dump(),
        },
        # A student that was distilled before it became one, and the run whose weights it was given.
        **({"student": before} if before else {}),
        **({} if warm is None else {"start": warm.record}),
    }
    return replace(
        lineage.provenance,
        **prepared.inputs.inputs.record,
        distillation=taught,
        metrics={},  # of what is trained here nothing is measured yet
        versions=versions(),
    )


def resolve_run(asked: Request) -> tuple[ResolvedRecipe, Recipe]:
    """The run's recipe, with the source that the student was converted from; and the student's own recipe."""
    beside = companions_of(asked.student)
    place = beside.recipe or asked.student / "recipe.yaml"
    recorded = beside.recorded(read_recorded(place))
    resolved = beside.resolve(None, asked.overrides) if asked.recipe is None else resolve(asked.recipe, asked.overrides)
    update: dict[str, Any] = {"student": recorded.student, "inherit": recorded.inherit, "solve": recorded.solve}
    keys = [one.partition("=")[0] for one in asked.overrides]
    moved = {}
    for key in keys:
        section, *rest = key.split(".")
        if section == "source" and rest and rest[0] in MOVABLE:
            moved[rest[0]] = getattr(resolved.recipe.source, rest[0])
        elif section in ("source", "student", "inherit", "solve"):
            wanted, made = (_value(one.model_dump(mode="json"), key) for one in (resolved.recipe, recorded))
            if wanted != made:
                raise UsageError(
                    f"{key} is {made} in {asked.student}; to have {wanted}, convert the source again with it"
                )
    update["source"] = recorded.source.model_copy(update=moved)
    distill = resolved.recipe.distill
    if asked.teacher is not None:
        base, named = distill.teacher or Source(), dict[str, Any](path=asked.teacher)
        if not any(key.startswith("distill.teacher.license") for key in keys):
            # Of another model than the recipe's nobody said under which licence it is.
            known = {one.path: one.license for one in (recorded.source, distill.teacher) if one is not None}
            named["license"] = known.get(asked.teacher, License())
        distill = distill.model_copy(update={"teacher": base.model_copy(update=named)})
    if asked.start is not None:
        base_start = distill.start or Start()
        distill = distill.model_copy(update={"start": base_start.model_copy(update={"path": asked.start})})
    update["distill"] = distill
    merged = resolved.recipe.model_copy(update=update)
    return ResolvedRecipe(resolved.name, merged, resolved.origins), recorded


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
