"""A checkpoint as lazily read named tensors, and where the bytes of each lie."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from litconvert.checkpoints.pickles import first_line
from litconvert.common.tensors import TensorInfo
from litconvert.errors import LitconvertError, system_cause

# What torch's distributed checkpoints have, those of runs among them.
RUN_INDEX = ".metadata"


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


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one set of weights, read when asked for.

    Attributes:
        source: what the user named.
        config: config.json, where there is one.
        tensors: header of every tensor, what wrappers put into its name removed.
        weights: which set of a training checkpoint this is (`ema`, `model`), or None where there is only one.
        sets: all sets the file holds.
        left_out: what else the file holds, by its outermost name.
        revision: commit of a Hub source.
        download_bytes: what has to be downloaded before a value can be read.
    """

    source: str
    config: dict[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    weights: str | None
    sets: tuple[str, ...]
    left_out: tuple[str, ...]
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

    @property
    def set_aside(self) -> tuple[str, ...]:
        """What of the file is not used, in words."""
        others = [f"{name} (--set inherit.weights={name} takes it)" for name in self.sets if name != self.weights]
        return (*others, *self.left_out)

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
