"""Writing weights: safetensors tensor by tensor, unchanged bytes copied from file to file, shards above a size."""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.checkpoints.checkpoint import Extent
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


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    produce: Produce,
    metadata: Metadata,
    *,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a safetensors file one tensor at a time, so that memory holds one at most; flushed to disk.

    Args:
        path: the file.
        tensors: header of every tensor, in the order of the file.
        produce: values by name: a tensor of that shape or pieces (n,) of it, row-major, which are cast to that dtype;
            or an extent that holds it in that dtype, which is copied from file to file.
        metadata: strings for the header; a function is asked for them after the last tensor.
        on_tensor: called after each tensor.

    Raises LitconvertError when a file that is copied from became shorter meanwhile.
    """

    def encode(strings: Mapping[str, str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(strings)}
        offset = 0
        for name, info in tensors.items():
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        return json.dumps(header, separators=(",", ":")).encode()

    length = len(encode({})) + METADATA_ROOM if callable(metadata) else len(encode(metadata))
    length += -length % 8
    first = produce(next(iter(tensors))) if tensors else None
    if isinstance(first, Extent) and first.offset % 8 == 0:
        # In step with the pages of the source, whose copying is then that of whole pages.
        length += (first.offset - 8 - length) % PAGE_BYTES
    total = 8 + length + sum(info.nbytes for info in tensors.values())
    with path.open("w+b", buffering=0) as file:
        descriptor = file.fileno()
        with suppress(AttributeError):  # not on every system
            try:
                # A full disk shows here, before anything is copied.
                os.posix_fallocate(descriptor, 0, total)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        position = 8 + length
        run: Extent | None = None  # ends at `position` in the file that is written, and is yet to be copied

        def copy_run() -> None:
            if run is not None:
                _copy(run, descriptor, position - run.nbytes)
                _start_flushing(descriptor, position - run.nbytes, run.nbytes)

        for name, info in tensors.items():
            value = produce(name) if first is None else first
            first = None
            if isinstance(value, Extent):
                assert (value.nbytes, value.dtype) == (info.nbytes, info.dtype), name
                if run is not None and run.followed_by(value) and run.nbytes < RUN_BYTES:
                    run = replace(run, nbytes=run.nbytes + value.nbytes)
                else:
                    copy_run()
                    run = value
            else:
                copy_run()
                run = None
                if isinstance(value, Tensor):
                    assert tuple(value.shape) == info.shape, name
                    value = iter([value.contiguous().view(-1)])
                _write_pieces(value, info, descriptor, position)
                _start_flushing(descriptor, position, info.nbytes)
            position += info.nbytes
            on_tensor(name)
        copy_run()
        encoded = encode(metadata() if callable(metadata) else metadata)
        assert len(encoded) <= length, "the metadata is longer than the room for it"
        _write(descriptor, memoryview(struct.pack("<Q", length) + encoded.ljust(length)), 0)
        os.fsync(descriptor)


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
    folder: Path,
    stem: str,
    tensors: Mapping[str, TensorInfo],
    produce: Produce,
    metadata: Metadata,
    *,
    max_shard_bytes: int,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Write STEM.safetensors or, above `max_shard_bytes`, shards of at most that (or of one tensor) and their index.

    Names and index are those that diffusers reads. Arguments as of `write_safetensors`. Returns the files.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, tensors, produce, metadata, on_tensor=on_tensor)
        return [path]
    paths = [folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, produce, metadata, on_tensor=on_tensor)
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
        "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths
