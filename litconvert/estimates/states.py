"""Bytes of what stays from step to step: weights, optimiser states, and their parts where they are split or moved."""

import math
from collections.abc import Sequence

import torch

from litconvert.model.config import ModelConfig
from litconvert.model.shapes import model_tensors
from litconvert.recipe.schema import AnyStage, Recipe

FLOAT32 = 4


def weights_bytes(config: ModelConfig | None) -> int:
    """Bytes of a model as it trains and teaches: float32."""
    return 0 if config is None else sum(info.nbytes for info in model_tensors(config, torch.float32).values())


def _block(config: ModelConfig) -> int:
    """Bytes of the largest block."""
    full = model_tensors(config, torch.float32)
    prefixes = [f"blocks.{index}." for index in range(config.num_layers)]
    return max(sum(info.nbytes for name, info in full.items() if name.startswith(prefix)) for prefix in prefixes)


def gathered_bytes(config: ModelConfig) -> int:
    """Bytes that sharding has whole at a time: two blocks, one computing and one arriving, and all but the blocks."""
    layers = config.num_layers
    return weights_bytes(config) - max(layers - 2, 0) * _block(config)


def teacher_bytes(recipe: Recipe, config: ModelConfig | None, processes: int, device: torch.device) -> int:
    """Bytes of the teacher, which stays through all stages, where the recipe places it."""
    placement = recipe.distill.teacher_placement
    if config is not None and placement == "offloaded" and device.type == "cuda":
        return 2 * _block(config)
    if config is not None and placement == "sharded" and processes > 1:
        return weights_bytes(config) // processes + gathered_bytes(config)
    return weights_bytes(config)


def optimizer_bytes(stage: AnyStage, shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of an optimiser's states for weights of these shapes.

    AdamW: two float32 numbers a weight. AdamW 8-bit (bitsandbytes): two bytes a weight and a float32 scale for each 256
    of either, and float32 below 4096 numbers. CAME: one float32 number a weight, and for matrices two rows and two
    columns of second moments, else a second number.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if stage.optimizer == "adamw-8bit":
        return sum(2 * FLOAT32 * size if size < 4096 else 2 * (size + FLOAT32 * -(-size // 256)) for size in sizes)
    if stage.optimizer == "came":
        factors = (
            2 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else size
            for shape, size in zip(shapes, sizes, strict=True)
        )
        return FLOAT32 * (sum(sizes) + sum(factors))
    return 2 * FLOAT32 * sum(sizes)
