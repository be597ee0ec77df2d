"""What a measurement was made with, so that figures of other code are told apart."""

import subprocess
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """The commit of this checkout (with -dirty where files differ from it) and torch's version."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {"commit": answer.stdout.strip() or "unknown", "torch": torch.__version__}
