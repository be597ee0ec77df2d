"""A model's self-attentions by themselves: which layers are linear, what goes into each layer's and what comes out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from litconvert.model.modeling_lit import Attention, Block, LiTTransformer2DModel


def attention_of(model: LiTTransformer2DModel, layer: int) -> Attention:
    """A layer's self-attention."""
    return cast(Block, model.blocks[layer]).attn


def linear_layers(model: LiTTransformer2DModel) -> list[int]:
    """The layers whose self-attention is linear."""
    return [layer for layer, kind in enumerate(model.config.attention or ()) if kind == "linear"]


@contextmanager
def recorded_attention(
    model: LiTTransformer2DModel, layers: Sequence[int]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the inputs and outputs of these layers' attention during one forward pass."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs.append(arguments[0])
        outputs.append(output)

    handles = [attention_of(model, layer).register_forward_hook(record) for layer in layers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
