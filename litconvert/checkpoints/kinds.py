"""What a file is, by its first bytes: its name may say anything."""

import struct
from pathlib import Path
from typing import Literal

from litconvert.errors import LitconvertError, system_cause

Kind = Literal["safetensors", "pickle", "index"]
# As many bytes as tell.
BEGINNING = 512
# The longest header that safetensors allows.
HEADER_BYTES = 100_000_000
# What is mistaken for a checkpoint, by how it begins, and what helps.
OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, which stands for a file that was not fetched: run `git lfs pull` in its repository, or "
        "`hf download` it",
    ),
    (b"GGUF", "a GGUF file, whose weights are quantised for other programs: use the checkpoint that it was made from"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes: save the weights as safetensors or by torch.save"),
    (b"\x93NUMPY", "a NumPy array: save the weights as safetensors or by torch.save"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\xfd7zXZ", "packed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd: unpack it first"),
    (b"%PDF", "a PDF document: download the checkpoint again"),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def kind_of(place: str, beginning: bytes, size: int) -> Kind:
    """What a file of weights is.

    Args:
        place: its name, for messages.
        beginning: its first `BEGINNING` bytes, or all.
        size: in bytes.

    Raises LitconvertError for what is known to be something else.
    """
    if not size:
        raise LitconvertError(f"{place}: an empty file; download it again")
    for start, what in OTHERS:
        if beginning.startswith(start):
            raise LitconvertError(f"{place}: {what}")
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(PAGES):
        raise LitconvertError(
            f"{place}: a web page that was saved under this name: download the file itself (on the Hub by `hf "
            "download`, or from a link with /resolve/ in place of /blob/)"
        )
    if len(beginning) > 8 and beginning[8:9] == b"{" and struct.unpack("<Q", beginning[:8])[0] <= HEADER_BYTES:
        return "safetensors"
    if text.startswith(b"{"):
        return "index"
    return "pickle"


def kind_of_file(path: Path) -> Kind:
    """What a file on this machine is. Raises LitconvertError as `kind_of` does, and for what cannot be read."""
    try:
        with path.open("rb") as file:
            return kind_of(str(path), file.read(BEGINNING), path.stat().st_size)
    except OSError as error:
        raise LitconvertError(f"cannot read {path}: {system_cause(error) or error}") from error
