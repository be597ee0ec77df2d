"""Writing weights: safetensors tensor by tensor, unchanged bytes copied from file to file, shards above a size."""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.checkpoints.checkpoint import Extent
from litconvert.common.files import take_room
from litconvert.common.listener import UNSEEN, Task
from litconvert.common.tensors import SAFETENSORS_DTYPES, TensorInfo
from litconvert.errors import LitconvertError

Produce = Callable[[str], Tensor | Extent | Iterator[Tensor]]
Metadata = Mapping[str, str] | Callable[[], Mapping[str, str]]
# Room in the header for metadata that is known only after the last tensor.
METADATA_ROOM = 1024
# Neighbours in the source are copied together, up to about so many bytes.
RUN_BYTES = 1 << 28
PAGE_BYTES = 4096
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


@dataclass(frozen=True)
class LazyTensors:
    """Tensors whose values are asked for when they are written.

    Attributes:
        infos: header of every tensor, in the order of the file.
        produce: values by name: a tensor of that shape or pieces (n,) of it, row-major, which are cast to that dtype;
            or an extent that holds it in that dtype, which is copied from file to file.
    """

    infos: Mapping[str, TensorInfo]
    produce: Produce

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "LazyTensors":
        """Tensors in memory, as they are."""
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
        return cls(infos, state.__getitem__)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """What a safetensors file says of these tensors before their values, but for its length."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, info in self.infos.items():
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        return json.dumps(header, separators=(",", ":")).encode()


def write_safetensors(path: Path, tensors: LazyTensors, metadata: Metadata, *, task: Task = UNSEEN) -> None:
    """Write a safetensors file one tensor at a time, so that memory holds one at most; flushed to disk.

    Args:
        path: the file.
        tensors: what is written.
        metadata: strings for the header; a function is asked for them after the last tensor.
        task: advanced by one after each tensor.

    Raises LitconvertError when a file that is copied from became shorter meanwhile.
    """
    known = {} if callable(metadata) else metadata
    length = len(tensors.header(known)) + (METADATA_ROOM if callable(metadata) else 0)
    length += -length % 8
    first = tensors.produce(next(iter(tensors.infos))) if tensors.infos else None
    if isinstance(first, Extent) and first.offset % 8 == 0:
        # In step with the pages of the source, whose copying is then that of whole pages.
        length += (first.offset - 8 - length) % PAGE_BYTES
    with path.open("w+b", buffering=0) as file:
        descriptor = file.fileno()
        take_room(descriptor, 8 + length + tensors.nbytes)
        values = _Values(descriptor, 8 + length)
        for name, info in tensors.infos.items():
            # Not kept by a name here: it would be in memory beside the next one.
            values.append(name, info, tensors.produce(name) if first is None else first)
            first = None
            task.advance()
        values.copy_run()
        encoded = tensors.header(metadata() if callable(metadata) else metadata)
        assert len(encoded) <= length, "the metadata is longer than the room for it"
        _write(descriptor, memoryview(struct.pack("<Q", length) + encoded.ljust(length)), 0)
        os.fsync(descriptor)


class _Values:
    """The values of a file, written one after the other. Those that are copied wait for their neighbours.

    Args:
        descriptor: of the file.
        position: where the first value begins.
    """

    def __init__(self, descriptor: int, position: int) -> None:
        self.descriptor, self.position = descriptor, position
        self.run: Extent | None = None  # ends at `position` in the file that is written, and is yet to be copied

    def append(self, name: str, info: TensorInfo, value: Tensor | Extent | Iterator[Tensor]) -> None:
        """The next tensor's values."""
        if isinstance(value, Extent):
            assert (value.nbytes, value.dtype) == (info.nbytes, info.dtype), name
            if self.run is not None and self.run.followed_by(value) and self.run.nbytes < RUN_BYTES:
                self.run = replace(self.run, nbytes=self.run.nbytes + value.nbytes)
            else:
                self.copy_run()
                self.run = value
        else:
            self.copy_run()
            if isinstance(value, Tensor):
                assert tuple(value.shape) == info.shape, name
                value = iter([value.contiguous().view(-1)])
            _write_pieces(value, info, self.descriptor, self.position)
            _start_flushing(self.descriptor, self.position, info.nbytes)
        self.position += info.nbytes

    def copy_run(self) -> None:
        """Copy the neighbours that wait."""
        if self.run is not None:
            start = self.position - self.run.nbytes
            _copy(self.run, self.descriptor, start)
            _start_flushing(self.descriptor, start, self.run.nbytes)
            self.run = None


def _start_flushing(descriptor: int, position: int, nbytes: int) -> None:
    """Start writing to disk what is in memory, so that the flush at the end has little left to wait for."""
    with suppress(AttributeError, OSError):
        os.posix_fadvise(descriptor, position, nbytes, os.POSIX_FADV_DONTNEED)


def _write_pieces(pieces: Iterable[Tensor], info: TensorInfo, descriptor: int, position: int) -> None:
    """Write values (n,) one after the other, cast into one buffer: fresh memory costs more than the cast."""
    buffer, end = torch.empty(0, dtype=info.dtype), position + info.nbytes
    for piece in pieces:
        if piece.dtype != info.dtype:
            if len(buffer) < len(piece):
                buffer = torch.empty(len(piece), dtype=info.dtype)
            piece = buffer[: len(piece)].copy_(piece)
        data = piece.view(torch.uint8).numpy().data
        _write(descriptor, data, position)
        position += data.nbytes
    assert position == end


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _copy(extent: Extent, descriptor: int, position: int) -> None:
    """Copy bytes from file to file, inside the kernel where it can."""
    source, remaining = extent.offset, extent.nbytes
    with extent.path.open("rb", buffering=0) as file:
        in_kernel, buffer = hasattr(os, "copy_file_range"), memoryview(b"")
        while remaining:
            if in_kernel:
                try:
                    count = os.copy_file_range(file.fileno(), descriptor, remaining, source, position)
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    count = 0
                if count == 0:  # cannot, or (on some file systems) says it is at the end: reading tells
                    in_kernel = False
                    continue
            else:
                buffer = buffer or memoryview(bytearray(min(remaining, 1 << 22)))
                count = os.preadv(file.fileno(), [buffer[:remaining]], source)
                _write(descriptor, buffer[:count], position)
            if count == 0:
                raise LitconvertError(f"{extent.path} became shorter while it was read; restore it and try again")
            source, position, remaining = source + count, position + count, remaining - count


def write_weights(
    folder: Path, stem: str, tensors: LazyTensors, metadata: Metadata, *, max_shard_bytes: int, task: Task = UNSEEN
) -> list[Path]:
    """Write STEM.safetensors or, above `max_shard_bytes`, shards of at most that (or of one tensor) and their index.

    Names and index are those that diffusers reads. Arguments as of `write_safetensors`. Returns the files.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.infos.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, tensors, metadata, task=task)
        return [path]
    paths = [folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, LazyTensors(shard, tensors.produce), metadata, task=task)
    index = {
        "metadata": {"total_size": tensors.nbytes},
        "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths
