"""The solved start of a planned student: its calibration set, its walks, and what they came to."""

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litconvert.common.files import read_json, write_whole
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import work_path, work_paths
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.convert import fresh_tensor
from litconvert.conversion.plan import ConversionPlan, plan_conversion
from litconvert.conversion.solve_plan import SolvedStart, SolvePlan
from litconvert.data.dataset import open_latents
from litconvert.errors import LitconvertError
from litconvert.families.sources import read_model
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.inputs import Inputs, given
from litconvert.sampling.captions import read_embeddings
from litconvert.solving.calibration import (
    CalibrationImages,
    StateMaker,
    draw_caption_images,
    draw_class_images,
    open_images,
)
from litconvert.solving.closed_forms import alone
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Passes
from litconvert.solving.walk import HeldOut, LayerError, OutputErrors, Walk, output_errors
from litconvert.training.engine import Engine

# The held-out states' noise: no walk has this number.
HELD_OUT = 1_000_000
# Which numbers of the plan an unfinished walk keeps, and where.
CHOICE, CHOSEN = "chosen.json", ("states", "held_out", "images", "local_steps")


def solving_inputs(plan: ConversionPlan) -> dict[str, Any]:
    """What determines solved tensors. Numbers that are left to device and size are not among them."""
    chosen, recipe = plan.solve, plan.recipe
    if chosen is None:
        return {}
    settings = chosen.settings
    left_out = {"batch_size", "mixed_precision", "data", "embeddings"}
    found: dict[str, Any] = {
        "solve": {"layers": "all" if len(chosen.layers) == plan.config.num_layers else list(chosen.layers)},
        "diffusion": given(recipe.diffusion),
    }
    found["solve"] |= given(settings, exclude=left_out)
    if settings.data is not None:
        return {**found, "data": {"digest": open_latents(settings.data).digest}}
    found["data"] = {"synthesize": given(recipe.data.synthesize, include={"guidance", "guidance_channels", "seed"})}
    if settings.embeddings is not None:
        read_embeddings(Path(settings.embeddings))  # says what is wrong with the file
        found["embeddings"] = hashlib.sha256(Path(settings.embeddings).read_bytes()).hexdigest()
    return found


def partial_folder(out: Path, inputs: Inputs) -> Path:
    """Where an unfinished walk to `out` is kept."""
    return work_path(out, f"solving-{inputs.digest[:12]}")


def remove_partial(out: Path) -> None:
    """Remove what walks to `out` kept, once it is whole."""
    for folder in work_paths(out, "solving-"):
        shutil.rmtree(folder, ignore_errors=True)


def as_begun(plan: ConversionPlan, folder: Path) -> ConversionPlan:
    """The plan with the numbers that an interrupted walk was begun with: another device would choose others, which
    solve other tensors. In `folder` is what the walk kept; it need not be there."""
    kept, chosen = folder / CHOICE, plan.solve
    if chosen is None or not kept.is_file():
        return plan
    begun = read_json(kept)
    numbers: dict[str, Any] = {name: int(begun[name]) for name in CHOSEN}
    settings = chosen.settings
    if settings.mixed_precision == "auto" and "bf16" in begun:
        settings = settings.model_copy(update={"mixed_precision": "bf16" if begun["bf16"] else "no"})
    return plan_conversion(plan.source, plan.recipe, plan.recipe_name, replace(chosen, settings=settings, **numbers))


def solve(plan: ConversionPlan, out: Path, inputs: Inputs, listener: Listener = SILENT) -> SolvedStart | None:
    """Solve the fresh attention of a planned student. Every launched process must call it, and `out` is kept to them.

    What is done is kept beside `out`, layer by layer; called again with the same inputs, it goes on to the same bits.

    Args:
        plan: where a walk to `out` was interrupted, `as_begun` there.

    Returns: what it gave, in the first process; None in the others.

    Raises LitconvertError for a teacher that draws or computes NaN, UsageError for a data set that does not fit.
    """
    chosen = plan.solve
    assert chosen is not None
    engine = Engine(chosen.settings.mixed_precision, "solve.mixed_precision")
    folder = partial_folder(out, inputs)
    if engine.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CHOICE).is_file():
            numbers = {name: getattr(chosen, name) for name in CHOSEN}
            write_whole(folder / CHOICE, json.dumps({**numbers, "bf16": engine.bf16}) + "\n")
    engine.wait()
    hears = listener if engine.is_main else SILENT
    if hears.wants_estimates:
        hears.note(chosen.cost)
    began = time.monotonic()
    if kept := len(list(folder.glob("walk-*"))):
        count = len(chosen.layers) * chosen.settings.walks
        hears.note(f"goes on: {kept} of {count} layers are solved, in {'bf16' if engine.bf16 else 'float32'} as begun")
    images, teacher = _images_and_teacher(plan, chosen, folder, engine, hears)
    models = _Models(teacher, start_student(plan, teacher), images, _written_dtype(plan))
    layers, output = _walk(plan, chosen, folder, engine, models, hears)
    engine.wait()
    _refuse_nan(output)
    if not engine.is_main:
        return None
    state = models.student.state_dict()
    solved = [str(entry.target) for entry in plan.entries if entry.fate == "solved"]
    record = {
        **chosen.to_json(),
        "bf16": engine.bf16,
        "device": engine.device.type,
        "seconds": round(time.monotonic() - began, 1),
        **({"resumed_at": kept} if kept else {}),
        "layers": [asdict(error) for error in layers],
        "output": asdict(output),
    }
    return SolvedStart({name: state[name].to("cpu", models.dtype) for name in solved}, record, solving_inputs(plan))


@dataclass(frozen=True)
class _Models:
    """What a walk is between, and on; dtype: of the solved tensors where they are written."""

    teacher: LiTTransformer2DModel
    student: LiTTransformer2DModel
    images: CalibrationImages
    dtype: torch.dtype


def _written_dtype(plan: ConversionPlan) -> torch.dtype:
    """Of the solved tensors, which is one."""
    return DTYPES[next(entry.dtype for entry in plan.entries if entry.fate == "solved")]


def _refuse_nan(output: OutputErrors) -> None:
    if not math.isfinite(output.after):
        raise LitconvertError(
            "the teacher's or the solved student's output is NaN or infinite; look at the checkpoint with `litconvert "
            "inspect --weights`, or convert without solving (--no-solve)"
        )


def _images_and_teacher(
    plan: ConversionPlan, chosen: SolvePlan, folder: Path, engine: Engine, listener: Listener
) -> tuple[CalibrationImages, LiTTransformer2DModel]:
    """The clean images, drawn by the teacher where no data is given, and the teacher in float32."""
    drawn, recipe = folder / "images", plan.recipe
    captions = plan.source.config.reads_captions
    if chosen.draws and not captions:
        draw_class_images(chosen, recipe, drawn, listener)
    listener.note(f"reading {plan.source.checkpoint.source}")
    teacher = read_model(plan.source, torch.float32).to(engine.device).requires_grad_(False)
    if chosen.draws and captions:
        if engine.is_main and not drawn.is_dir():
            draw_caption_images(chosen, recipe, teacher, drawn, listener)
        engine.wait()
    return open_images(chosen, plan.source.config, recipe, drawn), teacher


def start_student(plan: ConversionPlan, teacher: LiTTransformer2DModel) -> LiTTransformer2DModel:
    """The student as it starts: what it inherits shares the teacher's memory, unless it is rounded or solved."""
    with torch.device("meta"):
        student: LiTTransformer2DModel = LiTTransformer2DModel(**plan.config.values)
    theirs = teacher.state_dict()
    state = {}
    for entry in plan.entries:
        if entry.target is None or entry.fate in ("recomputed", "dropped"):
            continue
        dtype = DTYPES[entry.dtype]
        if entry.source is None:
            info = TensorInfo(entry.shape, dtype)
            value = fresh_tensor(entry.target, info, plan.recipe.seed, plan.recipe.student.conv_size)
        else:
            value = theirs[entry.target]
            value = value.clone() if entry.fate == "solved" else value
        state[entry.target] = value.to(dtype).float().to(teacher.device)
    student.load_state_dict(state, strict=True, assign=True)
    student.eval().requires_grad_(False)
    return student


def _walk(
    plan: ConversionPlan, chosen: SolvePlan, folder: Path, engine: Engine, models: "_Models", listener: Listener
) -> tuple[list[LayerError], OutputErrors]:
    """All walks; the errors are those of the last."""
    recipe, settings = plan.recipe, chosen.settings
    place = (engine.process, engine.processes)
    maker = StateMaker(models.teacher, recipe, engine.device, settings.timestep_power, *place)
    measures = StateMaker(models.teacher, recipe, engine.device)  # evenly, by every process
    passes = Passes(engine.device, settings.batch_size, engine.bf16)
    errors: list[LayerError] = []
    unsolved: list[Tensor] = []
    held_out = None
    with listener.task("solve", len(models.teacher.blocks) * settings.walks) as task:
        for walk in range(settings.walks):
            states, counts = maker.make(models.images.solved_on, chosen.states, walk)
            held_out = HeldOut(measures.make(models.images.held_out, chosen.held_out, HELD_OUT)[0])
            total = _summed if engine.processes > 1 else alone
            steps = (chosen.local_steps, chosen.learning_rate)
            solver = LayerSolver(settings, passes, recipe.seed, *steps, counts, total, *place)
            walker = Walk(
                models.teacher,
                models.student,
                solver,
                chosen.layers,
                chosen.convolution,
                "o" not in recipe.inherit.attention,
                models.dtype,
                folder,
            )
            with engine.group_failures():
                found = walker.go(states, held_out, walk, task)
            # What the first walk started from is what the others are compared with, too.
            unsolved = unsolved or held_out.unsolved
            befores = [error.before for error in (errors or found)]
            errors = [replace(error, before=before) for error, before in zip(found, befores, strict=True)]
            held_out.unsolved = unsolved
    assert held_out is not None
    return errors, output_errors(models.teacher, models.student, held_out)


def _summed(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    dist.all_reduce(values)
    return values
