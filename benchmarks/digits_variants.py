"""Solving with a part of it left out, which no recipe asks for: what that part is worth is all there is to it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from litconvert.model.modeling_lit import Block
from litconvert.solving import solve as solving
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Streams
from litconvert.solving.walk import Walk

_solve = LayerSolver.solve


@contextmanager
def steps_alone() -> Iterator[None]:
    """Local steps from the start as it is, output projections at random; no closed form."""

    def keep_output(*given: Any) -> Walk:
        return replace(Walk(*given), fresh_output=False)

    def project(*_: object) -> None:
        """As it is."""

    with patch.object(solving, "Walk", keep_output), patch.object(LayerSolver, "_project", project), o_alone():
        yield


@contextmanager
def own_target() -> Iterator[None]:
    """Each layer is solved on the teacher's stream: its own output is its target, what earlier ones left stands."""

    def solve(
        solver: LayerSolver, teacher: Block, student: Block, states: Sequence[Streams], *, draws: int, convolution: bool
    ) -> None:
        streams = [one.student for one in states]
        for one in states:
            one.student = one.teacher.clone()
        _solve(solver, teacher, student, states, draws=draws, convolution=convolution)
        for one, stream in zip(states, streams, strict=True):
            one.student = stream

    with patch.object(LayerSolver, "solve", solve):
        yield


@contextmanager
def o_alone() -> Iterator[None]:
    """The convolution has no closed form, where V is inherited."""

    def solve(
        solver: LayerSolver, teacher: Block, student: Block, states: Sequence[Streams], *, draws: int, convolution: bool
    ) -> None:
        _solve(solver, teacher, student, states, draws=draws, convolution=False)

    with patch.object(LayerSolver, "solve", solve):
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "steps alone": steps_alone,
    "own target": own_target,
    "O alone": o_alone,
}


def variant(name: str | None) -> AbstractContextManager[None]:
    """Solving in this variant while the block runs; None: as it is."""
    return nullcontext() if name is None else VARIANTS[name]()
