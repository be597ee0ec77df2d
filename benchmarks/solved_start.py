"""The solved start at full size on this machine: a random DiT-XL/2 and PixArt-Sigma 512, beside what `plan` said of it.

    python -m benchmarks.solved_start --work /some/folder/with/20/GB

Wall time, drawing included, and the most memory that is the process's own (mapped files are left out). Written to
benchmarks/results/solved_start.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.provenance import provenance
from litconvert.conversion.provenance import Provenance
from tests.helpers.checkpoint_files import dit_shapes, pixart_shapes

SOURCES: dict[str, dict[str, tuple[int, ...]]] = {
    "DiT-XL-2-256": dit_shapes(),
    "PixArt-Sigma-512": pixart_shapes(),
}
HINTS = {
    "DiT-XL-2-256": ["--sample-size", "32"],
    "PixArt-Sigma-512": ["--sample-size", "64", "--set", "source.family=pixart-sigma"],
}


def make(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A random checkpoint, where it is not there yet."""
    if path.exists():
        return
    torch.manual_seed(0)
    # Products keep the size of what they multiply, so that nothing overflows through 28 layers.
    state = {
        name: torch.randn(shape) * (0.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.02)
        for name, shape in shapes.items()
        if name != "pos_embed"
    }
    save_file(state, path)


def own_bytes(process: psutil.Process) -> int:
    """What a process holds without the files it has mapped."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def converted(arguments: list[str]) -> dict[str, float]:
    """Seconds and the largest own memory of one conversion."""
    began = time.perf_counter()
    running = subprocess.Popen([sys.executable, "-m", "litconvert", "convert", *arguments])
    seen, most = psutil.Process(running.pid), 0
    while running.poll() is None:
        try:
            most = max(most, own_bytes(seen))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    if running.wait():
        raise SystemExit(f"failed: {arguments}")
    return {"seconds": round(time.perf_counter() - began), "own_memory_gb": round(most / 1e9, 2)}


def measure(name: str, work: Path, inherit: list[str]) -> dict[str, Any]:
    """One model, planned and converted."""
    source, out = work / f"{name}.safetensors", work / f"{name}-student"
    make(source, SOURCES[name])
    options = [*HINTS[name], *inherit, "--device", "cpu"]
    said = subprocess.run(
        [sys.executable, "-m", "litconvert", "plan", str(source), "--json", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    solve = json.loads(said.stdout)["solve"]
    took = converted([str(source), str(out), "--force", *options])
    record = Provenance.read(out).solve or {}
    return {
        "states": solve["states"],
        "images": solve["images"],
        "local_steps": solve["local_steps"],
        "planned": {"seconds": round(solve["seconds"]), "memory_gb": round(solve["memory"] / 1e9, 2)},
        "measured": took,
        "solving_seconds": record["seconds"],
        "output_error": {key: record["output"][key] for key in ("before", "after")},
    }


def main() -> None:
    """Make, plan, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "litconvert-solved-start")
    parser.add_argument("--models", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--inherit", help="as of convert; default: none")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    out = Path(__file__).parent / "results" / "solved_start.json"
    result = json.loads(out.read_text()) if out.exists() else {"models": {}}
    inherit = ["--inherit", arguments.inherit] if arguments.inherit else []
    for name in arguments.models:
        label = f"{name}, {arguments.inherit or 'nothing'} inherited"
        result["models"][label] = measure(name, arguments.work, inherit)
        result |= {"cores": os.cpu_count(), "machine": platform.machine(), **provenance()}
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
