"""Files of weights on this machine, safetensors and pickles: their headers, and their values mapped from disk."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from litconvert.checkpoints.checkpoint import Extent
from litconvert.checkpoints.kinds import kind_of_file
from litconvert.checkpoints.pickles import (
    BoundedReader,
    check_zip,
    damaged,
    first_line,
    is_zip,
    load_pickle,
    records_of,
    refusals,
    tensors_of,
)
from litconvert.checkpoints.sets import Header
from litconvert.common.files import require_utf8
from litconvert.common.tensors import TensorInfo, check_dtype, info_of_header
from litconvert.errors import LitconvertError, system_cause


class WeightsFile(Protocol):
    """A file of named tensors.

    Attributes:
        path: where it is.
        headers: of every tensor, by its name in the file, as `choose` wants them.
        tensors: of those that are settled.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, Header]

    def settle(self, names: Sequence[str]) -> None:
        """See to it that these can be read. Raises LitconvertError where one cannot."""

    def read(self, name: str) -> Tensor:
        """A tensor's values, mapped from disk where the format allows."""

    def extent(self, name: str) -> Extent | None:
        """Where a tensor's bytes are, None where they are not one run of the file."""


def open_weights(path: Path) -> WeightsFile:
    """Open a file of whichever kind its bytes say. Raises LitconvertError for what is none, or is damaged."""
    require_utf8(path)
    kind = kind_of_file(path)
    if kind == "index":
        raise LitconvertError(f"{path}: a JSON file, which holds no weights; give the file or the folder that does")
    return SafetensorsFile(path) if kind == "safetensors" else PickleFile(path)


class _Mapped:
    """Files in the address space: private, not in memory before they are read, and each mapped once."""

    def __init__(self) -> None:
        self._storages: dict[tuple[Path, int, int, int], Any] = {}

    def __call__(self, extent: Extent) -> Any:
        """The storage of an extent's bytes. A file that changed is mapped again.

        Raises OSError when the file no longer reaches that far: reading on would end the process.
        """
        status = extent.path.stat()
        if extent.offset + extent.nbytes > status.st_size:
            raise OSError(f"{extent.path} became shorter")
        key = (extent.path, status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in self._storages:
            path = str(extent.path)
            self._storages[key] = torch.UntypedStorage.from_file(path, shared=False, nbytes=status.st_size)
        return self._storages[key][extent.offset : extent.offset + extent.nbytes]


def read_extent(mapped: _Mapped, extent: Extent, info: TensorInfo, stride: tuple[int, ...] | None = None) -> Tensor:
    """The tensor whose bytes are there, mapped from disk."""
    if extent.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    piece = mapped(extent)
    if extent.offset % info.dtype.itemsize:  # arithmetic wants aligned values: these few are read
        piece = piece.clone()
    empty: Any = torch.empty(0, dtype=info.dtype)
    strides = torch.empty(info.shape, device="meta").stride() if stride is None else stride
    tensor: Tensor = empty.set_(piece, 0, info.shape, strides)
    return tensor


class SafetensorsFile:
    """A file in safetensors' format. Raises LitconvertError for one that is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            # The library checks that the header is whole and that its offsets leave no gap and no overlap.
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                header = json.loads(file.read(length))
            entries = {
                name: (header[name]["dtype"], header[name]["shape"], header[name]["data_offsets"]) for name in names
            }
        except Exception as error:  # a damaged header leads to whatever it leads to
            if cause := system_cause(error):
                raise LitconvertError(f"cannot read {path}: {cause}") from error
            raise LitconvertError(
                f"{path}: not a complete safetensors file ({first_line(error)}); it may be truncated: download it again"
            ) from error
        self.path = path
        self._entries = entries
        self.tensors: Mapping[str, TensorInfo] = {}
        self.headers: Mapping[str, Header] = {name: Header(tuple(shape)) for name, (_, shape, _) in entries.items()}
        self._starts = {name: 8 + length + start for name, (_, _, (start, _)) in entries.items()}
        self._mapped = _Mapped()

    def settle(self, names: Sequence[str]) -> None:
        """Look at the dtypes: what is set aside may have one that is not read."""
        given = {name: self._entries[name] for name in names}
        self.tensors = {
            name: info_of_header(str(self.path), name, dtype, shape) for name, (dtype, shape, _) in given.items()
        }

    def read(self, name: str) -> Tensor:
        return read_extent(self._mapped, self.extent(name), self.tensors[name])

    def extent(self, name: str) -> Extent:
        info = self.tensors[name]
        return Extent(self.path, self._starts[name], info.nbytes, info.dtype)


class PickleFile:
    """A file that torch.save wrote. Raises LitconvertError for one that is damaged, or holds code."""

    def __init__(self, path: Path) -> None:
        self.path, self._mapped = path, _Mapped()
        self._places: dict[str, Extent] = {}
        with refusals(str(path)), BoundedReader(io.FileIO(path)) as file:
            self._zipped = is_zip(file)
            self._records = records_of(str(path), file, check_zip(str(path), file)) if self._zipped else {}
            file.seek(0)
            content = load_pickle(str(path), file, map_location="meta" if self._zipped else "cpu")
        self.headers: Mapping[str, Header]
        self._state, self.headers = tensors_of(str(path), content)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(one.shape), one.dtype) for name, one in self._state.items()
        }

    def settle(self, names: Sequence[str]) -> None:
        """Find where the values of these are."""
        if special := next((name for name in names if _is_special(self._state[name])), None):
            raise LitconvertError(f"{self.path}: {special!r} is sparse or quantised; use the plain checkpoint")
        for name in names:
            check_dtype(str(self.path), name, self.tensors[name].dtype)
        places: dict[str, Extent | None] = {}
        if self._zipped:
            places = {name: _place(self.path, name, self._state[name], self._records) for name in names}
        if any(place is None for place in places.values()):
            # Not as torch writes it, or tensors without values: read by torch alone, which knows every form.
            content = load_pickle(str(self.path), self.path, map_location="cpu", mmap=True)
            self._state, places = tensors_of(str(self.path), content)[0], {}
        self._places = {name: place for name, place in places.items() if place is not None}
        size = self.path.stat().st_size
        for name in names:
            # Strides of 0 make any number of values of a few bytes, which would take for ever to check.
            if self.tensors[name].nbytes > size and (name in self._places or not self._state[name].is_meta):
                raise LitconvertError(
                    f"{self.path}: {name!r} is a view of more values than the file holds; save plain tensors"
                )

    def read(self, name: str) -> Tensor:
        place, value = self._places.get(name), self._state[name]
        if place is None:
            return value.detach()
        return read_extent(self._mapped, place, self.tensors[name], value.stride())

    def extent(self, name: str) -> Extent | None:
        return self._places.get(name) if self._state[name].is_contiguous() else None


def _is_special(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized


def _place(path: Path, name: str, tensor: Tensor, records: Mapping[int, int]) -> Extent | None:
    """Where a tensor's values are, from the offset that torch notes on a storage it did not load.

    None when no entry of the zip begins there, or the values are not as they are stored (negated views).

    Raises LitconvertError when the tensor does not lie within its entry.
    """
    if tensor.numel() == 0:
        return Extent(path, 0, 0, tensor.dtype)
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or offset not in records or tensor.is_neg() or tensor.is_conj():
        return None
    # From the first to the last element, in whatever order the strides visit them.
    span = 1 + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, nbytes = tensor.storage_offset() * tensor.dtype.itemsize, span * tensor.dtype.itemsize
    if start + nbytes > records[offset]:
        raise damaged(str(path), f"{name!r} is larger than what is stored of it")
    return Extent(path, offset + start, nbytes, tensor.dtype)
