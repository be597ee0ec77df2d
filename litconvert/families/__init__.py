"""Families of checkpoints: what a file is, told by its names and shapes.

A package that adds a family needs these names alone; they are imported from here.
"""

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import UsageError
from litconvert.families.family import Family, Reading
from litconvert.families.headers import count_layers, has_key, num_attention_heads, sample_size, shape_of
from litconvert.families.layout import Layout
from litconvert.model.config import ModelConfig
from litconvert.recipe.schema import Source

__all__ = [
    "Checkpoint",
    "Family",
    "Layout",
    "ModelConfig",
    "Reading",
    "Source",
    "UsageError",
    "count_layers",
    "has_key",
    "num_attention_heads",
    "sample_size",
    "shape_of",
]
