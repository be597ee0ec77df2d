"""What a long measurement is made of: tasks that are done once, by any number of processes, and gone on with."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from litconvert.training.trainer import Interrupted

ROOT = Path(__file__).parents[1]
WAIT = 2.0  # seconds until it is looked again for a task that can be done


@dataclass(frozen=True)
class Task:
    """Something that one worker does, once.

    Attributes:
        kind: `reference`, `data`, `student` or `row`.
        name: of the student or row; empty where the seed says it all.
        needs: tasks that come first.
        seconds: about how many it takes.
    """

    kind: str
    name: str
    seed: int
    needs: tuple["Task", ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def key(self) -> str:
        return "-".join(str(part) for part in (self.kind, self.name, self.seed) if part != "")


class Measurement(Protocol):
    """What there is to do, and how."""

    @property
    def folder(self) -> Path:
        """For data and models in the making."""

    def tasks(self) -> list[Task]:
        """What is missing, in the order of importance, each after what it needs."""

    def is_done(self, task: Task) -> bool: ...

    def do(self, task: Task) -> str:
        """One task, whose needs are done; returns what was found, to be printed."""


def with_needs(wanted: Sequence[Task], measurement: Measurement) -> list[Task]:
    """Those that are not done, each after what it needs and is not done either."""
    missing: dict[str, Task] = {}

    def add(task: Task) -> None:
        if not measurement.is_done(task):
            for one in task.needs:
                add(one)
            missing.setdefault(task.key, task)

    for task in wanted:
        add(task)
    return list(missing.values())


def code_digest() -> str:
    """Of what a student depends on beside its recipe."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "litconvert").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


CODE = code_digest()


@contextmanager
def core_share() -> Iterator[list[float]]:
    """How much of a core this process had while the block ran, in the list's one place afterwards."""
    share: list[float] = []
    wall, core = time.perf_counter(), time.process_time()
    yield share
    share.append((time.process_time() - core) / (time.perf_counter() - wall))


def work_through(measurement: Measurement, hours: float) -> list[str]:
    """Do what is missing and nobody else does, until all is there or time is up; returns what failed.

    The system lets go of a claim however its process ends, so that none outlives it.
    """
    deadline = time.monotonic() + 3600 * hours
    claims = measurement.folder / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    parent = os.getppid()
    while os.getppid() == parent:  # whoever started this worker may have been killed
        tasks = measurement.tasks()
        left = deadline - time.monotonic()
        due = [task for task in tasks if task.key not in failed and task.seconds < left]
        ready = [task for task in due if all(map(measurement.is_done, task.needs))]
        if not ready:
            break
        for task in ready:
            try:
                with FileLock(claims / f"{task.key}.lock", timeout=0, fallback_to_soft=False):
                    if measurement.is_done(task):
                        break
                    began = time.monotonic()
                    found = measurement.do(task)
                    seconds = time.monotonic() - began
                    print(f"{task.key}: {seconds:.0f} s{found and ', '}{found}; {len(tasks) - 1} to go", flush=True)
                    break
            except Timeout:
                continue
            except Interrupted:
                raise
            except Exception as error:
                traceback.print_exc()
                failed[task.key] = str(error)
                break
        else:
            time.sleep(WAIT)  # others are at work on all that could be done now
    return list(failed)


def run_workers(module: str, arguments: Sequence[str], workers: int) -> int:
    """A command in so many processes of one thread each; returns the worst exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments, "--worker"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(workers)]
    try:
        return max(abs(process.wait()) for process in started)
    except KeyboardInterrupt:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def print_missing(tasks: Sequence[Task], workers: int) -> None:
    """Every task with its seconds, and their sum."""
    for task in tasks:
        print(f"{task.seconds:6.0f} s  {task.key}")
    hours = sum(task.seconds for task in tasks) / 3600 / max(1, workers)
    print(f"{len(tasks)} tasks, about {hours:.1f} hours in {workers} processes with a core each")
