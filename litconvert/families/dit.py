"""DiT: class-conditional, adaLN-zero. Reads facebookresearch/DiT's layout and diffusers' DiTTransformer2DModel."""

import math
import re
from collections.abc import Mapping
from typing import Any

from litconvert.checkpoints import Checkpoint
from litconvert.errors import LitconvertError, UsageError
from litconvert.families import Origin, Reading
from litconvert.recipe import Source

# Head counts of the published sizes: S, B, L, XL. D / 64 is no rule (XL has 72), so any other width asks.
HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}

# Ours, the original's, diffusers'. {i}: block; [n/3]: the n-th third of the rows; {*}: a copy in every block.
KEYS = (
    ("x_embedder.proj", "x_embedder.proj", "pos_embed.proj"),
    (
        "conditioning.timestep_embedder.linear_1",
        "t_embedder.mlp.0",
        "transformer_blocks.{*}.norm1.emb.timestep_embedder.linear_1",
    ),
    (
        "conditioning.timestep_embedder.linear_2",
        "t_embedder.mlp.2",
        "transformer_blocks.{*}.norm1.emb.timestep_embedder.linear_2",
    ),
    (
        "conditioning.class_embedder",
        "y_embedder.embedding_table",
        "transformer_blocks.{*}.norm1.emb.class_embedder.embedding_table",
    ),
    ("blocks.{i}.adaLN_modulation", "blocks.{i}.adaLN_modulation.1", "transformer_blocks.{i}.norm1.linear"),
    ("blocks.{i}.attn.to_q", "blocks.{i}.attn.qkv[0/3]", "transformer_blocks.{i}.attn1.to_q"),
    ("blocks.{i}.attn.to_k", "blocks.{i}.attn.qkv[1/3]", "transformer_blocks.{i}.attn1.to_k"),
    ("blocks.{i}.attn.to_v", "blocks.{i}.attn.qkv[2/3]", "transformer_blocks.{i}.attn1.to_v"),
    ("blocks.{i}.attn.to_out", "blocks.{i}.attn.proj", "transformer_blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.ff.fc1", "blocks.{i}.mlp.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
    ("blocks.{i}.ff.fc2", "blocks.{i}.mlp.fc2", "transformer_blocks.{i}.ff.net.2"),
    ("final_layer.adaLN_modulation", "final_layer.adaLN_modulation.1", "proj_out_1"),
    ("final_layer.linear", "final_layer.linear", "proj_out_2"),
)
LAYOUTS = {"original": 1, "diffusers": 2}

# What must be in a file's keys, for some block {i}, for it to be tried as this layout.
MARKS = {"original": "blocks.{i}.attn.qkv", "diffusers": "transformer_blocks.{i}.norm1.emb.class_embedder"}

# Config values of diffusers; others would change the function, and no released DiT has them.
DIFFUSERS_CONFIG = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    """A DiT in either layout, or None."""
    keys = checkpoint.tensors
    patterns = {layout: re.compile(re.escape(mark).replace(r"\{i\}", r"\d+")) for layout, mark in MARKS.items()}
    layout = next((name for name, pattern in patterns.items() if any(map(pattern.match, keys))), None)
    if layout is None or any(".cross_attn." in key for key in keys):
        return None
    column = LAYOUTS[layout]
    num_layers = _count_layers(checkpoint, "blocks" if layout == "original" else "transformer_blocks")
    origins = {}
    for row in KEYS:
        ours, theirs = row[0], row[column]
        suffixes = ("weight",) if ours.endswith("class_embedder") else ("weight", "bias")
        for block in range(num_layers) if "{i}" in ours else (None,):
            for suffix in suffixes:
                origins[f"{_fill(ours, block)}.{suffix}"] = _origin(theirs, block, num_layers, suffix)
    config, unsure = _config(checkpoint, hints, layout, origins, num_layers)
    return Reading(
        family="dit",
        layout=layout,
        because=f"it has {_fill(MARKS[layout], 0)} and no cross-attention",
        config=config,
        origins=origins,
        recomputed={"pos_embed": "pos_embed"} if layout == "original" and "pos_embed" in keys else {},
        unsure=tuple(unsure),
    )


def _fill(pattern: str, block: int | None) -> str:
    return pattern.replace("{i}", str(block))


def _origin(pattern: str, block: int | None, num_layers: int, suffix: str) -> Origin:
    part, parts = 0, 1
    if match := re.search(r"\[(\d)/(\d)\]$", pattern):
        part, parts = int(match.group(1)), int(match.group(2))
        pattern = pattern[: match.start()]
    copies = range(num_layers) if "{*}" in pattern else (0,)
    names = tuple(f"{_fill(pattern.replace('{*}', str(copy)), block)}.{suffix}" for copy in copies)
    return Origin(names, part, parts)


def _count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    keys = checkpoint.tensors
    found = [match for key in keys if (match := re.match(rf"{prefix}\.(\d{{1,9}})\.", key))]
    last = max(found, key=lambda match: int(match.group(1)))
    if int(last.group(1)) >= len(keys):
        raise LitconvertError(
            f"{checkpoint.source}: {last.string} names a layer beyond the file's {len(keys)} tensors; "
            "use the complete, unmodified checkpoint"
        )
    return 1 + int(last.group(1))


def _config(
    checkpoint: Checkpoint, hints: Source, layout: str, origins: Mapping[str, Origin], num_layers: int
) -> tuple[dict[str, Any], list[str]]:
    """The model's config from shapes, from diffusers' config.json and from hints; and what was assumed."""

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        name = origins[ours].names[0]
        info = checkpoint.tensors.get(name)
        if info is None:
            raise LitconvertError(f"{checkpoint.source}: {name} is missing; use the complete, unmodified checkpoint")
        if len(info.shape) != dimensions or 0 in info.shape:
            raise LitconvertError(
                f"{checkpoint.source}: {name} has shape {info.shape}, expected {dimensions} dimensions, "
                "none of them 0; use the complete, unmodified checkpoint"
            )
        return info.shape

    theirs = (checkpoint.config or {}) if layout == "diffusers" else {}
    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    rows = shape("conditioning.class_embedder.weight", 2)[0]
    out_channels = shape("final_layer.linear.weight", 2)[0] // patch_size**2
    unsure = []
    if layout == "original" and hints.family is None:
        unsure.append(
            "read as DiT: SiT's checkpoints have the same keys and shapes, and litconvert does not read SiT yet "
            "(family=dit says that it is DiT)"
        )
    _check_config(
        checkpoint.source,
        theirs,
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

    num_classes = hints.num_classes or theirs.get("num_embeds_ada_norm")
    if num_classes is None:
        num_classes = rows - 1
        unsure.append(
            f"the class table's {rows} rows are read as {num_classes} classes and a null class: "
            f"num_classes={rows} for none"
        )
    if num_classes not in (rows, rows - 1):
        raise UsageError(
            f"{checkpoint.source}: num_classes is {num_classes}, but the class table has {rows} rows; "
            f"give {rows - 1} (with a null class) or {rows} (without)"
        )

    num_heads = hints.num_attention_heads or theirs.get("num_attention_heads") or HEADS_OF_WIDTH.get(hidden_size)
    if num_heads is None:
        raise UsageError(
            f"{checkpoint.source}: the number of attention heads is missing: the file does not tell it, and width "
            f"{hidden_size} is none of the published sizes ({', '.join(map(str, HEADS_OF_WIDTH))}). "
            "Give num_attention_heads=N (--num-attention-heads N, or source.num_attention_heads in the recipe; "
            "for another teacher distill.teacher.num_attention_heads)"
        )
    if hidden_size % num_heads:
        raise UsageError(
            f"{checkpoint.source}: num_attention_heads={num_heads} does not divide the width {hidden_size}; "
            "give one that does"
        )

    timestep_freq_shift = 0.0 if hints.timestep_freq_shift is None else hints.timestep_freq_shift
    norm_eps = 1e-6 if hints.norm_eps is None else hints.norm_eps
    if layout == "diffusers" and hints.timestep_freq_shift is None and hints.norm_eps is None:
        unsure.append(
            "read with DiT's own timestep_freq_shift=0 and norm_eps=1e-6, as the released weights were trained: "
            "timestep_freq_shift=1 norm_eps=1e-5 for weights trained in diffusers"
        )
    return {
        "sample_size": _sample_size(checkpoint, hints, hidden_size, patch_size, theirs),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention": ["softmax"] * num_layers,
        "num_classes": num_classes,
        "null_class": rows > num_classes,
        "mlp_ratio": shape("blocks.0.ff.fc1.weight", 2)[0] / hidden_size,
        "timestep_freq_shift": timestep_freq_shift,
        "norm_eps": norm_eps,
    }, unsure


def _check_config(
    source: str, theirs: Mapping[str, Any], *, tensors: Mapping[str, int], hints: Mapping[str, int | None]
) -> None:
    """Refuse a diffusers config.json that contradicts the tensors, the hints, or what a DiT is."""
    for key, value in DIFFUSERS_CONFIG.items():
        if theirs.get(key, value) != value:
            raise UsageError(
                f"{source}: config.json has {key}={theirs[key]!r}; litconvert reads DiT with {value!r} only"
            )
    for key, number in {**tensors, **hints}.items():
        told = theirs.get(key)
        if told is not None and (type(told) is not int or told < 1):
            raise LitconvertError(f"{source}: config.json has {key}={told!r}, not a number from 1; download it again")
        if told is None or number is None or told == number:
            continue
        if key in hints:
            raise UsageError(f"{source}: config.json has {key}={told}, but the hint says {number}; leave the hint out")
        raise LitconvertError(
            f"{source}: config.json has {key}={told}, but the tensors have {number}; "
            "use the complete, unmodified checkpoint"
        )


def _sample_size(
    checkpoint: Checkpoint, hints: Source, hidden_size: int, patch_size: int, theirs: Mapping[str, Any]
) -> int:
    """Side of the latent, from the position embedding, diffusers' config or the hint."""
    stored = checkpoint.tensors.get("pos_embed")
    if stored is not None and (len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] != hidden_size):
        raise LitconvertError(
            f"{checkpoint.source}: pos_embed has shape {stored.shape}, expected (1, positions, {hidden_size})"
        )
    told = hints.sample_size or theirs.get("sample_size")
    if stored is None:
        if told is None:
            raise UsageError(
                f"{checkpoint.source}: the size of the latent is missing: there is no position embedding to tell it. "
                "Give sample_size=N (--sample-size N, or source.sample_size in the recipe), 32 for 256px models"
            )
        return int(told)
    side = math.isqrt(stored.shape[1])
    if side * side != stored.shape[1]:
        raise LitconvertError(
            f"{checkpoint.source}: pos_embed has {stored.shape[1]} positions, which is not a square grid"
        )
    if told is not None and told != side * patch_size:
        raise UsageError(
            f"{checkpoint.source}: sample_size={told}, but pos_embed has {stored.shape[1]} positions, "
            f"so it is {side * patch_size}; leave sample_size out"
        )
    return side * patch_size
