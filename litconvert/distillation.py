"""Distillation: what a run is made of, whether that fits together, and what is left. The loop is in `trainer`."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.attention_layers import linear_layers
from litconvert.checkpoints import TensorInfo
from litconvert.conditions import Conditioner, Encode
from litconvert.conversion import DTYPES, plan_conversion
from litconvert.engine import Engine
from litconvert.errors import LitconvertError, UsageError
from litconvert.estimate import StageEstimate, estimate_stages, micro_batch_of
from litconvert.files import digest_of, held, require_space, whole_directory
from litconvert.latents import LatentDataset, open_latents
from litconvert.launch import launched_processes, sharding_asked
from litconvert.model_directory import (
    FORMAT_VERSION,
    read_provenance,
    refuse_changed_source,
    versions,
    write_description,
    write_model_directory,
)
from litconvert.modeling_lit import CaptionConditioning, LiTTransformer2DModel
from litconvert.observer import Observer
from litconvert.optimization import trained_names
from litconvert.recipe import AttentionTransfer, FlowMatching, Recipe, Source, Start
from litconvert.recipe_files import ResolvedRecipe, read_recorded, resolve
from litconvert.run_directory import RECORD, Progress, RunDirectory, is_run, model_of
from litconvert.run_inputs import File, RunInputs, go_on, goes_on, is_finished
from litconvert.sources import open_source, read_model
from litconvert.synthesis import synthesize_resolved
from litconvert.teaching import Teachers, open_outputs, teacher_weights
from litconvert.trackers import tracker_packages
from litconvert.trainer import StepReport, Trainer
from litconvert.warm_start import check_start, open_start

# Of a student's source: where its files are now, and what decodes and encodes beside it.
MOVABLE = ("path", "vae", "text_encoder", "license")


def check_model(config: Mapping[str, Any], recipe: Recipe) -> None:
    """Whether a model can be trained by the recipe's stages, on so many processes. Raises UsageError."""
    if recipe.publish.backup_every is not None and recipe.publish.repo_id is None:
        raise UsageError("publish.backup_every needs to know where to: set publish.repo_id=owner/name")
    if not recipe.distill.stages:
        raise UsageError("the recipe has no distill.stages; `litconvert recipes show digits` shows an example")
    velocity = config["prediction"] == "velocity"
    settings = recipe.distill
    if settings.noise_set is not None:
        if int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes())) != launched_processes():
            raise UsageError(
                "distill.noise_set keeps outputs in files that processes share, which works on one node alone; leave "
                "it out on several"
            )
        if settings.teacher_placement == "sharded":
            raise UsageError(
                "distill.noise_set keeps outputs process by process, and a sharded teacher answers all at once"
            )
        if len({stage.condition_dropout for stage in settings.stages if not isinstance(stage, AttentionTransfer)}) > 1:
            raise UsageError("distill.noise_set draws dropped conditions once: give all stages one condition_dropout")
    sharded = sharding_asked() and launched_processes() > 1
    for index, stage in enumerate(recipe.distill.stages):
        where = f"distill.stages.{index}"
        if sharded and stage.optimizer != "adamw":
            raise UsageError(
                f"{where}.optimizer={stage.optimizer} keeps its states whole, and they are to be split over the "
                "processes; set adamw, or launch without --use_fsdp"
            )
        micro_batch_of(recipe, index, launched_processes())  # refuses a batch that does not split
        if stage.condition_dropout and config["num_classes"] is not None and not config["null_class"]:
            raise UsageError(
                f"{where}.condition_dropout needs a null class, which this model was trained without; set 0"
            )
        if isinstance(stage, AttentionTransfer):
            if "linear" not in config["attention"]:
                raise UsageError(f"{where} transfers attention, but the student has no linear layer")
            continue
        if isinstance(stage, FlowMatching) != velocity:
            right = "flow_matching" if velocity else "hybrid"
            raise UsageError(
                f"{where}.objective={stage.objective}: this model predicts {config['prediction']}, whose objective is "
                f"{right}"
            )
        if not velocity and config["out_channels"] != 2 * config["in_channels"]:
            raise UsageError(
                f"{where}: the hybrid loss is DiT's, for models with a learned variance, which this one has not"
            )
        if stage.feature_weight and "linear" not in config["attention"]:
            raise UsageError(f"{where}.feature_weight is of linear layers, and the student has none; set 0")


def check_data(config: Mapping[str, Any], data: LatentDataset, recipe: Recipe) -> None:
    """Whether a model can see the data. Raises UsageError."""
    patch = config["patch_size"]
    for bucket in data.buckets:
        if bucket.shape[0] != config["in_channels"] or any(side % patch for side in bucket.shape[1:]):
            raise UsageError(
                f"the data set's latents are {bucket.shape}, the student takes {config['in_channels']} channels and "
                f"sides that are multiples of {patch}; draw or encode the data for this model"
            )
    classes = config["num_classes"] is not None
    if classes != (data.condition == "class"):
        raise UsageError(
            f"the data set has {'classes' if data.condition == 'class' else 'captions'}, the model "
            f"{'classes' if classes else 'captions'}; draw or encode the data for this model"
        )
    if data.labels is not None and not 0 <= data.labels[0] <= data.labels[1] < config["num_classes"]:
        raise UsageError(
            f"the data set's class labels are {data.labels[0]} to {data.labels[1]}, the model's classes are 0 to "
            f"{config['num_classes'] - 1}; draw or label the data for this model"
        )
    if data.condition == "caption":
        if data.caption_channels != config["caption_channels"]:
            raise UsageError(
                f"the data set's captions have features of width {data.caption_channels}, the model reads "
                f"{config['caption_channels']}: encode them with the T5 that the model was trained with"
            )
        if (data.caption_tokens or 0) > config["caption_tokens"]:
            raise UsageError(
                f"the data set's captions have up to {data.caption_tokens} tokens, the model reads "
                f"{config['caption_tokens']}: encode the data for this model"
            )
    if recipe.data.flip and not data.pixels and not data.flipped:
        raise UsageError("data.flip needs mirrored latents, which the data set has not: encode it with data.flip=true")


def check_teacher(student: Mapping[str, Any], teacher: Mapping[str, Any], recipe: Recipe) -> None:
    """Whether a teacher can teach this student. Raises UsageError."""
    keys = ("in_channels", "sample_size", "out_channels", "num_classes", "caption_channels", "caption_tokens")
    for key in (*keys, "prediction", "data_timestep", "micro_conditions"):
        if student[key] != teacher[key]:
            raise UsageError(
                f"the teacher's {key} is {teacher[key]}, the student's is {student[key]}: they cannot see the same "
                "input; choose a teacher of the same latent and condition (--teacher, or distill.teacher.path)"
            )
    for index, stage in enumerate(recipe.distill.stages):
        features = not isinstance(stage, AttentionTransfer) and stage.feature_weight > 0
        if features and not _same_layers(student, teacher):
            raise UsageError(
                f"distill.stages.{index}.feature_weight compares layer with layer, and the teacher has others than the "
                "student; set 0, or let the source teach"
            )


def _same_layers(student: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(student[key] == other[key] for key in ("hidden_size", "num_layers", "patch_size", "in_channels"))


def check_source(student: Mapping[str, Any], source: Mapping[str, Any], recipe: Recipe, *, is_teacher: bool) -> None:
    """Whether the model inherited from can play its part. Raises UsageError."""
    for index, stage in enumerate(recipe.distill.stages):
        if isinstance(stage, AttentionTransfer):
            if not _same_layers(student, source):
                raise UsageError("the student does not have the shape of its recorded source; convert it again")
            layers = [n for n, kind in enumerate(student["attention"]) if kind == "linear"]
            if any((source["attention"] or ["softmax"] * source["num_layers"])[n] == "linear" for n in layers):
                raise UsageError(
                    f"distill.stages.{index} transfers attention from the source, which is linear already; leave the "
                    "stage out"
                )
        elif is_teacher and any(teacher_weights(stage)) and source["attention"] == student["attention"]:
            raise UsageError(
                "the source is linear already and has nothing to teach; name the softmax model that teaches "
                "(--teacher, or distill.teacher.path)"
            )


def make_conditioner(
    model: LiTTransformer2DModel, data: LatentDataset, recipe: Recipe, device: torch.device
) -> Conditioner:
    """What turns the data's conditions into the model's arguments; loads T5 where the data holds texts.

    Raises UsageError when captions are to be dropped and there is no null caption.
    """
    own = model.conditioning.null_caption if isinstance(model.conditioning, CaptionConditioning) else None
    empty, encode = data.null_caption, None
    if data.condition == "text":
        encode = load_encode(recipe, int(model.config.caption_tokens), device)
        if own is None:
            features, mask = encode([""])
            empty = (features[0], mask[0])
    drops = any(stage.condition_dropout for stage in recipe.distill.stages)
    if model.config.caption_channels is not None and drops and own is None and empty is None:
        raise UsageError(
            "dropping captions needs the null caption, and neither the model nor the data set holds one: encode the "
            "data with `litconvert latents encode`, or set condition_dropout to 0"
        )
    return Conditioner(model.config, own_null=own, empty_prompt=empty, encode=encode, device=device)


def load_encode(recipe: Recipe, tokens: int, device: torch.device) -> Encode:
    """T5, kept loaded, for captions that are encoded on the fly."""
    from litconvert.captions import encode_texts, load_text_encoder

    if recipe.source.text_encoder is None:
        raise UsageError(
            "the data set holds captions as text, and no text encoder is named: set source.text_encoder.path, or "
            "encode the data with data.encode.captions=embeddings"
        )
    tokenizer, encoder = load_text_encoder(recipe.source.text_encoder)
    return partial(encode_texts, tokenizer, encoder.to(device), tokens=tokens)


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


def refuse_inputs_in(out: Path, *inputs: str | Path | None) -> None:
    """Raise UsageError where the run would be written over what it reads."""
    held = [path for path in inputs if path and Path(path).resolve().is_relative_to(out.resolve())]
    if held:
        raise UsageError(f"{out} holds {held[0]}, which the run reads; write the run beside it")


def begin(
    engine: Engine,
    run: RunDirectory,
    wanted: RunInputs,
    more: Mapping[str, Any],
    *,
    force: bool,
    on_note: Callable[[str], None],
) -> bool:
    """Begin a run, or have the one that is there go on; returns whether it is finished already.

    Args:
        more: what its record holds beside the inputs.
    """
    finished = False
    if engine.is_main:
        before = (run.record() or {}).get("bf16")
        if before is not None and before != engine.bf16 and run.latest_checkpoint() is not None:
            names = {True: "bf16 autocast", False: "float32"}
            on_note(
                f"this run was computed in {names[before]} so far, and goes on in {names[engine.bf16]}: set "
                f"distill.mixed_precision or LITCONVERT_BF16={int(before)} for the same"
            )
        for note in go_on(run, wanted, {**more, "bf16": engine.bf16}, force=force):
            on_note(note)
        finished = is_finished(run, wanted)
    engine.wait()
    if not (run.path / RECORD).is_file():
        raise LitconvertError(
            f"process {engine.process} does not see {run.path}, which the first has begun: all nodes need one shared "
            "file system for the run directory"
        )
    return bool(engine.from_main(finished))


def trained_record(recipe: Recipe, data: LatentDataset) -> dict[str, Any]:
    """How a model was trained, for its litconvert.json."""
    return {
        "steps": sum(stage.steps for stage in recipe.distill.stages),
        "stages": [stage.model_dump(mode="json") for stage in recipe.distill.stages],
        "data": {"samples": len(data), "digest": data.digest},
        "seed": recipe.seed,
    }


def checkpoint_record(record: Mapping[str, Any], progress: Progress, total_steps: int) -> dict[str, Any]:
    """litconvert.json of a checkpoint in the middle of a run, from that of the run's result."""
    key = "distillation" if "distillation" in record else "training"
    trained = {**record[key], "steps": progress.global_step, "planned_steps": total_steps}
    digest = digest_of([record["digest"], progress.global_step])
    # Of its own: what the result's record says of inputs and digest is not of this model.
    rest = {name: value for name, value in record.items() if name not in ("inputs", "defaults")}
    return {"metrics": {}, **rest, "digest": digest, key: trained, "format": FORMAT_VERSION, "versions": versions()}


def fit_and_write(
    engine: Engine,
    model: LiTTransformer2DModel,
    config: Mapping[str, Any],
    teachers: Teachers,
    data: LatentDataset,
    recipe: Recipe,
    run: RunDirectory,
    *,
    fresh: frozenset[str],
    dtypes: Mapping[str, torch.dtype],
    record: Mapping[str, Any],
    on_step: Callable[[StepReport], None],
    on_note: Callable[[str], None],
) -> None:
    """Train, observe, and write model/.

    Args:
        config: the model's, as it is written.
        fresh: names of tensors that were not inherited.
        dtypes: of the written tensors, where the recipe names none.
        record: litconvert.json of the result, and but for the steps that of each checkpoint.
    """
    if engine.is_main:
        # Model, EMA and two Adam moments in float32, once for each kept checkpoint and one in the making; the result.
        nbytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        kept = len(list(run.checkpoints.glob("step-*"))) if run.checkpoints.is_dir() else 0
        require_space(run.path, 4 * nbytes * max(1, recipe.distill.keep_checkpoints + 1 - kept) + nbytes)
        on_note(engine.describe())
        if data.flipped and not recipe.data.flip:
            on_note("the data set holds mirrored latents, which are not used: set data.flip=true to train on them too")
        tokens = (model.config.sample_size // model.config.patch_size) ** 2
        sizes = [bucket.shape[1] * bucket.shape[2] // model.config.patch_size**2 for bucket in data.buckets]
        if not any(0.5 < size / tokens < 2 for size in sizes):
            on_note(
                f"the data set's images are of {sizes[0]:,} tokens, the model was made for {tokens:,}; was it encoded "
                "for another size?"
            )
    conditioner = make_conditioner(model, data, recipe, engine.device)
    # A split teacher answers only when every process asks, and the main one looks alone.
    split = recipe.distill.teacher_placement == "sharded" and engine.processes > 1
    if split and engine.is_main:
        on_note("the teacher is split over the processes: it is not drawn, nor is the error by timestep measured")
    shown = None if split else teachers.teacher
    with (
        held(run.path, on_note) if engine.is_main else nullcontext(),
        Observer(engine, model, shown, data, conditioner, recipe, run, on_note) as observer,
    ):

        def report(step: StepReport) -> None:
            observer.log(step)
            on_step(step)

        def describe(folder: Path, progress: Progress) -> None:
            provenance = checkpoint_record(record, progress, trainer.total_steps)
            write_description(folder, config=config, recipe=_of_result(recipe), provenance=provenance)

        trainer = Trainer(
            engine,
            model,
            teachers,
            data,
            conditioner,
            recipe,
            run,
            fresh=fresh,
            on_step=report,
            on_observe=observer.observe,
            on_note=on_note if engine.is_main else lambda note: None,
            describe=describe,
        )
        if engine.from_main(engine.is_main and run.latest_checkpoint() is None):
            observer.before()
        state = trainer.fit()
        observer.after(trainer.total_steps, state)
        if engine.is_main:
            run.plot_curves()
            run.plot_timestep_errors()
            _write_result(run, config, state, recipe, dtypes, record)
    engine.wait()


def _of_result(recipe: Recipe) -> Recipe:
    """The recipe as a model carries it: whoever trains that model on starts from it, not from where it started."""
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"start": None})})


def _write_result(
    run: RunDirectory,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    recipe: Recipe,
    dtypes: Mapping[str, torch.dtype],
    record: Mapping[str, Any],
) -> None:
    """model/: the EMA's weights as a model directory, with how they were trained."""
    dtype = recipe.student.dtype
    tensors = {
        name: TensorInfo(tuple(value.shape), DTYPES[dtype] if dtype else dtypes.get(name, torch.float32))
        for name, value in state.items()
    }
    whole_record = {"metrics": {}, **record, "format": FORMAT_VERSION, "versions": versions()}
    with whole_directory(run.model) as folder:
        write_model_directory(
            folder,
            config=config,
            tensors=tensors,
            produce=lambda name: state[name].cpu(),
            recipe=_of_result(recipe),
            provenance=lambda: whole_record,
        )
