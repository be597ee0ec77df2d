"""The closed forms against a float64 least-squares solver, on small layers of every kind."""

import math

import pytest
import torch
from torch import Tensor

from litconvert.model.modeling_lit import LinearAttention
from litconvert.solving import closed_forms
from litconvert.solving.closed_forms import SMALLEST_SHARE, ConvolutionSums, ProjectionSums

CPU = torch.device("cpu")
GRIDS = [(4, 4), (3, 5), (12, 20)]


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridged(inputs: Tensor, wanted: Tensor, ridge: float, start: Tensor | None = None) -> Tensor:
    """argmin ||inputs w - wanted||^2 + lambda ||w - start||^2 by an orthogonal factorisation, lambda as documented."""
    scale = math.sqrt(ridge * float(inputs.square().sum(0).mean()))
    below = torch.zeros(inputs.shape[1], dtype=torch.float64) if start is None else scale * start
    rows = torch.cat([inputs, scale * torch.eye(inputs.shape[1], dtype=torch.float64)])
    found: Tensor = torch.linalg.lstsq(rows, torch.cat([wanted, below]), driver="gelsd").solution
    return found


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("way", ["exact", "iterative"])
def test_the_projection_is_the_least_squares_solution_of_every_channel(
    monkeypatch: pytest.MonkeyPatch, batch: int, from_start: bool, way: str
) -> None:
    monkeypatch.setattr(closed_forms, "EXACT_WIDTH", 512 if way == "exact" else 0)
    count, tokens, width, ridge = 7, 11, 12, 1e-4
    features, target = values(count, tokens, width, seed=0), values(count, tokens, width, seed=1)
    gate = values(count, 1, width, seed=2)
    weight, bias = torch.zeros(width, width), torch.zeros(width)
    if from_start:
        weight, bias = values(width, width, seed=3), values(width, seed=4)
    sums = ProjectionSums(width, CPU)
    for first in range(0, count, batch):
        some = slice(first, first + batch)
        sums.add(features[some], gate[some], target[some])
    solved, offset = sums.solve(ridge, weight, bias)
    for channel in range(width):
        inputs = torch.cat([features, torch.ones(count, tokens, 1, dtype=torch.float64)], dim=2) * gate[:, :, [channel]]
        start = torch.cat([weight[channel].double(), bias[[channel]].double()])
        expected = ridged(inputs.flatten(0, 1), target[..., channel].flatten(), ridge, start)
        torch.testing.assert_close(torch.cat([solved[channel], offset[[channel]]]), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", ["exact", "iterative"])
def test_a_channel_whose_gate_is_shut_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(closed_forms, "EXACT_WIDTH", 512 if way == "exact" else 0)
    width = 8
    gate = values(3, 1, width, seed=0)
    gate[:, :, 2] = 0
    sums = ProjectionSums(width, CPU)
    sums.add(values(3, 5, width, seed=1), gate, values(3, 5, width, seed=2))
    weight, bias = values(width, width, seed=3), values(width, seed=4)
    solved, offset = sums.solve(1e-4, weight, bias)
    torch.testing.assert_close(solved[2], weight[2])
    torch.testing.assert_close(offset[2], bias[2])
    assert not torch.allclose(solved[1], weight[1])


@pytest.mark.parametrize("count", [24, 4], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("width", [192, pytest.param(1152, marks=pytest.mark.slow)])
def test_both_ways_give_the_same_outputs_in_float32(monkeypatch: pytest.MonkeyPatch, width: int, count: int) -> None:
    """Of features whose spectrum falls off, with gates that go through zero; of 48 channels, to save time."""
    monkeypatch.setattr(ProjectionSums, "_chunks", lambda sums: iter([slice(0, 48)]))
    tokens = 4 * width // count
    scales = torch.logspace(0, -3, width, dtype=torch.float64)
    features = (values(count, tokens, width, seed=0) * scales) @ torch.linalg.qr(values(width, width, seed=1))[0] + 0.1
    gate = 0.5 + 0.5 * values(count, 1, width, seed=2)
    target = gate * (features @ values(width, width, seed=3)) + 0.05 * values(count, tokens, width, seed=4)
    outputs = []
    for exact_width in (width, 0):
        monkeypatch.setattr(closed_forms, "EXACT_WIDTH", exact_width)
        sums = ProjectionSums(width, CPU)
        sums.add(features.float(), gate.float(), target.float())
        weight, bias = sums.solve(1e-4, torch.zeros(width, width), torch.zeros(width))
        outputs.append((gate * (features @ weight.T + bias))[..., :48])
    exact, iterative = outputs
    assert float((iterative - exact).norm() / exact.norm()) < 5e-5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("heads", [1, 2, 12])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_convolution_is_the_least_squares_solution_of_every_channel(
    grid: tuple[int, int], heads: int, size: int
) -> None:
    width, count, ridge = 12, 2, 1e-3
    tokens, head_dim = grid[0] * grid[1], width // heads
    core, given = values(count, tokens, width, seed=0), values(count, tokens, width, seed=1)
    # A target of the form that is fitted, and noise: the share of the core is then well above its floor.
    target = 0.7 * core + 0.3 * given + 0.1 * values(count, tokens, width, seed=2)
    sums = ConvolutionSums(heads, head_dim, size, CPU)
    for sample in range(count):
        one = slice(sample, sample + 1)
        sums.add(core[one], given[one], target[one], grid)
    kernel, bias = sums.solve(ridge)
    # By the model's own convolution, one unknown at a time: what each entry of the kernel adds to the output.
    attention = LinearAttention(width, heads, "relu", size, 1e-6).double()
    assert attention.dwc is not None
    assert attention.dwc.bias is not None
    columns = [core]
    with torch.no_grad():
        attention.dwc.bias.zero_()
        for entry in range(size * size):
            attention.dwc.weight.zero_()
            attention.dwc.weight.flatten(1)[:, entry] = 1
            columns.append(attention.convolve(given, grid))
    inputs = torch.stack([*columns, torch.ones_like(core)], dim=-1).unflatten(2, (heads, head_dim))
    wanted = target.unflatten(2, (heads, head_dim))
    for channel in range(head_dim):
        rows = inputs[:, :, :, channel].reshape(-1, size * size + 2)
        expected = ridged(rows, wanted[:, :, :, channel].reshape(-1), ridge)
        share = expected[0].clamp(min=SMALLEST_SHARE)
        torch.testing.assert_close(kernel[channel].flatten(), expected[1:-1] / share, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(bias[channel], expected[-1] / share, rtol=1e-7, atol=1e-9)


def test_the_core_keeps_a_share_whatever_the_target() -> None:
    core, given = values(2, 16, 4, seed=0), values(2, 16, 4, seed=1)
    sums = ConvolutionSums(2, 2, 3, CPU)
    sums.add(core, given, given - core, (4, 4))  # the core's own share would be -1
    kernel, _ = sums.solve(1e-3)
    assert ((kernel[:, 0, 1, 1] * SMALLEST_SHARE - 1).abs() < 0.05).all()
