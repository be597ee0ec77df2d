"""The families of checkpoints: one file each, and what each owes.

A family owes
1. `recognise(checkpoint, hints)`: None when the keys are not its own; otherwise a `Reading`, or a UsageError that names
   the hint which settles what shapes cannot tell;
2. a key table for each layout it reads, so that every source tensor is mapped or refused, never ignored;
3. tests on a checkpoint made on disk: its outputs against an independent implementation, and its refusals.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litconvert.checkpoints import Checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.recipe import Source


@dataclass(frozen=True)
class Origin:
    """Where a model tensor is in the source: a tensor, or a run of its rows.

    Attributes:
        names: the source tensors; more than one where the source holds copies, which must be equal.
        part, parts: which of how many equal runs of rows, for fused projections.
    """

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Reading:
    """A checkpoint, understood.

    Attributes:
        family, layout: what it is.
        because: why it was recognised as that, a clause.
        config: of the LiTTransformer2DModel that computes the source's function.
        origins: for every tensor of that model, where it is in the source.
        recomputed: source tensors that a formula replaces, each with the name of the formula's result.
        unsure: what shapes cannot tell and was assumed, each with the hint that settles it.
    """

    family: str
    layout: str
    because: str
    config: dict[str, Any]
    origins: Mapping[str, Origin]
    recomputed: Mapping[str, str]
    unsure: tuple[str, ...]


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading:
    """Ask every family in turn.

    Raises UsageError for an unknown architecture and for what a hint must settle; LitconvertError for missing, extra
    and misshapen tensors.
    """
    from litconvert.families import dit, litconvert_model

    readers: dict[str, Callable[[Checkpoint, Source], Reading | None]] = {
        "litconvert": litconvert_model.recognise,
        "dit": dit.recognise,
    }
    for family, reader in readers.items():
        if hints.family not in (None, family):
            continue
        reading = reader(checkpoint, hints)
        if reading is not None:
            check_tensors(checkpoint, reading)
            return reading
    some = ", ".join(list(checkpoint.tensors)[:4])
    what = f"not of family {hints.family}" if hints.family else "unknown architecture"
    raise UsageError(
        f"{checkpoint.source}: {what} (keys: {some}, ...); litconvert reads DiT (the original and the diffusers "
        "layout) and its own model directories"
    )


def check_tensors(checkpoint: Checkpoint, reading: Reading) -> None:
    """Every source tensor is used, every model tensor has a source, and every shape fits; all problems at once."""
    from litconvert.shapes import model_tensors

    problems = []
    used = set(reading.recomputed)
    for name, info in model_tensors(reading.config).items():
        origin = reading.origins[name]
        used.update(origin.names)
        for source in origin.names:
            found = checkpoint.tensors.get(source)
            if found is None:
                problems.append(f"{source} is missing")
                continue
            expected = (info.shape[0] * origin.parts, *info.shape[1:])
            if found.shape != expected:
                problems.append(f"{source} has shape {found.shape}, expected {expected}")
            elif not found.dtype.is_floating_point:
                problems.append(f"{source} is {found.dtype}, not floating point")
    problems += [
        f"{extra} is not part of this layout{did_you_mean(extra, used)}"
        for extra in checkpoint.tensors
        if extra not in used
    ]
    if problems:
        problems = list(dict.fromkeys(problems))
        listed = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise LitconvertError(
            f"{checkpoint.source}: {reading.family} ({reading.layout} layout), but {listed}. "
            "Nothing is loaded in part: use the complete, unmodified checkpoint"
        )
