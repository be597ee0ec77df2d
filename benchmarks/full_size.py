"""A full-size conversion: a random DiT-XL/2 `.pt` (2.7 GB), converted, and one 256px latent sampled from the result.

    python -m benchmarks.full_size --work /some/folder/with/10/GB

Each step is a process of its own: wall time, and peak resident memory as the kernel counted it (mapped file pages
included). Written to benchmarks/results/full_size.json.
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

MAKE = """
import sys, torch
from litconvert.model.modeling_lit import sincos_position_embedding
torch.manual_seed(0)
width, layers = 1152, 28
state = {"pos_embed": sincos_position_embedding(width, (16, 16), 16, torch.device("cpu")).clone()}
def add(name, *shape):
    state[name] = torch.randn(shape) * 0.02
def linear(name, out, into):
    add(name + ".weight", out, into)
    add(name + ".bias", out)
add("x_embedder.proj.weight", width, 4, 2, 2)
add("x_embedder.proj.bias", width)
linear("t_embedder.mlp.0", width, 256)
linear("t_embedder.mlp.2", width, width)
add("y_embedder.embedding_table.weight", 1001, width)
for i in range(layers):
    linear(f"blocks.{i}.attn.qkv", 3 * width, width)
    linear(f"blocks.{i}.attn.proj", width, width)
    linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
    linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
    linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
linear("final_layer.linear", 32, width)
linear("final_layer.adaLN_modulation.1", 2 * width, width)
torch.save(state, sys.argv[1])
"""


def measured(arguments: list[str]) -> dict[str, Any]:
    """Wall time and peak resident memory of one process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {arguments}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_resident_gb": round(usage.ru_maxrss / 1e6, 2)}


def main() -> None:
    """Make, convert, sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "litconvert-full-size")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    source, student, latents = work / "DiT-XL-2-random.pt", work / "student", work / "latents.safetensors"
    if not source.exists():
        subprocess.run([sys.executable, "-c", MAKE, str(source)], check=True)
    cli = ["-m", "litconvert"]
    sample = ["--num", "1", "--latents", str(latents), "--scheduler", "ddim", "--steps", "25", "--guidance", "1"]
    options = ["--recipe", "dit-xl-2-256"]
    steps = {
        "plan": measured([*cli, "plan", str(source), "--recipe", "dit-xl-2-256"]),
        "convert": measured([*cli, "convert", str(source), str(student), *options, "--no-solve", "-q", "--force"]),
        "sample one 256px latent, 25 DDIM steps": measured([*cli, "sample", str(student), *sample, "-q"]),
    }
    result = {
        "source_gb": round(source.stat().st_size / 1e9, 2),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "steps": steps,
    }
    out = Path(__file__).parent / "results" / "full_size.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
