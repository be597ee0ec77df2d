"""A training step of each size: memory and time as `plan --stage` estimates them, against a step of the trainer."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from litconvert.checks.check import NO_TIME, Context, Finding, Skipped
from litconvert.checks.compiled import why_not
from litconvert.common.listener import Listener, StepReport
from litconvert.common.memory import available_memory, measured_peak
from litconvert.common.quantities import size as text_of
from litconvert.data.conditions import Conditioner
from litconvert.data.dataset import Bucket, LatentDataset, quiet_datasets
from litconvert.distillation.teaching import Teacher
from litconvert.estimates.stage import StageEstimate, Workload, estimate_stage
from litconvert.estimates.states import weights_bytes
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Distill, Hybrid, Recipe
from litconvert.runs.directory import RunDirectory
from litconvert.runs.throughput import peak_flops, training_flops
from litconvert.training.engine import Engine
from litconvert.training.objective import TrainingRun
from litconvert.training.trainer import Trainer

# Estimate over measurement. Times are of blocks alone, on a machine that others may use.
MEMORY_LIMITS = (0.8, 1.25)
TIME_LIMITS = (0.4, 2.5)
# Of the free memory: on a CPU the rest of the machine needs some, too.
MEMORY_SHARE = {"cuda": 0.92, "cpu": 0.5}
# Steps before those that are timed, and those.
STEPS = {"cuda": (3, 5), "cpu": (1, 2)}
# Making both models takes about so long for each parameter of one.
SECONDS_A_PARAMETER = {"cuda": 1e-9, "cpu": 4e-8}
# Compiling the blocks of both.
COMPILING = 90.0


@dataclass(frozen=True)
class Size:
    """A released model and the samples that are tried at a time on a GPU, the most first; on a CPU it is one."""

    width: int
    layers: int
    heads: int
    linear_heads: int
    sample_size: int = 32
    captions: bool = False
    batches: tuple[int, ...] = (32, 8, 1)

    def config(self, kind: str) -> ModelConfig:
        """The model's, with one kind of attention."""
        known: dict[str, Any] = {
            "sample_size": self.sample_size,
            "hidden_size": self.width,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention": [kind] * self.layers,
            "linear_num_heads": self.linear_heads,
        }
        if self.captions:
            known |= {"num_classes": None, "caption_channels": 4096, "caption_tokens": 300}
        return ModelConfig.of(known)


SIZES = {
    "DiT-S/2": Size(384, 12, 6, 2),
    "DiT-B/2": Size(768, 12, 12, 3),
    "DiT-L/2": Size(1024, 24, 16, 4),
    "DiT-XL/2": Size(1152, 28, 16, 4),
    "PixArt-Sigma 512": Size(1152, 28, 16, 4, sample_size=64, captions=True, batches=(8, 2, 1)),
}


class Measured(Exception):
    """Ends the trainer's loop: there are steps enough."""


class Timed(Listener):
    """Notes when each step ends. Raises Measured after the last one that is asked for."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.ends = device, steps, list[float]()

    def step(self, report: StepReport) -> None:
        """A step is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if report.step == self.steps:
            raise Measured


def check_step(context: Context, size: str) -> Finding:
    """A hybrid step on random weights and data, in the trainer, against its estimate."""
    if context.device == "mps":
        raise Skipped("memory and time are estimated for NVIDIA's GPUs and for CPUs")
    return _step(context, SIZES[size], compile="no")


def check_compiled_step(context: Context, size: str) -> Finding:
    """The same with compiled blocks, whose speed and memory nobody estimates."""
    if context.device != "cuda":
        raise Skipped("blocks are compiled on NVIDIA's GPUs, and on a CPU only when asked")
    if reason := why_not(context.device):
        raise Skipped(reason)
    return _step(context, SIZES[size], compile="blocks")


def _step(context: Context, size: Size, *, compile: str) -> Finding:
    began = time.monotonic()
    estimate = fitting(size, context.device)
    needed = sum(STEPS[context.device]) * estimate.step_seconds
    needed += SECONDS_A_PARAMETER[context.device] * estimate.parameters + COMPILING * (compile != "no")
    if needed > context.seconds - (time.monotonic() - began):
        raise Skipped(f"needs about {needed:.0f} s: {NO_TIME}")
    seconds, peak = measure(size, estimate.micro_batch, context, compile)
    return report(size, estimate, seconds, peak, compiled=compile != "no")


def fitting(size: Size, device: str) -> StageEstimate:
    """The estimate of the largest micro-batch that fits. Raises Skipped where one sample does not."""
    student, teacher = size.config("linear"), size.config("softmax")
    room = int(MEMORY_SHARE[device] * available_memory(torch.device(device)))
    # Both weights, AdamW's two states and the EMA: what does not fit without activations need not be timed.
    needed = 5 * weights_bytes(student)
    batches = size.batches if device == "cuda" else (1,)
    for batch in batches if needed <= room else ():
        estimate = estimate_stage(Workload(recipe_of(batch), student, teacher, device=torch.device(device)), 0)
        if estimate.peak <= room:
            return estimate
        needed = estimate.peak
    raise Skipped(f"needs at least {text_of(needed)}, and {text_of(room)} of what is free may be taken")


def recipe_of(batch: int, compile: str = "no") -> Recipe:
    """One long hybrid stage, which `Measured` ends."""
    stage = Hybrid(objective="hybrid", steps=1_000_000, batch_size=batch, condition_dropout=0.0)
    return Recipe(
        distill=Distill.model_validate({"stages": (stage,), "compile": compile, "checkpoint_every": stage.steps})
    )


def measure(size: Size, batch: int, context: Context, compile: str) -> tuple[float, int]:
    """Seconds of a step, the median, and the most memory in bytes."""
    engine = Engine()
    recipe = recipe_of(batch, compile)
    with engine.device:
        student, teacher = (LiTTransformer2DModel(**size.config(kind).values) for kind in ("linear", "softmax"))
    run = RunDirectory(context.folder / f"step-{time.monotonic_ns()}")
    run.path.mkdir()
    warm_up, timed = STEPS[context.device]
    steps = Timed(engine.device, warm_up + timed)
    teachers = Teacher(engine, teacher, list(range(size.layers)), recipe.distill)
    conditioner = Conditioner(size.config("linear"), device=engine.device)
    data = random_data(size.config("linear"), max(batch, 8))
    try:
        training = TrainingRun(engine, recipe, run, data, student, teachers)
        Trainer(training, conditioner, listener=steps).fit()
    except Measured:
        peak = measured_peak()
    times = [after - before for before, after in pairwise(steps.ends[warm_up - 1 :])]
    return median(times), peak


def random_data(config: ModelConfig, count: int) -> LatentDataset:
    """Latents with classes, or with captions of the longest length, in memory."""
    from datasets import Dataset

    quiet_datasets()
    shape = (config.in_channels, config.sample_size, config.sample_size)
    columns: dict[str, Any] = {"latent": list(torch.randn(count, *shape).flatten(1).numpy())}
    channels, tokens = config.caption_channels, config.caption_tokens
    if channels is None:
        columns["class_label"] = [index % config.classes for index in range(count)]
        bucket = Bucket(shape, Dataset.from_dict(columns))
        return LatentDataset((bucket,), "latents", "class", (0, config.classes - 1), "random")
    columns["caption_features"] = list(torch.randn(count, tokens * channels).half().numpy())
    columns["caption_tokens"] = [tokens] * count
    bucket = Bucket(shape, Dataset.from_dict(columns))
    return LatentDataset(
        (bucket,), "latents", "caption", None, "random", caption_channels=channels, caption_tokens=tokens
    )


def report(size: Size, estimate: StageEstimate, seconds: float, peak: int, *, compiled: bool) -> Finding:
    """Ratios of estimate to measurement, speed, and the share of the device's peak that it comes to."""
    flops = estimate.micro_batch * training_flops(
        recipe_of(1).distill.stages[0], size.config("linear"), size.config("softmax")
    )
    most = peak_flops(torch.cuda.get_device_name()) if estimate.device == "cuda" else None
    ratios = {"memory": estimate.peak / peak, "time": estimate.step_seconds / seconds}
    figures = {
        "micro_batch": estimate.micro_batch,
        "precision": "bf16 autocast" if estimate.bf16 else "float32",
        "compiled": compiled,
        "parameters": estimate.parameters,
        "peak_bytes": peak,
        "peak_bytes_estimated": estimate.peak,
        "memory_estimated": dict(estimate.memory),
        "step_seconds": seconds,
        "step_seconds_estimated": estimate.step_seconds,
        "estimate_over_measurement": ratios,
        "images_per_second": estimate.micro_batch / seconds,
        "flops_per_second": flops / seconds,
        "flops_utilization": None if most is None else flops / seconds / most,
    }
    text = f"{estimate.micro_batch / seconds:.3g} images/s at {estimate.micro_batch} a time, {text_of(peak)}"
    text += f", {flops / seconds / most:.0%} of the peak" if most else ""
    if compiled:
        return Finding(text, figures)
    text += f"; estimate over measurement: memory {ratios['memory']:.2f}, time {ratios['time']:.2f}"
    limits = {"memory": MEMORY_LIMITS, "time": TIME_LIMITS}
    over = [
        f"{what} is outside {low} to {high}" for what, (low, high) in limits.items() if not low <= ratios[what] <= high
    ]
    return Finding(text, figures, f"{' and '.join(over)}: {text}" if over else "")
