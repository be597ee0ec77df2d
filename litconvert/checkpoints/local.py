"""Checkpoints on this machine: folders, safetensors, pickles, shards."""

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from litconvert.checkpoints.checkpoint import RUN_INDEX, Checkpoint, Extent, Stored, wrapper_prefix
from litconvert.checkpoints.pickles import (
    BoundedReader,
    check_zip,
    choose_set,
    damaged,
    first_line,
    is_zip,
    load_pickle,
    records_of,
    refusals,
    refuse_choice,
)
from litconvert.common.files import read_json
from litconvert.common.hub import WEIGHT_SUFFIXES
from litconvert.common.tensors import TensorInfo, info_of_header
from litconvert.errors import LitconvertError, UsageError, system_cause


def open_local(source: str, path: Path, *, file: str | None = None, weights: str = "auto") -> Checkpoint:
    """Open a checkpoint on this machine: headers only. Arguments as of `open_checkpoint`, `path` is where it is."""
    config = None
    if path.is_dir() and (path / RUN_INDEX).is_file():
        return _open_run_checkpoint(source, path, weights)
    if path.is_dir():
        files, config = _files_of_folder(path, file)
    else:
        files = [path]
        if file is not None and path.name != Path(file).name:
            raise UsageError(f"{source}: is a file, so source.file={file!r} cannot be chosen from it; leave it out")
        config = _config_beside(path)
        if not path.is_file():
            raise UsageError(
                f"{source}: a device or a pipe, which cannot be mapped; save the checkpoint to a file first"
            )
    return open_files(source, files, config, weights=weights)


def open_files(
    source: str,
    files: Sequence[Path],
    config: dict[str, Any] | None,
    *,
    weights: str = "auto",
) -> Checkpoint:
    """Open weight files, shards of one checkpoint or a single one: headers only. Arguments as of `open_checkpoint`."""
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    if all(one.suffix == ".safetensors" for one in files):
        stored = _open_safetensors(files)
        refuse_choice(source, weights)
    else:
        stored, chosen, sets = _open_pickles(source, files, weights)
    prefix = wrapper_prefix(stored.tensors)
    stored = stored.without_prefix(prefix)
    if not stored.tensors:
        raise LitconvertError(f"{source}: holds no tensors")
    return Checkpoint(source, config, stored.tensors, chosen, sets, None, 0, lambda: stored)


def _open_run_checkpoint(source: str, folder: Path, weights: str) -> Checkpoint:
    """A checkpoint that a run of `distill` or `train` wrote."""
    from litconvert.checkpoints.distributed import SETS, open_run_checkpoint, weight_files  # most of a second

    if not (folder / "config.json").is_file():
        raise LitconvertError(
            f"{source}: a checkpoint of litconvert 0.1's first runs, which do not say what model they hold; run the "
            "same `litconvert distill` again: it goes on, and its next checkpoint is one that can be used"
        )
    found, read, chosen = open_run_checkpoint(folder, weights)
    tensors = {name: TensorInfo(shape, dtype) for name, (shape, dtype) in found.items()}
    stored = Stored(weight_files(folder), tensors, read, lambda name: None)
    config = read_json(folder / "config.json")
    return Checkpoint(source, config, tensors, chosen, SETS, None, 0, lambda: stored)


def _files_of_folder(folder: Path, file: str | None) -> tuple[list[Path], dict[str, Any] | None]:
    """The weight files of a folder in diffusers' layout, or its one weights file; and config.json."""
    if file is None and (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if file is not None:
        if not os.path.isfile(folder / file):
            raise UsageError(f"{folder}: holds no file {file!r}")
        return [folder / file], _config_beside(folder / file) or config
    for stem in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _files_of_index(index), config
        if (folder / stem).is_file():
            return [folder / stem], config
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(found) == 1:
        return found, config
    if not found:
        raise UsageError(
            f"{folder}: holds no weights ({', '.join(WEIGHT_SUFFIXES)}); give the folder or file that does"
        )
    names = ", ".join(path.name for path in found)
    raise UsageError(f"{folder}: holds several weight files ({names}); choose one with --set source.file=NAME")


def _config_beside(file: Path) -> dict[str, Any] | None:
    """config.json beside a weights file that is named as diffusers names them, to which it belongs."""
    beside = file.with_name("config.json")
    return read_json(beside) if file.name.startswith("diffusion_pytorch_model.") and beside.is_file() else None


def shards_of_index(index: Path) -> list[str]:
    """The shards that an index names, all of them beside it.

    Raises LitconvertError for what is no index, and for one that names anything else.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise LitconvertError(f"{index}: has no weight_map of tensor to file; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        # A shard index comes from outside: it may not make us read anything beside it.
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise LitconvertError(f"{index}: names {name[:80]!r}, which is outside its folder; refused")
    return names


def _files_of_index(index: Path) -> list[Path]:
    files = [index.parent / name for name in shards_of_index(index)]
    for file in files:
        if not os.path.isfile(file):
            raise LitconvertError(f"{index}: names the shard {file.name[:80]}, which is missing; download it again")
    return files


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


def _open_safetensors(files: Sequence[Path]) -> Stored:
    tensors: dict[str, TensorInfo] = {}
    extents: dict[str, Extent] = {}
    for path in files:
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
        for name, (dtype, shape, (start, _)) in entries.items():
            info = info_of_header(str(path), name, dtype, shape)
            if name in tensors:
                raise LitconvertError(f"{path}: {name!r} is in two shards; download the checkpoint again")
            tensors[name] = info
            extents[name] = Extent(path, 8 + length + start, info.nbytes, info.dtype)
    mapped = _Mapped()

    def read(name: str) -> Tensor:
        return read_extent(mapped, extents[name], tensors[name])

    return Stored(tuple(files), tensors, read, extents.__getitem__)


def _open_pickles(source: str, files: Sequence[Path], weights: str) -> tuple[Stored, str | None, tuple[str, ...]]:
    shards: dict[str, Stored] = {}
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    for path in files:
        shard, chosen, sets = _open_pickle(source, path, weights)
        for name in shard.tensors:
            if name in shards:
                raise LitconvertError(f"{path}: {name!r} is in two shards; download the checkpoint again")
            shards[name] = shard
    stored = Stored(
        tuple(files),
        {name: shard.tensors[name] for name, shard in shards.items()},
        lambda name: shards[name].read(name),
        lambda name: shards[name].extent(name),
    )
    return stored, chosen, sets


def _open_pickle(source: str, path: Path, weights: str) -> tuple[Stored, str | None, tuple[str, ...]]:
    with refusals(str(path)), BoundedReader(io.FileIO(path)) as file:
        zipped = is_zip(file)
        records = records_of(str(path), file, check_zip(str(path), file)) if zipped else {}
        file.seek(0)
        content = load_pickle(str(path), file, map_location="meta" if zipped else "cpu")
    state, chosen, sets = choose_set(source, str(path), content, weights)
    places = {name: _place(path, name, value, records) for name, value in state.items()} if zipped else {}
    if zipped and any(place is None for place in places.values()):
        # Not as torch writes it, or tensors without values: read by torch alone, which knows every form.
        content = load_pickle(str(path), path, map_location="cpu", mmap=True)
        state, chosen, sets = choose_set(source, str(path), content, weights)
        places = {}
    tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
    size = path.stat().st_size
    for name, info in tensors.items():
        # Strides of 0 make any number of values of a few bytes, which would take for ever to check.
        if info.nbytes > size and (name in places or not state[name].is_meta):
            raise LitconvertError(f"{path}: {name!r} is a view of more values than the file holds; save plain tensors")

    mapped = _Mapped()

    def read(name: str) -> Tensor:
        place, value = places.get(name), state[name]
        return value.detach() if place is None else read_extent(mapped, place, tensors[name], value.stride())

    def extent(name: str) -> Extent | None:
        return places.get(name) if state[name].is_contiguous() else None

    return Stored((path,), tensors, read, extent), chosen, sets


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
