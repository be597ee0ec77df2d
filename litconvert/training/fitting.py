"""A training run from its first file to its last: begun or gone on with, trained, observed, written."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.common.files import digest_of, held, require_space, whole_directory
from litconvert.common.listener import StepReport
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.common.versions import versions
from litconvert.conversion.directory import FORMAT_VERSION, write_description, write_model_directory
from litconvert.data.conditions import make_conditioner
from litconvert.data.dataset import LatentDataset
from litconvert.distillation.teaching import Teachers
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import RECORD, Progress, RunDirectory
from litconvert.training.engine import Engine
from litconvert.training.observer import Observer
from litconvert.training.run_inputs import RunInputs, go_on, is_finished
from litconvert.training.trainer import Trainer


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
