"""The model as numbers: its tensors, parameters and multiply-accumulates, from a config alone.

Written out rather than read off the model, so that planning and converting import neither diffusers nor the model:
that is seconds and a hundred megabytes. The tests hold it against LiTTransformer2DModel, tensor by tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litconvert.common.tensors import TensorInfo
from litconvert.errors import UsageError

# LiTTransformer2DModel's own defaults, for a config.json that was written before a key existed.
CONFIG_DEFAULTS: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "hidden_size": 1152,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention": None,
    "linear_num_heads": 4,
    "linear_kernel": "relu",
    "linear_conv_size": 5,
    "linear_eps": 1e-6,
    "num_classes": 1000,
    "null_class": True,
    "mlp_ratio": 4.0,
    "timestep_freq_shift": 0.0,
    "norm_eps": 1e-6,
    "caption_channels": None,
    "caption_tokens": 0,
    "null_caption": False,
    "micro_conditions": False,
    "interpolation_scale": 1.0,
    "kv_compress_factor": 2,
    "prediction": "noise",
    "data_timestep": 1,
}
KINDS = ("linear", "softmax", "kv_compress")
CHOICES: dict[str, tuple[Any, ...]] = {
    "linear_kernel": ("relu", "gelu", "focused"),
    "linear_conv_size": (0, 3, 5, 7),
    "prediction": ("noise", "velocity"),
    "data_timestep": (1, 0),
}
TIMESTEP_CHANNELS = 256
# More positions than any image has: their embedding alone would not fit into memory.
MAX_SAMPLE_SIZE = 1 << 14
# Stored, but no parameters: they are not trained and not counted.
BUFFERS = ("conditioning.null_caption",)


def is_pixel_space(channels: int) -> bool:
    """Whether a model of so many channels sees images, grey or RGB; others see a VAE's latents."""
    return channels in (1, 3)


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the model's defaults filled in, and the kind of every layer named.

    Raises UsageError for kinds of attention that do not exist or are not one a layer, and for heads that do not divide
    the width.
    """
    full = {**CONFIG_DEFAULTS, **config}
    kinds = list(full["attention"] or ["softmax"] * full["num_layers"])
    if len(kinds) != full["num_layers"] or set(kinds) - set(KINDS):
        raise UsageError(f"attention must name one of {KINDS} for each of {full['num_layers']} layers, got {kinds}")
    for key, values in CHOICES.items():
        if full[key] not in values:
            raise UsageError(f"{key} must be one of {values}, got {full[key]!r}")
    width = full["hidden_size"]
    if full["sample_size"] > MAX_SAMPLE_SIZE:
        raise UsageError(f"sample_size must be at most {MAX_SAMPLE_SIZE}, got {full['sample_size']}")
    if width % 4:
        raise UsageError(f"hidden_size must be a multiple of 4, got {width}")
    if (full["num_classes"] is None) == (full["caption_channels"] is None):
        raise UsageError("a model has classes or captions: give one of num_classes and caption_channels")
    heads = ["linear_num_heads"] * ("linear" in kinds)
    heads += ["num_attention_heads"] * (full["caption_channels"] is not None or bool(set(kinds) - {"linear"}))
    for name in heads:
        if full[name] < 1 or width % full[name]:
            raise UsageError(f"{name} must divide hidden_size {width}, got {full[name]}")
    return {**full, "attention": kinds}


def given_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a full config that differ from their defaults."""
    return {key: value for key, value in config.items() if CONFIG_DEFAULTS.get(key, ...) != value}


def model_tensors(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    """Name and shape of every tensor the model of this config stores, in the model's own order."""
    c = full_config(config)
    width, patch = c["hidden_size"], c["patch_size"]
    inner, head_dim = round(width * c["mlp_ratio"]), width // c["linear_num_heads"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def convolution(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def timestep_embedding(name: str, out: int) -> None:
        linear(f"{name}.linear_1", out, TIMESTEP_CHANNELS)
        linear(f"{name}.linear_2", out, out)

    def modulation(name: str, parts: int) -> None:
        if c["caption_channels"] is None:
            linear(name, parts * width, width)
        else:
            shapes[f"{name}.scale_shift_table"] = (parts, width)

    convolution("x_embedder.proj", width, c["in_channels"], patch, patch)
    if c["null_caption"] and c["caption_channels"] is not None:
        shapes["conditioning.null_caption"] = (c["caption_tokens"], c["caption_channels"])
    timestep_embedding("conditioning.timestep_embedder", width)
    if c["caption_channels"] is None:
        shapes["conditioning.class_embedder.weight"] = (c["num_classes"] + bool(c["null_class"]), width)
    else:
        if c["micro_conditions"]:
            timestep_embedding("conditioning.resolution_embedder", width // 3)
            timestep_embedding("conditioning.aspect_ratio_embedder", width // 3)
        linear("conditioning.modulation", 6 * width, width)
        linear("conditioning.caption_projection.linear_1", width, c["caption_channels"])
        linear("conditioning.caption_projection.linear_2", width, width)
    for layer, kind in enumerate(c["attention"]):
        block = f"blocks.{layer}"
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            linear(f"{block}.attn.{projection}", width, width)
        if kind == "linear" and c["linear_conv_size"]:
            convolution(f"{block}.attn.dwc", head_dim, 1, c["linear_conv_size"], c["linear_conv_size"])
        if kind == "kv_compress":
            convolution(f"{block}.attn.sr", width, 1, c["kv_compress_factor"], c["kv_compress_factor"])
            shapes[f"{block}.attn.norm.weight"] = shapes[f"{block}.attn.norm.bias"] = (width,)
        if c["caption_channels"] is not None:
            for projection in ("to_q", "to_k", "to_v", "to_out"):
                linear(f"{block}.cross_attn.{projection}", width, width)
        linear(f"{block}.ff.fc1", inner, width)
        linear(f"{block}.ff.fc2", width, inner)
        modulation(f"{block}.adaLN_modulation", 6)
    linear("final_layer.linear", patch * patch * c["out_channels"], width)
    modulation("final_layer.adaLN_modulation", 2)
    return {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters, without buffers: neither the fixed position embedding nor the null caption."""
    return sum(info.numel for name, info in model_tensors(config).items() if name not in BUFFERS)


def count_macs(config: Mapping[str, Any], latent_size: int) -> int:
    """Multiply-accumulates of one forward pass of one square latent of side `latent_size`.

    Per token: patch embedding, 4 D^2 of projections, 2 r D^2 of feed-forward (r = mlp_ratio), the output projection;
    attention core 2 T D (softmax, or linear when T < d) or 2 d D (linear), plus k^2 D for the convolution;
    KV-compressed by factor f: 2 T D / f^2 and 2 D for its convolutions of K and V. With captions of L tokens (the
    longest trained on): 2 D^2 + 2 L D more, and 2 D^2 for each caption token in every layer. Per image: the embedders
    and the modulation. Norms, activations and the denominator (D a token) are not counted.
    """
    c = full_config(config)
    width, p, kinds = c["hidden_size"], c["patch_size"], c["attention"]
    side = latent_size // p
    tokens, head_dim = side**2, width // c["linear_num_heads"]
    merged = (side // c["kv_compress_factor"]) ** 2
    core = {
        "softmax": 2 * tokens * width * tokens,
        "linear": tokens * width * (2 * min(tokens, head_dim) + c["linear_conv_size"] ** 2),
        "kv_compress": 2 * tokens * width * merged + 2 * merged * width * c["kv_compress_factor"] ** 2,
    }
    inner = round(c["mlp_ratio"] * width)
    per_image = (6 * len(kinds) + 2) * width**2
    total: int = tokens * p * p * (c["in_channels"] + c["out_channels"]) * width
    total += sum(tokens * (4 * width + 2 * inner) * width + core[kind] for kind in kinds)
    total += (TIMESTEP_CHANNELS + width) * width
    if c["caption_channels"] is None:
        total += per_image
        return total
    length = c["caption_tokens"]
    total += 6 * width**2 + length * (c["caption_channels"] + width) * width
    total += len(kinds) * (2 * (tokens + length) * width**2 + 2 * tokens * length * width)
    if c["micro_conditions"]:
        total += 3 * (TIMESTEP_CHANNELS + width // 3) * (width // 3)
    return total


def position_embedding(config: Mapping[str, Any]) -> Tensor:
    """The fixed sine-cosine position embedding of a config's own square grid, (1, T, D) float32, tokens row-major.

    As LiTTransformer2DModel computes it: column then row, sin then cos, frequencies 10000^(-2i/(D/2)), positions
    divided by the interpolation scale.
    """
    width, side = config["hidden_size"], config["sample_size"] // config["patch_size"]
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    positions = torch.arange(side, dtype=torch.float32) / config["interpolation_scale"]
    angles = torch.outer(positions.double(), frequencies)
    encoded = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    embedding = torch.cat([encoded.repeat(side, 1), encoded.repeat_interleave(side, dim=0)], dim=1)
    return embedding.float().unsqueeze(0)
