"""A distillation step of litconvert beside the same step written plainly on diffusers' DiTTransformer2DModel.

    python -m benchmarks.step_time                 on a GPU DiT-XL/2, or else small models on one CPU thread: minutes
    python -m benchmarks.step_time --rounds 40     more rounds, for a machine that others use too

Both have a softmax teacher and the loss of DiT and the teacher. litconvert's side is its trainer as it runs (draws,
gradient norm, checks and metrics included), with a linear student. The plain side has a softmax student, SDPA, and
foreach AdamW and EMA, and is not compiled. In one process the two take turns, step by step. Times are medians over
rounds; a ratio is that of the two steps of one round, plain over litconvert, its median and quartiles. CPU seconds are
the process's own, which the load of a shared machine hardly changes. Peak memory is of each side in a process of its
own: what tensors take on a GPU, what is resident (libraries too) on a CPU. Written to
benchmarks/results/step_time.json on a CPU, step_time-cuda.json on a GPU.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.provenance import provenance
from litconvert.common.device import bf16_in_hardware
from litconvert.common.listener import Listener, StepReport
from litconvert.data.conditions import Conditioner
from litconvert.data.dataset import Bucket, LatentDataset
from litconvert.distillation.teaching import Teacher
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Distill, Hybrid, Recipe
from litconvert.runs.directory import RunDirectory
from litconvert.runs.throughput import peak_flops, training_flops
from litconvert.training.engine import Engine
from litconvert.training.objective import TrainingRun
from litconvert.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
CLASSES = 1000
STAGE = Hybrid(objective="hybrid", steps=1_000_000, batch_size=1)
Side = Literal["litconvert", "plain"]


@dataclass(frozen=True)
class Size:
    """A model of patch size 2 and a batch."""

    width: int
    layers: int
    heads: int
    linear_heads: int
    sample_size: int
    batch: int

    @property
    def tokens(self) -> int:
        return (self.sample_size // 2) ** 2


CPU_SIZES = (
    Size(384, 6, 6, 2, 32, 4),
    Size(768, 4, 12, 3, 32, 4),
    Size(1152, 3, 16, 4, 32, 4),
    Size(384, 4, 6, 2, 64, 4),
)
GPU_SIZES = (Size(1152, 28, 16, 4, 32, 32),)


class Measured(Exception):
    """Ends the trainer's loop once there are enough rounds."""


def model_config(size: Size, kind: str) -> dict[str, Any]:
    return {
        "sample_size": size.sample_size,
        "hidden_size": size.width,
        "num_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention": [kind] * size.layers,
        "linear_num_heads": size.linear_heads,
        "num_classes": CLASSES,
    }


def random_weights(model: Any) -> Any:
    """Initialised, both kinds of model would give zeros."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def now(device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def plain_step(size: Size, device: torch.device) -> Callable[[], None]:
    """The step as one writes it with diffusers."""

    def model() -> DiTTransformer2DModel:
        return random_weights(
            DiTTransformer2DModel(
                num_attention_heads=size.heads,
                attention_head_dim=size.width // size.heads,
                in_channels=4,
                out_channels=8,
                num_layers=size.layers,
                sample_size=size.sample_size,
                num_embeds_ada_norm=CLASSES,
            )
        ).to(device)

    teacher, student = model().eval().requires_grad_(False), model().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)
    average = EMAModel(student.parameters(), decay=0.9999, foreach=True)
    diffusion = DDPM()
    clean = torch.randn(size.batch, 4, size.sample_size, size.sample_size, device=device)
    labels = torch.randint(CLASSES, (size.batch,), device=device)

    def predict(model: DiTTransformer2DModel, noisy: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = model(noisy, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output.float()

    def step() -> None:
        noise = torch.randn_like(clean)
        timestep = torch.randint(diffusion.num_timesteps, (size.batch,), device=device)
        noisy = diffusion.add_noise(clean, noise, timestep)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_in_hardware()):
            with torch.no_grad():
                theirs = predict(teacher, noisy, timestep)
            mine = predict(student, noisy, timestep)
        terms = diffusion.terms(mine, clean, noise, timestep)
        (noise_mine, variance_mine), (noise_theirs, variance_theirs) = mine.chunk(2, dim=1), theirs.chunk(2, dim=1)
        loss = terms["noise"].mean() + terms["variational_bound"].mean()
        loss = loss + STAGE.noise_weight * F.mse_loss(noise_mine, noise_theirs)
        loss = loss + STAGE.variance_weight * F.mse_loss(variance_mine, variance_theirs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(student.parameters())

    return step


def random_latents(size: Size) -> LatentDataset:
    """64 samples in memory."""
    shape = (4, size.sample_size, size.sample_size)
    columns = {
        "latent": list(torch.randn(64, *shape).flatten(1).numpy()),
        "class_label": torch.randint(CLASSES, (64,)).tolist(),
    }
    bucket = Bucket(shape, Dataset.from_dict(columns))
    return LatentDataset((bucket,), "latents", "class", (0, CLASSES - 1), "random")


class Calls(Listener):
    """Calls a function after each step."""

    def __init__(self, on_step: Callable[[StepReport], None]) -> None:
        self.on_step = on_step

    def step(self, report: StepReport) -> None:
        self.on_step(report)


def run_litconvert(size: Size, folder: Path, on_step: Callable[[StepReport], None]) -> None:
    """litconvert's own trainer, until `on_step` raises Measured."""
    engine = Engine("auto")
    stage = STAGE.model_copy(update={"batch_size": size.batch})
    recipe = Recipe(distill=Distill(stages=(stage,), checkpoint_every=STAGE.steps))
    student = random_weights(LiTTransformer2DModel(**model_config(size, "linear")))
    teacher = random_weights(LiTTransformer2DModel(**model_config(size, "softmax")))
    run = RunDirectory(folder / "run")
    run.start({"digest": "random"}, recipe.to_yaml())
    teachers = Teacher(engine, teacher, list(range(size.layers)), recipe.distill)
    training = TrainingRun(engine, recipe, run, random_latents(size), student, teachers)
    trainer = Trainer(
        training, Conditioner(ModelConfig.of(student.config), device=engine.device), listener=Calls(on_step)
    )
    try:
        trainer.fit()
    except Measured:
        return


def take_turns(size: Size, rounds: int, threads: int, device: torch.device) -> dict[Side, list[tuple[float, float]]]:
    """Wall and CPU seconds of each step of both sides, which take turns."""
    torch.set_num_threads(threads)
    plain = plain_step(size, device)
    times: dict[Side, list[tuple[float, float]]] = {"litconvert": [], "plain": []}
    began = now(device)

    def since(then: tuple[float, float]) -> tuple[float, float]:
        wall, cpu = now(device)
        return wall - then[0], cpu - then[1]

    def on_step(report: StepReport) -> None:
        nonlocal began
        times["litconvert"].append(since(began))
        began = now(device)
        plain()
        times["plain"].append(since(began))
        if len(times["plain"]) == WARM_UP + rounds:
            raise Measured
        began = now(device)

    with tempfile.TemporaryDirectory() as folder:
        run_litconvert(size, Path(folder), on_step)
    return {side: values[WARM_UP:] for side, values in times.items()}


def peak_memory(side: Side, size: Size, threads: int, device: torch.device) -> int:
    """Peak bytes of five steps of one side alone; to be called in a process of its own."""
    torch.set_num_threads(threads)
    if side == "plain":
        step = plain_step(size, device)
        for _ in range(5):
            step()
    else:

        def on_step(report: StepReport) -> None:
            if report.step == 5:
                raise Measured

        with tempfile.TemporaryDirectory() as folder:
            run_litconvert(size, Path(folder), on_step)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(size: Size, times: dict[Side, list[tuple[float, float]]], device: torch.device) -> dict[str, Any]:
    """Medians of the two sides, and the ratios of rounds."""

    def ratio(which: int) -> dict[str, float]:
        pairs = zip(times["plain"], times["litconvert"], strict=True)
        low, middle, high = quantiles((plain[which] / ours[which] for plain, ours in pairs), n=4)
        return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}

    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    teacher = ModelConfig.of(model_config(size, "softmax"))
    result: dict[str, Any] = {**asdict(size), "tokens": size.tokens, "rounds": len(times["plain"])}
    students: dict[Side, str] = {"litconvert": "linear", "plain": "softmax"}
    for side, kind in students.items():
        seconds = median(wall for wall, _ in times[side])
        flops = size.batch * training_flops(STAGE, ModelConfig.of(model_config(size, kind)), teacher)
        result[side] = {
            "seconds": round(seconds, 4),
            "cpu_seconds": round(median(cpu for _, cpu in times[side]), 4),
            "images_per_second": round(size.batch / seconds, 2),
            "gflops_per_second": round(flops / seconds / 1e9, 1),
            "flops_utilization": None if peak is None else round(flops / seconds / peak, 3),
        }
    result["plain_over_litconvert"] = {"wall": ratio(0), "cpu": ratio(1)}
    return result


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--batch", type=int, help="in place of each size's own")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The processes in which models run are children, which inherit it.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": arguments.threads,
        "precision": "bf16 autocast" if bf16_in_hardware() else "float32",
        **provenance(),
        "sizes": [],
    }
    for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        if arguments.batch:
            size = Size(**{**asdict(size), "batch": arguments.batch})
        memory = {side: alone(peak_memory, side, size, arguments.threads, device) for side in ("litconvert", "plain")}
        before = os.getloadavg()[0]
        measured = summary(size, alone(take_turns, size, arguments.rounds, arguments.threads, device), device)
        for side, taken in memory.items():
            measured[side]["peak_memory_gb"] = round(taken / 1e9, 2)
        measured["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
        print(json.dumps(measured), flush=True)
        result["sizes"].append(measured)
        name = "step_time.json" if device.type == "cpu" else f"step_time-{device.type}.json"
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
