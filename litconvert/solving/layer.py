"""One layer solved: its linear attention such that the student's residual stream after it is the teacher's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from litconvert.data.batches import Schedule
from litconvert.model.modeling_lit import Block, LinearAttention
from litconvert.recipe.schema import Solve
from litconvert.solving.closed_forms import ConvolutionSums, ProjectionSums, SumOverProcesses, alone
from litconvert.solving.streams import Passes, Streams, attention_input


@dataclass(frozen=True)
class LayerSolver:
    """Solves one layer after another.

    Attributes:
        settings: of the recipe.
        passes: how blocks are computed.
        seed: of the order in which local steps meet the states.
        local_steps: how many; 0: the closed forms alone.
        learning_rate: of the first of them.
        counts: states of each grid, over all processes.
        total: adds up over the processes that share the states.
        process, processes: state i of a grid is that of process i modulo their number.
    """

    settings: Solve
    passes: Passes
    seed: int
    local_steps: int
    learning_rate: float
    counts: Sequence[int]
    total: SumOverProcesses = alone
    process: int = 0
    processes: int = 1

    def solve(
        self, teacher: Block, student: Block, states: Sequence[Streams], *, draws: int, convolution: bool
    ) -> None:
        """Solve the student's attention; the teacher's stream is left as it is after its own attention.

        Args:
            draws: a number of this layer in this walk, which the order of local steps is a function of.
            convolution: solve it too; V must be the teacher's.
        """
        attention = student.attn
        assert isinstance(attention, LinearAttention)
        if convolution and attention.dwc is not None:
            self._convolve(teacher, student, states)
        else:
            self.attend(teacher, states)
        self._project(student, states)
        if self.local_steps:
            with torch.enable_grad():
                self._step(student, states, draws)
            self._project(student, states)

    def attend(self, teacher: Block, states: Sequence[Streams]) -> None:
        """The teacher's stream through its self-attention, in place."""
        for one in states:
            for some in one.batches(self.passes.batch_size):
                self._attended(teacher, one, some)

    def _attended(self, teacher: Block, one: Streams, some: slice) -> None:
        with self.passes.autocast():
            x, gate = attention_input(teacher, one.teacher[some], one.condition_of(some))
            one.teacher[some] = (one.teacher[some] + gate * teacher.attn(x, one.grid)).float()

    def _convolve(self, teacher: Block, student: Block, states: Sequence[Streams]) -> None:
        """`attend`, and meanwhile the convolution, for what the teacher's attention gives before its projection."""
        attention = cast(LinearAttention, student.attn)
        assert attention.dwc is not None
        head_dim, _, _, size = attention.dwc.weight.shape
        sums = ConvolutionSums(attention.num_heads, head_dim, size, self._sums_device)
        inputs: list[Tensor] = []
        handle = teacher.attn.to_out.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            for one in states:
                for some in one.batches(self.passes.batch_size):
                    self._attended(teacher, one, some)
                    with self.passes.autocast():
                        x, _ = attention_input(student, one.student[some], one.condition_of(some))
                        core, values = attention.core(x)
                    core, values, theirs = map(self._summed, (core, values, inputs.pop()))
                    sums.add(core, values, theirs, one.grid)
        finally:
            handle.remove()
        weight, bias = sums.solve(self.settings.convolution_ridge, self.total)
        attention.dwc.weight.copy_(weight)
        assert attention.dwc.bias is not None
        attention.dwc.bias.copy_(bias)

    def _project(self, student: Block, states: Sequence[Streams]) -> None:
        """The output projection for the target that repairs what earlier layers left."""
        attention = cast(LinearAttention, student.attn)
        projection = attention.to_out
        sums = ProjectionSums(projection.in_features, self._sums_device)
        for one in states:
            for some in one.batches(self.passes.batch_size):
                with self.passes.autocast():
                    x, gate = attention_input(student, one.student[some], one.condition_of(some))
                    features = attention.features(x, one.grid)
                target = one.teacher[some] - one.student[some]
                sums.add(*(self._summed(part) for part in (features, gate, target)))
        weight, bias = sums.solve(self.settings.ridge, projection.weight, projection.bias, self.total)
        projection.weight.copy_(weight)
        projection.bias.copy_(bias)

    def _step(self, student: Block, states: Sequence[Streams], draws: int) -> None:
        """Local gradient steps on all of this attention, for the same target."""
        attention = student.attn
        parameters = list(attention.parameters())
        attention.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        size = self.settings.local_batch_size
        schedule = Schedule(self.counts, size, self.seed, draws)
        problems = [self._problem(student, one) for one in states]
        for step in range(self.local_steps):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.local_steps))
            grid, indices, _ = schedule.at(step, range(size))
            mine = [i // self.processes for i in indices if i % self.processes == self.process]
            optimizer.zero_grad()
            if mine and (problem := problems[grid]) is not None:
                self._loss(student, problem, torch.tensor(mine)).backward()
            for parameter in parameters:
                if parameter.grad is None:  # this process has none of the states
                    parameter.grad = torch.zeros_like(parameter)
                self.total(parameter.grad)
            optimizer.step()
        attention.requires_grad_(False)

    @torch.no_grad()
    def _problem(self, student: Block, one: Streams) -> "_Problem | None":
        """What does not change from step to step; None: this process has no state of the grid."""
        parts = []
        for some in one.batches(self.passes.batch_size):
            with self.passes.autocast():
                x, gate = attention_input(student, one.student[some], one.condition_of(some))
            # In the precision that the first product reads it in: half the bytes to gather.
            parts.append((x.to(torch.bfloat16) if self.passes.bf16 else x, gate))
        if not parts:
            return None
        inputs, gates = zip(*parts, strict=True)
        return _Problem(one.grid, torch.cat(inputs), torch.cat(gates), one.teacher - one.student)

    def _loss(self, student: Block, problem: "_Problem", some: Tensor) -> Tensor:
        """These states' part of the mean squared error of a local step."""
        with self.passes.autocast():
            out = problem.gate[some] * student.attn(problem.x[some], problem.grid)
        squares: Tensor = (out.float() - problem.target[some]).square()
        return squares.sum() / (self.settings.local_batch_size * problem.target[0].numel())

    @property
    def _sums_device(self) -> torch.device:
        """A Mac's GPU has no float64."""
        return torch.device("cpu") if self.passes.device.type == "mps" else self.passes.device

    def _summed(self, values: Tensor) -> Tensor:
        return values.float().to(self._sums_device)


@dataclass(frozen=True)
class _Problem:
    """What the local steps of a layer fit: gate * attention(x) to the target; (n, 1, D), (n, T, D) and (n, T, D)."""

    grid: tuple[int, int]
    x: Tensor
    gate: Tensor
    target: Tensor
