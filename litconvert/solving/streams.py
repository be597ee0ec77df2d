"""The calibration states as they pass through the blocks: the teacher's residual stream and the student's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from litconvert.model.modeling_lit import Block, Condition, modulate


@dataclass
class Streams:
    """States of one grid, in front of a block.

    Attributes:
        grid: height and width in tokens.
        condition: of all n states.
        noise_share: (n,), where on the way a state is: 0 is a clean image, 1 is noise.
        teacher, student: residual streams (n, T, D) float32. Equal at the first block.
    """

    grid: tuple[int, int]
    condition: Condition
    noise_share: Tensor
    teacher: Tensor
    student: Tensor

    def __len__(self) -> int:
        return len(self.teacher)

    def batches(self, size: int) -> Iterator[slice]:
        """All states, so many at a time."""
        return (slice(first, min(first + size, len(self))) for first in range(0, len(self), size))

    def condition_of(self, some: slice | Tensor) -> Condition:
        """The condition of some of the states."""
        blocks, final, *caption = self.condition
        return Condition(blocks[some], final[some], *(None if part is None else part[some] for part in caption))


def attention_input(block: Block, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """What a block's self-attention reads, (N, T, D), and the gate of what it gives, (N, 1, D)."""
    shift, scale, gate, *_ = block.modulation(condition)
    return modulate(block.norm1(x), shift, scale), gate


@dataclass(frozen=True)
class Passes:
    """How blocks are computed here.

    Attributes:
        device: where they are.
        batch_size: states at a time; it changes rounding alone.
        bf16: in bf16 autocast; the residual streams stay float32.
    """

    device: torch.device
    batch_size: int
    bf16: bool

    def autocast(self) -> AbstractContextManager[object]:
        """Around what is computed in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def through(self, block: Block, x: Tensor, streams: Streams) -> Tensor:
        """One of the streams through a block, in place; (n, T, D)."""
        for some in streams.batches(self.batch_size):
            with self.autocast():
                x[some] = block(x[some], streams.condition_of(some), streams.grid).float()
        return x

    def after_attention(self, block: Block, streams: Streams) -> None:
        """The teacher's stream, which has attended already, through the rest of a block, in place."""
        for some in streams.batches(self.batch_size):
            condition = streams.condition_of(some)
            with self.autocast():
                *_, shift, scale, gate = block.modulation(condition)
                x = block.after_attention(streams.teacher[some], condition, shift, scale, gate)
            streams.teacher[some] = x.float()
