"""Any checkpoint as lazily read named tensors, and writing that appears whole or not at all."""

import argparse
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import reprlib
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.files import read_json

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

DTYPES_OF_SAFETENSORS = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

REMEDY = "Save the state dict alone: torch.save(model.state_dict(), path)"

# What a damaged pickle may ask to be read at once, before the file's own size is looked at.
READ_BYTES = 1 << 21

# What training scripts call their sets of weights.
_SETS = {"ema": "ema", "state_dict_ema": "ema", "model": "model", "state_dict": "state_dict"}

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "base_model.")

# Training scripts store their command line beside the weights; nothing else that is code is let in.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie: one run of a file, row-major, of that dtype."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype

    def followed_by(self, other: "Extent") -> bool:
        """Whether the other's bytes are the next ones of the same file."""
        return self.path == other.path and self.offset + self.nbytes == other.offset


@dataclass(frozen=True)
class Stored:
    """Tensors on disk.

    Attributes:
        files: that hold the weights.
        tensors: header of every tensor.
        read: values by name, mapped from disk where the format allows.
        extent: where the bytes of a tensor are, None where they are not one run of a file.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    extent: Callable[[str], Extent | None]

    def without_prefix(self, prefix: str) -> "Stored":
        """The same tensors, their names without what a wrapper put before them all."""
        return replace(
            self,
            tensors={name.removeprefix(prefix): info for name, info in self.tensors.items()},
            read=lambda name: self.read(prefix + name),
            extent=lambda name: self.extent(prefix + name),
        )


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one set of weights, read when asked for.

    Attributes:
        source: what the user named.
        config: config.json, where there is one.
        tensors: header of every tensor, wrapper prefixes removed.
        weights: which set of a training checkpoint this is (`ema`, `model`), or None where there is only one.
        sets: all sets the file holds.
        revision: commit of a Hub source.
        download_bytes: what has to be downloaded before a value can be read.
    """

    source: str
    config: dict[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    weights: str | None
    sets: tuple[str, ...]
    revision: str | None
    download_bytes: int
    _stored: Callable[[], Stored]

    def stored(self) -> Stored:
        """The tensors on disk. Of a Hub source this downloads them, once."""
        return self._stored()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights. Of a Hub source this downloads them, once."""
        return self._stored().files

    def read(self, name: str) -> Tensor:
        """One tensor's values; mapped from disk where the format allows."""
        try:
            tensor = self._stored().read(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise LitconvertError(
                f"{self.source}: cannot read {name!r}: {first_line(error)}; it may be damaged"
            ) from error
        if tensor.is_meta:
            raise LitconvertError(f"{self.source}: {name!r} has a shape but no values (saved from the meta device)")
        return tensor

    def extent(self, name: str) -> Extent | None:
        """Where a tensor's bytes are on disk, None where they are not one run of a file."""
        return self._stored().extent(name)

    def sha256(self) -> str:
        """Digest of the weight files, in order."""
        digest, buffer = hashlib.sha256(), bytearray(1 << 22)
        view = memoryview(buffer)
        for path in self.files:
            try:
                with path.open("rb") as file:
                    while count := file.readinto(buffer):
                        digest.update(view[:count])
            except OSError as error:
                raise LitconvertError(f"cannot read {path}: {system_cause(error) or error}") from error
        return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What went wrong inside a library, of which a damaged file may choose the words."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def open_checkpoint(
    source: str, *, file: str | None = None, weights: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint: headers only.

    Args:
        source: a file (.safetensors, .pt, .pth, .bin, .ckpt), a folder in diffusers' layout or with one weights file, a
            Hub id (`owner/name`, `owner/name@revision`), or `asset:NAME` for one that ships with litconvert.
        file: which file to read, in a folder or repository that holds several.
        weights: `ema`, `model`, or `auto` (EMA if present, else the only set).
        revision: of a Hub id.

    Raises LitconvertError for what cannot be read, and UsageError for what must be settled first.
    """
    path = Path(source)
    if source.startswith("asset:"):
        path = Path(__file__).parent / "assets" / f"{source.removeprefix('asset:')}.safetensors"
        if not path.is_file():
            known = sorted(f"asset:{asset.stem}" for asset in path.parent.glob("*.safetensors"))
            raise UsageError(f"{source}: no such asset; there are {', '.join(known)}")
    elif not os.path.exists(path):  # Path.exists raises for a name that is too long
        name, _, at = source.partition("@")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).suffix in WEIGHT_SUFFIXES:
            raise UsageError(f"{source}: no such file or folder, and not a Hub id (owner/name)")
        from litconvert.hub import open_hub_checkpoint

        return open_hub_checkpoint(source, name, revision or at or None, file, weights)
    config = None
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
    revision: str | None = None,
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
    return Checkpoint(source, config, stored.tensors, chosen, sets, revision, 0, lambda: stored)


def refuse_choice(source: str, weights: str) -> None:
    """Raise UsageError where a set of weights is asked for by name and there is only one."""
    if weights != "auto":
        raise UsageError(f"{source}: holds one set of weights, so weights={weights!r} cannot be chosen; leave it out")


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


def info_of_header(path: str, name: str, dtype: str, shape: Sequence[int]) -> TensorInfo:
    """A tensor's header, from safetensors' names.

    Raises LitconvertError for a dtype that is none of ours, and for a shape that is none.
    """
    if dtype not in DTYPES_OF_SAFETENSORS:
        raise LitconvertError(
            f"{path}: {name!r} is {dtype}, which litconvert does not read; use the unquantised checkpoint"
        )
    if not all(type(count) is int and 0 <= count < 1 << 63 for count in shape) or math.prod(shape) >= 1 << 59:
        raise LitconvertError(f"{path}: {name!r} has the shape {shape}, which cannot be; download the checkpoint again")
    return TensorInfo(tuple(shape), DTYPES_OF_SAFETENSORS[dtype])


class _BoundedReader(io.BufferedReader):
    """A file that makes no room for more than it holds, whatever length a damaged pickle announces."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > READ_BYTES:
            size = max(0, min(size, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def is_zip(file: IO[bytes]) -> bool:
    """Whether this is a checkpoint as torch writes it since 1.6; before, it was a bare pickle."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


def check_zip(path: str, file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """The entries of a checkpoint's zip, from its directory alone.

    Raises LitconvertError for one that would unpack to more than it holds, or whose entries are not within it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with _refusals(path), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size for one in entries):
            raise LitconvertError(f"{path}: a compressed zip, which torch.save does not write; unpack or save it again")
        if sum(entry.file_size for entry in entries) > size or not all(
            0 <= entry.header_offset <= size - 30 - len(entry.filename) - entry.file_size for entry in entries
        ):
            raise _damaged(path, "its directory names what lies outside it")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise _damaged(path, "two entries have one name")
        for entry in entries:
            # torch swaps the bytes of tensors without values too, and dies of it. It knows no case in names.
            if entry.filename.lower().endswith("/byteorder") and archive.read(entry) != b"little":
                raise LitconvertError(
                    f"{path}: written by a big-endian machine, or damaged; load it there, and save it as safetensors"
                )
    file.seek(0)
    return entries


def _damaged(path: str, reason: str) -> LitconvertError:
    return LitconvertError(
        f"{path}: not a complete PyTorch file ({reason}); it may be truncated or damaged: download it again"
    )


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Whatever reading a pickle or a zip raises, as a sentence."""
    try:
        yield
    except LitconvertError:
        raise
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL\s+([\w.]+)", str(error)):
            raise LitconvertError(
                f"{path}: holds code or objects ({found.group(1)}), not only tensors; refused and not run. {REMEDY}"
            ) from error
        raise LitconvertError(
            f"{path}: not a checkpoint that can be read safely; it may be damaged: download it again. {REMEDY}"
        ) from error
    except Exception as error:  # a damaged file raises whatever it leads to
        if isinstance(error, OSError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot read {path}: {cause}") from error
        if "TorchScript" in str(error):
            raise LitconvertError(f"{path}: a TorchScript program, not a state dict; refused and not run") from error
        raise _damaged(path, first_line(error)) from error


def load_pickle(path: str, file: IO[bytes] | Path, **options: Any) -> Any:
    """torch.load, weights only, of a file that may come from anywhere; a zip is checked by the caller.

    Raises LitconvertError for what is no checkpoint, is damaged, or holds code.
    """
    with (
        _refusals(path),
        warnings.catch_warnings(),
        torch.serialization.safe_globals(_SAFE_GLOBALS),
    ):
        # What torch warns of (old pickles, TorchScript) is read whole or refused.
        warnings.simplefilter("ignore")
        return torch.load(file, weights_only=True, **options)


def choose_set(
    source: str, path: str, content: Any, weights: str
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """The state dict in what a pickle holds, which set of a training checkpoint it is, and which there are.

    DiT's training checkpoints hold `ema` and `model`, PixArt's `state_dict_ema` and `state_dict`.
    """
    if not isinstance(content, dict):
        raise LitconvertError(f"{path}: holds a {type(content).__name__}, not a state dict. {REMEDY}")
    found = {name: content[key] for key, name in _SETS.items() if isinstance(content.get(key), dict)}
    if set(found) == {"state_dict"}:
        content, found = found["state_dict"], {}
    if "state_dict" in found:
        found["model"] = found.pop("state_dict")
    sets, chosen = tuple(name for name in ("ema", "model") if name in found), None
    if sets:
        chosen = sets[0] if weights == "auto" else weights
        if chosen not in sets:
            raise UsageError(
                f"{source}: has no {chosen!r} weights, only {', '.join(sets)}; choose with inherit.weights"
            )
        content = found[chosen]
    else:
        refuse_choice(source, weights)
    for name, value in content.items():
        if not isinstance(name, str):
            raise LitconvertError(
                f"{path}: has the key {reprlib.repr(name)}, not a name, so this is not a plain state dict. {REMEDY}"
            )
        if not isinstance(value, Tensor):
            raise LitconvertError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor, so this is not a plain state "
                f"dict. {REMEDY}"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise LitconvertError(f"{path}: {name!r} is sparse or quantised; use the plain checkpoint")
    return content, chosen, sets


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
    with _refusals(str(path)), _BoundedReader(io.FileIO(path)) as file:
        zipped = is_zip(file)
        records = _records(str(path), file, check_zip(str(path), file)) if zipped else {}
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


def _records(path: str, file: IO[bytes], entries: Sequence[zipfile.ZipInfo]) -> dict[int, int]:
    """Where the bytes of each entry of a zip begin, and how many they are.

    Raises LitconvertError where the headers before the entries are not those that the zip's directory promises.
    """
    size = file.seek(0, os.SEEK_END)
    records = {}
    starts = sorted(entry.header_offset for entry in entries)
    end_of = dict(zip(starts, [*starts[1:], size], strict=True))
    for entry in entries:
        file.seek(entry.header_offset)
        magic, flags, method, name_length, extra_length = struct.unpack("<4s2xHH16xHH", file.read(30))
        name = file.read(name_length)
        begin = entry.header_offset + 30 + name_length + extra_length
        end = begin + entry.file_size
        whole = magic == b"PK\x03\x04" and method == 0 and name == entry.orig_filename.encode()
        if whole and end <= end_of[entry.header_offset]:
            file.seek(end)
            # The sizes that follow the bytes: where they are not, a length before the bytes was wrong.
            whole = not flags & 8 or file.read(4) == b"PK\x07\x08"
        if not whole or end > end_of[entry.header_offset]:
            raise _damaged(path, f"{entry.filename} is not where its directory says")
        if entry.file_size:
            records[begin] = entry.file_size
    return records


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
        raise _damaged(str(path), f"{name!r} is larger than what is stored of it")
    return Extent(path, offset + start, nbytes, tensor.dtype)


def wrapper_prefix(names: Mapping[str, Any]) -> str:
    """What DDP, torch.compile and trainers put before every key."""
    prefix = ""
    while names and (
        found := next((one for one in WRAPPER_PREFIXES if all(name.startswith(prefix + one) for name in names)), None)
    ):
        prefix += found
    return prefix


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
