"""DiT and SiT: class-conditional, adaLN-zero. Reads and writes the original layout and, for DiT, diffusers' own.

SiT's files have DiT's keys and shapes and another meaning, so only the hint family="sit" tells them apart.
"""

from typing import Any

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError, UsageError
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

# Shared with PixArt's original layout, of which it is the ancestor.
ORIGINAL_ROWS = {
    "x_embedder.proj": "x_embedder.proj",
    "conditioning.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "conditioning.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "blocks.{i}.attn.to_q": "blocks.{i}.attn.qkv[0/3]",
    "blocks.{i}.attn.to_k": "blocks.{i}.attn.qkv[1/3]",
    "blocks.{i}.attn.to_v": "blocks.{i}.attn.qkv[2/3]",
    "blocks.{i}.attn.to_out": "blocks.{i}.attn.proj",
    "blocks.{i}.ff.fc1": "blocks.{i}.mlp.fc1",
    "blocks.{i}.ff.fc2": "blocks.{i}.mlp.fc2",
    "final_layer.linear": "final_layer.linear",
}
# LiT's public layout: the original one, but for linear attention.
LINEAR_ROWS = {
    "blocks.{i}.attn.to_q": "blocks.{i}.attn.q",
    "blocks.{i}.attn.to_k": "blocks.{i}.attn.kv[0/2]",
    "blocks.{i}.attn.to_v": "blocks.{i}.attn.kv[1/2]",
    "blocks.{i}.attn.dwc": "blocks.{i}.attn.dwc",
}
ORIGINAL = Layout(
    "original",
    {
        **ORIGINAL_ROWS,
        "conditioning.class_embedder": "y_embedder.embedding_table",
        "blocks.{i}.adaLN_modulation": "blocks.{i}.adaLN_modulation.1",
        "final_layer.adaLN_modulation": "final_layer.adaLN_modulation.1",
    },
    LINEAR_ROWS,
)
DIFFUSERS = Layout(
    "diffusers",
    {
        "x_embedder.proj": "pos_embed.proj",
        "conditioning.timestep_embedder": "transformer_blocks.{*}.norm1.emb.timestep_embedder",
        "conditioning.class_embedder": "transformer_blocks.{*}.norm1.emb.class_embedder.embedding_table",
        "blocks.{i}.adaLN_modulation": "transformer_blocks.{i}.norm1.linear",
        "blocks.{i}.attn.to_q": "transformer_blocks.{i}.attn1.to_q",
        "blocks.{i}.attn.to_k": "transformer_blocks.{i}.attn1.to_k",
        "blocks.{i}.attn.to_v": "transformer_blocks.{i}.attn1.to_v",
        "blocks.{i}.attn.to_out": "transformer_blocks.{i}.attn1.to_out.0",
        "blocks.{i}.ff.fc1": "transformer_blocks.{i}.ff.net.0.proj",
        "blocks.{i}.ff.fc2": "transformer_blocks.{i}.ff.net.2",
        "final_layer.adaLN_modulation": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
)

# What must be in a file's keys, for some block {i}, for it to be tried as this layout.
ORIGINAL_MARKS = ("blocks.{i}.attn.qkv", "blocks.{i}.attn.kv")
DIFFUSERS_MARK = "transformer_blocks.{i}.norm1.emb.class_embedder"

# Config values of diffusers; others would change the function, and no released DiT has them.
DIFFUSERS_CONFIG = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    """A DiT in either layout, or a SiT where the hint says so, or None."""
    mark = next((mark for mark in (*ORIGINAL_MARKS, DIFFUSERS_MARK) if has_key(checkpoint, mark)), None)
    if mark is None or has_key(checkpoint, "blocks.{i}.cross_attn."):
        return None
    sit = hints.family == "sit"
    layout = DIFFUSERS if mark == DIFFUSERS_MARK else ORIGINAL
    if sit and layout is DIFFUSERS:
        return None
    table = f"{layout.name_of('conditioning.class_embedder')}.weight"
    if layout is ORIGINAL and table not in checkpoint.tensors:
        raise LitconvertError(
            f"{checkpoint.source}: has no class table ({table}): an unconditional DiT, which litconvert does not read, "
            "or a part of a checkpoint"
        )
    because = f"it has {mark.replace('{i}', '0')} and no cross-attention"
    config, unsure = _config(checkpoint, hints, layout)
    if sit:
        config |= {"prediction": "velocity", "data_timestep": 1 if hints.data_timestep is None else hints.data_timestep}
        if hints.data_timestep is None:
            unsure.append("data is at t = 1, as in SiT's own code; data_timestep=0 for code that runs the other way")
        because += ", and family=sit says that it is no DiT"
    elif layout is ORIGINAL and hints.family is None:
        unsure.append("read as DiT: SiT's checkpoints have the same keys and shapes; family=sit if it is one, else dit")
    return Reading(
        family="sit" if sit else "dit",
        layout="lit" if "linear" in config["attention"] else layout.name,
        because=because,
        config=config,
        origins=layout.origins(config),
        recomputed={"pos_embed": "pos_embed"} if layout is ORIGINAL and "pos_embed" in checkpoint.tensors else {},
        unsure=tuple(unsure),
        extra={name: "REPA's alignment heads" for name in checkpoint.tensors if name.startswith("projectors.")},
    )


def _recognise_sit(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    return recognise(checkpoint, hints) if hints.family == "sit" else None


def _config(checkpoint: Checkpoint, hints: Source, layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """The model's config from shapes, from diffusers' config.json and from hints; and what was assumed."""

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(checkpoint, layout.name_of(ours), dimensions)

    refuse_hints(checkpoint, hints, "a model of classes", "interpolation_scale")
    if hints.family != "sit":
        refuse_hints(checkpoint, hints, "a DiT", "data_timestep")
    theirs = (checkpoint.config or {}) if layout is DIFFUSERS else {}
    num_layers = count_layers(checkpoint, "transformer_blocks" if layout is DIFFUSERS else "blocks")
    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    rows = shape("conditioning.class_embedder.weight", 2)[0]
    out_channels = shape("final_layer.linear.weight", 2)[0] // patch_size**2
    unsure: list[str] = []
    check_config(
        checkpoint,
        theirs,
        fixed=DIFFUSERS_CONFIG,
        tensors={
            "num_layers": num_layers,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
        },
        hints={
            "num_attention_heads": hints.num_attention_heads,
            "sample_size": hints.sample_size,
            "num_embeds_ada_norm": hints.num_classes,
        },
    )
    num_classes = _num_classes(checkpoint, hints.num_classes or theirs.get("num_embeds_ada_norm"), rows, unsure)
    attention: dict[str, Any] = {"attention": ["softmax"] * num_layers}
    if layout is ORIGINAL:
        attention = attention_config(checkpoint, hints, hidden_size, num_layers, unsure)
    told_heads = theirs.get("num_attention_heads")
    if set(attention["attention"]) == {"linear"}:  # no softmax head anywhere, so nothing to ask for
        told_heads = told_heads or attention["linear_num_heads"]
    if layout is DIFFUSERS and hints.timestep_freq_shift is None and hints.norm_eps is None:
        unsure.append(
            "read with DiT's own timestep_freq_shift=0 and norm_eps=1e-6, as the released weights were trained: "
            "timestep_freq_shift=... norm_eps=... if they differ"
        )
    return {
        "sample_size": sample_size(checkpoint, hints, hidden_size, patch_size, theirs.get("sample_size")),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads(checkpoint, hints, hidden_size, told_heads, unsure),
        **attention,
        "num_classes": num_classes,
        "null_class": rows > num_classes,
        "mlp_ratio": shape("blocks.0.ff.fc1.weight", 2)[0] / hidden_size,
        "timestep_freq_shift": 0.0 if hints.timestep_freq_shift is None else hints.timestep_freq_shift,
        "norm_eps": 1e-6 if hints.norm_eps is None else hints.norm_eps,
    }, unsure


def _num_classes(checkpoint: Checkpoint, told: int | None, rows: int, unsure: list[str]) -> int:
    """Classes, not counting the null class: as told, or one fewer than the class table has rows, which is assumed.

    Raises UsageError for a number that the table cannot be of.
    """
    if told is None and rows == 1:
        told = 1
        unsure.append("the class table's one row is read as one class without a null class, so without guidance")
    if told is None:
        told = rows - 1
        unsure.append(
            f"the class table's {rows} rows are read as {told} classes and a null class: num_classes={rows} for none"
        )
    if told not in (rows, rows - 1):
        fits = f"{rows - 1} (with a null class) or {rows} (without)" if rows > 1 else "1"
        raise UsageError(
            f"{checkpoint.source}: num_classes is {told}, but the class table has {rows} rows; give {fits}"
        )
    return told


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of diffusers' DiTTransformer2DModel for a softmax DiT.

    Raises UsageError for a class table that diffusers' model cannot hold.
    """
    if not config.null_class:
        raise UsageError("diffusers' DiT always has a null class, and this model has none; write it with --to original")
    return {
        "_class_name": "DiTTransformer2DModel",
        **{key: getattr(config, key) for key in ("num_attention_heads", "num_layers", "sample_size", "patch_size")},
        "attention_head_dim": config.hidden_size // config.num_attention_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm_eps,
        **DIFFUSERS_CONFIG,
    }


DIT = Family("dit", "DiT", recognise, {"original": ORIGINAL, "diffusers": DIFFUSERS}, diffusers_config)
SIT = Family("sit", "SiT", _recognise_sit, {"original": ORIGINAL})
