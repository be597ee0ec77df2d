"""How soon the command line answers: help, the list of recipes and mistakes, beside a bare Python start.

    python -m benchmarks.startup

The median of seven runs each, in seconds of wall time; of the mistakes in tests/helpers/mistakes.py the median over all
of them and the slowest, of three runs each. Written to benchmarks/results/startup.json.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.helpers.mistakes import MISTAKES, make_place

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "litconvert --help": ["-m", "litconvert", "--help"],
    "litconvert recipes ls": ["-m", "litconvert", "recipes", "ls"],
}


def seconds(arguments: list[str], code: int = 0, folder: str | None = None) -> float:
    """Wall time of one run, which ends with this code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False, cwd=folder)
    if done.returncode != code:
        raise SystemExit(f"{arguments}: {done.stderr.decode()}")
    return time.perf_counter() - began


def of_mistakes() -> list[float]:
    """The median of each mistake."""
    with tempfile.TemporaryDirectory() as folder:
        make_place(Path(folder))
        commands = [["-m", "litconvert", *arguments] for arguments, _ in MISTAKES]
        return [median(seconds(arguments, 2, folder) for _ in range(3)) for arguments in commands]


def main() -> None:
    """Measure, print and keep."""
    medians = {name: round(median(seconds(arguments) for _ in range(7)), 3) for name, arguments in COMMANDS.items()}
    mistakes = of_mistakes()
    medians |= {"a mistake": round(median(mistakes), 3), "the slowest mistake": round(max(mistakes), 3)}
    result = {"machine": platform.machine(), "python": platform.python_version(), "median_seconds": medians}
    out = Path(__file__).parent / "results" / "startup.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
