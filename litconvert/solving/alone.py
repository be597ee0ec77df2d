"""Each layer solved by itself, as if all others were the teacher's: what its linear attention can do alone."""

from collections.abc import Collection, Sequence
from typing import cast

import torch

from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Streams


@torch.no_grad()
def solve_alone(
    teacher: LiTTransformer2DModel,
    student: LiTTransformer2DModel,
    states: Sequence[Streams],
    layers: Collection[int],
    solver: LayerSolver,
) -> None:
    """Solve the output projection of these layers again, each for the teacher's own stream; in place.

    A walk has each layer repair what those before it left, so that in the teacher's company, where nothing is to be
    repaired, its layers do harm.

    Args:
        states: in front of the first block.
        solver: without local steps.
    """
    for layer, blocks in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
        theirs, mine = cast(tuple[Block, Block], blocks)
        if layer in layers:
            solver.solve(theirs, mine, states, draws=layer, convolution=False)
        else:
            solver.attend(theirs, states)
        for one in states:
            solver.passes.after_attention(theirs, one)
            one.student.copy_(one.teacher)
