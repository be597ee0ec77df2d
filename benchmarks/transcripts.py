"""What the main commands write, kept in docs/transcripts/: through a pipe, and on terminals of 80 and 120 columns.

    apt-get install tmux
    python -m benchmarks.transcripts              everything: some minutes
    python -m benchmarks.transcripts --pipe       through a pipe alone; no tmux

The commands are those of a user who tries the embedded digits model, in one folder, each on what the ones before it
left; sizes are cut down, so that scores mean nothing. Of a terminal it is what stands there when the command has ended.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRANSCRIPTS = Path(__file__).parents[1] / "docs" / "transcripts"
WIDTHS = (80, 120)
LINES = 400
SECONDS = 300
SHORT_SOLVE = "--set 'solve={states: 64, held_out: 16, local_steps: 20, drawing_steps: 4}'"
SHORT_STAGE = "--set distill.stages.0.steps=20"
SHORT_SCORES = "--set evaluate.num_samples=50"
COMMANDS = {
    "inspect": "litconvert inspect asset:dit-digits",
    "plan": "litconvert plan asset:dit-digits",
    "convert": f"litconvert convert asset:dit-digits lit-digits {SHORT_SOLVE}",
    "convert-again": f"litconvert convert asset:dit-digits lit-digits {SHORT_SOLVE}",
    "latents-synthesize": "litconvert latents synthesize latents -r digits --set data.synthesize.num_samples=64",
    "latents-show": "litconvert latents show latents --out sheet.png",
    "distill": f"litconvert distill lit-digits runs/lit-digits --data latents {SHORT_STAGE}",
    "sample": "litconvert sample runs/lit-digits --teacher asset:dit-digits --out samples.png",
    "evaluate": f"litconvert evaluate runs/lit-digits {SHORT_SCORES}",
    "probe": "litconvert probe runs/lit-digits --data latents --num-samples 8",
    "push": "litconvert push runs/lit-digits me/lit-digits --dry-run",
    "recipes-ls": "litconvert recipes ls",
    "recipes-show": "litconvert recipes show digits",
    "env": "litconvert env",
    "mistake": "litconvert run digitz",
    "run": f"litconvert run digits {SHORT_SOLVE} {SHORT_STAGE} {SHORT_SCORES} "
    "--set data.synthesize.num_samples=64 --out runs/digits",
}


@dataclass(frozen=True)
class Written:
    """What a command wrote through a pipe."""

    command: str
    code: int
    out: str
    err: str


def piped(folder: Path) -> Iterator[tuple[str, Written]]:
    """Each command in a folder, through pipes."""
    for name, command in COMMANDS.items():
        arguments = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment(), timeout=SECONDS)
        yield name, Written(command, done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """As a user's, with this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "LITCONVERT_DEVICE": "cpu"}


def on_terminal(folder: Path, width: int) -> Iterator[tuple[str, str]]:
    """Each command in a folder, on a terminal of so many columns."""
    variables = [part for key in ("PYTHONPATH", "LITCONVERT_DEVICE") for part in ("-e", f"{key}={environment()[key]}")]
    for name, command in COMMANDS.items():
        # A server for each: one that is about to end takes no new session.
        tmux = ["tmux", "-L", f"litconvert-{os.getpid()}-{width}-{name}"]
        ended = folder / ".ended"
        ended.unlink(missing_ok=True)
        shell = f"{shlex.quote(sys.executable)} -m {command}; touch {ended}; sleep {SECONDS}"
        size = ["-x", str(width), "-y", str(LINES)]
        subprocess.run([*tmux, "new-session", "-d", *size, *variables, "-c", str(folder), shell], check=True)
        deadline = time.monotonic() + SECONDS
        while not ended.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        shown = subprocess.run([*tmux, "capture-pane", "-p", "-S", "-"], check=True, capture_output=True, text=True)
        subprocess.run([*tmux, "kill-server"], check=False)
        yield name, "\n".join(line.rstrip() for line in shown.stdout.rstrip().splitlines()) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipe", action="store_true", help="through a pipe alone")
    parser.add_argument("--out", type=Path, default=TRANSCRIPTS)
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, written in piped(Path(folder)):
            keep(given.out / "pipe" / f"{name}.txt", f"$ {written.command}\n{written.out}--- stderr\n{written.err}")
    for width in () if given.pipe else WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in on_terminal(Path(folder), width):
                keep(given.out / f"{width}-columns" / f"{name}.txt", f"$ {COMMANDS[name]}\n{text}")


def keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(platform.platform(), platform.system()))  # whose machine it was is nobody's business
    print(path, flush=True)


if __name__ == "__main__":
    main()
