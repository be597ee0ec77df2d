"""Checkpoints in the original layouts: of full size without their weights (over a hole), and small random ones."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

Shapes = Mapping[str, tuple[int, ...]]


def _named(linears: Shapes) -> dict[str, tuple[int, ...]]:
    """A weight and a bias of its length for each name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _attention(block: str, width: int, linear_heads: int | None, kv_compress: int | None) -> Shapes:
    """Self-attention in the original layout: fused, or LiT's, or with KV compression."""
    if linear_heads is not None:
        return {
            f"{block}.attn.q": (width, width),
            f"{block}.attn.kv": (2 * width, width),
            f"{block}.attn.proj": (width, width),
            f"{block}.attn.dwc": (width // linear_heads, 1, 5, 5),
        }
    fused: dict[str, tuple[int, ...]] = {
        f"{block}.attn.qkv": (3 * width, width),
        f"{block}.attn.proj": (width, width),
    }
    if kv_compress is not None:
        fused |= {f"{block}.attn.sr": (width, 1, kv_compress, kv_compress), f"{block}.attn.norm": (width,)}
    return fused


def dit_shapes(
    *,
    width: int = 1152,
    layers: int = 28,
    channels: int = 4,
    sample_size: int = 32,
    patch: int = 2,
    rows: int = 1001,
    inner: int | None = None,
    linear_heads: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a DiT in the original layout; by default those of DiT-XL/2 at 256px.

    With `linear_heads` in LiT's public layout.
    """
    inner = 4 * width if inner is None else inner
    linears: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch * patch * 2 * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        linears |= _attention(block, width, linear_heads, None)
        linears |= {
            f"{block}.mlp.fc1": (inner, width),
            f"{block}.mlp.fc2": (width, inner),
            f"{block}.adaLN_modulation.1": (6 * width, width),
        }
    return {
        "pos_embed": (1, (sample_size // patch) ** 2, width),
        "y_embedder.embedding_table.weight": (rows, width),
        **_named(linears),
    }


def pixart_shapes(
    *,
    width: int = 1152,
    layers: int = 28,
    channels: int = 4,
    sample_size: int = 64,
    patch: int = 2,
    tokens: int | None = 300,
    caption_channels: int = 4096,
    micro_conditions: bool = False,
    kv_compress: tuple[int, ...] = (),
    linear_heads: int | None = None,
    pos_embed: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a PixArt in the original layout; by default those of PixArt-Sigma at 512px.

    `tokens`: of the stored null caption, None for none. `kv_compress`: layers with KV compression.
    """
    linears: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, caption_channels),
        "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (patch * patch * 2 * channels, width),
    }
    if micro_conditions:
        for name in ("csize_embedder", "ar_embedder"):
            linears |= {f"{name}.mlp.0": (width // 3, 256), f"{name}.mlp.2": (width // 3, width // 3)}
    tables: dict[str, tuple[int, ...]] = {"final_layer.scale_shift_table": (2, width)}
    for layer in range(layers):
        block = f"blocks.{layer}"
        tables[f"{block}.scale_shift_table"] = (6, width)
        linears |= _attention(block, width, linear_heads, 2 if layer in kv_compress else None)
        linears |= {
            f"{block}.cross_attn.q_linear": (width, width),
            f"{block}.cross_attn.kv_linear": (2 * width, width),
            f"{block}.cross_attn.proj": (width, width),
            f"{block}.mlp.fc1": (4 * width, width),
            f"{block}.mlp.fc2": (width, 4 * width),
        }
    shapes = {**tables, **_named(linears)}
    if tokens is not None:
        shapes["y_embedder.y_embedding"] = (tokens, caption_channels)
    if pos_embed:
        shapes["pos_embed"] = (1, (sample_size // patch) ** 2, width)
    return shapes


def random_state(shapes: Shapes, *, scale: float = 0.15, seed: int = 0) -> dict[str, Tensor]:
    """A random state dict of these shapes, without the position embedding, which is a formula."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items() if name != "pos_embed"
    }


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


def dit_state(
    *,
    width: int = 32,
    layers: int = 2,
    channels: int = 1,
    sample_size: int = 8,
    patch: int = 2,
    rows: int = 5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A random DiT in the original layout, every tensor non-zero; `rows` classes, the null class among them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}

    from litconvert.model.modeling_lit import sincos_position_embedding

    side = sample_size // patch
    state = {"pos_embed": sincos_position_embedding(width, (side, side), side, torch.device("cpu")).clone()}
    state |= {"x_embedder.proj.weight": normal(width, channels, patch, patch), "x_embedder.proj.bias": normal(width)}
    state |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    state |= {"y_embedder.embedding_table.weight": normal(rows, width)}
    for block in range(layers):
        prefix = f"blocks.{block}"
        state |= linear(f"{prefix}.attn.qkv", 3 * width, width) | linear(f"{prefix}.attn.proj", width, width)
        state |= linear(f"{prefix}.mlp.fc1", 4 * width, width) | linear(f"{prefix}.mlp.fc2", width, 4 * width)
        state |= linear(f"{prefix}.adaLN_modulation.1", 6 * width, width)
    state |= linear("final_layer.linear", patch * patch * 2 * channels, width)
    state |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return state
