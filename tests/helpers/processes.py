"""`litconvert` in several processes at once, started by forking one that has imported everything: a start is quick."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Reads a line of JSON (arguments, environment, log file), forks, and answers with the child's number; asked for that
# number's end, answers with the exit code or `running`.
_FORKER = """
import json, os, sys
import importlib
import accelerate, datasets, diffusers, matplotlib.pyplot, torch, torch.distributed.checkpoint, torch.distributed.fsdp
import litconvert.cli.app, litconvert.distillation.distillation, litconvert.workflow
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        number = order["wait"]
        done, status = os.waitpid(number, os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if done else "running", flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        sys.argv = ["litconvert", *order["arguments"]]
        code = 1
        try:
            module, _, function = order["call"].partition(":")
            getattr(importlib.import_module(module), function)()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
"""


# Seconds in which what is left of a group may end by itself.
GRACE = 3.0


@dataclass
class Workers:
    """The processes of one launch."""

    forker: "Forker"
    numbers: list[int]
    log: Path

    def kill(self, number: signal.Signals, *, only: int | None = None) -> None:
        """Send a signal to all of them, or to one alone."""
        for index, process in enumerate(self.numbers):
            if only is None or index == only:
                os.kill(process, number)

    def wait(self) -> list[int]:
        """Exit codes, once all have ended.

        As torchrun and `accelerate launch` do: when one has failed, the others are asked to end, and then made to.
        """
        codes: dict[int, int] = {}
        asked: float | None = None
        while len(codes) < len(self.numbers):
            for index in range(len(self.numbers)):
                if index not in codes and (code := self._ended(index)) is not None:
                    codes[index] = code
            if any(codes.values()) and asked is None:
                asked = time.monotonic() + GRACE
            if asked is not None and time.monotonic() > asked:
                number = signal.SIGTERM if time.monotonic() < asked + GRACE else signal.SIGKILL
                for index, process in enumerate(self.numbers):
                    if index not in codes:
                        os.kill(process, number)
                time.sleep(0.5)
            time.sleep(0.01)
        return [codes[index] for index in range(len(self.numbers))]

    def _ended(self, index: int) -> int | None:
        answer = self.forker.ask({"wait": self.numbers[index]})
        return None if answer == "running" else int(answer)


class Forker:
    """A process with everything imported, which forks workers."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LITCONVERT_DEBUG": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def ask(self, order: Mapping[str, object]) -> str:
        """One order and its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def launch(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        processes: int = 1,
        sharded: bool = False,
        call: str = "litconvert.cli.app:main",
    ) -> Workers:
        """`litconvert ARGUMENTS` in so many processes of one group, as `accelerate launch --cpu` sets them up.

        `call` is another function than the command line's, which finds the arguments in sys.argv.
        """
        environment = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": str(sharded).lower()}
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        numbers = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            order = {
                "arguments": list(arguments),
                "environment": {**environment, **ranks},
                "log": str(log),
                "call": call,
            }
            numbers.append(int(self.ask(order)))
        return Workers(self, numbers, log)

    def __enter__(self) -> "Forker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        with self.process:  # closes the pipes, and waits
            pass


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Fail rather than hang."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"nothing after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


_KEEPER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("kept", flush=True)
time.sleep(600)
"""


@contextmanager
def kept_by_another_process(folder: Path, lock: str = ".lock") -> Iterator[None]:
    """A folder as it is while another process works in it, or holds another lock there."""
    with subprocess.Popen([sys.executable, "-c", _KEEPER, str(folder / lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"kept\n"
        try:
            yield
        finally:
            process.kill()
