"""What families read off headers: shapes, the number of layers, heads, the size of the latent; or what they ask for."""

import math
import re
from collections.abc import Mapping
from typing import Any

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Source

LINEAR_HINTS = ("linear_num_heads", "linear_kernel", "linear_eps")
# Head counts of the published sizes: S, B, L, XL. D / 64 is no rule (XL has 72), so any other width asks.
HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}


def has_key(checkpoint: Checkpoint, pattern: str) -> bool:
    """Whether some key begins like the pattern, in which `{i}` stands for any number."""
    found = re.compile(re.escape(pattern).replace(r"\{i\}", r"\d+"))
    return any(map(found.match, checkpoint.tensors))


def shape_of(checkpoint: Checkpoint, name: str, dimensions: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises LitconvertError when it is missing or has another number of dimensions.
    """
    info = checkpoint.tensors.get(name)
    if info is None:
        raise LitconvertError(f"{checkpoint.source}: {name} is missing; use the complete, unmodified checkpoint")
    if len(info.shape) != dimensions or 0 in info.shape:
        raise LitconvertError(
            f"{checkpoint.source}: {name} has shape {info.shape}, expected {dimensions} dimensions, "
            "none of them 0; use the complete, unmodified checkpoint"
        )
    return info.shape


def refuse_hints(checkpoint: Checkpoint, hints: Source, what: str, *names: str) -> None:
    """Raise UsageError for hints that mean nothing for `what` this is."""
    given = [name for name in names if getattr(hints, name) is not None]
    if given:
        raise UsageError(f"{checkpoint.source}: {given[0]} means nothing for {what}; leave it out")


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """One more than the highest layer among keys `prefix.N.`.

    Raises LitconvertError for a number that no file of so many tensors can mean.
    """
    keys = checkpoint.tensors
    found = [match for key in keys if (match := re.match(rf"{re.escape(prefix)}\.(\d{{1,99}})\.", key))]
    if not found:
        raise LitconvertError(
            f"{checkpoint.source}: has no numbered layers {prefix}.0, ...; use the complete, unmodified checkpoint"
        )
    last = max(found, key=lambda match: int(match.group(1)))
    if int(last.group(1)) >= len(keys):
        raise LitconvertError(
            f"{checkpoint.source}: {last.string[:80]} names a layer beyond the file's {len(keys)} tensors; "
            "use the complete, unmodified checkpoint"
        )
    return 1 + int(last.group(1))


def num_attention_heads(
    checkpoint: Checkpoint, hints: Source, hidden_size: int, told: int | None, unsure: list[str]
) -> int:
    """Softmax heads: from the hint, from `told` (a config.json), or of a published width, which adds to `unsure`.

    Raises UsageError, naming the hint, when nothing tells.
    """
    heads = hints.num_attention_heads or told
    if heads is None and hidden_size in HEADS_OF_WIDTH:
        heads = HEADS_OF_WIDTH[hidden_size]
        unsure.append(
            f"{heads} attention heads, as the published models of width {hidden_size} have: num_attention_heads=N if "
            "it was trained with others"
        )
    if heads is None:
        raise UsageError(
            f"{checkpoint.source}: the number of attention heads is missing: the file does not tell it, and width "
            f"{hidden_size} is none of the published sizes ({', '.join(map(str, HEADS_OF_WIDTH))}). "
            "Give num_attention_heads=N (--num-attention-heads N, or source.num_attention_heads in the recipe; "
            "for another teacher distill.teacher.num_attention_heads)"
        )
    if hidden_size % heads:
        raise UsageError(
            f"{checkpoint.source}: num_attention_heads={heads} does not divide the width {hidden_size}; "
            "give one that does"
        )
    return heads


def sample_size(
    checkpoint: Checkpoint,
    hints: Source,
    hidden_size: int,
    patch_size: int,
    told: int | None = None,
    *,
    used: bool = True,
) -> int:
    """Side of the latent, from a stored position embedding, the hint or `told` (a config.json).

    A position embedding that the model does not use (`used`) contradicts neither.

    Raises UsageError, naming the hint, when nothing tells.
    """
    stored = checkpoint.tensors.get("pos_embed")
    if stored is not None and (len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] != hidden_size):
        raise LitconvertError(
            f"{checkpoint.source}: pos_embed has shape {stored.shape}, expected (1, positions, {hidden_size})"
        )
    told = hints.sample_size or told
    if stored is None:
        if told is None:
            raise UsageError(
                f"{checkpoint.source}: the size of the latent is missing: there is no position embedding to tell it. "
                "Give sample_size=N (--sample-size N, or source.sample_size in the recipe): an eighth of the image's "
                "side, so 32 for 256px models, 64 for 512px, 128 for 1024px"
            )
        if told % patch_size:
            raise UsageError(
                f"{checkpoint.source}: sample_size={told} is no multiple of the patch size {patch_size}; give one"
            )
        return int(told)
    side = math.isqrt(stored.shape[1])
    if side * side != stored.shape[1]:
        raise LitconvertError(
            f"{checkpoint.source}: pos_embed has {stored.shape[1]} positions, which is not a square grid"
        )
    if told is not None and not used and told % patch_size == 0:
        return int(told)
    if told is not None and told != side * patch_size:
        raise UsageError(
            f"{checkpoint.source}: sample_size={told}, but pos_embed has {stored.shape[1]} positions, "
            f"so it is {side * patch_size}; leave sample_size out"
        )
    return side * patch_size


def attention_config(
    checkpoint: Checkpoint, hints: Source, hidden_size: int, num_layers: int, unsure: list[str]
) -> dict[str, Any]:
    """The kind of every layer of an original layout, and what its tensors tell of linear and KV-compressed ones.

    Softmax layers have `attn.qkv`; KV-compressed ones `attn.sr` beside it (PixArt-Sigma); linear ones `attn.q` and
    `attn.kv`, and their heads follow from the convolution `attn.dwc`, which all heads share (LiT's public layout).
    Adds to `unsure` what had to be assumed.

    Raises UsageError, naming the hint, for linear layers without a convolution to tell their heads.
    """
    tensors = checkpoint.tensors
    kinds = []
    for layer in range(num_layers):
        names = {kind: f"blocks.{layer}.attn.{key}.weight" for kind, key in (("linear", "kv"), ("kv_compress", "sr"))}
        kinds.append(next((kind for kind, name in names.items() if name in tensors), "softmax"))
    config: dict[str, Any] = {"attention": kinds}
    if "kv_compress" in kinds:
        config["kv_compress_factor"] = shape_of(
            checkpoint, f"blocks.{kinds.index('kv_compress')}.attn.sr.weight", dimensions=4
        )[-1]
    if "linear" not in kinds:
        refuse_hints(checkpoint, hints, "a model without linear layers", *LINEAR_HINTS)
        return config
    for name, assumed in (("linear_kernel", "relu"), ("linear_eps", 1e-6)):
        if getattr(hints, name) is None:
            unsure.append(
                f"the file does not tell {name}, which is taken for LiT's {assumed}: {name}=... if it differs"
            )
    convolution = f"blocks.{kinds.index('linear')}.attn.dwc.weight"
    heads = hints.linear_num_heads
    if convolution in tensors:
        channels, _, _, conv_size = shape_of(checkpoint, convolution, dimensions=4)
        told = hidden_size // channels
        if heads not in (None, told):
            raise UsageError(
                f"{checkpoint.source}: linear_num_heads={heads}, but {convolution} has {channels} channels, so it is "
                f"{told}; leave linear_num_heads out"
            )
        heads, config["linear_conv_size"] = told, conv_size
    elif heads is None:
        raise UsageError(
            f"{checkpoint.source}: the number of linear heads is missing: there is no convolution to tell it. "
            "Give linear_num_heads=N (--set source.linear_num_heads=N)"
        )
    else:
        config["linear_conv_size"] = 0
    return {
        **config,
        "linear_num_heads": heads,
        "linear_kernel": hints.linear_kernel or "relu",
        "linear_eps": hints.linear_eps or 1e-6,
    }


def check_config(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any],
    tensors: Mapping[str, int],
    hints: Mapping[str, int | None],
) -> None:
    """Refuse a diffusers config.json that contradicts the tensors, the hints, or (`fixed`) what the family is."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UsageError(
                f"{checkpoint.source}: config.json has {key}={config[key]!r}; litconvert reads this family with "
                f"{value!r} only"
            )
    for key, number in {**tensors, **hints}.items():
        told = config.get(key)
        if told is not None and (type(told) is not int or told < 1):
            raise LitconvertError(
                f"{checkpoint.source}: config.json has {key}={told!r}, not a number from 1; download it again"
            )
        if told is None or number is None or told == number:
            continue
        if key in hints:
            raise UsageError(
                f"{checkpoint.source}: config.json has {key}={told}, but the hint says {number}; leave the hint out"
            )
        raise LitconvertError(
            f"{checkpoint.source}: config.json has {key}={told}, but the tensors have {number}; "
            "use the complete, unmodified checkpoint"
        )
