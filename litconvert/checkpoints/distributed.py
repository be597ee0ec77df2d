"""Checkpoints of runs: PyTorch's distributed format, written by any number of processes, read as named tensors.

The format's index is a pickle. It is read with the classes of an index alone allowed, so that a run that came from
somebody else cannot run code; the tensors themselves are read weights-only by torch.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from litconvert.errors import LitconvertError, UsageError, system_cause

INDEX = ".metadata"
SETS = ("ema", "model")
# What an index is made of. torch's dtypes are objects of the module torch, which a pickle names like classes.
CLASSES = {
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
    "collections": ("OrderedDict",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}  # fmt: skip


class _IndexUnpickler(pickle._Unpickler):
    """Reads an index, and refuses anything else that is in it by name.

    Python's own reader in Python, since that in C cannot be kept from setting attributes of the classes it is allowed:
    an index could change what a path means in the whole process.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise LitconvertError(f"holds code or objects ({module}.{name}), not only an index; refused and not run")

    def load_build(self) -> None:
        """Set the attributes of an object: of an index's own ones alone."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if not type(target).__module__.startswith("torch.distributed.checkpoint.") or isinstance(target, Enum):
            raise LitconvertError(f"changes {target!r}, not only an index; refused and not run")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


@contextmanager
def own_failures() -> Iterator[None]:
    """What went wrong in a process, in the place of torch's summary of it, which no `except Exception` catches."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without torch's warning that there is no process group: a run of one process has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint's folder, which reads the index once, and safely.

    Raises LitconvertError for an index that is damaged, or that names files outside its folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = self._read_index()
        self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index

    def _read_index(self) -> Metadata:
        try:
            with (self.folder / INDEX).open("rb") as file:
                index = _IndexUnpickler(file).load()
        except LitconvertError as error:
            raise LitconvertError(f"{self.folder / INDEX}: {error}") from error
        except Exception as error:  # a damaged pickle raises whatever it leads to
            reason = system_cause(error) or f"not the index of a checkpoint ({type(error).__name__})"
            raise self.damaged(reason) from error
        tables = (getattr(index, "storage_data", None), getattr(index, "state_dict_metadata", None))
        if not isinstance(index, Metadata) or not all(isinstance(table, dict) for table in tables):
            raise self.damaged("not the index of a checkpoint")
        for key, stored in index.storage_data.items():
            name, length = getattr(stored, "relative_path", None), getattr(stored, "length", None)
            if not isinstance(key, MetadataIndex) or type(name) is not str or type(length) is not int:
                raise self.damaged("not the index of a checkpoint")
            if os.path.basename(name) != name or not name.endswith(".distcp"):
                raise LitconvertError(f"{self.folder / INDEX}: names {name[:80]!r}, which is no part of it; refused")
        return index

    def damaged(self, reason: str) -> LitconvertError:
        """The error for a checkpoint that cannot be read."""
        return LitconvertError(
            f"{self.folder}: the checkpoint cannot be read ({reason}); remove it to go on from the one before"
        )

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shapes and dtypes of all tensors."""
        found = self.read_metadata().state_dict_metadata
        return {name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)}

    def check_sizes(self) -> None:
        """Raise LitconvertError where less is stored of a tensor than its shape says, for which room would be made."""
        stored: dict[str, int] = {}
        for index, piece in self.read_metadata().storage_data.items():
            stored[index.fqn] = stored.get(index.fqn, 0) + piece.length
        for name, info in self.tensors().items():
            nbytes = info.size.numel() * info.properties.dtype.itemsize
            if nbytes > stored.get(name, 0):
                raise self.damaged(f"{name!r} is larger than what is stored of it")


def write_tensors(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Write tensors, whole or sharded, into a folder; every process its own part."""
    with _alone_on_purpose(), own_failures():
        save(tensors, checkpoint_id=str(folder), no_dist=alone)


def read_tensors(reader: CheckpointReader, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Read into tensors that are whole or sharded, whatever they were when they were written.

    Raises LitconvertError for a checkpoint that is damaged.
    """
    try:
        with _alone_on_purpose(), own_failures():
            load(tensors, storage_reader=reader, no_dist=alone)
    except LitconvertError:
        raise
    except Exception as error:  # torch reports a damaged file in many ways
        raise reader.damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def open_run_checkpoint(
    folder: Path, weights: str
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Callable[[str], Tensor], str]:
    """The model in a run's checkpoint: shape and dtype of each tensor, how to read one, and which set that is.

    Args:
        weights: `ema`: the moving average where a tensor is trained, and its value where it is not; `model`: the raw
            weights, as training goes on from them; `auto`: the average.

    Raises LitconvertError for a checkpoint that is damaged or is another program's, UsageError for another set.
    """
    if weights not in ("auto", *SETS):
        raise UsageError(f"{folder}: a checkpoint holds the sets {' and '.join(SETS)}, not {weights!r}")
    chosen, reader = "ema" if weights == "auto" else weights, CheckpointReader(folder)
    infos = reader.tensors()
    if not any(name.startswith("model/") for name in infos):
        raise LitconvertError(f"{folder}: a distributed checkpoint of another program; save its weights as safetensors")
    reader.check_sizes()
    keys = {name.removeprefix("model/"): name for name in infos if name.startswith("model/")}
    if chosen == "ema":
        keys |= {name.removeprefix("ema/"): name for name in infos if name.startswith("ema/")}
    tensors = {name: (tuple(infos[key].size), infos[key].properties.dtype) for name, key in keys.items()}
    return tensors, partial(_read_one, reader, keys, tensors), chosen


def _read_one(
    reader: CheckpointReader,
    keys: Mapping[str, str],
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    name: str,
) -> Tensor:
    shape, dtype = tensors[name]
    value = torch.empty(shape, dtype=dtype)
    read_tensors(reader, {keys[name]: value}, alone=True)
    return value


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint that hold its tensors, the index first."""
    return (folder / INDEX, *sorted(folder.glob("*.distcp")))
