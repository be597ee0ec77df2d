"""What a stage will take, in memory and time, before anything starts; and what to do when it was more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.memory import available_memory, resident_now
from litconvert.estimates.activations import Step, step_memory
from litconvert.estimates.states import FLOAT32, gathered_bytes, optimizer_bytes, teacher_bytes, weights_bytes
from litconvert.estimates.times import step_seconds
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import BUFFERS, model_tensors
from litconvert.recipe.batch_split import micro_batch_of, out_of_memory_advice, stage_at
from litconvert.recipe.schema import Recipe, teacher_weights
from litconvert.training.optimization import trained_names

# glibc maps blocks of 32 MiB and more by themselves (DEFAULT_MMAP_THRESHOLD_MAX) and gives them back when they are
# freed. Smaller ones share a heap, whose gaps stay resident: a quarter to a half of what was in use when they were
# measured (DiTs of width 192 to 768). benchmarks/memory.py shows what comes of it at other sizes.
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


@dataclass(frozen=True)
class Workload:
    """What estimates are asked for: the models, how they are trained, and where.

    Attributes:
        recipe: resolved.
        student: full config.
        teacher: full config of what teaches it; None: nothing is learnt from a teacher.
        processes: that share a batch, each on a device like this one.
        micro_batch: samples at a time; None: what batch, accumulation and processes leave.
        device: None: the GPU if there is one, or else the CPU.
        sharded: states are split over the processes.
        mapped_bytes: of checkpoint files, which stay mapped in main memory once they are read.
        resident_bytes: of interpreter and libraries; None: what this process takes now.
    """

    recipe: Recipe
    student: ModelConfig
    teacher: ModelConfig | None = None
    processes: int = 1
    micro_batch: int | None = None
    device: torch.device | None = None
    sharded: bool = False
    mapped_bytes: int = 0
    resident_bytes: int | None = None

    def step(self, index: int) -> Step:
        """One step of a stage. Raises UsageError for one that does not exist, or whose batch does not split."""
        stage, settings = stage_at(self.recipe, index), self.recipe.distill
        return Step(
            stage,
            settings,
            self.student,
            self.teacher if any(teacher_weights(stage)) else None,
            self.micro_batch or micro_batch_of(self.recipe, index, self.processes),
            self.device or default_device(),
            uses_bf16(settings.mixed_precision),
        )


def estimate_stage(work: Workload, index: int) -> StageEstimate:
    """Memory and time of a stage (of recipe.distill.stages) on this device, without weights and data.

    Activations are counted on the real modules (`activations`), and blocks are timed now (`times`); the rest is
    arithmetic. To be asked before models are read, since what this process takes then counts as its libraries.
    On a GPU what is not a tensor (context, kernels, the allocator's reserve) is left out, as it is in
    torch.cuda.max_memory_allocated; on a CPU, T5 where captions are encoded on the fly.

    Raises UsageError for a stage that does not exist and for a batch that does not split.
    """
    step = work.step(index)
    stage, device = step.stage, step.device
    shapes = {name: info.shape for name, info in model_tensors(work.student).items() if name not in BUFFERS}
    names = trained_names(list(shapes), stage, f"distill.stages.{index}")
    trained = [shapes[name] for name in names]
    parameters = sum(map(math.prod, trained))
    resident = 0
    if device.type == "cpu":
        resident = resident_now() if work.resident_bytes is None else work.resident_bytes
    memory = _memory(work, step, trained, resident)
    seconds = step_seconds(step, parameters)
    available = available_memory(device) + resident
    fits = sum(memory.values()) <= available
    return StageEstimate(
        stage=index,
        objective=stage.objective,
        device=device.type,
        bf16=step.bf16,
        processes=work.processes,
        micro_batch=step.micro_batch,
        parameters=parameters,
        memory=memory,
        step_seconds=seconds,
        seconds=seconds * stage.steps,
        available=available,
        advice=None if fits else out_of_memory_advice(work.recipe, index, work.processes),
    )


def _memory(work: Workload, step: Step, trained: Sequence[tuple[int, ...]], resident: int) -> dict[str, int]:
    """Bytes by what they are for, with weights of these shapes trained."""
    parameters, processes = sum(map(math.prod, trained)), work.processes
    counted, share = step_memory(step), processes if work.sharded else 1
    memory = {
        "student weights": weights_bytes(work.student) // share,
        "teacher weights": teacher_bytes(work.recipe, work.teacher, processes, step.device),
        "optimiser states": optimizer_bytes(step.stage, trained) // share,
        "EMA": FLOAT32 * parameters // share,
        "gradients": counted.gradients // share,
        "activations": counted.activations,
    }
    if work.sharded:
        memory["gathered blocks"] = gathered_bytes(work.student)
    elif processes > 1:
        memory["gradients in exchange"] = FLOAT32 * parameters  # DDP's buckets
    if step.device.type == "cpu":
        memory["gaps in the heap"] = round(HEAP_GAPS * counted.small)
        memory["mapped checkpoints"] = work.mapped_bytes
        memory["interpreter and libraries"] = resident
    return memory


def estimate_stages(work: Workload, stage: int | None = None) -> list[StageEstimate]:
    """Estimates of one stage, or with None of all, in their order."""
    # Once, for all stages: the first estimate leaves something behind.
    work = replace(work, resident_bytes=resident_now())
    every = range(len(work.recipe.distill.stages))
    return [estimate_stage(work, index) for index in (every if stage is None else [stage])]
