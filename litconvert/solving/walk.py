"""The walk: once through the layers, first to last, with the teacher's and the student's residual streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.files import whole_file
from litconvert.common.listener import Task
from litconvert.errors import LitconvertError
from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Streams


@dataclass
class HeldOut:
    """States that nothing is solved for.

    Attributes:
        streams: the teacher's and the solved student's.
        unsolved: that of the student as it started, in front of the same block.
    """

    streams: list[Streams]
    unsolved: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unsolved = [one.student.clone() for one in self.streams]


@dataclass(frozen=True)
class LayerError:
    """Of the residual stream after a layer, on held-out states: ||student's - teacher's||^2 / ||teacher's||^2.

    Attributes:
        before: of the student as it started, unsolved in every layer so far.
        after: solved in every layer so far.
    """

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class Walk:
    """Goes through the layers of one student.

    Attributes:
        teacher, student: the student has the teacher's weights but for the attention that is solved.
        solver: of one layer.
        layers: those that are solved.
        convolution: whether that of V is solved too.
        fresh_output: output projections start from nothing, and not from the teacher's.
        dtype: of the solved weights where they are written; what rounding takes is repaired by later layers.
        folder: where each layer's result is kept until all are there, by the first process.
    """

    teacher: LiTTransformer2DModel
    student: LiTTransformer2DModel
    solver: LayerSolver
    layers: Sequence[int]
    convolution: bool
    fresh_output: bool
    dtype: torch.dtype
    folder: Path

    @torch.no_grad()
    def go(self, states: Sequence[Streams], held_out: HeldOut, walk: int, task: Task) -> list[LayerError]:
        """Once through all layers, from where an interrupted walk was; the student is changed in place."""
        errors = []
        passes = self.solver.passes
        for layer, blocks in enumerate(zip(self.teacher.blocks, self.student.blocks, strict=True)):
            theirs, mine = cast(tuple[Block, Block], blocks)
            held_out.unsolved = [
                passes.through(mine, x, one) for x, one in zip(held_out.unsolved, held_out.streams, strict=True)
            ]
            if layer in self.layers:
                self._solve(theirs, mine, states, layer, walk)
            else:
                self.solver.attend(theirs, states)
            for one in states:
                passes.after_attention(theirs, one)
                one.student = passes.through(mine, one.student, one)
            for one in held_out.streams:
                one.teacher = passes.through(theirs, one.teacher, one)
                one.student = passes.through(mine, one.student, one)
            errors.append(_layer_error(layer, held_out))
            task.advance(remark=f"error {errors[-1].after:.2e}")
        return errors

    def _solve(self, theirs: Block, mine: Block, states: Sequence[Streams], layer: int, walk: int) -> None:
        """Solve a layer, or take what an interrupted walk kept of it; the teacher's stream attends."""
        kept = self.folder / f"walk-{walk}-layer-{layer:04d}.safetensors"
        attention = mine.attn
        if kept.is_file():
            attention.load_state_dict(load_file(kept), strict=True)
            self.solver.attend(theirs, states)
            return
        if walk == 0 and self.fresh_output:
            attention.to_out.weight.zero_()
            attention.to_out.bias.zero_()
        draws = walk * len(self.student.blocks) + layer
        try:
            self.solver.solve(theirs, mine, states, draws=draws, convolution=self.convolution and walk == 0)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # equations of NaN
            raise _no_numbers(layer) from error
        for parameter in attention.parameters():
            parameter.copy_(parameter.to(self.dtype))
        if not all(parameter.isfinite().all() for parameter in attention.parameters()):
            raise _no_numbers(layer)  # and nothing of it is kept
        if self.solver.process == 0:
            with whole_file(kept) as partial:
                write_safetensors(partial, LazyTensors.of(attention.state_dict()), {"format": "pt"})


def _no_numbers(layer: int) -> LitconvertError:
    return LitconvertError(
        f"layer {layer} cannot be solved: NaN or infinite values reach it; look at the checkpoint with `litconvert "
        "inspect --weights` and at the images (--data), solve in float32 (--set solve.mixed_precision=no), or convert "
        "without solving (--no-solve)"
    )


def _wide(values: Tensor) -> Tensor:
    """In float64, which a Mac's GPU has not."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _layer_error(layer: int, held_out: HeldOut) -> LayerError:
    """The residual stream's, where the held-out states are now."""
    pairs = list(zip(held_out.streams, held_out.unsolved, strict=True))
    scale = sum(float(_wide(one.teacher).square().sum()) for one, _ in pairs)
    before = sum(float(_wide(x - one.teacher).square().sum()) for one, x in pairs)
    after = sum(float(_wide(one.student - one.teacher).square().sum()) for one, _ in pairs)
    return LayerError(layer, before / scale, after / scale)


@dataclass(frozen=True)
class OutputErrors:
    """Of the model's output on held-out states: ||student's - teacher's||^2 / ||teacher's||^2.

    Attributes, of the noise or velocity where nothing else is said:
        before, after: of all states, of the student as it started and as it was solved.
        before_by_tenth, after_by_tenth: by timestep, from clean images to noise; None where no state lies.
        variance: of the learned variance, solved; None where there is none.
    """

    before: float
    after: float
    before_by_tenth: tuple[float | None, ...]
    after_by_tenth: tuple[float | None, ...]
    variance: float | None


@torch.no_grad()
def output_errors(teacher: LiTTransformer2DModel, student: LiTTransformer2DModel, held_out: HeldOut) -> OutputErrors:
    """What the walk came to, once the held-out states are through all blocks."""
    channels = teacher.config.in_channels
    squares: list[Tensor] = []
    for one, x in zip(held_out.streams, held_out.unsolved, strict=True):
        theirs = _wide(teacher.output(one.teacher, one.condition, one.grid))
        mine, start = (_wide(student.output(y, one.condition, one.grid)) for y in (one.student, x))
        parts = [theirs[:, :channels], (mine - theirs)[:, :channels], (start - theirs)[:, :channels]]
        parts += [theirs[:, channels:], (mine - theirs)[:, channels:]]
        squares.append(torch.stack([part.square().flatten(1).sum(1) for part in parts], dim=1).cpu())
    sums = torch.cat(squares)  # (n, 5)
    tenth = (torch.cat([one.noise_share for one in held_out.streams]) * 10).long().clamp(max=9)
    by_tenth = [sums[tenth == index].sum(0) for index in range(10)]
    whole = sums.sum(0)

    def ratio(part: Tensor, index: int, scale: int = 0) -> float | None:
        return float(part[index] / part[scale]) if part[scale] != 0 else None  # NaN is no reason to say nothing

    return OutputErrors(
        before=ratio(whole, 2) or 0.0,
        after=ratio(whole, 1) or 0.0,
        before_by_tenth=tuple(ratio(part, 2) for part in by_tenth),
        after_by_tenth=tuple(ratio(part, 1) for part in by_tenth),
        variance=ratio(whole, 4, 3),
    )
