"""The memory estimate of `litconvert plan --stage` against what `litconvert distill` then takes, on the CPU.

    python -m benchmarks.memory --work /some/folder/with/10/GB

Three sizes, each with a hybrid stage, on random weights and latents. Every step is a process of its own; what was
measured is the most resident memory of the whole process, as the kernel counted it. The time of a step is compared too,
where the machine has nothing else to do. Written to benchmarks/results/memory.json.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 4

MAKE = """
import sys, torch
from pathlib import Path
from litconvert.data.dataset import write_latents
from litconvert.model.modeling_lit import LiTTransformer2DModel
work, width, layers, heads = Path(sys.argv[1]), *map(int, sys.argv[2:])
torch.manual_seed(0)
model = LiTTransformer2DModel(hidden_size=width, num_layers=layers, num_attention_heads=heads, num_classes=10)
model.save_pretrained(work / "teacher")
write_latents(torch.randn(64, 4, 32, 32), torch.arange(64) % 10, work / "data", "random")
"""

RECIPE = """\
source: {{path: {teacher}}}
distill:
  mixed_precision: "no"
  stages:
    - {{objective: hybrid, steps: {steps}, batch_size: {batch}}}
sample: {{scheduler: ddim, steps: 1, num_images: 1}}
"""


@dataclass(frozen=True)
class Size:
    """A DiT of 32 x 32 latents in patches of 2, 256 tokens."""

    width: int
    layers: int
    heads: int
    batch: int


# The room that is left between blocks (litconvert.estimates.stage.HEAP_GAPS) was fitted to others: depths 12, 6 and 6,
# batches 32, 8 and 8.
SIZES = (Size(192, 8, 6, 48), Size(384, 12, 6, 16), Size(768, 4, 12, 12))


def peak_of(arguments: list[str]) -> int:
    """Peak resident memory of one process in bytes.

    The kernel counts what a process was forked from, too: this one is small, since it imports no torch.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {arguments}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(size: Size, work: Path) -> dict[str, Any]:
    """Estimate and measure the stage of a size."""
    recipe, student, run = work / "recipe.yaml", work / "student", work / "run"
    recipe.write_text(RECIPE.format(teacher=work / "teacher", steps=STEPS, batch=size.batch))
    cli = ["-m", "litconvert"]
    subprocess.run(
        [
            sys.executable,
            *cli,
            "convert",
            str(work / "teacher"),
            str(student),
            "--recipe",
            str(recipe),
            "-q",
            "--force",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    planned = subprocess.run(
        [sys.executable, *cli, "plan", "--recipe", str(recipe), "--stage", "0", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    estimate = json.loads(planned.stdout)[0]
    measured = peak_of(
        [*cli, "distill", str(student), str(run), "--recipe", str(recipe), "--data", str(work / "data"), "-q"]
    )
    with (run / "metrics.csv").open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return {
        "width": size.width,
        "layers": size.layers,
        "batch": size.batch,
        "memory": estimate["memory"],
        "estimated": estimate["peak"],
        "measured": measured,
        "difference": round(estimate["peak"] / measured - 1, 4),
        "step_seconds_estimated": round(estimate["step_seconds"], 2),
        "step_seconds_measured": round(statistics.median(seconds[1:]), 2),
    }


def main() -> None:
    """Compare all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="Default: a temporary folder.")
    given = parser.parse_args().work
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # resident memory is what is measured
    rows = []
    print(f"{'width':>5} {'layers':>6} {'batch':>5} {'estimated':>9} {'measured':>8} {'difference':>10}")
    with tempfile.TemporaryDirectory(prefix="litconvert-memory-", dir=given) as folder:
        for size in SIZES:
            work = Path(folder) / str(size.width)
            work.mkdir()
            peak_of(["-c", MAKE, str(work), str(size.width), str(size.layers), str(size.heads)])
            row = compare(size, work)
            rows.append(row)
            place = f"{size.width:>5} {size.layers:>6} {size.batch:>5}"
            megabytes = f"{row['estimated'] / 1e6:>6.0f} MB {row['measured'] / 1e6:>5.0f} MB"
            print(place, megabytes, f"{row['difference']:>+10.1%}", flush=True)
    result = {
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "rows": rows,
    }
    out = Path(__file__).parent / "results" / "memory.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
