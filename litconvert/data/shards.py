"""Data sets that several processes write shard by shard; interrupted, the same command goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litconvert.common.files import require_space, write_whole
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import (
    DATA_SET,
    contents,
    is_unfinished,
    refuse_foreign,
    refuse_stranger,
    whole_directory,
)
from litconvert.data.dataset import (
    DATA_RECORD,
    ConditionKind,
    features_of,
    quiet_datasets,
    read_record,
    record_text,
)
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.inputs import Inputs
from litconvert.sampling.parts import Group, Parts


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


class Assembly(Parts):
    """A data set in the making.

    Args:
        out: the finished data set.
        inputs: what determines it.
        count: of shards.
        group: the processes.
        listener: hears what the first process has to say.
        force: replace an `out` that was made from other inputs.
    """

    any_name = False

    def __init__(
        self,
        out: Path,
        inputs: Inputs,
        count: int,
        group: Group,
        listener: Listener = SILENT,
        *,
        force: bool = False,
    ) -> None:
        digests = [inputs.digest, *([inputs.first_digest] if inputs.first_digest else [])]
        super().__init__(out, digests, count, group, listener)
        self.inputs, self.force = inputs, force

    @contextmanager
    def begun(self, refuse: Callable[[], object] | None = None) -> Iterator[None]:
        """As `Parts.begun`; what another command has just made is refused."""
        with super().begun(refuse or (lambda: is_finished(self.out, self.inputs, force=self.force))):
            yield

    def join(self, facts: Callable[[Sequence[Path]], Mapping[str, Any]], extra: Callable[[Path], None]) -> Path:
        """Every process calls this last; the main one waits for the shards and makes them one data set.

        Args:
            facts: for the record, given the shards.
            extra: writes what else belongs into the data set's folder.

        Raises UsageError when no shard holds a sample, LitconvertError when the disk has no room for a second copy.
        """
        self.finish(lambda shards: self._join(shards, facts(shards), extra))
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
