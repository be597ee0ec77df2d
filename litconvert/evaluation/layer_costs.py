"""What layers cost when they are kept in softmax, and which of them to keep for a budget."""

import copy
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from litconvert.errors import UsageError
from litconvert.model.attention_layers import attention_of
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import Attention, LiTTransformer2DModel
from litconvert.model.shapes import count_macs

TIMINGS = 7


@dataclass(frozen=True)
class LayerCosts:
    """What a forward pass of one image costs when some layers are kept as the teacher has them.

    Attributes:
        config: the student's.
        kinds: the teacher's attention, layer by layer.
        latent_size: side of the latent.
        times: milliseconds of a self-attention of each kind; None: not measured.
    """

    config: ModelConfig
    kinds: Sequence[str]
    latent_size: int
    times: Mapping[str, float] | None = None

    def _attention(self, kept: Collection[int]) -> list[str]:
        return [kind if layer in kept else "linear" for layer, kind in enumerate(self.kinds)]

    def macs(self, kept: Collection[int] = ()) -> int:
        """Multiply-accumulates of the whole model."""
        return count_macs(replace(self.config, attention=tuple(self._attention(kept))), self.latent_size)

    def more_macs(self, layer: int) -> int:
        """Multiply-accumulates more when this layer is kept; below 0 where linear attention costs more."""
        return self.macs((layer,)) - self.macs()

    def milliseconds(self, kept: Collection[int] = ()) -> float:
        """Of all self-attentions."""
        assert self.times is not None
        return math.fsum(self.times[kind] for kind in self._attention(kept))

    def more_milliseconds(self, layer: int) -> float:
        """Milliseconds more when this layer is kept."""
        assert self.times is not None
        return self.times[self.kinds[layer]] - self.times["linear"]


def attention_milliseconds(
    attentions: Mapping[str, Attention], grid: tuple[int, int], dtype: torch.dtype
) -> dict[str, float]:
    """Time of a forward pass of each self-attention for one image, projections and all, on the device it is on.

    The median of several measurements, taken in turns, so that a disturbance falls on all of them.
    """
    from torch.utils.benchmark import Timer

    timers, times = {}, {name: [] for name in attentions}  # type: dict[str, Timer], dict[str, list[float]]
    for name, attention in attentions.items():
        module = copy.deepcopy(attention).to(dtype)
        weight = module.to_q.weight
        x = torch.randn(1, grid[0] * grid[1], weight.shape[1], device=weight.device, dtype=dtype)
        timers[name] = Timer(
            "module(x, grid)",
            globals={"module": module, "x": x, "grid": grid},
            num_threads=torch.get_num_threads(),
        )
    with torch.inference_mode():
        for _ in range(TIMINGS):
            for name, timer in timers.items():
                times[name].append(timer.blocked_autorange(min_run_time=0.05).median)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def milliseconds_by_kind(
    teacher: LiTTransformer2DModel, student: LiTTransformer2DModel, latent_size: int, dtype: torch.dtype
) -> dict[str, float]:
    """Time of a self-attention of each kind that the teacher has, and of a linear one of the student.

    Layers of one kind have the same shapes and so take the same time: one of each is measured.
    """
    side = latent_size // student.config.patch_size
    kinds = teacher.config.attention
    attentions = {kind: attention_of(teacher, kinds.index(kind)) for kind in kinds if kind != "linear"}
    attentions["linear"] = attention_of(student, student.config.attention.index("linear"))
    return attention_milliseconds(attentions, (side, side), dtype)


@dataclass(frozen=True)
class Budget:
    """A budget in one of the two measures, with what it is spent on.

    Attributes:
        option: as the user gave it.
        limit, spent: in the measure; the student with the layers it keeps already comes to `spent`.
        more: what each probed layer costs more when it is kept.
        unit: what 1 means to the user, in the measure.
    """

    option: str
    limit: float
    spent: float
    more: Mapping[int, float]
    unit: float

    def require_possible(self) -> None:
        """Raises UsageError where not even the cheapest choice fits."""
        least = self.spent + math.fsum(min(0.0, cost) for cost in self.more.values())
        if least > self.limit:
            shown = math.ceil(1000 * least / self.unit) / 1000
            raise UsageError(
                f"{self.option} {self.limit / self.unit:g} cannot be met: the cheapest choice of layers, with those "
                f"that the student keeps already, comes to {shown:g}; give at least that"
            )


def budget_of(
    costs: LayerCosts, layers: Collection[int], kept: Collection[int], budget: float | None, budget_ms: float | None
) -> Budget | None:
    """The one that was given: in multiply-accumulates over the fully linear student's, or in milliseconds."""
    if budget is not None:
        linear = costs.macs()
        more = {layer: float(costs.more_macs(layer)) for layer in layers}
        return Budget("--budget", budget * linear, costs.macs(kept), more, linear)
    if budget_ms is not None:
        more = {layer: costs.more_milliseconds(layer) for layer in layers}
        return Budget("--budget-ms", budget_ms, costs.milliseconds(kept), more, 1.0)
    return None


def choose_layers(errors: Mapping[int, float], costs: Mapping[int, float], spare: float) -> list[int]:
    """Which layers to keep, so that the errors of those that stay linear add up to the least.

    Single errors stand for their sum: what layers do to one another's errors is not measured. Among layers of one cost
    the greedy choice, the largest error first, is exact: any other choice of as many costs the same and leaves a larger
    sum. Linear layers all cost the same, and so do softmax layers; where a teacher has KV-compressed layers besides,
    every split of the budget over the two costs is tried, so that the choice is exact there too.

    Args:
        errors, costs: by layer, what it leaves when linear and what keeping it costs more; of few different costs.
        spare: what the costs may add up to.

    Returns: layers in order. What costs nothing more is always kept, what costs more for no error never.
    """
    free = [layer for layer, cost in costs.items() if cost <= 0]
    spare -= sum(costs[layer] for layer in free)
    groups: dict[float, list[int]] = {}
    for layer in sorted(errors, key=lambda layer: -errors[layer]):
        if costs[layer] > 0 and errors[layer] > 0:
            groups.setdefault(costs[layer], []).append(layer)
    best: list[int] = []
    most = 0.0
    for counts in product(*(range(len(group) + 1) for group in groups.values())):
        if sum(count * cost for count, cost in zip(counts, groups, strict=True)) > spare:
            continue
        taken = [layer for count, group in zip(counts, groups.values(), strict=True) for layer in group[:count]]
        removed = math.fsum(errors[layer] for layer in taken)
        if removed > most:
            best, most = taken, removed
    return sorted([*free, *best])
