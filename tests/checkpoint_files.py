"""Checkpoints of full size without their weights: the headers of every tensor, over a file with a hole in it."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]


def dit_shapes(
    *,
    width: int = 1152,
    layers: int = 28,
    channels: int = 4,
    sample_size: int = 32,
    patch: int = 2,
    rows: int = 1001,
    inner: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a DiT in the original layout; by default those of DiT-XL/2 at 256px."""
    inner = 4 * width if inner is None else inner
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 2 * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        linears |= {
            f"{block}.attn.qkv": (3 * width, width),
            f"{block}.attn.proj": (width, width),
            f"{block}.mlp.fc1": (inner, width),
            f"{block}.mlp.fc2": (width, inner),
            f"{block}.adaLN_modulation.1": (6 * width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (sample_size // patch) ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (rows, width),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def write_hollow(path: Path, shapes: Shapes) -> Path:
    """A safetensors file of float32 tensors of these shapes, all zero, that takes no room on disk."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return path
