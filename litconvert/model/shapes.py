"""The model as numbers: its tensors, parameters and multiply-accumulates, from a config alone.

Written out rather than read off the model, so that planning and converting import neither diffusers nor the model:
that is seconds and a hundred megabytes. The tests hold it against LiTTransformer2DModel, tensor by tensor.
"""

import torch
from torch import Tensor

from litconvert.common.tensors import TensorInfo
from litconvert.model.config import ModelConfig

TIMESTEP_CHANNELS = 256
# Stored, but no parameters: they are not trained and not counted.
BUFFERS = ("conditioning.null_caption",)


def model_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    """Name and shape of every tensor the model of this config stores, in the model's own order."""
    width, patch = config.hidden_size, config.patch_size
    inner, head_dim = round(width * config.mlp_ratio), width // config.linear_num_heads
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def convolution(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def timestep_embedding(name: str, out: int) -> None:
        linear(f"{name}.linear_1", out, TIMESTEP_CHANNELS)
        linear(f"{name}.linear_2", out, out)

    def modulation(name: str, parts: int) -> None:
        if not config.reads_captions:
            linear(name, parts * width, width)
        else:
            shapes[f"{name}.scale_shift_table"] = (parts, width)

    convolution("x_embedder.proj", width, config.in_channels, patch, patch)
    if config.null_caption and config.reads_captions:
        shapes["conditioning.null_caption"] = (config.caption_tokens, config.caption_width)
    timestep_embedding("conditioning.timestep_embedder", width)
    if not config.reads_captions:
        shapes["conditioning.class_embedder.weight"] = (config.classes + bool(config.null_class), width)
    else:
        if config.micro_conditions:
            timestep_embedding("conditioning.resolution_embedder", width // 3)
            timestep_embedding("conditioning.aspect_ratio_embedder", width // 3)
        linear("conditioning.modulation", 6 * width, width)
        linear("conditioning.caption_projection.linear_1", width, config.caption_width)
        linear("conditioning.caption_projection.linear_2", width, width)
    for layer, kind in enumerate(config.attention):
        block = f"blocks.{layer}"
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            linear(f"{block}.attn.{projection}", width, width)
        if kind == "linear" and config.linear_conv_size:
            convolution(f"{block}.attn.dwc", head_dim, 1, config.linear_conv_size, config.linear_conv_size)
        if kind == "kv_compress":
            convolution(f"{block}.attn.sr", width, 1, config.kv_compress_factor, config.kv_compress_factor)
            shapes[f"{block}.attn.norm.weight"] = shapes[f"{block}.attn.norm.bias"] = (width,)
        if config.reads_captions:
            for projection in ("to_q", "to_k", "to_v", "to_out"):
                linear(f"{block}.cross_attn.{projection}", width, width)
        linear(f"{block}.ff.fc1", inner, width)
        linear(f"{block}.ff.fc2", width, inner)
        modulation(f"{block}.adaLN_modulation", 6)
    linear("final_layer.linear", patch * patch * config.out_channels, width)
    modulation("final_layer.adaLN_modulation", 2)
    return {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}


def count_parameters(config: ModelConfig) -> int:
    """Parameters, without buffers: neither the fixed position embedding nor the null caption."""
    return sum(info.numel for name, info in model_tensors(config).items() if name not in BUFFERS)


def count_macs(config: ModelConfig, latent_size: int) -> int:
    """Multiply-accumulates of one forward pass of one square latent of side `latent_size`.

    Per token: patch embedding, 4 D^2 of projections, 2 r D^2 of feed-forward (r = mlp_ratio), the output projection;
    attention core 2 T D (softmax, or linear when T < d) or 2 d D (linear), plus k^2 D for the convolution;
    KV-compressed by factor f: 2 T D / f^2 and 2 D for its convolutions of K and V. With captions of L tokens (the
    longest trained on): 2 D^2 + 2 L D more, and 2 D^2 for each caption token in every layer. Per image: the embedders
    and the modulation. Norms, activations and the denominator (D a token) are not counted.
    """
    width, p, kinds = config.hidden_size, config.patch_size, config.attention
    side = latent_size // p
    tokens, head_dim = side**2, width // config.linear_num_heads
    merged = (side // config.kv_compress_factor) ** 2
    core = {
        "softmax": 2 * tokens * width * tokens,
        "linear": tokens * width * (2 * min(tokens, head_dim) + config.linear_conv_size**2),
        "kv_compress": 2 * tokens * width * merged + 2 * merged * width * config.kv_compress_factor**2,
    }
    inner = round(config.mlp_ratio * width)
    per_image = (6 * len(kinds) + 2) * width**2
    total: int = tokens * p * p * (config.in_channels + config.out_channels) * width
    total += sum(tokens * (4 * width + 2 * inner) * width + core[kind] for kind in kinds)
    total += (TIMESTEP_CHANNELS + width) * width
    if not config.reads_captions:
        total += per_image
        return total
    length = config.caption_tokens
    total += 6 * width**2 + length * (config.caption_width + width) * width
    total += len(kinds) * (2 * (tokens + length) * width**2 + 2 * tokens * length * width)
    if config.micro_conditions:
        total += 3 * (TIMESTEP_CHANNELS + width // 3) * (width // 3)
    return total


def position_embedding(config: ModelConfig) -> Tensor:
    """The fixed sine-cosine position embedding of a config's own square grid, (1, T, D) float32, tokens row-major.

    As LiTTransformer2DModel computes it: column then row, sin then cos, frequencies 10000^(-2i/(D/2)), positions
    divided by the interpolation scale.
    """
    width, side = config.hidden_size, config.sample_size // config.patch_size
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    positions = torch.arange(side, dtype=torch.float32) / config.interpolation_scale
    angles = torch.outer(positions.double(), frequencies)
    encoded = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    embedding = torch.cat([encoded.repeat(side, 1), encoded.repeat_interleave(side, dim=0)], dim=1)
    return embedding.float().unsqueeze(0)
