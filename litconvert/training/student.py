"""The student as a stage trains it: one module for the engine to wrap, recomputed and compiled as the recipe says."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from litconvert.model.attention_layers import linear_layers, recorded_attention
from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.recipe.schema import AnyStage, Distill


def compiles(setting: str, device: torch.device) -> bool:
    """What distill.compile comes to on this device."""
    return setting == "blocks" or (setting == "auto" and device.type == "cuda" and has_triton())


def compile_blocks(model: LiTTransformer2DModel, *, recorded: bool) -> None:
    """torch.compile, block by block: one compilation serves them all.

    With `recorded` attention outputs, attention and feed-forward are compiled each by itself: a hook inside a compiled
    block would not be called.
    """
    # Inductor's mix-order reduction gives silently wrong gradients for the scales and shifts of modulated LayerNorms
    # (torch 2.10 and later; pytorch/pytorch issue 193061).
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    # Data parallelism would cut each block in pieces, for communication to begin in the middle of one.
    torch._dynamo.config.optimize_ddp = False
    for block in cast(Iterator[Block], model.blocks):
        # One code object serves every kind of layer, mode, size and precision: more than the eight there may be of it.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for module in (block.attn, block.ff) if recorded else (block,):
            module.forward = torch.compile(type(module).forward).__get__(module)  # type: ignore[method-assign]


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
