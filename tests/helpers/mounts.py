"""File systems mounted for a test, where that is allowed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *, size: str = "50m", bound: Path | None = None) -> Iterator[Path]:
    """A folder that is a mount point while the block runs: a file system in memory, or another folder bound to it."""
    folder.mkdir(exist_ok=True)
    what = ["--bind", str(bound)] if bound else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    if subprocess.run(["mount", *what, str(folder)], capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a data set may still be mapped
