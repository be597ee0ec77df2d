"""Conversion against `cp`: time, anonymous memory, a bf16 cast against load-cast-save, and reading an EMA alone.

    python -m benchmarks.conversion --work /some/folder/with/30/GB

Random checkpoints of full size are made once: PixArt-Sigma as a 2.4 GB `.safetensors`, DiT-XL/2 as a 2.7 GB `.pt`, and
a training checkpoint of DiT-L/2 (raw weights, EMA, two Adam moments). Every figure is a median of several rounds, and
each ratio is of two things done in the same round, one after the other, files in the page cache, writes flushed.

1. Copying: dtype kept and all attention inherited, in one process, without its imports. The digest, the reading that
   checks for NaN, fsync and the making of fresh tensors are measured apart and taken off; what is left is divided by
   `cp` of as many bytes, the faster of two.
2. Default: the paper's recipe whole, fsync included, over the sum of `cp` (bytes written), `sha256sum` (the source) and
   the making of its fresh tensors alone.
3. Memory: the peak of anonymous memory of `litconvert convert` as a process of its own, sampled every 5 ms.
4. Cast: all attention inherited, in bfloat16, fsync and the check for NaN included, the digest not; over torch's load,
   cast and safetensors' save of the same source and fsync.
5. EMA: opening the training checkpoint and reading its EMA into memory, over torch.load of the whole.

Written to benchmarks/results/conversion.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import litconvert
from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.checkpoints.opening import open_checkpoint
from litconvert.common.tensors import TensorInfo
from litconvert.conversion import convert as conversion
from litconvert.conversion.plan import plan as plan_of
from litconvert.families.sources import OpenSource
from litconvert.model.config import ModelConfig
from tests.helpers.checkpoint_files import dit_shapes, pixart_shapes

ROUNDS = 5
LARGEST = {"PixArt-Sigma.safetensors": 6912 * 1152 * 4, "DiT-XL-2.pt": 6912 * 1152 * 4}


def make(work: Path) -> None:
    """The sources, random, where they are not there yet."""
    from litconvert.model.shapes import position_embedding

    torch.manual_seed(0)

    def state(shapes: dict[str, tuple[int, ...]], size: int, width: int) -> dict[str, torch.Tensor]:
        values = {name: torch.empty(shape).uniform_(-0.05, 0.05) for name, shape in shapes.items()}
        config = ModelConfig(hidden_size=width, sample_size=size, patch_size=2)
        return {**values, "pos_embed": position_embedding(config)}

    sigma, dit, training = work / "PixArt-Sigma.safetensors", work / "DiT-XL-2.pt", work / "training.pt"
    if not sigma.exists():
        save_file(state(pixart_shapes(), 64, 1152), sigma)
    if not dit.exists():
        torch.save(state(dit_shapes(), 32, 1152), dit)
    if not training.exists():
        sets = [state(dit_shapes(width=1024, layers=24), 32, 1024) for _ in range(4)]
        pairs = zip(sets[2].values(), sets[3].values(), strict=True)
        moments = {index: {"exp_avg": one, "exp_avg_sq": two} for index, (one, two) in enumerate(pairs)}
        torch.save({"model": sets[0], "ema": sets[1], "opt": {"state": moments, "param_groups": []}}, training)


def seconds(work: Callable[[], Any], *results: Path) -> float:
    """Wall time, with earlier results removed and earlier writes on disk."""
    for result in results:
        removed(result)
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def removed(path: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return path


class Stopwatch:
    """Adds up the time spent in what it wraps."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

        return timed


@contextmanager
def apart(watch: Stopwatch, digest: str) -> Iterator[None]:
    """Time the check, fsync and fresh tensors; the digest is known already."""
    with (
        patch.object(Checkpoint, "sha256", lambda self: digest),
        patch.object(OpenSource, "checked", watch.wrap("check", OpenSource.checked)),
        patch.object(OpenSource, "check_recomputed", watch.wrap("check", OpenSource.check_recomputed)),
        patch.object(os, "fsync", watch.wrap("fsync", os.fsync)),
        patch.object(os, "posix_fadvise", watch.wrap("fsync", os.posix_fadvise)),  # which starts the flushing
        patch.object(conversion, "fresh_tensor", watch.wrap("fresh", conversion.fresh_tensor)),
    ):
        yield


def convert(source: Path, out: Path, *overrides: str) -> Path:
    return litconvert.convert(source, out, None, ["solve=null", *overrides])


def fresh_alone(source: Path) -> None:
    """The fresh tensors of the default conversion, one at a time."""
    plan = plan_of(source, None, ["solve=null"])
    for entry in plan.entries:
        if entry.fate == "fresh":
            info = TensorInfo(entry.shape, torch.float32)
            conversion.fresh_tensor(str(entry.target), info, 0, plan.recipe.student.conv_size)


def load_cast_save(source: Path, out: Path) -> None:
    """How one would do it by hand."""
    if source.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(source)
    else:
        state = torch.load(source, weights_only=True)
    save_file({name: value.to(torch.bfloat16) for name, value in state.items()}, out)
    with out.open("rb") as file:
        os.fsync(file.fileno())


def peak_anonymous(arguments: list[str]) -> int:
    """Peak of a process's anonymous memory in bytes, sampled every 5 ms."""
    process = subprocess.Popen([sys.executable, "-m", "litconvert", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, int(found[0].split()[1]) * 1024 if found else 0)
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(f"failed: {arguments}")
    return peak


def copying(source: Path, work: Path, digest: str) -> dict[str, float]:
    """One round of 1 and 2."""
    out, other = work / "student", work / "copy"
    watch = Stopwatch()
    with apart(watch, digest):
        whole = seconds(lambda: convert(source, out, "inherit.attention=all"), out)
    weights = out / "diffusion_pytorch_model.safetensors"
    cp = seconds(lambda: subprocess.run(["cp", weights, other], check=True), other)
    default = seconds(lambda: convert(source, out), out, other)
    written = seconds(lambda: subprocess.run(["cp", weights, other], check=True), other)
    hashing = seconds(lambda: subprocess.run(["sha256sum", source], check=True, stdout=subprocess.DEVNULL))
    fresh = seconds(lambda: fresh_alone(source))
    rest, cp = whole - sum(watch.spent.values()), min(cp, written)
    return {
        "copy": rest,
        **{f"copy: {name}, apart": spent for name, spent in watch.spent.items()},
        "cp": cp,
        "copy over cp": rest / cp,
        "default": default,
        "sha256sum": hashing,
        "fresh tensors alone": fresh,
        "default over cp + sha256sum + fresh": default / (written + hashing + fresh),
    }


def casting(source: Path, work: Path, digest: str) -> dict[str, float]:
    """One round of 4."""
    out, cast = work / "student", work / "cast.safetensors"
    with patch.object(Checkpoint, "sha256", lambda self: digest):
        ours = seconds(lambda: convert(source, out, "student.dtype=bfloat16", "inherit.attention=all"), out)
    by_hand = seconds(lambda: load_cast_save(source, cast), out, cast)
    removed(cast)
    return {"cast": ours, "load, cast, save": by_hand, "cast speed-up": by_hand / ours}


def averaged(source: Path) -> dict[str, float]:
    """One round of 5."""

    def read_ema() -> None:
        checkpoint = open_checkpoint(str(source), weights="ema")
        for name in checkpoint.tensors:
            checkpoint.read(name).clone()

    ours = seconds(read_ema)
    whole = seconds(lambda: torch.load(source, weights_only=True))
    return {"EMA": ours, "torch.load of the whole": whole, "EMA speed-up": whole / ours}


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Median of every figure, and every round's ratios."""
    result: dict[str, Any] = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
    ratios = [name for name in rounds[0] if "over" in name or "speed-up" in name]
    return {**result, "rounds": {name: [round(one[name], 3) for one in rounds] for name in ratios}}


def main() -> None:
    """Make, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "litconvert-conversion")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    work, rounds = given.work, range(given.rounds)
    work.mkdir(parents=True, exist_ok=True)
    make(work)
    results: dict[str, Any] = {}
    for name, largest in LARGEST.items():
        source = work / name
        digest = open_checkpoint(str(source)).sha256()  # and the file into the page cache
        figures = medians([{**copying(source, work, digest), **casting(source, work, digest)} for _ in rounds])
        peak = peak_anonymous(["convert", str(source), str(removed(work / "student")), "-q"])
        figures |= {"peak anonymous MB": round(peak / 1e6), "limit MB": round(150 + 3 * largest / 1e6)}
        results[name] = {"GB": round(source.stat().st_size / 1e9, 2), **figures}
        print(json.dumps(results[name], indent=2), flush=True)
    training = work / "training.pt"
    open_checkpoint(str(training)).sha256()
    results["training.pt"] = {
        "GB": round(training.stat().st_size / 1e9, 2),
        **medians([averaged(training) for _ in rounds]),
    }
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    out = Path(__file__).parent / "results" / "conversion.json"
    out.write_text(json.dumps({**machine, "rounds": given.rounds, **results}, indent=2) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
