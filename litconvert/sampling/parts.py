"""Work that several processes share part by part, and that is kept until it is whole: interrupted, it goes on."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from litconvert.common.files import read_json, require_utf8, write_whole
from litconvert.common.listener import SILENT, Listener, Task
from litconvert.common.outputs import at_work, place_of, whole_directory, work_path, work_paths
from litconvert.errors import LitconvertError, system_cause

# In the folder of the parts: which files are written beside the output.
BESIDE = "beside.json"


@dataclass(frozen=True)
class Group:
    """The processes that share the work, and this one's place among them."""

    process: int
    processes: int
    device: torch.device
    wait: Callable[[], None]
    """Until every process is here."""


def launched_group() -> Group:
    """The group that `accelerate launch` formed; this process alone where nothing was launched.

    Raises UsageError when this process was launched as one of several but is in no group.
    """
    from litconvert.common.launch import device_of, join_group

    state = join_group()
    return Group(state.process_index, state.num_processes, device_of(state), state.wait_for_everyone)


def _until(done: Callable[[], bool]) -> None:
    """Wait for other processes' files. Not a barrier: its timeout would be shorter than a part may take.

    A process that fails ends the others too, which the launcher sees to.
    """
    while not done():
        time.sleep(0.2)


class Parts:
    """An output in the making, part by part.

    Args:
        out: the finished output, a file or a folder.
        digests: of what determines it; the second, where there is one, is what an earlier version called it.
        count: of parts; part i is that of process i modulo their number.
        group: the processes.
        listener: hears what the first process has to say.
    """

    any_name = True
    """The output may be called what is not UTF-8, which Arrow could not open."""

    def __init__(
        self, out: Path, digests: Sequence[str], count: int, group: Group, listener: Listener = SILENT
    ) -> None:
        self.out, self.digests, self.count, self.group, self.listener = out, digests, count, group, listener

    @cached_property
    def folder(self) -> Path:
        """Where the parts are until they are joined."""
        places = [work_path(self.out, f"shards-{digest[:12]}") for digest in self.digests]
        # Begun by a version whose digests were others, it goes on.
        return next((place for place in reversed(places) if place.is_dir()), places[0])

    def part(self, index: int) -> Path:
        """A finished part's folder."""
        return self.folder / f"{index:09d}"

    @property
    def own(self) -> list[int]:
        """Parts of this process that are still to be made."""
        mine = range(self.group.process, self.count, self.group.processes)
        return [index for index in mine if not self.part(index).exists()]

    @contextmanager
    def begun(self, refuse: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Around the work of every process; no other group of processes may be at it.

        Args:
            refuse: called by the main process once no other command is at work, raises where one has just made `out`.
        """
        if not self.any_name:
            require_utf8(place_of(self.out))
        self.group.wait()  # until every one has seen whether `out` was there
        with at_work(self.out, self.listener, any_name=self.any_name) if self.group.process == 0 else nullcontext():
            if self.group.process == 0:
                refuse()
                self.folder.mkdir(exist_ok=True)
            self.group.wait()
            if not self.folder.is_dir():
                raise LitconvertError(
                    f"process {self.group.process} does not see {self.folder}, which process 0 made; write to a file "
                    "system that all nodes share"
                )
            done = self.count - sum(not self.part(index).exists() for index in range(self.count))
            if done and self.group.process == 0:
                self.listener.note(f"goes on: {done} of {self.count} shards of {self.out} are there")
            yield

    def record_beside(self, files: Iterable[Path]) -> None:
        """Let the main process record which files are written beside `out`, before it writes them: the command that
        goes on may then replace them. `written_beside` gives them back."""
        names = [str(place_of(file)) for file in files]
        write_whole(self.folder / BESIDE, json.dumps({"files": names}) + "\n")

    def once(self, path: Path, make: Callable[[], None]) -> None:
        """Let the main process make a file in `folder` that all need. Every process calls it."""
        if self.group.process == 0 and not path.exists():
            make()
        _until(path.exists)
        self.group.wait()  # who is done first removes the folder: not before all have seen the file

    def task(self, name: str, total: int) -> Task:
        """The work of this process, of which the first one's is seen."""
        return (self.listener if self.group.process == 0 else SILENT).task(name, total)

    @contextmanager
    def make(self, index: int) -> Iterator[Path]:
        """The folder of a part to be written, whole or not at all. Raises LitconvertError where it cannot be."""
        try:
            with whole_directory(self.part(index)) as folder:
                yield folder
        except LitconvertError as error:
            if not str(error).startswith(start := f"cannot write {self.part(index)}"):
                raise
            # Where parts are is nobody's business: what cannot be written is the output.
            raise LitconvertError(f"cannot write {self.out}{str(error).removeprefix(start)}") from error

    def finish(self, join: Callable[[Sequence[Path]], None]) -> None:
        """Every process calls this last; the main one waits for all parts, joins them, and removes them."""
        if self.group.process != 0:
            _until(lambda: not self.folder.exists())
        else:
            parts = [self.part(index) for index in range(self.count)]
            _until(lambda: all(part.exists() for part in parts))
            join(parts)
            # Its own, and what interrupted runs of other inputs left.
            for folder in work_paths(self.out, "shards-"):
                shutil.rmtree(folder)
        self.group.wait()


def written_beside(folders: Iterable[Path]) -> set[Path]:
    """Files, by where they really are, that interrupted commands write beside an output with its parts in `folders`."""
    records = [folder / BESIDE for folder in folders]
    return {Path(name) for record in records if record.is_file() for name in read_json(record)["files"]}


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Say in a sentence why `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
