"""The command line in this process: what it prints and how it exits, without a new process and its imports."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from litconvert.cli import app as cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Outcome:
    """`litconvert ARGUMENTS`, as the console script runs it."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["litconvert", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())
