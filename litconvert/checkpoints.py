"""Any checkpoint as lazily read named tensors, and writing that appears whole or not at all."""

import argparse
import glob
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litconvert.errors import LitconvertError, UsageError, did_you_mean, system_cause

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
        path, revision = _download_weights(name, revision or at or None, file)
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a LitconvertError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise LitconvertError(f"{path}: not valid JSON ({error}); download or write it again") from error
    if not isinstance(data, dict):
        raise LitconvertError(f"{path}: not a JSON object")
    return data


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


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What goes wrong while reading from the Hub, as a sentence."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise LitconvertError(
            f"{repo_id}: access must be asked for on its Hub page, and you must be logged in"
        ) from error
    except RepositoryNotFoundError as error:
        raise LitconvertError(
            f"{repo_id}: no such Hub repository, or it is private: log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise LitconvertError(f"{repo_id}: no such revision on the Hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LitconvertError(
            f"{repo_id}: the Hub cannot be reached, and there is no local copy; check the network (and HF_HUB_OFFLINE)"
        ) from error
    except EntryNotFoundError as error:
        raise LitconvertError(f"{repo_id}: a file is missing on the Hub: {str(error).splitlines()[-1]}") from error
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: not a Hub id: {str(error).splitlines()[0]}") from error
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        if error.response.status_code == 401:
            reason = "the token is not accepted; run `hf auth login` again, or set HF_TOKEN to a valid token"
        raise LitconvertError(f"{repo_id}: the Hub refused: {reason}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise LitconvertError(f"{repo_id}: the Hub cannot be reached; check the network, then try again") from error
    except OSError as error:
        reason = system_cause(error) or str(error).splitlines()[0]
        raise LitconvertError(f"{repo_id}: {reason}") from error


def download(repo_id: str, filename: str, *, revision: str | None) -> Path:
    """One file of a Hub repository, through the Hub's cache."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, filename, revision=revision))


def _download_weights(repo_id: str, revision: str | None, file: str | None) -> tuple[Path, str]:
    """The transformer of a Hub repository: its folder (or the one file) in the cache, and the commit.

    Where the Hub cannot be reached, what an earlier download left in the cache is used.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    with _hub_errors(repo_id):
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # No file has this name: nothing is asked for but the folder.
            root = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns="no such file")
            return _cached_weights(Path(root), file), Path(root).name
        patterns = _wanted_files(repo_id, {sibling.rfilename for sibling in info.siblings or ()}, file)
        # By the name asked for, not by the commit: so the cache knows it by that name when there is no network.
        root = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        return _cached_weights(Path(root), file), Path(root).name


def _cached_weights(root: Path, file: str | None) -> Path:
    """In a downloaded snapshot: the file asked for, or the folder of the transformer, or of the one file there is."""
    if file is not None:
        return root / file
    if (root / "transformer" / "config.json").is_file():
        return root / "transformer"
    found = [path for path in root.rglob("*") if path.suffix in WEIGHT_SUFFIXES]
    return found[0] if len(found) == 1 and found[0].parent != root else root


def _wanted_files(repo_id: str, names: set[str], file: str | None) -> list[str]:
    """Which files of a repository to download: the transformer's, or the one weights file."""
    if file is not None:
        if file not in names:
            raise UsageError(f"{repo_id}: holds no file {file!r}{did_you_mean(file, names)}")
        return [file]
    folder = "transformer/" if "transformer/config.json" in names else ""
    for suffix in ("safetensors", "bin"):
        stem = f"{folder}diffusion_pytorch_model"
        if {f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"} & names:
            weights = [f"{stem}*.{suffix}", f"{stem}.{suffix}.index.json"]
            return [*weights, f"{folder}config.json", f"{folder}litconvert.json"]
    found = sorted(name for name in names if Path(name).suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        raise UsageError(
            f"{repo_id}: not a diffusers model; its weight files are {', '.join(found) or 'none'}: "
            "choose one with --set source.file=NAME"
        )
    return found


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


def digest_of(inputs: Any) -> str:
    """sha256 of resolved inputs (plain data), to tell whether an output is that of these inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse before the work where a full disk can be foreseen."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise LitconvertError(
            f"{folder}: {nbytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
            "free some space, or write elsewhere"
        )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed process left behind is removed on the next try. An existing `out` is replaced.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            pid = stale.name.rsplit("-", 1)[1]
            if not pid.isdigit() or not _alive(int(pid)):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    try:
        yield temporary
        _sync(temporary)
        if out.exists():
            retired = out.parent / f".{out.name}.partial-{os.getpid()}-old"
            out.rename(retired)
            try:
                temporary.rename(out)
            except OSError:
                retired.rename(out)
                raise
            shutil.rmtree(retired) if retired.is_dir() else retired.unlink()
        else:
            temporary.rename(out)
        _sync(out.parent, recurse=False)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, LitconvertError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot write {out}: {cause}") from error
        raise


def _sync(folder: Path, *, recurse: bool = True) -> None:
    """Flush a folder (and what is in it) to disk, so that a rename never precedes the bytes."""
    paths = [folder, *(folder.rglob("*") if recurse else ())]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise LitconvertError(f"cannot write {path}: {system_cause(error) or error}") from error
