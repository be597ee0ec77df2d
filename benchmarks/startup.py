"""How soon the command line answers: `litconvert --help` and `litconvert recipes ls`, beside a bare Python start.

    python -m benchmarks.startup

The median of seven runs each, in seconds of wall time; written to benchmarks/results/startup.json.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "litconvert --help": ["-m", "litconvert", "--help"],
    "litconvert recipes ls": ["-m", "litconvert", "recipes", "ls"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one run."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and keep."""
    medians = {name: round(median(seconds(arguments) for _ in range(7)), 3) for name, arguments in COMMANDS.items()}
    result = {"machine": platform.machine(), "python": platform.python_version(), "median_seconds": medians}
    out = Path(__file__).parent / "results" / "startup.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
