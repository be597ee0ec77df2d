"""litconvert turns a softmax diffusion transformer into a linear-attention one, teaches it, and publishes it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from litconvert.errors import GateError, LitconvertError, UsageError

if TYPE_CHECKING:
    from litconvert import objectives
    from litconvert.conversion.plan import plan
    from litconvert.data.dataset import open_latents
    from litconvert.distillation.pretraining import train
    from litconvert.families.sources import load
    from litconvert.publishing.push import push
    from litconvert.sampling.draw import sample
    from litconvert.solving.convert import convert
    from litconvert.workflow import distill

__version__ = "0.1.0"
__all__ = [
    "GateError",
    "LitconvertError",
    "UsageError",
    "convert",
    "distill",
    "load",
    "objectives",
    "open_latents",
    "plan",
    "push",
    "sample",
    "train",
]

_HOMES = {
    "convert": "solving.convert",
    "distill": "workflow",
    "load": "families.sources",
    "open_latents": "data.dataset",
    "plan": "conversion.plan",
    "push": "publishing.push",
    "sample": "sampling.draw",
    "train": "distillation.pretraining",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `litconvert --help` must not wait for torch."""
    if name == "objectives":
        return import_module("litconvert.objectives")
    if name in _HOMES:
        return getattr(import_module(f"litconvert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'litconvert' has no attribute {name!r}")
