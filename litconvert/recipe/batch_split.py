"""How a stage's batch is split over processes and accumulation, and what to change where it does not fit."""

from litconvert.common.device import has_gpu
from litconvert.errors import UsageError
from litconvert.recipe.schema import AnyStage, Recipe


def stage_at(recipe: Recipe, index: int) -> AnyStage:
    """A stage of a recipe, counted from 0. Raises UsageError where there is none."""
    stages = recipe.distill.stages
    if not 0 <= index < len(stages):
        known = f"0 to {len(stages) - 1}" if stages else "none; `litconvert recipes show digits` shows some"
        raise UsageError(f"--stage {index}: the recipe's stages are {known}")
    return stages[index]


def micro_batch_of(recipe: Recipe, stage_index: int, processes: int) -> int:
    """Samples that a process computes at a time. Raises UsageError for a batch that does not split."""
    size, parts = stage_at(recipe, stage_index).batch_size, processes * recipe.distill.gradient_accumulation_steps
    if size % parts:
        raise UsageError(
            f"distill.stages.{stage_index}.batch_size={size} is not a multiple of processes times accumulation, "
            f"{parts}; set one, or change distill.gradient_accumulation_steps or the number of processes"
        )
    return size // parts


def out_of_memory_advice(recipe: Recipe, stage_index: int, processes: int) -> str:
    """What to change when a stage does not fit, as a sentence: first what keeps the same mathematics.

    Args:
        recipe: of the run.
        stage_index: the stage that ran out of memory.
        processes: that share a batch.
    """
    settings = recipe.distill
    stage = settings.stages[stage_index]
    sizes = [one.batch_size for one in settings.stages]
    smallest = min(sizes) // processes
    more = range(settings.gradient_accumulation_steps + 1, smallest + 1)
    fitting = [parts for parts in more if not any(size % (processes * parts) for size in sizes)]
    if fitting:
        before = stage.batch_size // (processes * settings.gradient_accumulation_steps)
        after = stage.batch_size // (processes * fitting[0])
        return (
            f"--set distill.gradient_accumulation_steps={fitting[0]} keeps the same mathematics with {after} samples "
            f"at a time in place of {before}"
        )
    advice = "accumulation is exhausted: no larger gradient_accumulation_steps divides the batch of every stage. "
    if settings.gradient_checkpointing < 1:
        return advice + "--set distill.gradient_checkpointing=1 computes activations again rather than keeping them"
    if settings.teacher_placement == "device" and has_gpu() and recipe.scratch is None:
        return advice + "--set distill.teacher_placement=offloaded keeps the teacher in main memory"
    advice += "More processes share the batch"
    if any(one.optimizer != "adamw" for one in settings.stages):
        return advice
    return advice + ", and with --use_fsdp --fsdp_version 2 of `accelerate launch` the states"
