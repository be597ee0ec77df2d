"""The model's shapes, without its memory."""

from collections.abc import Mapping
from typing import Any

import torch

from litconvert.checkpoints import TensorInfo
from litconvert.errors import UsageError
from litconvert.modeling_lit import LiTTransformer2DModel


def empty_model(config: Mapping[str, Any]) -> LiTTransformer2DModel:
    """The model on the meta device: shapes, no memory.

    Raises UsageError for a config that the model refuses.
    """
    try:
        with torch.device("meta"):
            model: LiTTransformer2DModel = LiTTransformer2DModel(**config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return model


def model_tensors(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    """Name and shape of every tensor the model of this config stores."""
    return {name: TensorInfo(tuple(value.shape), dtype) for name, value in empty_model(config).state_dict().items()}


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the model's defaults filled in, and the kind of every layer named."""
    full = {key: value for key, value in dict(empty_model(config).config).items() if not key.startswith("_")}
    return {**full, "attention": list(full["attention"] or ["softmax"] * full["num_layers"])}
