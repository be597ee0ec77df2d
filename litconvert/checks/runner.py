"""Checks one after the other, in another process: one that crashes or hangs takes nothing with it."""

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType

from litconvert.checks.check import NO_TIME, Check, Context, Outcome, perform

# Seconds after the time is over in which a check that has begun may end.
GRACE = 120.0
# Seconds in which a process that is asked to end may do so.
ENDING = 10.0
# Each check says itself what it launches, and nothing that it needs is on the Hub.
CLEARED = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "MEGATRON_")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run_checks(
    checks: Sequence[Check],
    device: str,
    folder: Path,
    seconds: float,
    on_begin: Callable[[str], None] = lambda name: None,
    grace: float = GRACE,
) -> list[Outcome]:
    """Run checks in their order; those that would begin after so many seconds are skipped.

    Args:
        device: what they work on: the one that is chosen (LITCONVERT_DEVICE) or else the default.
        folder: a temporary one.
        on_begin: told the name of each check that begins.
        grace: seconds after which a check that has not ended is made to.
    """
    ends = time.monotonic() + seconds
    outcomes = []
    with Worker(folder / "log") as worker:
        for check in checks:
            left = ends - time.monotonic()
            if left <= 0:
                outcomes.append(Outcome(check.name, "skipped", 0.0, NO_TIME))
                continue
            on_begin(check.name)
            outcomes.append(worker.perform(check, Context(device, folder, left), left + grace))
    return outcomes


class Worker:
    """A process that performs checks, replaced where it has died, hangs, or has met an error: a GPU may be left broken.

    Args:
        log: a file for what it prints.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._used = False  # by a check that was not skipped

    def perform(self, check: Check, context: Context, patience: float) -> Outcome:
        """A check's outcome, after at most so many seconds."""
        if check.alone and self._used:
            self.end()
        began = time.monotonic()
        process, connection = self._begin()
        printed = self.log.stat().st_size if self.log.exists() else 0
        connection.send((check, context))
        wait([connection, process.sentinel], patience)
        try:
            outcome: Outcome | None = connection.recv() if connection.poll() else None
        except (EOFError, OSError):
            outcome = None
        if outcome is not None:
            self._used = self._used or outcome.status != "skipped"
            if outcome.traceback is not None:
                self.end()
            return replace(outcome, seconds=time.monotonic() - began)
        process.join(0.5)
        text = (
            f"it had not ended after {patience:.0f} s, and was made to"
            if process.is_alive()
            else f"its process died ({_cause(process.exitcode)})"
        )
        self.end()
        return Outcome(check.name, "failed", time.monotonic() - began, text, traceback=self._printed(printed))

    def end(self) -> None:
        """End the process and what it has started."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        self._used = False
        if process is None or connection is None:
            return
        connection.close()
        process.join(1.0)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.is_alive():
                _end_group(process, number)
                process.join(ENDING)

    def _begin(self) -> tuple[SpawnProcess, Connection]:
        if self._process is not None and self._connection is not None and self._process.is_alive():
            return self._process, self._connection
        self.end()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self.log)), daemon=False)
        self._process.start()
        theirs.close()
        return self._process, self._connection

    def _printed(self, start: int) -> str:
        """The last lines that were printed since the log had this length."""
        try:
            text = self.log.read_bytes()[start:].decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-40:])

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _end_group(process: SpawnProcess, number: signal.Signals) -> None:
    """Send a signal to a process and what it started; to it alone where it has no group of its own yet."""
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            os.kill(process.pid, number)


def _cause(code: int | None) -> str:
    """Why a process ended."""
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"signal {-code}"


def _serve(connection: Connection, log: str) -> None:
    """Perform checks until nobody asks any more."""
    os.setsid()  # so that it can be ended together with what it starts, and Ctrl-C is its parent's
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    for name in [name for name in os.environ if name.startswith(CLEARED)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    while True:
        try:
            check, context = connection.recv()
        except EOFError:
            return
        connection.send(perform(check, context))
