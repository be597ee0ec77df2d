"""litconvert turns a softmax diffusion transformer into a linear-attention one, teaches it, and publishes it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from litconvert.errors import LitconvertError

if TYPE_CHECKING:
    from litconvert import objectives
    from litconvert.conversion import convert, plan
    from litconvert.distillation import distill
    from litconvert.publishing import push
    from litconvert.sampling import sample
    from litconvert.sources import load

__version__ = "0.1.0"
__all__ = ["LitconvertError", "convert", "distill", "load", "objectives", "plan", "push", "sample"]

_HOMES = {
    "convert": "conversion",
    "load": "sources",
    "plan": "conversion",
    "distill": "distillation",
    "push": "publishing",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `litconvert --help` must not wait for torch."""
    if name == "objectives":
        return import_module("litconvert.objectives")
    if name in _HOMES:
        return getattr(import_module(f"litconvert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'litconvert' has no attribute {name!r}")
