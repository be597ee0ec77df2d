"""Speed of training, the time that is left, memory, and utilisation of the device."""

import re
from collections import deque
from collections.abc import Sequence

import psutil
import torch

from litconvert.model.config import ModelConfig
from litconvert.model.shapes import count_macs
from litconvert.recipe.schema import AnyStage, Recipe, teacher_weights

WINDOW = 20
# Dense bf16 products with float32 accumulation, in TFLOP/s, by torch's name of the device. From NVIDIA's data sheets of
# A100, H100, H200 and L40S (some of which print the figure with sparsity alone, twice this one) and the appendix of its
# Ada architecture whitepaper for the RTX 4090. A name that is not here has no known peak, among them a slice of a GPU
# (MIG) and a laptop's GPU of nearly the same name.
PEAK_TFLOPS = {
    r"(NVIDIA )?A100(-SXM4?|-PCIE)?[- ](40|80)GB( PCIe)?": 312,
    r"NVIDIA H100 80GB HBM3": 989,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H200": 989,
    r"NVIDIA H200 NVL": 835,
    r"NVIDIA L40S": 362,
    r"NVIDIA GeForce RTX 4090": 165,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of dense bf16 products, FLOP/s; None where no data sheet is known for a device of this name."""
    found = (tera for pattern, tera in PEAK_TFLOPS.items() if re.fullmatch(pattern, device_name))
    tera = next(found, None)
    return None if tera is None else tera * 1e12


def training_flops(stage: AnyStage, student: ModelConfig, teacher: ModelConfig | None, *, kept: bool = False) -> float:
    """Floating-point operations that one image of a stage needs, at the student's own size.

    2 for each multiply-accumulate; the teacher's forward pass once where the stage asks the teacher for anything, and
    what is trained three times: forward, gradients of the inputs, gradients of the weights. As in the utilisation of
    PaLM (arXiv 2204.02311, appendix B), what gradient checkpointing computes again is not counted: it is no progress.

    Args:
        stage: its weights say what of the teacher is asked for.
        student, teacher: configs; no teacher: none is run.
        kept: the teacher's outputs are read from disk where a stage needs nothing else of it.
    """
    size = student.sample_size
    trained = 6.0 * count_macs(student, size)
    if teacher is None or not any(teacher_weights(stage)) or (kept and not stage.feature_weight):
        return trained
    return trained + 2.0 * count_macs(teacher, size)


def stage_work(recipe: Recipe, student: ModelConfig, teacher: ModelConfig | None) -> list[float]:
    """Floating-point operations of a step of each stage, for the configs of what learns and what teaches."""
    kept = recipe.distill.noise_set is not None
    return [one.batch_size * training_flops(one, student, teacher, kept=kept) for one in recipe.distill.stages]


class Throughput:
    """Speed of a stage over its last steps, the time that is left, memory and utilisation.

    Args:
        recipe: its stages; `stage` is the index of the one that runs.
        work: floating-point operations of a step of each stage.
        device: of this process.
        processes: that share the work.
    """

    def __init__(self, recipe: Recipe, stage: int, work: Sequence[float], device: torch.device, processes: int) -> None:
        stages = recipe.distill.stages
        self.images, self.flops = stages[stage].batch_size, work[stage]
        # Another stage's steps take as long as this one's, times what they compute more.
        later = list(zip(stages[stage + 1 :], work[stage + 1 :], strict=True))
        self.later_steps = sum(one.steps for one, _ in later)
        self.later = sum(one.steps * flops / self.flops for one, flops in later)
        self.device = device
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        self.peak = None if peak is None else peak * processes
        self.seconds: deque[float] = deque(maxlen=WINDOW)

    def update(self, seconds: float, steps_left: int) -> dict[str, float]:
        """What to report after a step that took so long, with so many steps left in this stage and those after it.

        Returns: `images_per_second` over all processes, mean of the last 20 steps; `eta_seconds` for the steps alone,
        without checkpoints and pictures; `memory_bytes` of this process: on a GPU the most that tensors have taken so
        far, on a CPU what is resident now; `flops_utilization`, the share of the devices' peak bf16 rate that the work
        comes to, where that peak is known.
        """
        self.seconds.append(seconds)
        step = sum(self.seconds) / len(self.seconds)
        metrics = {
            "images_per_second": self.images / step,
            "eta_seconds": step * (steps_left - self.later_steps + self.later),
            "memory_bytes": memory_bytes(self.device),
        }
        if self.peak is not None:
            metrics["flops_utilization"] = self.flops / step / self.peak
        return metrics


def memory_bytes(device: torch.device) -> int:
    """Of this process: the most that tensors have taken on a GPU so far, or else its resident main memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
