"""Models whose blocks are compiled."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch._inductor import config as inductor
from torch.utils._triton import has_triton

from litconvert.model.modeling_lit import Block, LiTTransformer2DModel

# Forward passes of a batch; a block takes tens of seconds to compile. An estimate: no GPU has measured it.
REPAID_AFTER = 1_000


def compiles(setting: str, device: torch.device) -> bool:
    """What a recipe's `compile` (`auto`, `no` or `blocks`) comes to on this device."""
    return setting == "blocks" or (setting == "auto" and device.type == "cuda" and has_triton())


def compile_for(passes: int, models: Iterable[LiTTransformer2DModel], setting: str) -> None:
    """Compile models for so many forward passes, where the setting says so or, `auto`, where they repay it."""
    if setting == "auto" and passes < REPAID_AFTER:
        return
    for model in models:
        if compiles(setting, model.device):
            compile_blocks(model, recorded=False)


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
