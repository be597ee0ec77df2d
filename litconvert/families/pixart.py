"""PixArt-alpha and PixArt-Sigma: captions through cross-attention, adaLN-single. The original layout and diffusers'."""

from dataclasses import replace
from typing import Any

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.dit import LINEAR_ROWS, ORIGINAL_ROWS
from litconvert.families.family import Family, Reading
from litconvert.families.headers import (
    attention_config,
    check_config,
    count_layers,
    has_key,
    num_attention_heads,
    refuse_hints,
    sample_size,
    shape_of,
)
from litconvert.families.layout import Layout
from litconvert.model.config import ModelConfig
from litconvert.recipe.schema import Source

ORIGINAL = Layout(
    "original",
    {
        **ORIGINAL_ROWS,
        "conditioning.resolution_embedder.linear_1": "csize_embedder.mlp.0",
        "conditioning.resolution_embedder.linear_2": "csize_embedder.mlp.2",
        "conditioning.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
        "conditioning.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
        "conditioning.modulation": "t_block.1",
        "conditioning.caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "conditioning.caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "conditioning.null_caption": "y_embedder.y_embedding",
        "blocks.{i}.adaLN_modulation": "blocks.{i}",
        "blocks.{i}.attn.sr": "blocks.{i}.attn.sr",
        "blocks.{i}.attn.norm": "blocks.{i}.attn.norm",
        "blocks.{i}.cross_attn.to_q": "blocks.{i}.cross_attn.q_linear",
        "blocks.{i}.cross_attn.to_k": "blocks.{i}.cross_attn.kv_linear[0/2]",
        "blocks.{i}.cross_attn.to_v": "blocks.{i}.cross_attn.kv_linear[1/2]",
        "blocks.{i}.cross_attn.to_out": "blocks.{i}.cross_attn.proj",
        "final_layer.adaLN_modulation": "final_layer",
    },
    LINEAR_ROWS,
    kv_compress=True,
)
DIFFUSERS = Layout(
    "diffusers",
    {
        "x_embedder.proj": "pos_embed.proj",
        "conditioning.timestep_embedder": "adaln_single.emb.timestep_embedder",
        "conditioning.resolution_embedder": "adaln_single.emb.resolution_embedder",
        "conditioning.aspect_ratio_embedder": "adaln_single.emb.aspect_ratio_embedder",
        "conditioning.modulation": "adaln_single.linear",
        "conditioning.caption_projection": "caption_projection",
        "blocks.{i}.adaLN_modulation": "transformer_blocks.{i}",
        "blocks.{i}.attn.to_q": "transformer_blocks.{i}.attn1.to_q",
        "blocks.{i}.attn.to_k": "transformer_blocks.{i}.attn1.to_k",
        "blocks.{i}.attn.to_v": "transformer_blocks.{i}.attn1.to_v",
        "blocks.{i}.attn.to_out": "transformer_blocks.{i}.attn1.to_out.0",
        "blocks.{i}.cross_attn.to_q": "transformer_blocks.{i}.attn2.to_q",
        "blocks.{i}.cross_attn.to_k": "transformer_blocks.{i}.attn2.to_k",
        "blocks.{i}.cross_attn.to_v": "transformer_blocks.{i}.attn2.to_v",
        "blocks.{i}.cross_attn.to_out": "transformer_blocks.{i}.attn2.to_out.0",
        "blocks.{i}.ff.fc1": "transformer_blocks.{i}.ff.net.0.proj",
        "blocks.{i}.ff.fc2": "transformer_blocks.{i}.ff.net.2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.scale_shift_table": "scale_shift_table",
    },
)
# Folders of PixArt-alpha that were converted by its authors hold the null caption, which diffusers does not use.
NULL_CAPTION = "caption_projection.y_embedding"
RELEASED = replace(DIFFUSERS, rows={**DIFFUSERS.rows, "conditioning.null_caption": NULL_CAPTION})
ORIGINAL_MARK = "blocks.{i}.cross_attn.q_linear"
DIFFUSERS_MARK = "transformer_blocks.{i}.attn2.to_q"

# Longest caption, in tokens: that of the null caption, where it is stored.
CAPTION_TOKENS = {"pixart-alpha": 120, "pixart-sigma": 300}
# Position interpolation by the side of the latent, of the released checkpoints.
INTERPOLATION = {
    "pixart-alpha": {32: 1.0, 64: 1.0, 128: 2.0},
    "pixart-sigma": {32: 0.5, 64: 1.0, 128: 2.0, 256: 4.0},
}
# Config values of diffusers; others would change the function, and no released PixArt has them.
DIFFUSERS_CONFIG = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    """A PixArt in either layout, or None."""
    mark = next((mark for mark in (ORIGINAL_MARK, DIFFUSERS_MARK) if has_key(checkpoint, mark)), None)
    if mark is None or (mark == DIFFUSERS_MARK and "adaln_single.linear.weight" not in checkpoint.tensors):
        return None
    layout = ORIGINAL if mark == ORIGINAL_MARK else DIFFUSERS
    if layout is DIFFUSERS and NULL_CAPTION in checkpoint.tensors:
        layout = RELEASED
    family, why, unsure = _variant(checkpoint, hints, layout)
    config = _config(checkpoint, hints, layout, family, unsure)
    return Reading(
        family=family,
        layout="lit" if "linear" in config["attention"] else layout.name,
        because=f"it has {mark.replace('{i}', '0')}, and {why}",
        config=config,
        origins=layout.origins(config),
        recomputed={"pos_embed": "pos_embed"} if "pos_embed" in checkpoint.tensors else {},
        unsure=tuple(unsure),
    )


def _variant(checkpoint: Checkpoint, hints: Source, layout: Layout) -> tuple[str, str, list[str]]:
    """PixArt-alpha or PixArt-Sigma, why, and what was assumed. They differ in caption length and interpolation."""
    if hints.family is not None:
        return hints.family, f"family={hints.family} says so", []
    null_caption = checkpoint.tensors.get("y_embedder.y_embedding", checkpoint.tensors.get(NULL_CAPTION))
    if null_caption is not None and len(null_caption.shape) == 2:
        for family, tokens in CAPTION_TOKENS.items():
            if null_caption.shape[0] == tokens:
                return family, f"its null caption has {tokens} tokens", []
    if any(key.startswith(("csize_embedder.", "adaln_single.emb.resolution_embedder.")) for key in checkpoint.tensors):
        return "pixart-alpha", "it has micro-conditions", []
    if hints.interpolation_scale == 0.5 or (checkpoint.config or {}).get("interpolation_scale") == 0.5:
        return "pixart-sigma", "its positions are interpolated by 0.5", []
    size = hints.sample_size or (checkpoint.config or {}).get("sample_size")
    if size is None and "pos_embed" in checkpoint.tensors and len(checkpoint.tensors["pos_embed"].shape) == 3:
        size = 2 * round(checkpoint.tensors["pos_embed"].shape[1] ** 0.5)
    if size in (128, 256):
        return "pixart-sigma", f"a latent of side {size} without micro-conditions is Sigma's", []
    config = checkpoint.config if layout is not ORIGINAL else None
    if config is not None and config.get("interpolation_scale") is None:
        assumed = "read as PixArt-alpha, with captions of up to 120 tokens: family=pixart-sigma for 300"
        return "pixart-alpha", "its config.json names no interpolation, as Sigma's does", [assumed]
    if size == 32 and hints.interpolation_scale is None and config is None:
        raise UsageError(
            f"{checkpoint.source}: PixArt-alpha or PixArt-Sigma: without its null caption or a config.json the file "
            "does not tell, and at 256px their positions differ; give family=pixart-alpha or family=pixart-sigma "
            "(--set source.family=...)"
        )
    assumed = "read as PixArt-Sigma, with captions of up to 300 tokens: family=pixart-alpha for 120"
    return "pixart-sigma", "it is taken for Sigma", [assumed]


def _config(checkpoint: Checkpoint, hints: Source, layout: Layout, family: str, unsure: list[str]) -> dict[str, Any]:
    """The model's config from shapes, from diffusers' config.json and from hints; adds to what was assumed."""

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(checkpoint, layout.name_of(ours), dimensions)

    refuse_hints(checkpoint, hints, "a PixArt", "num_classes", "data_timestep")
    theirs = (checkpoint.config or {}) if layout is not ORIGINAL else {}
    num_layers = count_layers(checkpoint, "transformer_blocks" if layout is not ORIGINAL else "blocks")
    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    out_channels = shape("final_layer.linear.weight", 2)[0] // patch_size**2
    caption_channels = shape("conditioning.caption_projection.linear_1.weight", 2)[1]
    check_config(
        checkpoint,
        theirs,
        fixed=DIFFUSERS_CONFIG,
        tensors={
            "num_layers": num_layers,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "caption_channels": caption_channels,
        },
        hints={"num_attention_heads": hints.num_attention_heads, "sample_size": hints.sample_size},
    )
    attention: dict[str, Any] = {"attention": ["softmax"] * num_layers}
    if layout is ORIGINAL:
        attention = attention_config(checkpoint, hints, hidden_size, num_layers, unsure)
    if "linear" in attention["attention"]:
        unsure.append(
            "cross-attention is read with the source's own heads: LiT's public text-to-image code regroups it into "
            "the linear layers' heads; num_attention_heads=N for a model that was trained so"
        )
    # diffusers' own layout has no place for it.
    null_caption = layout is not DIFFUSERS and layout.name_of("conditioning.null_caption") in checkpoint.tensors
    caption_tokens = shape("conditioning.null_caption", 2)[0] if null_caption else CAPTION_TOKENS[family]
    # PixArt's own code drops a stored position embedding and makes that of the size at hand.
    size = sample_size(checkpoint, hints, hidden_size, patch_size, theirs.get("sample_size"), used=False)
    return {
        "sample_size": size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads(
            checkpoint, hints, hidden_size, theirs.get("num_attention_heads"), unsure
        ),
        **attention,
        "num_classes": None,
        "null_class": False,
        "mlp_ratio": shape("blocks.0.ff.fc1.weight", 2)[0] / hidden_size,
        "timestep_freq_shift": 0.0 if hints.timestep_freq_shift is None else hints.timestep_freq_shift,
        "norm_eps": 1e-6 if hints.norm_eps is None else hints.norm_eps,
        "caption_channels": caption_channels,
        "caption_tokens": caption_tokens,
        "null_caption": null_caption,
        "micro_conditions": layout.name_of("conditioning.resolution_embedder.linear_1.weight") in checkpoint.tensors,
        "interpolation_scale": _interpolation(checkpoint, hints, layout, family, size, unsure),
    }


def _interpolation(
    checkpoint: Checkpoint, hints: Source, layout: Layout, family: str, size: int, unsure: list[str]
) -> float:
    """What positions are divided by: the hint, diffusers' config.json, or that of the released size."""
    told = (checkpoint.config or {}).get("interpolation_scale") if layout is not ORIGINAL else None
    if told is not None and (type(told) not in (int, float) or not told > 0):
        raise LitconvertError(
            f"{checkpoint.source}: config.json has interpolation_scale={told!r}, not a number above 0; download it "
            "again"
        )
    if hints.interpolation_scale is not None:
        if told not in (None, hints.interpolation_scale):
            raise UsageError(
                f"{checkpoint.source}: config.json has interpolation_scale={told}, but the hint says "
                f"{hints.interpolation_scale}; leave the hint out"
            )
        return hints.interpolation_scale
    if told is not None:
        return float(told)
    if layout is not ORIGINAL and checkpoint.config is not None:
        return _diffusers_interpolation(size)
    if size in INTERPOLATION[family]:
        return INTERPOLATION[family][size]
    unsure.append(
        f"no released {TITLES[family]} has a latent of side {size}; its positions are read without interpolation: "
        "interpolation_scale=... if it was trained with one"
    )
    return 1.0


def _diffusers_interpolation(size: int) -> float:
    """What diffusers takes where config.json names no interpolation."""
    return float(max(size // 64, 1))


def variant_of(config: ModelConfig) -> str:
    """Which of the two a model's own config is: alpha has micro-conditions or shorter captions."""
    alpha = config.micro_conditions or config.caption_tokens == CAPTION_TOKENS["pixart-alpha"]
    return "pixart-alpha" if alpha else "pixart-sigma"


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of diffusers' PixArtTransformer2DModel for a softmax PixArt."""
    usual = _diffusers_interpolation(config.sample_size)
    scale: float | None = config.interpolation_scale
    if variant_of(config) == "pixart-alpha" and scale == usual:
        scale = None  # as alpha's own folders leave it
    return {
        "_class_name": "PixArtTransformer2DModel",
        **{key: getattr(config, key) for key in ("num_attention_heads", "num_layers", "sample_size", "patch_size")},
        "attention_head_dim": config.hidden_size // config.num_attention_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.caption_channels,
        "interpolation_scale": int(scale) if scale is not None and scale == int(scale) else scale,
        # Explicit: diffusers takes None for True at 1024px, which is wrong for Sigma.
        "use_additional_conditions": config.micro_conditions,
        **DIFFUSERS_CONFIG,
    }


TITLES = {"pixart-alpha": "PixArt-alpha", "pixart-sigma": "PixArt-Sigma"}
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
ALPHA = Family("pixart-alpha", TITLES["pixart-alpha"], recognise, LAYOUTS, diffusers_config, "state_dict")
SIGMA = Family("pixart-sigma", TITLES["pixart-sigma"], recognise, LAYOUTS, diffusers_config, "state_dict")
