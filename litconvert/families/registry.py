"""The families of checkpoints: one file each, and what each owes.

A family owes
1. `recognise(checkpoint, hints)`: None when the keys are not its own; otherwise a `Reading`, or a UsageError that names
   the hint which settles what shapes cannot tell;
2. a `Layout`, our names beside theirs, for each way its files are written: so that every source tensor is mapped or
   refused, never ignored, and a model can be written back;
3. tests on a checkpoint made on disk: its outputs against an independent implementation, and its refusals.

Another package adds a family through the entry point group `litconvert.families`: docs/add-a-family.md shows one.
"""

from functools import cache
from importlib.metadata import entry_points

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families.dit import DIT, SIT
from litconvert.families.family import Family, Reading
from litconvert.families.own import LITCONVERT
from litconvert.families.pixart import ALPHA, SIGMA
from litconvert.families.refusals import refuse_unreadable
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import model_tensors
from litconvert.recipe.schema import Source

ENTRY_POINTS = "litconvert.families"


@cache
def families() -> dict[str, Family]:
    """Every known family by name, in the order in which they are asked; those of other packages last.

    Raises LitconvertError for a plugin that cannot be loaded or takes another family's name.
    """
    shipped = (LITCONVERT, DIT, SIT, ALPHA, SIGMA)
    known = {family.name: family for family in shipped}
    for point in entry_points(group=ENTRY_POINTS):
        package = point.dist.name if point.dist else "an installed package"
        try:
            family = point.load()
        except Exception as error:  # a plugin's import can raise anything
            raise LitconvertError(
                f"the family {point.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); "
                "upgrade or uninstall that package"
            ) from error
        if not isinstance(family, Family) or family.name in known:
            what = f"takes the name {family.name!r}" if isinstance(family, Family) else "is no litconvert Family"
            raise LitconvertError(f"the family {point.name!r} of {package} {what}; upgrade or uninstall that package")
        known[family.name] = family
    return known


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading:
    """Ask every family in turn.

    Raises UsageError for an unknown architecture and for what a hint must settle; LitconvertError for missing, extra
    and misshapen tensors.
    """
    known = families()
    if hints.family not in (None, *known):
        raise UsageError(
            f"source.family: unknown family {hints.family!r}{did_you_mean(str(hints.family), known)}; "
            f"there are {', '.join(known)}"
        )
    for name, family in known.items():
        if hints.family not in (None, name):
            continue
        try:
            reading = family.recognise(checkpoint, hints)
            if reading is not None:
                check_tensors(checkpoint, reading)
                return reading
        except LitconvertError:
            refuse_unreadable(checkpoint)  # the reason behind what the family found, where names tell it
            raise
    refuse_unreadable(checkpoint)
    some = ", ".join(list(checkpoint.tensors)[:4])
    what = f"not of family {hints.family}" if hints.family else "unknown architecture"
    raise UsageError(
        f"{checkpoint.source}: {what} (keys: {some}, ...); litconvert reads "
        f"{', '.join(family.title for family in known.values())}"
    )


def check_tensors(checkpoint: Checkpoint, reading: Reading) -> None:
    """Every source tensor is used, every model tensor has a source, and every shape fits; all problems at once."""
    problems = []
    used = {*reading.recomputed, *reading.extra}
    for name, info in model_tensors(ModelConfig.of(reading.config)).items():
        origin = reading.origins.get(name)
        if origin is None:
            problems.append(f"this layout has no place for {name}")
            continue
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
    unfit = bool(problems)
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
            + (
                "Nothing is loaded in part: use the complete checkpoint"
                if unfit
                else "What has no place would be lost, and the model would be another one, so it is not read"
            )
        )
