"""How weights move: which of them, by which optimiser, at which learning rate, and their moving average."""

import fnmatch
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from litconvert.common.versions import is_installed
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.recipe.schema import AnyStage, Stage
from litconvert.training.engine import Engine

# The module that an optimiser is of, and what it is installed by.
PACKAGES = {"adamw-8bit": ("bitsandbytes", "bitsandbytes"), "came": ("came_pytorch", "came-pytorch")}


def trained_names(names: Sequence[str], stage: AnyStage, where: str) -> list[str]:
    """The tensors a stage trains: all but the frozen ones.

    Raises UsageError for a pattern that freezes nothing, and when nothing is left.
    """
    trained = list(names)
    for pattern in stage.frozen:
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"{where}.frozen: no tensor is called {pattern!r}{did_you_mean(pattern, names)}; "
                "`litconvert plan SRC --tensors` lists them"
            )
        trained = [name for name in trained if not fnmatch.fnmatchcase(name, pattern)]
    if not trained:
        raise UsageError(f"{where}.frozen freezes everything that the stage would train; leave something out of it")
    return trained


def make_optimizer(
    stage: Stage, parameters: Mapping[str, nn.Parameter], fresh: Set[str], solved: Set[str] = frozenset()
) -> torch.optim.Optimizer:
    """The stage's optimiser, with a group for fresh, one for solved and one for inherited tensors.

    Args:
        parameters: by name.
        fresh, solved: names of tensors that were neither inherited.

    Its package is installed: see `optimizer_package`.
    """
    rates = {
        "fresh": stage.learning_rate,
        "solved": stage.solved_learning_rate or stage.learning_rate,
        "inherited": stage.inherited_learning_rate or stage.learning_rate,
    }
    fates = {name: "fresh" if name in fresh else "solved" if name in solved else "inherited" for name in parameters}
    groups: list[dict[str, Any]] = []
    for fate, rate in rates.items():
        mine = [parameter for name, parameter in parameters.items() if fates[name] == fate]
        if mine:
            groups.append({"params": mine, "lr": rate, "base_lr": rate})
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)
    if stage.optimizer == "came":
        from came_pytorch import CAME

        # The third decay, of the instability, is the one PixArt trains with.
        return CAME(groups, lr=stage.learning_rate, betas=(*stage.betas, 0.9999), weight_decay=stage.weight_decay)  # type: ignore[no-any-return]
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay)  # type: ignore[no-any-return]


def optimizer_package(stage: Stage, where: str) -> None:
    """Raise UsageError for an optimiser whose package is missing."""
    module, package = PACKAGES.get(stage.optimizer, ("torch", "torch"))
    if not is_installed(module):
        raise UsageError(
            f"{where}.optimizer={stage.optimizer} needs {package}, which is not installed: pip install {package}, or "
            f"set {where}.optimizer=adamw"
        )


class LearningRate:
    """The stage's schedule as a function of the step: warm-up, then constant, cosine or linear to 0."""

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        scheduler = get_scheduler(
            "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
            unused,
            num_warmup_steps=stage.warmup_steps,
            num_training_steps=stage.steps,
        )
        self._factor = scheduler.lr_lambdas[0]

    def set(self, step: int) -> float:
        """Set the rate of a step, counted from 0; returns that of the first group."""
        factor = float(self._factor(step))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])


class MovingAverage:
    """EMA of the trained weights, starting from the stage's first weights.

    Decay at the stage's step s, counted from 0: min(ema_decay, (1 + s) / (10 + s)), and 0 at the first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> float:
        """Take in the weights after a step; returns the decay."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        current: list[Tensor] = list(self.parameters.values())
        get_ema_multi_avg_fn(decay)(list(self.shadow.values()), current, torch.tensor(step))
        return decay


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimiser's state by `optimizer/NAME/KEY`."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_training_state(
    engine: Engine,
    folder: Path,
    student: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    average: MovingAverage,
) -> None:
    """Read what `training_state` gave for the same stage, by whatever number of processes."""
    stored, scalars = engine.stored(folder)
    wanted: dict[str, Tensor] = {f"model/{name}": value for name, value in student.items()}
    wanted |= {f"ema/{name}": value for name, value in average.shadow.items()}
    for full_name, info in stored.items():
        kind, _, rest = full_name.partition("/")
        if kind != "optimizer":
            continue
        name, _, key = rest.rpartition("/")
        parameter = parameters[name]
        # A moment is split over the processes as its weight is; a count of steps is whole everywhere.
        like_weight = isinstance(parameter, DTensor) and info.size == parameter.size()
        value = (
            torch.empty_like(parameter, dtype=info.properties.dtype)
            if like_weight
            else torch.empty(info.size, dtype=info.properties.dtype, device=parameter.device)
        )
        optimizer.state[parameter][key] = wanted[full_name] = value
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise LitconvertError(
            f"{folder}: the checkpoint is not complete, it has no {missing[0]}; remove it to go on from the one before"
        )
    engine.load(folder, wanted)
    for full_name, number in scalars.items():
        name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
        optimizer.state[parameters[name]][key] = number


def training_state(
    student: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    average: MovingAverage,
) -> dict[str, Tensor | int | float]:
    """All that a stage changes: the model's weights, their moving average and the optimiser's state."""
    state: dict[str, Tensor | int | float] = {f"model/{name}": value for name, value in student.items()}
    state |= {f"ema/{name}": value for name, value in average.shadow.items()}
    return state | optimizer_state(optimizer, parameters)
