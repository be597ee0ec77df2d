"""What a layer probe found, and what to know before trusting it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from litconvert.conversion.provenance import Provenance
from litconvert.evaluation.layer_costs import Budget, LayerCosts
from litconvert.recipe.schema import Recipe


@dataclass(frozen=True)
class LayerError:
    """One linear layer.

    Attributes:
        layer: counted from 0.
        keeps: what the layer would be if it were kept, the teacher's kind of attention there.
        error: ||output - teacher's||^2 / ||teacher's||^2 with this layer alone linear, mean over samples.
        deviation: its standard deviation over samples.
        macs: multiply-accumulates more when it is kept; below 0, it is cheaper kept.
        macs_ratio: MACs with this layer and all those of larger error kept, over those of the fully linear student.
        milliseconds: more when it is kept, for one image; None: not measured.
        total_milliseconds: of all self-attentions, with this layer and all those of larger error kept.
        suggested: to be kept, for the budget.
    """

    layer: int
    keeps: str
    error: float
    deviation: float
    macs: int
    macs_ratio: float
    milliseconds: float | None
    total_milliseconds: float | None
    suggested: bool


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        rows: linear layers, largest error first.
        kept: layers that the student keeps already; they are not probed, and stay kept.
        num_samples: samples the errors are means over.
        image_size, tokens: what the costs are for.
        linear_macs: of a forward pass of the fully linear student.
        linear_milliseconds: of its self-attentions; None: not measured.
        budget, budget_ms: what was asked for.
        softmax_layers: the suggestion, with those kept already; None: no budget was given.
        recipe: the student's, with the suggestion in student.softmax_layers; None: no budget was given.
        notes: what to know before trusting it.
    """

    rows: tuple[LayerError, ...]
    kept: tuple[int, ...]
    num_samples: int
    image_size: int
    tokens: int
    linear_macs: int
    linear_milliseconds: float | None
    budget: float | None
    budget_ms: float | None
    softmax_layers: tuple[int, ...] | None
    notes: tuple[str, ...]
    recipe: Recipe | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the recipe."""
        return {key: value for key, value in asdict(self).items() if key != "recipe"}


def rows_of(
    errors: Mapping[int, Tensor], costs: LayerCosts, kept: Collection[int], suggested: Collection[int]
) -> Iterator[LayerError]:
    """The table, largest error first."""
    so_far = list(kept)
    for layer in sorted(errors, key=lambda layer: -float(errors[layer].mean())):
        so_far.append(layer)
        yield LayerError(
            layer=layer,
            keeps=costs.kinds[layer],
            error=float(errors[layer].mean()),
            deviation=float(errors[layer].std()),
            macs=costs.more_macs(layer),
            macs_ratio=costs.macs(so_far) / costs.macs(),
            milliseconds=None if costs.times is None else costs.more_milliseconds(layer),
            total_milliseconds=None if costs.times is None else costs.milliseconds(so_far),
            suggested=layer in suggested,
        )


def notes_on_training(student: str | Path, provenance: Provenance) -> Iterator[str]:
    """What a student's history says about its ranking."""
    solve = provenance.solve
    if provenance.distillation is None and solve is not None:
        yield (
            f"as a whole {student} is {solve['output']['after']:.2%} off its teacher; here each layer was solved once "
            "more, for itself alone"
        )
    elif provenance.distillation is None:
        yield (
            f"{student} was converted and neither solved nor distilled: its linear attention is random, and the "
            "ranking means little; convert it without --no-solve"
        )
    else:
        yield (
            "distillation trained more than attention, and attention to go with it: here it is measured inside the "
            "teacher"
        )


def notes_on_costs(costs: LayerCosts, layers: Collection[int], image_size: int) -> Iterator[str]:
    """Where softmax is not the dearer one."""
    advice = "there; ask for the size that you will draw (--at)"
    if all(costs.more_macs(layer) <= 0 for layer in layers):
        yield (
            f"at {image_size} pixels softmax attention needs no more multiply-accumulates than linear attention: "
            f"keeping it costs nothing {advice}"
        )
    if costs.times is not None and all(costs.more_milliseconds(layer) <= 0 for layer in layers):
        yield f"at {image_size} pixels softmax attention is no slower here than linear: keeping it costs none {advice}"


def notes_on_budget(budget: Budget) -> Iterator[str]:
    """Where it buys nothing."""
    least = budget.spent + min(budget.more.values())
    if least > budget.limit:
        yield f"no layer fits the budget: with one more kept it comes to {least / budget.unit:.3f}"
