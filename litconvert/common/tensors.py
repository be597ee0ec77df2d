"""What is known of a tensor without its values: shape, dtype, and their names in files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litconvert.errors import LitconvertError

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


def check_dtype(path: str, name: str, dtype: torch.dtype) -> None:
    """Raise LitconvertError for a dtype that is none of ours."""
    if dtype not in SAFETENSORS_DTYPES:
        kind = str(dtype).removeprefix("torch.")
        raise LitconvertError(
            f"{path}: {name!r} is {kind}, which litconvert does not read; use the unquantised checkpoint"
        )


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


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
