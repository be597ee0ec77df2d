"""What a family of checkpoints is, and what it reads off one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.families.layout import Layout, Origin
from litconvert.model.config import ModelConfig
from litconvert.recipe.schema import Source


@dataclass(frozen=True)
class Reading:
    """A checkpoint, understood.

    Attributes:
        family, layout: what it is.
        because: why it was recognised as that, a clause.
        config: of the LiTTransformer2DModel that computes the source's function.
        origins: for every tensor of that model, where it is in the source.
        recomputed: source tensors that a formula replaces, each with the name of the formula's result.
        extra: source tensors that were of training alone and are left out, each with what it is of.
        unsure: what shapes cannot tell and was assumed, each with the hint that settles it.
    """

    family: str
    layout: str
    because: str
    config: dict[str, Any]
    origins: Mapping[str, Origin]
    recomputed: Mapping[str, str]
    unsure: tuple[str, ...]
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: for `source.family`.
        title: for people.
        recognise: from a checkpoint's headers and the recipe's hints.
        layouts: how a model of this family can be written, by name (`original`, `diffusers`).
        diffusers_config: config.json of the `diffusers` layout, from a softmax model's config.
        container: the key under which the original code keeps its state dict; None: at the top.
    """

    name: str
    title: str
    recognise: Callable[[Checkpoint, Source], Reading | None]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    diffusers_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    container: str | None = None
