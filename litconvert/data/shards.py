"""Data sets that several processes write shard by shard; interrupted, the same command goes on."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from litconvert.common.files import require_space, require_utf8, write_whole
from litconvert.common.listener import SILENT, Listener, Task
from litconvert.common.outputs import (
    DATA_SET,
    at_work,
    contents,
    is_unfinished,
    place_of,
    refuse_foreign,
    refuse_stranger,
    whole_directory,
    work_path,
    work_paths,
)
from litconvert.data.dataset import (
    DATA_RECORD,
    ConditionKind,
    features_of,
    quiet_datasets,
    read_record,
    record_text,
)
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.recipe.inputs import Inputs


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


def is_finished(out: Path, inputs: Inputs, *, force: bool, remake: bool = False) -> bool:
    """Whether `out` is the data set of these inputs already, and is not to be made again.

    Raises LitconvertError when something else is there; not even `force` replaces what is no data set of ours.
    """
    if not out.exists() or (out.is_dir() and not contents(out)):
        return False
    if out.is_dir() and is_unfinished(out):
        refuse_foreign(out, DATA_SET)
        return False
    found = read_record(out)
    if found.get("digest") is None:
        refuse_stranger(out, "a data set")
    if inputs.made(found) and not remake:
        return True
    refuse_foreign(out, DATA_SET)
    if force:
        return False
    raise LitconvertError(
        f"{out} exists and was made from other inputs ({inputs.changes(found)}); choose another path, or replace it "
        "with --force"
    )


class ShardWriter:
    """Writes the samples of a shard, each bucket to a file of its own.

    Args:
        folder: of the shard.
        dtype: of `latent` and `latent_flipped`.
    """

    def __init__(self, folder: Path, condition: ConditionKind, dtype: str) -> None:
        self.folder, self.condition, self.dtype = folder, condition, dtype
        self._writers: dict[str, Any] = {}

    def write(self, columns: Mapping[str, Any]) -> None:
        """Samples of one shape; `latent` and `latent_flipped` are arrays (N, C, H, W)."""
        from datasets.arrow_writer import ArrowWriter

        shapes = {name: columns[name].shape[1:] for name in ("latent", "latent_flipped") if name in columns}
        bucket = "{}x{}".format(*shapes["latent"][1:])
        if bucket not in self._writers:
            features = features_of({name: (shape, self.dtype) for name, shape in shapes.items()}, self.condition)
            self._writers[bucket] = ArrowWriter(path=str(self.folder / f"{bucket}.arrow"), features=features)
        self._writers[bucket].write_batch({name: list(values) for name, values in columns.items()})

    def close(self) -> None:
        """Write what is left."""
        for writer in self._writers.values():
            writer.finalize()


@contextmanager
def shard_writer(folder: Path, condition: ConditionKind, dtype: str) -> Iterator[ShardWriter]:
    """A writer that is closed when the block ends well."""
    quiet_datasets()
    writer = ShardWriter(folder, condition, dtype)
    yield writer
    writer.close()


def _until(done: Callable[[], bool]) -> None:
    """Wait for other processes' files. Not a barrier: its timeout would be shorter than a shard may take.

    A process that fails ends the others too, which the launcher sees to.
    """
    while not done():
        time.sleep(0.2)


@dataclass(frozen=True)
class Assembly:
    """A data set in the making.

    Attributes:
        out: the finished data set.
        inputs: what determines it.
        shards: how many; shard i is that of process i modulo their number.
        group: the processes.
        listener: hears what the first process has to say.
        force: replace an `out` that was made from other inputs.
    """

    out: Path
    inputs: Inputs
    shards: int
    group: Group
    listener: Listener = SILENT
    force: bool = False

    @cached_property
    def folder(self) -> Path:
        """Where the shards are until they are joined."""
        made, first = (
            work_path(self.out, f"shards-{digest[:12]}")
            for digest in (self.inputs.digest, self.inputs.first_digest or self.inputs.digest)
        )
        # Begun by a version whose digests were others, it goes on.
        return first if first.is_dir() else made

    def shard(self, index: int) -> Path:
        """A finished shard's folder."""
        return self.folder / f"{index:09d}"

    @property
    def own(self) -> list[int]:
        """Shards of this process that are still to be made."""
        mine = range(self.group.process, self.shards, self.group.processes)
        return [index for index in mine if not self.shard(index).exists()]

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Around the work of every process; no other group of processes may be at it."""
        require_utf8(place_of(self.out))
        self.group.wait()  # until every one has seen whether `out` was there
        with at_work(self.out, self.listener) if self.group.process == 0 else nullcontext():
            if self.group.process == 0:
                is_finished(self.out, self.inputs, force=self.force)  # refuses what another command has just made
                self.folder.mkdir(exist_ok=True)
            self.group.wait()
            if not self.folder.is_dir():
                raise LitconvertError(
                    f"process {self.group.process} does not see {self.folder}, which process 0 made; write to a file "
                    "system that all nodes share"
                )
            done = self.shards - sum(not self.shard(index).exists() for index in range(self.shards))
            if done and self.group.process == 0:
                self.listener.note(f"goes on: {done} of {self.shards} shards of {self.out} are there")
            yield

    def once(self, path: Path, make: Callable[[], None]) -> None:
        """Let the main process make a file in `folder` that all need."""
        if self.group.process == 0 and not path.exists():
            make()
        _until(path.exists)

    def task(self, name: str, total: int) -> Task:
        """The work of this process, of which the first one's is seen."""
        return (self.listener if self.group.process == 0 else SILENT).task(name, total)

    def make(self, index: int) -> AbstractContextManager[Path]:
        """The folder of a shard to be written, whole or not at all."""
        return whole_directory(self.shard(index))

    def join(self, facts: Callable[[Sequence[Path]], Mapping[str, Any]], extra: Callable[[Path], None]) -> Path:
        """Every process calls this last; the main one waits for the shards and makes them one data set.

        Args:
            facts: for the record, given the shards.
            extra: writes what else belongs into the data set's folder.

        Raises UsageError when no shard holds a sample, LitconvertError when the disk has no room for a second copy.
        """
        if self.group.process != 0:
            _until(lambda: not self.folder.exists())
        else:
            shards = [self.shard(index) for index in range(self.shards)]
            _until(lambda: all(shard.exists() for shard in shards))
            self._join(shards, facts(shards), extra)
            # Its own, and what interrupted runs of other inputs left.
            for folder in work_paths(self.out, "shards-"):
                shutil.rmtree(folder)
        self.group.wait()
        return self.out

    def _join(self, shards: Sequence[Path], facts: Mapping[str, Any], extra: Callable[[Path], None]) -> None:
        from datasets import Dataset, concatenate_datasets

        found = {path.stem for shard in shards for path in shard.glob("*.arrow")}
        buckets = sorted(found, key=lambda name: [int(side) for side in name.split("x")])
        if not buckets:
            raise UsageError("there is no sample to write: the source is empty")
        samples = 0
        require_space(self.out, sum(file.stat().st_size for shard in shards for file in shard.glob("*.arrow")))
        with whole_directory(self.out, DATA_SET) as folder:
            for bucket in buckets:
                files = [file for shard in shards if (file := shard / f"{bucket}.arrow").exists()]
                data = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
                target = folder if len(buckets) == 1 else folder / bucket
                data.save_to_disk(str(target), num_shards=len(files))
                samples += len(data)
            extra(folder)
            some = {} if len(buckets) == 1 else {"buckets": buckets}
            write_whole(folder / DATA_RECORD, record_text(self.inputs.record, samples, **facts, **some))


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Say in a sentence why `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
