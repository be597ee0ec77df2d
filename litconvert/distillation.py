"""Distillation: what a run is made of, whether that fits together, and what is left. The loop is in `trainer`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from litconvert.checkpoints import TensorInfo
from litconvert.conversion import DTYPES
from litconvert.errors import LitconvertError, UsageError
from litconvert.files import digest_of, read_json, require_space, whole_directory
from litconvert.latents import LatentDataset, open_latents, synthesize_resolved
from litconvert.model_directory import FORMAT_VERSION, read_provenance, versions, write_model_directory
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.recipe import AttentionTransfer, Hybrid, Recipe, ResolvedRecipe, Source, read_recorded, resolve
from litconvert.run_directory import RunDirectory
from litconvert.sampling import SampleSheet
from litconvert.sources import OpenSource, open_source, read_model
from litconvert.trainer import StepReport, Trainer


def bf16_in_hardware() -> bool:
    """Whether bf16 autocast is faster than float32 here: a GPU with bf16, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The engine. Raises UsageError when this process was launched as one of several but is in no group."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"this is one of {launched} launched processes, but they are in no process group, so each would train "
            "alone and overwrite the others; launch with `accelerate launch -m litconvert distill ...`"
        )
    return accelerator


def require_distillable(config: Mapping[str, Any]) -> None:
    """Refuse, before anything is drawn or loaded, a model whose training is not built. Raises UsageError."""
    kind = (
        "captions"
        if config["caption_channels"] is not None
        else "velocity"
        if config["prediction"] != "noise"
        else None
    )
    if kind is not None:
        raise UsageError(
            f"distilling a model of {kind} is not built yet; its conversion, sampling and push work: use `litconvert "
            "convert`, `sample` and `push`"
        )


def check_pair(
    student: LiTTransformer2DModel, teacher: LiTTransformer2DModel, data: LatentDataset, recipe: Recipe
) -> None:
    """Everything that can be refused before the first step. Raises UsageError."""
    mine, theirs = student.config, teacher.config
    for key in ("in_channels", "sample_size", "out_channels", "num_classes"):
        if mine[key] != theirs[key]:
            raise UsageError(
                f"the teacher's {key} is {theirs[key]}, the student's is {mine[key]}: they cannot see the same input; "
                "choose a teacher of the same latent and classes (--teacher, or distill.teacher.path)"
            )
    if data.shape[0] != mine.in_channels or any(side % mine.patch_size for side in data.shape[1:]):
        raise UsageError(
            f"the data set's latents are {data.shape}, the student takes {mine.in_channels} channels and sides that "
            f"are multiples of {mine.patch_size}; draw or encode the data for this model"
        )
    if not 0 <= data.labels[0] <= data.labels[1] < mine.num_classes:
        raise UsageError(
            f"the data set's class labels are {data.labels[0]} to {data.labels[1]}, the model's classes are 0 to "
            f"{mine.num_classes - 1}; draw or label the data for this model"
        )
    if not recipe.distill.stages:
        raise UsageError("the recipe has no distill.stages; `litconvert recipes show digits` shows an example")
    processes = int(os.environ.get("WORLD_SIZE", "1")) * recipe.distill.gradient_accumulation_steps
    for index, stage in enumerate(recipe.distill.stages):
        if stage.batch_size % processes:
            raise UsageError(
                f"distill.stages.{index}.batch_size={stage.batch_size} is not a multiple of processes times "
                f"accumulation, {processes}"
            )
        if stage.condition_dropout and not mine.null_class:
            raise UsageError(
                f"distill.stages.{index}.condition_dropout needs a null class, which this model was trained without; "
                "set 0"
            )
        if isinstance(stage, AttentionTransfer) and "linear" not in mine.attention:
            raise UsageError(f"distill.stages.{index} transfers attention, but the student has no linear layer")
        if isinstance(stage, Hybrid) and mine.out_channels != 2 * mine.in_channels:
            raise UsageError(
                f"distill.stages.{index}: the hybrid loss is DiT's, for models with a learned variance, which this one "
                "has not"
            )


def _same_attention(student: LiTTransformer2DModel, source: LiTTransformer2DModel) -> bool:
    keys = ("hidden_size", "num_layers", "patch_size", "in_channels")
    return all(student.config[key] == source.config[key] for key in keys)


def run_inputs(
    student: Path, teacher: OpenSource, source: OpenSource, data: LatentDataset, recipe: Recipe, student_digest: str
) -> dict[str, Any]:
    """What determines a run's result."""
    return {
        "student": student_digest,
        "source": source.checkpoint.sha256(),
        "teacher": teacher.checkpoint.sha256(),
        "teacher_weights": teacher.checkpoint.weights,
        "data": data.digest,
        "distill": recipe.distill.model_dump(
            mode="json", exclude={"checkpoint_every", "keep_checkpoints", "sample_every", "teacher"}
        ),
        "timesteps": recipe.diffusion.num_timesteps,
        "seed": recipe.seed,
    }


def resolve_run(
    student: Path, recipe: str | None, overrides: Sequence[str], teacher: str | None
) -> tuple[ResolvedRecipe, Recipe]:
    """The run's recipe, with the source that the student was converted from; and the student's own recipe."""
    recorded = read_recorded(student / "recipe.yaml")
    resolved = resolve(recipe or str(student / "recipe.yaml"), overrides)
    update: dict[str, Any] = {"source": recorded.source, "student": recorded.student, "inherit": recorded.inherit}
    if teacher is not None:
        base = resolved.recipe.distill.teacher or Source(license=recorded.source.license)
        distill = resolved.recipe.distill.model_copy(update={"teacher": base.model_copy(update={"path": teacher})})
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
    overrides: Sequence[str] = (),
    force: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_draw: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Teach a converted student with its softmax teacher. Called again with the same inputs, it goes on where it was.

    Args:
        student: model directory that `convert` wrote.
        out: run directory: recipe.yaml, metrics.csv, curves.png, samples/, checkpoints/, model/.
        recipe: name or path; None: the one recorded in the student.
        teacher: another checkpoint for the hybrid stage; None: the recipe's, or else the source.
        data: dataset folder; None: the recipe's, or else the teacher draws it into a folder `out`-latents.
        overrides: `key=value`, over the recipe.
        force: replace a run of other inputs.
        on_step, on_draw, on_note: for the console.

    Returns: the run directory.

    Raises UsageError for inputs that do not fit, LitconvertError when it had to stop, Interrupted after a signal.
    """
    student, out = Path(student), Path(out)
    provenance = read_provenance(student)
    inputs_in_out = [path for path in (student, data) if path and Path(path).resolve().is_relative_to(out.resolve())]
    if inputs_in_out:
        raise UsageError(f"{out} holds {inputs_in_out[0]}, which the run reads; write the run beside it")
    resolved, _ = resolve_run(student, recipe, overrides, teacher)
    settings = resolved.recipe
    accelerator = make_accelerator(settings.distill.mixed_precision)
    main = accelerator.is_main_process

    def quiet(*arguments: object) -> None: ...

    student_source = open_source(Source(path=str(student)))
    require_distillable(student_source.reading.config)
    source = open_source(settings.source, settings.inherit.weights)
    if source.checkpoint.sha256() != provenance["source"]["sha256"]:
        raise LitconvertError(
            f"{settings.source.path} has changed since {student} was converted from it; convert it again, or restore it"
        )
    teacher_source = open_source(settings.distill.teacher) if settings.distill.teacher else source
    folder = data or settings.data.path
    if folder is None:
        # Beside the run, not in it: the run's own digest is known only once the data is drawn.
        folder = out.parent / f"{out.name}-latents"
        if main:
            synthesize_resolved(resolved, folder, on_progress=on_draw)
        accelerator.wait_for_everyone()
    dataset = open_latents(folder)

    model = read_model(student_source, torch.float32)
    source_model = read_model(source, torch.float32)
    teacher_model = source_model if teacher_source is source else read_model(teacher_source, torch.float32)
    if not _same_attention(model, source_model):
        raise UsageError(f"{student} does not have the shape of {settings.source.path}, its recorded source")
    check_pair(model, teacher_model, dataset, settings)

    inputs = run_inputs(student, teacher_source, source, dataset, settings, student_source.checkpoint.sha256())
    digest = digest_of(inputs)
    run = RunDirectory(out)
    if main:
        run.start(digest, settings.to_yaml(), force=force)
    accelerator.wait_for_everyone()
    if run.model.is_dir() and read_json(run.model / "litconvert.json").get("digest") == digest:
        return out
    if main:
        # Model, EMA and two Adam moments in float32, once for each kept checkpoint and one in the making; the result.
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        require_space(out, 4 * size * (settings.distill.keep_checkpoints + 1) + size)
        precision = "float32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} autocast"
        on_note(f"device {accelerator.device.type}, {precision}, {accelerator.num_processes} process(es)")

    sheet = SampleSheet(settings, teacher_model, run.samples) if main else None
    trainer = Trainer(
        accelerator,
        model,
        source_model,
        teacher_model,
        dataset,
        settings,
        run,
        on_step if main else quiet,
        (lambda name: sheet.draw(model, name)) if sheet else quiet,
    )
    if sheet and run.latest_checkpoint() is None:
        sheet.draw(model, "before")
    trainer.fit()
    if main and sheet:
        sheet.draw(model.eval(), "after")
        run.plot_curves()
        _write_result(run, trainer, student_source, teacher_source, provenance, digest)
    accelerator.wait_for_everyone()
    return out


def _write_result(
    run: RunDirectory,
    trainer: Trainer,
    student: OpenSource,
    teacher: OpenSource,
    provenance: Mapping[str, Any],
    digest: str,
) -> None:
    """model/: the EMA's weights as a model directory, with how they were trained."""
    recipe = trainer.recipe
    state = trainer.student.state_dict()
    dtype = recipe.student.dtype
    tensors = {
        name: TensorInfo(tuple(value.shape), DTYPES[dtype] if dtype else student.checkpoint.tensors[name].dtype)
        for name, value in state.items()
    }
    result = {
        **provenance,
        "format": FORMAT_VERSION,
        "digest": digest,
        "versions": versions(),
        "distillation": {
            "steps": trainer.total_steps,
            "stages": [stage.model_dump(mode="json") for stage in recipe.distill.stages],
            "teacher": {
                "path": teacher.checkpoint.source,
                "weights": teacher.checkpoint.weights,
                "sha256": teacher.checkpoint.sha256(),
                "license": (recipe.distill.teacher or recipe.source).license.model_dump(),
            },
            "data": {"samples": len(trainer.data), "digest": trainer.data.digest},
            "seed": recipe.seed,
        },
        "metrics": {},
    }
    with whole_directory(run.model) as folder:
        write_model_directory(
            folder,
            config=student.reading.config,
            tensors=tensors,
            produce=lambda name: state[name].cpu(),
            recipe=recipe,
            provenance=lambda: result,
        )
