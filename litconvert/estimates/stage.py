"""What a stage will take, in memory and time, before anything starts; and what to do when it was more."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.memory import available_memory, resident_now
from litconvert.estimates.activations import step_memory
from litconvert.estimates.states import FLOAT32, gathered_bytes, optimizer_bytes, teacher_bytes, weights_bytes
from litconvert.estimates.times import step_seconds
from litconvert.model.shapes import BUFFERS, model_tensors
from litconvert.recipe.batch_split import micro_batch_of, out_of_memory_advice, stage_at
from litconvert.recipe.schema import AttentionTransfer, Recipe, teacher_weights
from litconvert.training.optimization import trained_names

# glibc maps blocks of 32 MiB and more by themselves (DEFAULT_MMAP_THRESHOLD_MAX) and gives them back when they are
# freed. Smaller ones share a heap, whose gaps stay resident: a quarter to a half of what was in use when they were
# measured (DiTs of width 192 to 768, both kinds of stage). benchmarks/memory.py shows what comes of it at other sizes.
HEAP_GAPS = 0.3


@dataclass(frozen=True)
class StageEstimate:
    """One stage of one process, at its most. Memory in bytes: of the GPU where there is one, or else resident.

    Attributes:
        stage, objective: its index and kind.
        device: `cuda` or `cpu`.
        bf16: whether it is computed in bf16 autocast.
        processes: that share a batch.
        micro_batch: samples that a process computes at a time.
        parameters: trained in this stage.
        memory: bytes by what they are for.
        step_seconds, seconds: of a step and of the whole stage.
        available: memory that is free now, for a process that is yet to begin.
        advice: what to change, where that is too little.
    """

    stage: int
    objective: str
    device: str
    bf16: bool
    processes: int
    micro_batch: int
    parameters: int
    memory: Mapping[str, int]
    step_seconds: float
    seconds: float
    available: int
    advice: str | None

    @property
    def peak(self) -> int:
        """The most memory a process has at a time."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "memory": dict(self.memory), "peak": self.peak}


def estimate_stage(
    recipe: Recipe,
    student_config: Mapping[str, Any],
    teacher_config: Mapping[str, Any] | None,
    stage_index: int,
    *,
    micro_batch: int | None = None,
    processes: int = 1,
    device: torch.device | None = None,
    source_config: Mapping[str, Any] | None = None,
    mapped_bytes: int = 0,
    resident_bytes: int | None = None,
    sharded: bool = False,
) -> StageEstimate:
    """Memory and time of a stage on this device, without weights and data.

    Activations are counted on the real modules (`live_memory`), and blocks are timed now (`block_times`); the rest is
    arithmetic. To be asked before models are read, since what this process takes then counts as its libraries.
    On a GPU what is not a tensor (context, kernels, the allocator's reserve) is left out, as it is in
    torch.cuda.max_memory_allocated; on a CPU, T5 where captions are encoded on the fly.

    Args:
        recipe: resolved.
        student_config, teacher_config: full configs; no teacher: nothing is learnt from one.
        stage_index: of recipe.distill.stages.
        micro_batch: samples at a time; None: what the recipe's batch, accumulation and `processes` leave.
        processes: each on a device like this one.
        device: None: the GPU if there is one, or else the CPU.
        source_config: what attention is transferred from, where that is another model than the teacher.
        mapped_bytes: of checkpoint files, which stay mapped in main memory once they are read.
        resident_bytes: of interpreter and libraries; None: what this process takes now.
        sharded: states are split over the processes.

    Raises UsageError for a stage that does not exist and for a batch that does not split.
    """
    stage = stage_at(recipe, stage_index)
    settings = recipe.distill
    device = device or default_device()
    micro_batch = micro_batch or micro_batch_of(recipe, stage_index, processes)
    bf16 = uses_bf16(settings.mixed_precision)
    teaching = source_config or teacher_config if isinstance(stage, AttentionTransfer) else teacher_config
    if not any(teacher_weights(stage)):
        teaching = None
    shapes = {name: info.shape for name, info in model_tensors(student_config).items() if name not in BUFFERS}
    names = trained_names(student_config, list(shapes), stage, f"distill.stages.{stage_index}")
    trained = [shapes[name] for name in names]
    parameters = sum(map(math.prod, trained))
    resident = 0
    if device.type == "cpu":
        resident = resident_now() if resident_bytes is None else resident_bytes
    step = step_memory(stage, settings, student_config, teaching, micro_batch=micro_batch, device=device, bf16=bf16)
    share = processes if sharded else 1
    memory = {
        "student weights": weights_bytes(student_config) // share,
        "teacher weights": teacher_bytes(recipe, [teacher_config, source_config], processes, device),
        "optimiser states": optimizer_bytes(stage, trained) // share,
        "EMA": FLOAT32 * parameters // share,
        "gradients": step.gradients // share,
        "activations": step.activations,
    }
    if sharded:
        memory["gathered blocks"] = gathered_bytes(student_config)
    elif processes > 1:
        memory["gradients in exchange"] = FLOAT32 * parameters  # DDP's buckets
    if device.type == "cpu":
        memory["gaps in the heap"] = round(HEAP_GAPS * step.small)
        memory["mapped checkpoints"] = mapped_bytes
        memory["interpreter and libraries"] = resident
    seconds = step_seconds(
        stage,
        settings,
        student_config,
        teaching,
        micro_batch=micro_batch,
        trained=parameters,
        device=device,
        bf16=bf16,
    )
    available = available_memory(device) + resident
    fits = sum(memory.values()) <= available
    return StageEstimate(
        stage=stage_index,
        objective=stage.objective,
        device=device.type,
        bf16=bf16,
        processes=processes,
        micro_batch=micro_batch,
        parameters=parameters,
        memory=memory,
        step_seconds=seconds,
        seconds=seconds * stage.steps,
        available=available,
        advice=None if fits else out_of_memory_advice(recipe, stage_index, processes),
    )


def estimate_stages(
    recipe: Recipe,
    config: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    source: Mapping[str, Any] | None,
    *,
    mapped_bytes: int,
    stage: int | None = None,
    processes: int = 1,
    micro_batch: int | None = None,
    sharded: bool = False,
) -> list[StageEstimate]:
    """Estimates for models that are known already.

    Args:
        config, teacher, source: of the student, of what teaches it, and of what it was converted from.
        mapped_bytes: of the checkpoints that are read.
        stage: one alone; None: all.
    """
    # The source is in memory beside another teacher where a stage learns from it, and then through all stages.
    both = teacher is not None and recipe.distill.teacher is not None
    both = both and any(one.objective == "attention_transfer" for one in recipe.distill.stages)
    # Once, for all stages: the first estimate leaves something behind.
    resident = resident_now()
    return [
        estimate_stage(
            recipe,
            config,
            teacher,
            index,
            micro_batch=micro_batch,
            processes=processes,
            source_config=source if both else None,
            mapped_bytes=mapped_bytes,
            resident_bytes=resident,
            sharded=sharded,
        )
        for index in (range(len(recipe.distill.stages)) if stage is None else [stage])
    ]
