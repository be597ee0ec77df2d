"""Two processes, data parallel and sharded, against one: the same losses of a model that is made in a moment.

    torchrun --standalone --nproc_per_node 2 -m litconvert.checks.processes STUDENT DATA FOLDER

is what the check launches: all ways to train together, one after the other, since a launch takes longer than they do.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import nn

import litconvert
from litconvert.checks.check import Context, Error, Finding, Skipped, judge
from litconvert.common.device import DEVICE_VARIABLE, float32_convolutions
from litconvert.data.dataset import write_latents
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.runs.directory import RunDirectory

PROCESSES = 2
LAUNCHED = "litconvert.checks.processes"
# Seconds; a launch takes ten to thirty.
PATIENCE = 180.0
PRECISIONS = {"no": "float32", "bf16": "bf16"}
LIMITS = {"no": 1e-4, "bf16": 2e-2}
PICO = (
    "distill.compile=no",
    "distill.stages=["
    "{objective: hybrid, steps: 4, batch_size: 8, learning_rate: 1.0e-3, feature_weight: 0.5},"
    "{objective: hybrid, steps: 8, batch_size: 8, learning_rate: 1.0e-3}]",
    "sample.num_images=1",
    "sample.steps=1",
)


@dataclass(frozen=True)
class Way:
    """One way to train: how states are spread, and distill.mixed_precision."""

    sharded: bool
    precision: str

    @property
    def name(self) -> str:
        """`sharded, float32`."""
        return f"{'sharded' if self.sharded else 'data parallel'}, {PRECISIONS[self.precision]}"

    @property
    def overrides(self) -> list[str]:
        """Over the recipe."""
        return [*PICO, f"distill.mixed_precision={self.precision}"]


WAYS = tuple(Way(*one) for one in product((False, True), LIMITS))


def check_processes(context: Context) -> Finding:
    """Losses of every way to train on two processes, by NCCL on two GPUs or by gloo on a CPU, against one process."""
    if context.device == "mps":
        raise Skipped("a Mac has one GPU")
    if context.device == "cuda" and torch.cuda.device_count() < PROCESSES:
        raise Skipped("one GPU")
    folder = context.folder / "processes"
    student, data = pico(folder)
    alone = {}
    with float32_convolutions():
        for way in WAYS[: len(LIMITS)]:
            run = litconvert.distill(student, folder / f"alone-{way.precision}", data=data, overrides=way.overrides)
            alone[way.precision] = losses_of(run)
    code, printed = launch([str(student), str(data), str(folder)], context.device, folder / "launch.log")
    errors: list[Error] = []
    figures: dict[str, list[float]] = {}
    for way in WAYS:
        losses = losses_of(folder / way.name)
        figures[way.name] = losses
        if len(losses) == len(alone[way.precision]):
            found = difference(alone[way.precision], losses)
            errors.append(Error(f"losses, {way.name}", found, LIMITS[way.precision]))
    known = {"alone": {PRECISIONS[key]: losses for key, losses in alone.items()}, "together": figures}
    if len(errors) == len(WAYS) and code == 0:
        return judge(errors, known)
    missing = (
        ", ".join(way.name for way in WAYS if len(figures[way.name]) < len(alone[way.precision])) or "none of them"
    )
    ended = (
        f"two processes had not ended after {PATIENCE:.0f} s" if code is None else f"torchrun ended with code {code}"
    )
    return Finding("", {**known, "printed": printed}, f"{ended}; not trained: {missing}")


def main() -> None:
    """What each of the launched processes does."""
    student, data, folder = map(Path, sys.argv[1:])
    with float32_convolutions():
        for way in WAYS:
            os.environ["ACCELERATE_USE_FSDP"] = str(way.sharded).lower()
            litconvert.distill(student, folder / way.name, data=data, overrides=way.overrides)


def launch(arguments: Sequence[str], device: str, log: Path) -> tuple[int | None, list[str]]:
    """`main` in two processes: torchrun's exit code, None where it had to be ended, and the last lines printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    environment = {**os.environ, DEVICE_VARIABLE: device, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    with log.open("w") as printed:
        process = subprocess.Popen(
            [*command, "-m", LAUNCHED, *arguments],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        code: int | None = None
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its processes, which are not ours to see
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
    return code, log.read_text(errors="replace").splitlines()[-40:]


def pico(folder: Path) -> tuple[Path, Path]:
    """A converted student of a random teacher, and data, made in a folder."""
    torch.manual_seed(0)
    teacher = LiTTransformer2DModel(
        sample_size=8, hidden_size=64, num_layers=2, num_attention_heads=4, linear_num_heads=2, num_classes=4
    )
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher.save_pretrained(folder / "teacher")
    data = write_latents(torch.randn(16, 4, 8, 8), torch.arange(16) % 4, folder / "data", "random")
    recipe = folder / "pico.yaml"
    recipe.write_text("student: {num_attention_heads: 2, conv_size: 3}\n")
    return litconvert.convert(folder / "teacher", folder / "student", str(recipe)), data


def losses_of(run: Path) -> list[float]:
    """Of every step that was made; none of a run that never began."""
    return [float(row["loss"]) for row in RunDirectory(run).read_metrics()] if run.is_dir() else []


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(one - other) / abs(one) for one, other in zip(losses, others, strict=True))


if __name__ == "__main__":
    main()
