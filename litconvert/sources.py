"""A checkpoint that is recognised: its values, checked, and the model they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from litconvert.checkpoints import Checkpoint, open_checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families import Reading, recognise
from litconvert.modeling_lit import LiTTransformer2DModel, sincos_position_embedding
from litconvert.recipe import Recipe, Source, resolve
from litconvert.shapes import empty_model, full_config, model_tensors


@dataclass(frozen=True)
class OpenSource:
    """A recognised checkpoint: its headers and what they mean."""

    checkpoint: Checkpoint
    reading: Reading

    def values(self, name: str) -> Tensor:
        """A model tensor's values from the source, checked: finite, and copies equal.

        Raises LitconvertError when they are not.
        """
        origin = self.reading.origins[name]
        first = self.checkpoint.read(origin.names[0])
        rows = first.shape[0] // origin.parts
        value = first[origin.part * rows : (origin.part + 1) * rows]
        if not torch.isfinite(value).all():
            raise LitconvertError(
                f"{self.checkpoint.source}: {origin.names[0]} holds NaN or infinite values; "
                "the checkpoint is broken: use another one (or another weights= set)"
            )
        for name_of_copy in origin.names[1:]:
            copy = self.checkpoint.read(name_of_copy)
            if copy.dtype != first.dtype or not torch.equal(copy, first):
                raise LitconvertError(
                    f"{self.checkpoint.source}: {origin.names[0]} and {name_of_copy} differ. The layout stores one "
                    "embedder in every block, so they must be equal; a model fine-tuned with separate copies cannot be "
                    "read as DiT"
                )
        return value

    def check_recomputed(self) -> None:
        """Refuse a stored position embedding that the formula does not give: dropping it would change the function."""
        for name in self.reading.recomputed:
            stored = self.checkpoint.read(name).float()
            config = self.reading.config
            side = config["sample_size"] // config["patch_size"]
            formula = sincos_position_embedding(config["hidden_size"], (side, side), side, torch.device("cpu"))
            difference = (stored - formula).abs().max().item() if stored.shape == formula.shape else float("inf")
            if not difference < 4e-3:  # bfloat16 rounding of values up to 1
                raise LitconvertError(
                    f"{self.checkpoint.source}: {name} differs from the fixed sine-cosine embedding by "
                    f"{difference:.2g}; a trained one is not supported: use a checkpoint with the fixed one"
                )

    def dtype(self) -> torch.dtype:
        """The one dtype that holds every weight."""
        result = None
        for origin in self.reading.origins.values():
            found = self.checkpoint.tensors[origin.names[0]].dtype
            result = found if result is None else torch.promote_types(result, found)
        assert result is not None
        return result


def open_source(source: Source, weights: str = "auto") -> OpenSource:
    """Open and recognise a recipe's source: headers only."""
    if source.path is None:
        raise UsageError("no source is named: give SRC, or source.path in the recipe")
    checkpoint = open_checkpoint(source.path, file=source.file, weights=weights)
    reading = recognise(checkpoint, source)
    return OpenSource(checkpoint, Reading(**{**reading.__dict__, "config": full_config(reading.config)}))


def read_model(source: OpenSource, dtype: torch.dtype | None = None) -> LiTTransformer2DModel:
    """The source's own model with its weights, in eval mode."""
    source.check_recomputed()
    dtype = dtype or source.dtype()
    model = empty_model(source.reading.config)
    state = {name: source.values(name).to(dtype) for name in source.reading.origins}
    # Values mapped from disk are cloned: the file may change or vanish while the model lives.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    model.eval().requires_grad_(True)
    return model


def check_values(source: OpenSource) -> list[str]:
    """Read every value: finite, embedder copies equal, position embedding as the formula; and what looks odd.

    Raises LitconvertError for what cannot be used.
    """
    source.check_recomputed()
    zero = [name for name in source.reading.origins if not source.values(name).any()]
    facts = ["every value is finite, copies are equal, the position embedding is the fixed one"]
    if zero:
        facts.append(f"{len(zero)} tensors are all zero ({', '.join(zero[:3])}): is the model trained?")
    return facts


def describe(source: OpenSource, facts: Sequence[str] = ()) -> dict[str, Any]:
    """What a checkpoint is, as plain data."""
    checkpoint, reading = source.checkpoint, source.reading
    return {
        "path": checkpoint.source,
        "family": reading.family,
        "layout": reading.layout,
        "because": reading.because,
        "weights": checkpoint.weights,
        "sets": list(checkpoint.sets),
        "revision": checkpoint.revision,
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "parameters": sum(info.numel for info in model_tensors(reading.config).values()),
        "dtype": str(source.dtype()).removeprefix("torch."),
        "config": reading.config,
        "unsure": list(reading.unsure),
        "values": list(facts),
    }


def load(
    source: str | Path, *, recipe: str | None = None, weights: str | None = None, **hints: Any
) -> LiTTransformer2DModel:
    """Load any recognised checkpoint as it is: softmax layers stay softmax.

    Args:
        source: file, folder, Hub id or `asset:NAME`.
        recipe: name or path of a recipe whose `source` section carries hints.
        weights: `ema` or `model` of a training checkpoint; None: EMA if present, else the only set.
        hints: keys of a recipe's `source` section, such as num_attention_heads=6.

    Returns: the model in eval mode, in the dtype of the source.

    Raises UsageError when a hint is missing or unknown, LitconvertError when the checkpoint cannot be read whole.
    """
    resolved = resolve(recipe).recipe if recipe else Recipe()
    known = [name for name in Source.model_fields if name != "path"]
    for name in hints:
        if name not in known:
            raise UsageError(f"unknown hint {name!r}{did_you_mean(name, known)}; hints are {', '.join(known)}")
    try:
        merged = Source.model_validate({**resolved.source.model_dump(), **hints, "path": str(source)}, strict=True)
    except ValidationError as error:
        problems = "; ".join(f"hint {problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise UsageError(f"{source}: {problems}") from error
    return read_model(open_source(merged, weights or resolved.inherit.weights))
