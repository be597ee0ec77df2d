"""How much sooner two processes draw a set of samples than one, each process with one thread.

    python -m benchmarks.sampling_processes [--num 2000] [--steps 8] [--rounds 3]

The embedded digits teacher, in float32, alone and by two launched processes in turn, --rounds times. Wall time of
the commands as a user waits for them, imports and the joining of the file included; what starting takes is measured
by itself. Pictures of the two files are compared. Written to
benchmarks/results/sampling_processes.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "sampling_processes.json"


def seconds(processes: int, npz: Path, num: int, steps: int) -> float:
    """Wall time of one command."""
    # Not `accelerate launch`, which starts one process on a CPU however many are asked for.
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "litconvert"]
    drawn = ["sample", "asset:dit-digits", "-n", str(num), "--steps", str(steps), "--npz", str(npz), "-q", "--force"]
    drawn += ["--out", str(npz.with_suffix(".png")), "--set", "sampling.mixed_precision=no"]
    drawn += ["--set", f"sampling.shard_size={max(1, num // 20)}"]
    command = [sys.executable, *(launched if processes > 1 else ["-m", "litconvert"]), *drawn]
    began = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def compared(one: Path, other: Path) -> dict[str, float]:
    """How far the pictures of two files are apart."""
    with np.load(one) as mine, np.load(other) as theirs:
        assert np.array_equal(mine["arr_1"], theirs["arr_1"])
        difference = np.abs(mine["arr_0"].astype(int) - theirs["arr_0"].astype(int))
    return {"largest": int(difference.max()), "share": float((difference > 0).mean())}


def measure(num: int, steps: int, rounds: int) -> dict[str, Any]:
    """Both in turn, so that what else the machine does meets both."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        files = {processes: Path(folder) / f"{processes}.npz" for processes in times}
        for _ in range(rounds):
            for processes, found in times.items():
                found.append(round(seconds(processes, files[processes], num, steps), 2))
                print(f"{processes} process(es): {found[-1]:.1f} s", flush=True)
        difference = compared(*files.values())
        start = {processes: round(seconds(processes, Path(folder) / "few.npz", 2, 1), 2) for processes in times}
    alone, both = (median(times[processes]) for processes in times)
    return {
        "num": num,
        "steps": steps,
        "seconds": {str(processes): found for processes, found in times.items()},
        "seconds_to_start": {str(processes): found for processes, found in start.items()},
        "ratio": round(both / alone, 3),
        "ratio_without_the_start": round((both - start[2]) / (alone - start[1]), 3),
        "pixels_that_differ": difference,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=2000, help="samples")
    parser.add_argument("--steps", type=int, default=8, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn")
    asked = parser.parse_args()
    result = {**provenance(), **measure(asked.num, asked.steps, asked.rounds)}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
