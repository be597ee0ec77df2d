"""Any checkpoint as lazily read named tensors, and writing that appears whole or not at all."""

import argparse
import hashlib
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
class Checkpoint:
    """Named tensors of one set of weights, read when asked for.

    Attributes:
        source: what the user named.
        files: the files that hold the weights.
        config: config.json, where there is one.
        tensors: header of every tensor, wrapper prefixes removed.
        weights: which set of a training checkpoint this is (`ema`, `model`), or None where there is only one.
        sets: all sets the file holds.
        revision: commit of a Hub source.
    """

    source: str
    files: tuple[Path, ...]
    config: dict[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    weights: str | None
    sets: tuple[str, ...]
    revision: str | None
    _read: Callable[[str], Tensor]

    def read(self, name: str) -> Tensor:
        """One tensor's values; mapped from disk where the format allows."""
        try:
            tensor = self._read(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise LitconvertError(f"{self.source}: cannot read {name!r}: {error}; the file may be damaged") from error
        if tensor.is_meta:
            raise LitconvertError(f"{self.source}: {name!r} has a shape but no values (saved from the meta device)")
        return tensor

    def sha256(self) -> str:
        """Digest of the weight files, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


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
    elif not path.exists():
        name, _, at = source.partition("@")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).suffix in WEIGHT_SUFFIXES:
            raise UsageError(f"{source}: no such file or folder, and not a Hub id (owner/name)")
        from litconvert.hub import download_weights

        path, revision = download_weights(name, revision or at or None, file)
    config = None
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    if path.is_dir():
        files, config = _files_of_folder(path, file)
    else:
        files = [path]
        if file is not None and path.name != Path(file).name:
            raise UsageError(f"{source}: is a file, so source.file={file!r} cannot be chosen from it; leave it out")
    if all(one.suffix == ".safetensors" for one in files):
        tensors, read = _open_safetensors(files)
        if weights != "auto":
            raise UsageError(
                f"{source}: holds one set of weights, so weights={weights!r} cannot be chosen; leave it out"
            )
    else:
        tensors, read, chosen, sets = _open_pickles(source, files, weights)
    tensors, read = _strip_prefixes(tensors, read)
    if not tensors:
        raise LitconvertError(f"{source}: holds no tensors")
    return Checkpoint(source, tuple(files), config, tensors, chosen, sets, revision, read)


def _files_of_folder(folder: Path, file: str | None) -> tuple[list[Path], dict[str, Any] | None]:
    """The weight files of a folder in diffusers' layout, or its one weights file; and config.json."""
    if file is None and (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if file is not None:
        if not (folder / file).is_file():
            raise UsageError(f"{folder}: holds no file {file!r}")
        return [folder / file], config
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


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LitconvertError(f"{index}: has no weight_map of tensor to file; download it again")
    files = []
    for name in sorted(set(weight_map.values())):
        # A shard index comes from outside: it may not make us read anything beside it.
        if Path(name).name != name or name in ("", ".", ".."):
            raise LitconvertError(f"{index}: names {name!r}, which is outside its folder; refused")
        if not (index.parent / name).is_file():
            raise LitconvertError(f"{index}: names the shard {name}, which is missing; download it again")
        files.append(index.parent / name)
    return files


def _open_safetensors(files: list[Path]) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    tensors: dict[str, TensorInfo] = {}
    handles: dict[str, Any] = {}
    for path in files:
        try:
            handle: Any = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                dtype = DTYPES_OF_SAFETENSORS.get(part.get_dtype())
                if dtype is None:
                    raise LitconvertError(
                        f"{path}: {name!r} is {part.get_dtype()}, which litconvert does not read; "
                        "use the unquantised checkpoint"
                    )
                if name in tensors:
                    raise LitconvertError(f"{path}: {name!r} is in two shards; download the checkpoint again")
                tensors[name] = TensorInfo(tuple(part.get_shape()), dtype)
                handles[name] = handle
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if cause := system_cause(error):
                raise LitconvertError(f"cannot read {path}: {cause}") from error
            raise LitconvertError(
                f"{path}: not a complete safetensors file ({str(error).splitlines()[0]}); it may be truncated: "
                "download it again"
            ) from error
    return tensors, lambda name: cast(Tensor, handles[name].get_tensor(name))


def _load_pickle(path: Path) -> Any:
    """torch.load, weights only, mapped from disk where the format allows."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE_GLOBALS):
            # What torch warns of (old pickles, TorchScript) is read whole or refused below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        remedy = "Save the state dict alone: torch.save(model.state_dict(), path)"
        if found := re.search(r"GLOBAL\s+([\w.]+)", str(error)):
            raise LitconvertError(
                f"{path}: holds code or objects ({found.group(1)}), not only tensors; refused and not run. {remedy}"
            ) from error
        raise LitconvertError(
            f"{path}: not a checkpoint that can be read safely; it may be damaged: download it again. {remedy}"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever it leads to
        if isinstance(error, OSError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot read {path}: {cause}") from error
        if "TorchScript" in str(error):
            raise LitconvertError(f"{path}: a TorchScript program, not a state dict; refused and not run") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LitconvertError(
            f"{path}: not a complete PyTorch file ({reason}); it may be truncated or damaged: download it again"
        ) from error


def _open_pickles(
    source: str, files: list[Path], weights: str
) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor], str | None, tuple[str, ...]]:
    state: dict[str, Tensor] = {}
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    for path in files:
        content = _load_pickle(path)
        if not isinstance(content, dict):
            raise LitconvertError(f"{path}: holds a {type(content).__name__}, not a state dict")
        sets = tuple(name for name in ("ema", "model") if isinstance(content.get(name), dict))
        if sets:
            chosen = sets[0] if weights == "auto" else weights
            if chosen not in sets:
                raise UsageError(
                    f"{source}: has no {chosen!r} weights, only {', '.join(sets)}; choose with inherit.weights"
                )
            content = content[chosen]
        elif weights != "auto":
            raise UsageError(
                f"{source}: holds one set of weights, so weights={weights!r} cannot be chosen; leave it out"
            )
        elif isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        for name, value in content.items():
            if not isinstance(name, str):
                raise LitconvertError(f"{path}: has the key {name!r}, not a name, so this is not a plain state dict")
            if not isinstance(value, Tensor):
                raise LitconvertError(
                    f"{path}: {name!r} is a {type(value).__name__}, not a tensor, so this is not a plain state dict"
                )
            if value.layout != torch.strided or value.is_quantized:
                raise LitconvertError(f"{path}: {name!r} is sparse or quantised; use the plain checkpoint")
            if name in state:
                raise LitconvertError(f"{path}: {name!r} is in two shards; download the checkpoint again")
            state[name] = value
    tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
    return tensors, lambda name: state[name].detach(), chosen, sets


def _strip_prefixes(
    tensors: dict[str, TensorInfo], read: Callable[[str], Tensor]
) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    """Remove what DDP, torch.compile and trainers put before every key."""
    prefix = ""
    while tensors and (found := next((p for p in WRAPPER_PREFIXES if all(k.startswith(p) for k in tensors)), None)):
        tensors = {name.removeprefix(found): info for name, info in tensors.items()}
        prefix += found
    return tensors, lambda name: read(prefix + name)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a safetensors file one tensor at a time, so that memory holds one at most; flushed to disk.

    Args:
        path: the file.
        tensors: header of every tensor, in the order of the file.
        produce: values by name, of that shape; cast to that dtype.
        metadata: strings for the header.
        on_tensor: called after each tensor.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, info in tensors.items():
            tensor = produce(name).to(info.dtype).contiguous()
            assert tuple(tensor.shape) == info.shape, name
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            on_tensor(name)
        file.flush()
        os.fsync(file.fileno())
