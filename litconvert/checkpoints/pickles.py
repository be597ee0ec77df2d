"""Pickles that may come from anywhere: read weights-only, after their zip has been looked at."""

import argparse
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from litconvert.checkpoints.sets import Header, flattened
from litconvert.errors import LitconvertError, system_cause

REMEDY = "Save the state dict alone: torch.save(model.state_dict(), path)"

# What a damaged pickle may ask to be read at once, before the file's own size is looked at.
READ_BYTES = 1 << 21

# Training scripts store their command line beside the weights; nothing else that is code is let in.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]


def first_line(error: Exception) -> str:
    """What went wrong inside a library, of which a damaged file may choose the words."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class BoundedReader(io.BufferedReader):
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
    with refusals(path), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size for one in entries):
            raise LitconvertError(f"{path}: a compressed zip, which torch.save does not write; unpack or save it again")
        if sum(entry.file_size for entry in entries) > size or not all(
            0 <= entry.header_offset <= size - 30 - len(entry.filename) - entry.file_size for entry in entries
        ):
            raise damaged(path, "its directory names what lies outside it")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise damaged(path, "two entries have one name")
        for entry in entries:
            # torch swaps the bytes of tensors without values too, and dies of it. It knows no case in names.
            if entry.filename.lower().endswith("/byteorder") and archive.read(entry) != b"little":
                raise LitconvertError(
                    f"{path}: written by a big-endian machine, or damaged; load it there, and save it as safetensors"
                )
    file.seek(0)
    return entries


def damaged(path: str, reason: str) -> LitconvertError:
    return LitconvertError(
        f"{path}: not a complete PyTorch file ({reason}); it may be truncated or damaged: download it again"
    )


@contextmanager
def refusals(path: str) -> Iterator[None]:
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
        raise damaged(path, first_line(error)) from error


def load_pickle(path: str, file: IO[bytes] | Path, **options: Any) -> Any:
    """torch.load, weights only, of a file that may come from anywhere; a zip is checked by the caller.

    Raises LitconvertError for what is no checkpoint, is damaged, or holds code.
    """
    with (
        refusals(path),
        warnings.catch_warnings(),
        torch.serialization.safe_globals(_SAFE_GLOBALS),
    ):
        # What torch warns of (old pickles, TorchScript) is read whole or refused.
        warnings.simplefilter("ignore")
        return torch.load(file, weights_only=True, **options)


def tensors_of(path: str, content: Any) -> tuple[dict[str, Tensor], dict[str, Header]]:
    """The tensors of a pickle by their joined names, however its dictionaries lie within one another.

    Raises LitconvertError for what is no dictionary, and for a name that is there twice.
    """
    if not isinstance(content, dict):
        raise LitconvertError(f"{path}: holds a {type(content).__name__}, not a state dict. {REMEDY}")
    try:
        found = flattened(content)
    except LitconvertError as error:
        raise LitconvertError(f"{path}: {error}. {REMEDY}") from error
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    return tensors, {name: Header(tuple(tensor.shape), container) for name, (tensor, container) in found.items()}


def records_of(path: str, file: IO[bytes], entries: Sequence[zipfile.ZipInfo]) -> dict[int, int]:
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
            raise damaged(path, f"{entry.filename} is not where its directory says")
        if entry.file_size:
            records[begin] = entry.file_size
    return records
