"""`litconvert convert`: a plan carried out, its fresh attention solved. Without solving nothing heavy is imported."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import at_work, work_paths
from litconvert.conversion.convert import carry_out, conversion_inputs, is_converted, refuse_early
from litconvert.conversion.plan import ConversionPlan, plan
from litconvert.recipe.inputs import Inputs


def convert(
    source: str | Path | None,
    out: str | Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Convert a checkpoint to a linear model directory, written whole or not at all.

    Its fresh attention is solved on states that the teacher draws, unless the recipe says `solve: null`. Interrupted,
    the same call goes on. Every launched process must call it; the first one writes.

    Args:
        source: file, folder, Hub id or `asset:NAME`; None: the recipe's.
        out: the model directory. One made from the same inputs is left as it is.
        recipe, overrides: as for `plan`.
        force: replace an `out` that was made from other inputs.
        listener: hears of the layers that are solved and of each tensor that is written.

    Returns: the model directory.
    """
    return convert_planned(plan(source, recipe, overrides), Path(out), force=force, listener=listener)


def convert_planned(plan: ConversionPlan, out: Path, *, force: bool = False, listener: Listener = SILENT) -> Path:
    """`convert` of what is planned already."""
    is_first = os.environ.get("RANK", "0") == "0"
    if plan.solve is None and not is_first:
        return out  # there is nothing to share, and the first one writes
    refuse_early(plan, out)
    with at_work(out, listener) if is_first else nullcontext():
        if plan.solve is None:
            return carry_out(plan, out, force=force, listener=listener)
        return _convert_solved(plan, out, force=force, listener=listener, is_first=is_first)


def as_begun(plan: ConversionPlan, out: Path) -> ConversionPlan:
    """The plan that an interrupted conversion to `out` was begun with, or else this one."""
    if plan.solve is None or not work_paths(out, "solving-"):
        return plan
    from litconvert.solving import solve

    return solve.as_begun(plan, solve.partial_folder(out, _inputs(plan)))


def _inputs(plan: ConversionPlan) -> Inputs:
    from litconvert.solving.solve import solving_inputs

    return conversion_inputs(plan, plan.source.checkpoint.sha256(), solving_inputs(plan))


def _convert_solved(plan: ConversionPlan, out: Path, *, force: bool, listener: Listener, is_first: bool) -> Path:
    """`convert_planned` of a plan that solves."""
    from litconvert.solving.solve import remove_partial, solve

    inputs = _inputs(plan)
    if is_converted(plan, out, inputs, force=force):
        listener.note(f"already done: {out}")
        if is_first:
            remove_partial(out)  # ended between writing the student and removing what the walk kept
        return out
    plan = as_begun(plan, out)
    solved = solve(plan, out, inputs, listener)
    if solved is not None:
        carry_out(plan, out, force=force, solved=solved, listener=listener)
        remove_partial(out)
    return out
