"""A training run from its first file to its last: begun or gone on with, trained, observed, written."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors
from litconvert.common.files import digest_of, held, require_space
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import MODEL, refuse_foreign, refuse_place, whole_directory
from litconvert.common.quantities import size
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.directory import write_description, write_model_directory
from litconvert.data.conditions import make_conditioner
from litconvert.data.dataset import LatentDataset
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import RECORD, Progress, RunDirectory
from litconvert.runs.plots import compare
from litconvert.training.checks import stage_remarks
from litconvert.training.engine import Engine
from litconvert.training.objective import TrainingRun
from litconvert.training.observer import Observer
from litconvert.training.run_inputs import RunInputs, go_on, is_finished
from litconvert.training.trainer import Trainer


def refuse_inputs_in(out: Path, *inputs: str | Path | None) -> None:
    """Raise UsageError where the run would be written over what it reads, or into another output of ours."""
    refuse_place(out)
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
    listener: Listener,
) -> bool:
    """Begin a run, or have the one that is there go on; returns whether it is finished already.

    Args:
        more: what its record holds beside the inputs.
    """
    finished = False
    if engine.is_main:
        # Nothing of a run that another command is at is written.
        with held(run.path, listener) if (run.path / RECORD).is_file() else nullcontext():
            before, finished = (run.record() or {}).get("bf16"), is_finished(run, wanted)
            bf16 = before if finished and before is not None else engine.bf16
            for note in go_on(run, wanted, {**more, "bf16": bf16}, force=force):
                listener.note(note)
            finished = is_finished(run, wanted)
        if before not in (None, bf16) and run.latest_checkpoint() is not None:
            names = {True: "bf16 autocast", False: "float32"}
            listener.note(
                f"this run was computed in {names[before]} so far, and goes on in {names[bf16]}: stop it and set "
                f"LITCONVERT_BF16={int(before)} in the environment for the same"
            )
        if not finished and run.model.is_dir():
            refuse_foreign(run.model, MODEL)  # which the run's result replaces
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


def fit(training: TrainingRun, listener: Listener = SILENT) -> None:
    """Train, observe, and write model/. Every process calls it; the main one is heard."""
    engine, run = training.engine, training.directory
    listener = listener if engine.is_main else SILENT
    if engine.is_main:
        _require_room(training)
        for note in _notes(training):
            listener.note(note)
    conditioner = make_conditioner(training.model, training.data, training.recipe, engine.device)
    with (
        held(run.path, listener) if engine.is_main else nullcontext(),
        Observer(training, conditioner, listener) as observer,
    ):

        def describe(folder: Path, progress: Progress) -> None:
            step, result = progress.global_step, training.provenance
            provenance = result.in_the_middle(digest_of([result.digest, step]), step, training.total_steps)
            recipe = _of_result(training.recipe)
            write_description(folder, config=training.config, recipe=recipe, provenance=provenance)

        trainer = Trainer(training, conditioner, listener=observer, on_observe=observer.observe, describe=describe)
        if engine.from_main(engine.is_main and run.latest_checkpoint() is None):
            observer.before()
        with listener.training(training.name):
            state = trainer.fit()
        observer.after(training.total_steps, state)
        if engine.is_main:
            run.plot_curves()
            run.plot_timestep_errors()
            compare(run.path)
            _write_result(training, state)
    engine.wait()


def _disk_bytes(training: TrainingRun, kept: int = 0) -> int:
    """What the run's checkpoints, so many of which are there, and its result take."""
    # Model, EMA and two Adam moments in float32, once for each kept checkpoint and one in the making; the result.
    nbytes: int = 4 * sum(parameter.numel() for parameter in training.model.parameters())
    missing = max(1, training.recipe.distill.keep_checkpoints + 1 - kept)
    return 4 * nbytes * missing + nbytes


def _require_room(training: TrainingRun) -> None:
    """Raise LitconvertError where the disk cannot hold the run's checkpoints and its result."""
    checkpoints = training.directory.checkpoints
    kept = len(list(checkpoints.glob("step-*"))) if checkpoints.is_dir() else 0
    require_space(training.directory.path, _disk_bytes(training, kept))


def _notes(training: TrainingRun) -> Iterator[str]:
    """What to know of a run before it begins."""
    data, config = training.data, training.model.config
    yield training.engine.describe()
    yield f"checkpoints and the model take up to {size(_disk_bytes(training))} of disk"
    if data.flipped and not training.recipe.data.flip:
        yield "the data set holds mirrored latents, which are not used: set data.flip=true to train on them too"
    tokens = (config.sample_size // config.patch_size) ** 2
    sizes = [bucket.shape[1] * bucket.shape[2] // config.patch_size**2 for bucket in data.buckets]
    if not any(0.5 < size / tokens < 2 for size in sizes):
        yield (
            f"the data set's images are of {sizes[0]:,} tokens, the model was made for {tokens:,}; was it encoded "
            "for another size?"
        )
    yield from stage_remarks(training.config, training.recipe)
    if training.splits_teacher:
        yield "the teacher is split over the processes: it is not drawn, nor is the error by timestep measured"


def _of_result(recipe: Recipe) -> Recipe:
    """The recipe as a model carries it: whoever trains that model on starts from it, not from where it started."""
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"start": None})})


def _write_result(training: TrainingRun, state: Mapping[str, Tensor]) -> None:
    """model/: the EMA's weights as a model directory, with how they were trained."""
    dtype = training.recipe.student.dtype
    tensors = {
        name: TensorInfo(tuple(value.shape), DTYPES[dtype] if dtype else training.dtypes.get(name, torch.float32))
        for name, value in state.items()
    }
    with whole_directory(training.directory.model, MODEL) as folder:
        write_model_directory(
            folder,
            config=training.config,
            tensors=LazyTensors(tensors, lambda name: state[name].cpu()),
            recipe=_of_result(training.recipe),
            provenance=lambda: training.provenance,
        )
