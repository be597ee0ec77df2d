"""How far a teacher's output moves when one layer alone is linear."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from litconvert.common.listener import UNSEEN, Task
from litconvert.errors import LitconvertError
from litconvert.model.attention_layers import attention_of
from litconvert.model.modeling_lit import Attention, Block, LiTTransformer2DModel

# x_t (N, C, H, W), timestep (N,), and the condition as the model's arguments.
ModelInputs = tuple[Tensor, Tensor, Mapping[str, Any]]


class _Replay(nn.Module):
    """Stands for the blocks before a layer, whose output (N, T, D) is known: they are the teacher's own."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Any) -> Tensor:
        return self.output


def probed_layers(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """Layers in which the student attends linearly and the teacher does not, by the kinds of both."""
    kinds = zip(student, teacher, strict=True)
    return [layer for layer, (mine, theirs) in enumerate(kinds) if mine == "linear" != theirs]


@torch.inference_mode()
def layer_errors(
    teacher: LiTTransformer2DModel,
    student: LiTTransformer2DModel,
    batches: Iterable[ModelInputs],
    task: Task = UNSEEN,
) -> dict[int, Tensor]:
    """How far the teacher's output moves when the student's attention replaces its own in one layer alone.

    The attention module alone is taken: what else the student trained (modulation, feed-forward) stays the teacher's.
    Both models are on one device, in eval mode, and are left as they were.

    Args:
        teacher: softmax; the model the student was converted from.
        student: linear in the layers that are probed.
        batches: what both see.
        task: advances with each layer of each batch.

    Returns: for each probed layer ||output - teacher's||^2 / ||teacher's||^2 of each sample, (S,) float64 on the CPU.
    """
    layers = probed_layers(student.config.attention, teacher.config.attention)
    errors: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    blocks = list(teacher.blocks)
    for noisy, timestep, condition in batches:
        entries: list[tuple[Any, ...]] = []
        handle = blocks[0].register_forward_pre_hook(lambda _, entered, entries=entries: entries.append(entered))
        try:
            expected = teacher(noisy, timestep, **condition, return_dict=False)[0]
        finally:
            handle.remove()
        x, modulation, grid = entries[0]
        for layer, block in enumerate(blocks):
            if layer in errors:
                with _attending(teacher, layer, attention_of(student, layer), x):
                    output = teacher(noisy, timestep, **condition, return_dict=False)[0]
                errors[layer].append(_relative_error(output, expected))
                task.advance()
            x = block(x, modulation, grid)  # (N, T, D)
    return {layer: torch.cat(values) for layer, values in errors.items()}


@contextmanager
def _attending(model: LiTTransformer2DModel, layer: int, attention: Attention, x: Tensor) -> Iterator[None]:
    """The model with another attention in one layer, and before it nothing but that layer's input x (N, T, D).

    What the layers before it give is the same for all, and so computed once: half of the work.
    """
    blocks, block = model.blocks, cast(Block, model.blocks[layer])
    own = block.attn
    try:
        block.attn = attention
        model.blocks = nn.ModuleList([_Replay(x), *list(blocks)[layer:]])
        yield
    finally:
        block.attn, model.blocks = own, blocks


def _relative_error(output: Tensor, expected: Tensor) -> Tensor:
    """(N,) float64, on the CPU.

    Raises LitconvertError where it is no number.
    """
    output, expected = output.double().flatten(1), expected.double().flatten(1)
    error = ((output - expected).square().sum(1) / expected.square().sum(1)).cpu()
    if not error.isfinite().all():
        raise LitconvertError(
            "the teacher's or the student's output is NaN, infinite or all zero; look at the checkpoints with "
            "`litconvert inspect --weights`"
        )
    return error
