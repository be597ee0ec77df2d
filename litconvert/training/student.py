"""The student as a stage trains it: one module for the engine to wrap, recomputed and compiled as the recipe says."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litconvert.model.attention_layers import linear_layers, recorded_attention
from litconvert.model.compilation import compile_blocks, compiles
from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.recipe.schema import AnyStage, Distill


class Student(nn.Module):
    """The student as one module for the engine to wrap, whatever a stage trains of it.

    Args:
        model: with `requires_grad` set on what the stage trains.
        stage: it decides whether attention outputs are recorded.
        settings: how blocks are recomputed and compiled.
    """

    def __init__(self, model: LiTTransformer2DModel, stage: AnyStage, settings: Distill) -> None:
        super().__init__()
        self.model = model
        self.records = stage.feature_weight > 0
        self.layers = linear_layers(model)
        device = next(model.parameters()).device
        for block in model.blocks:
            for module in (block, cast(Block, block).attn, cast(Block, block).ff):
                module.__dict__.pop("forward", None)  # what the stage before it compiled or recomputed
        if compiles(settings.compile, device):
            compile_blocks(model, recorded=self.records)
        count = len(model.blocks)
        for block in list(model.blocks)[: round(settings.gradient_checkpointing * count)]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def parts(self) -> Iterator[nn.Module]:
        """What sharding gathers by itself: each block."""
        yield from self.model.blocks

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The output for (N, C, H, W), and attention outputs where the stage needs them."""
        with recorded_attention(self.model, self.layers if self.records else []) as (_, outputs):
            sample = self.model(noisy, timestep, **condition, return_dict=False)[0]
        return sample, outputs
