"""A checkpoint that is recognised: its values, checked, and the model they make."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from litconvert.checkpoints.checkpoint import RUN_INDEX, Checkpoint, Extent
from litconvert.checkpoints.opening import open_checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families.family import Reading
from litconvert.families.registry import families, recognise
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import count_parameters, position_embedding
from litconvert.recipe.packaged import asset_of
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe, Source
from litconvert.runs.directory import model_of

if TYPE_CHECKING:
    from litconvert.model.modeling_lit import LiTTransformer2DModel

# Interpolation scales to name when a stored position embedding is another's: those of the released checkpoints.
KNOWN_INTERPOLATION = (0.5, 1.0, 2.0, 4.0)

# Numbers that are checked, cast and written at a time: they stay in the processor's cache between the steps.
PIECE = 1 << 19


def extremes_of(value: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; NaN where one is NaN. Twenty times faster than asking each value."""
    if value.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(value)
    return low.item(), high.item()


@dataclass(frozen=True)
class OpenSource:
    """A recognised checkpoint: its headers and what they mean.

    Attributes:
        reading: what its family read off it.
        config: of the model that computes its function.
    """

    checkpoint: Checkpoint
    reading: Reading
    config: ModelConfig

    @property
    def nbytes(self) -> int:
        """Of the checkpoint's tensors, as they are stored."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    def values(self, name: str) -> Tensor:
        """A model tensor's values from the source, mapped from disk where the format allows, and checked.

        Raises LitconvertError for values that are not finite, and for copies that are not equal.
        """
        value = self._finite(name, self._mapped(name))
        first, *copies = self.reading.origins[name].names
        for name_of_copy in copies:
            one, other = self.checkpoint.read(first), self.checkpoint.read(name_of_copy)
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise LitconvertError(
                    f"{self.checkpoint.source}: {first} and {name_of_copy} differ. The layout stores one "
                    "embedder in every block, so they must be equal; a model fine-tuned with separate copies cannot be "
                    "read as DiT"
                )
        return value

    def checked(self, name: str, dtype: torch.dtype) -> Extent | Iterator[Tensor]:
        """The same values for writing as `dtype`, in which they must be finite too: a checked run of a file where that
        holds them as they are, and otherwise pieces (n,), row-major, each checked as it is taken."""
        extent = self.extent(name)
        if len(self.reading.origins[name].names) > 1 or (extent is not None and extent.dtype == dtype):
            self.values(name)
        if extent is not None and extent.dtype == dtype:
            return extent
        pieces = self._mapped(name).contiguous().view(-1).split(PIECE)
        return (self._finite(name, piece, dtype) for piece in pieces)

    def _mapped(self, name: str) -> Tensor:
        """Values as they are on disk."""
        origin = self.reading.origins[name]
        whole = self.checkpoint.read(origin.names[0])
        rows = whole.shape[0] // origin.parts
        return whole[origin.part * rows : (origin.part + 1) * rows]

    def _finite(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values, none of which may be NaN or infinite as it is, or become so in `dtype`."""
        extremes = extremes_of(values)
        if not all(map(math.isfinite, extremes)):
            raise LitconvertError(
                f"{self.checkpoint.source}: {self.reading.origins[name].names[0]} holds NaN or infinite values; "
                "the checkpoint is broken: use another one (or another weights= set)"
            )
        # Rounding keeps the order, so no other value leaves the range before these.
        if dtype is not None and not torch.tensor(extremes, dtype=values.dtype).to(dtype).isfinite().all():
            raise LitconvertError(
                f"{name} holds values up to {max(map(abs, extremes)):.3g}, beyond "
                f"{str(dtype).removeprefix('torch.')}; set student.dtype=bfloat16 or float32"
            )
        return values

    def extent(self, name: str) -> Extent | None:
        """Where a model tensor's bytes lie in the source's files; None where they are not one run."""
        origin = self.reading.origins[name]
        whole = self.checkpoint.extent(origin.names[0])
        if whole is None or origin.parts == 1:
            return whole
        nbytes = whole.nbytes // origin.parts
        return Extent(whole.path, whole.offset + origin.part * nbytes, nbytes, whole.dtype)

    def check_recomputed(self) -> tuple[str, ...]:
        """Refuse a stored position embedding that the formula does not give: dropping it would change the function.

        PixArt's own code does not use a stored one, which then is said: returns such remarks.
        """
        remarks = []
        for name in self.reading.recomputed:
            stored, config = self.checkpoint.read(name).float(), self.config
            difference = _difference(stored, position_embedding(config))
            if difference is None:
                continue
            if not config.reads_captions:
                raise LitconvertError(
                    f"{self.checkpoint.source}: {name} differs from the fixed sine-cosine embedding by "
                    f"{difference:.2g}; a trained one is not supported: use a checkpoint with the fixed one"
                )
            scales = [
                scale
                for scale in KNOWN_INTERPOLATION
                if _difference(stored, position_embedding(replace(config, interpolation_scale=scale))) is None
            ]
            what = f"that of interpolation_scale={scales[0]:g}" if scales else "another one"
            remarks.append(
                f"{name} in the file is {what}, and is not used, as in PixArt's own code; positions are those of "
                f"interpolation_scale={config.interpolation_scale:g}, which --set source.interpolation_scale changes"
            )
        return tuple(remarks)

    def dtype(self) -> torch.dtype:
        """The one dtype that holds every weight."""
        result = None
        for origin in self.reading.origins.values():
            found = self.checkpoint.tensors[origin.names[0]].dtype
            result = found if result is None else torch.promote_types(result, found)
        assert result is not None
        return result


def open_source(source: Source, weights: str = "auto") -> OpenSource:
    """Open and recognise a recipe's source: headers only. Of a run (RUN, RUN@STEP) that is the model it holds.

    An asset brings hints of its own, for those that are not given.
    """
    if source.path is None:
        raise UsageError("no source is named: give SRC, or source.path in the recipe")
    checkpoint = open_checkpoint(model_of(source.path, raw=weights == "model"), file=source.file, weights=weights)
    known = {key: value for key, value in asset_of(source.path).hints.items() if getattr(source, key) is None}
    reading = recognise(checkpoint, source.model_copy(update=known))
    return OpenSource(checkpoint, reading, ModelConfig.of(reading.config))


def open_source_of(recipe: Recipe) -> OpenSource:
    """A recipe's source, of which the set of weights is read that the recipe inherits."""
    return open_source(recipe.source, recipe.inherit.weights)


def open_named_teacher(recipe: Recipe, source: OpenSource) -> OpenSource:
    """Who teaches: the teacher that a recipe names, or else its source itself."""
    return source if recipe.distill.teacher is None else open_source(recipe.distill.teacher)


def open_teacher(recipe: Recipe) -> OpenSource:
    """What a student is held against: the source, or the teacher that is named where the source is linear already."""
    source = open_source_of(recipe)
    return open_named_teacher(recipe, source) if "linear" in source.config.attention else source


def open_student(folder: str | Path, weights: str = "auto") -> OpenSource:
    """A model directory of ours, or the checkpoint of a run: what it is stands in it, so no recipe is asked."""
    return open_source(Source(path=str(folder)), weights)


def _difference(stored: Tensor, formula: Tensor) -> float | None:
    """The largest difference of two position embeddings, None where it is rounding."""
    difference = (stored - formula).abs().max().item() if stored.shape == formula.shape else float("inf")
    return None if difference < 4e-3 else difference  # bfloat16 rounding of values up to 1


def read_model(source: OpenSource, dtype: torch.dtype | None = None) -> "LiTTransformer2DModel":
    """The source's own model with its weights, in eval mode."""
    from litconvert.model.modeling_lit import LiTTransformer2DModel

    source.check_recomputed()
    dtype = dtype or source.dtype()
    try:
        with torch.device("meta"):
            model: LiTTransformer2DModel = LiTTransformer2DModel(**source.config.values)
    except ValueError as error:
        raise UsageError(f"{source.checkpoint.source}: {error}") from error
    state = {name: source.values(name).to(dtype) for name in source.reading.origins}
    # Values mapped from disk are cloned: the file may change or vanish while the model lives.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    model.eval().requires_grad_(True)
    return model


@dataclass(frozen=True)
class Findings:
    """What reading every value showed.

    Attributes:
        facts: what holds.
        odd: what looks wrong, though it can be used.
        broken: why it cannot be used.
    """

    facts: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


def examine(source: OpenSource) -> Findings:
    """Read every value and say what looks wrong: NaN, copies that differ, an untrained model, a wrong position
    embedding, an EMA that equals the raw weights."""
    broken, zero = [], []
    remarks: tuple[str, ...] = ()
    try:
        remarks = source.check_recomputed()
    except LitconvertError as error:
        broken.append(str(error))
    for name in source.reading.origins:
        try:
            if not source.values(name).any():
                zero.append(name)
        except LitconvertError as error:
            broken.append(str(error))
    facts, odd = [], list(remarks)
    if not broken:
        facts.append("every value is finite, and what is stored twice is equal")
        if source.reading.recomputed and not remarks:
            facts.append("the position embedding is the fixed one")
    modulation = [name for name in zero if "adaLN_modulation" in name and name.endswith("weight")]
    if modulation:
        odd.append(
            f"the modulation of {len(modulation)} layers is all zero ({modulation[0]}): the model is not trained"
        )
    others = [name for name in zero if name not in modulation and not name.endswith("bias")]
    if others:
        odd.append(f"{len(others)} other weights are all zero ({', '.join(others[:3])}): is the model trained?")
    if {"ema", "model"} <= set(source.checkpoint.sets) and _equal_sets(source):
        odd.append("the EMA equals the raw weights: it was never updated, or training had not begun")
    return Findings(tuple(facts), tuple(odd), tuple(dict.fromkeys(broken)))


def _equal_sets(source: OpenSource) -> bool:
    """Whether a training checkpoint's EMA and raw weights are the same, tensor by tensor."""
    other = "model" if source.checkpoint.weights == "ema" else "ema"
    mine = source.checkpoint
    first = mine.files[0]
    theirs = open_checkpoint(str(first.parent if first.name == RUN_INDEX else first), weights=other)
    return mine.tensors == theirs.tensors and all(
        torch.equal(mine.read(name), theirs.read(name)) for name in mine.tensors
    )


def _extra(reading: Reading) -> list[str]:
    """Tensors of training alone, by what they are of."""
    whats = list(reading.extra.values())
    return [f"{what} ({whats.count(what)} tensors), of training alone" for what in dict.fromkeys(whats)]


def describe(source: OpenSource, findings: Findings | None = None) -> dict[str, Any]:
    """What a checkpoint is, as plain data; `values` where they were read."""
    checkpoint, reading = source.checkpoint, source.reading
    known = families()
    return {
        "path": checkpoint.source,
        "family": reading.family,
        "title": known[reading.family].title if reading.family in known else reading.family,
        "layout": reading.layout,
        "because": reading.because,
        "weights": checkpoint.weights,
        "sets": list(checkpoint.sets),
        "set_aside": [*checkpoint.set_aside, *_extra(reading)],
        "revision": checkpoint.revision,
        "download_bytes": checkpoint.download_bytes,
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "parameters": count_parameters(source.config),
        "dtype": str(source.dtype()).removeprefix("torch."),
        "config": source.config.values,
        "unsure": list(reading.unsure),
        "values": None if findings is None else {key: list(value) for key, value in vars(findings).items()},
    }


def load(
    source: str | Path, *, recipe: str | None = None, weights: str | None = None, **hints: Any
) -> "LiTTransformer2DModel":
    """Load any recognised checkpoint as it is: softmax layers stay softmax.

    Args:
        source: file, folder, Hub id or `asset:NAME`.
        recipe: name or path of a recipe whose `source` section carries hints.
        weights: `ema` or `model` of a training checkpoint; None: EMA if present, else the only set.
        hints: keys of a recipe's `source` section, such as num_attention_heads=6.

    Returns: the model in eval mode, in the dtype of the source.

    Raises UsageError when a hint is missing or unknown, LitconvertError when the checkpoint cannot be read whole.
    """
    resolved = resolve(recipe).recipe
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
