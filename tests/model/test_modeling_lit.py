"""The network: its linear attention against the formula in float64, and what the model promises around it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from litconvert.model.modeling_lit import (
    LinearAttention,
    LiTTransformer2DModel,
    SoftmaxAttention,
    linear_attention,
    sincos_position_embedding,
)

EPS = 1e-6
KERNELS = ("relu", "gelu", "focused")
CONV_SIZES = (0, 3, 5, 7)
# Relative error of outputs and of gradients; where values have a mean, that of queries is float32's cancellation.
LIMITS = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1e-2)}
HALF = (torch.bfloat16, torch.float16)

# (grid, heads, width of a head)
SHAPES = [
    pytest.param((4, 4), 2, 32, id="square,T<d"),
    pytest.param((3, 5), 2, 32, id="3:5,T<d"),
    pytest.param((8, 8), 3, 16, id="square,T>d"),
    pytest.param((6, 10), 1, 64, id="3:5,T<d,one head"),
    pytest.param((12, 20), 2, 64, id="3:5,T>d"),
]


def phi(x: Tensor, kernel: str) -> Tensor:
    """The kernel functions as the paper writes them, over the whole width."""
    if kernel == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) + EPS
    positive = torch.clamp(x, min=0) + EPS
    if kernel == "relu":
        return positive
    cubed = positive**3
    return cubed / (cubed**2).sum(-1, keepdim=True).sqrt() * (positive**2).sum(-1, keepdim=True).sqrt()


def textbook(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: str, grid: tuple[int, int], convolution: list[Tensor]
) -> Tensor:
    """Linear attention as the sum over all pairs of tokens, plus the convolution of V as (N h, d, H, W)."""
    count, tokens, width = v.shape
    head_dim = width // heads
    q, k = phi(q, kernel), phi(k, kernel)
    outputs = []
    for channels in torch.arange(width).chunk(heads):
        scores = torch.einsum("nic,njc->nij", q[..., channels], k[..., channels])
        summed = torch.einsum("nij,njc->nic", scores, v[..., channels]) / tokens
        outputs.append(summed / (scores.mean(-1, keepdim=True) + EPS))
    output = torch.cat(outputs, -1)
    if convolution:
        weight, bias = convolution
        image = v.transpose(1, 2).reshape(count * heads, head_dim, *grid)
        image = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=head_dim)
        output = output + image.reshape(count, width, tokens).transpose(1, 2)
    return output


class GivenProjections(LinearAttention):
    """Linear attention on given queries, keys and values (3, N, T, D), and nothing after it."""

    def __init__(self, width: int, heads: int, kernel: str, conv_size: int) -> None:
        super().__init__(width, heads, kernel, conv_size, EPS)
        nn.init.eye_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unbind()
        return q, k, v


def relative_error(value: Tensor, reference: Tensor) -> float:
    error: Tensor = (value.detach().double() - reference.detach()).norm() / reference.detach().norm()
    return error.item()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(kernel: str, *shape: int, seed: int = 0) -> Tensor:
    """Queries, keys, and values with a mean; GELU's shifted, which keeps its denominator away from zero."""
    values = normal(3, *shape, seed=seed)
    values[:2] += 1.5 if kernel == "gelu" else 0.0
    values[2] += normal(shape[-1], seed=seed + 100)
    return values


@pytest.mark.parametrize(("grid", "heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("conv_size", CONV_SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_linear_attention_agrees_with_the_formula_in_float64(
    dtype: torch.dtype, kernel: str, conv_size: int, grid: tuple[int, int], heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    tokens, width = grid[0] * grid[1], heads * head_dim
    attention = GivenProjections(width, heads, kernel, conv_size).to(dtype)
    qkv = inputs_of(kernel, 2, tokens, width).to(dtype).requires_grad_()
    weights = [] if attention.dwc is None else list(attention.dwc.parameters())
    output = attention(qkv, grid)
    upstream = normal(*output.shape, seed=1).to(dtype)
    gradients = torch.autograd.grad(output, [qkv, *weights], upstream)

    exact_qkv, *exact_weights = (x.detach().double().requires_grad_() for x in (qkv, *weights))
    q, k, v = exact_qkv.unbind()
    exact = textbook(q, k, v, heads, kernel, grid, exact_weights)
    exact_gradients = torch.autograd.grad(exact, [exact_qkv, *exact_weights], upstream.double())

    assert output.dtype == dtype
    output_limit, gradient_limit = LIMITS[dtype]
    assert relative_error(output, exact) <= output_limit
    for mine, theirs in zip(gradients[0].unbind(), exact_gradients[0].unbind(), strict=True):
        assert relative_error(mine, theirs) <= gradient_limit
    for mine, theirs in zip(gradients[1:], exact_gradients[1:], strict=True):
        assert relative_error(mine, theirs) <= gradient_limit


@pytest.mark.parametrize(("grid", "heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_whole_layer_agrees_with_the_formula_in_float64(
    kernel: str, grid: tuple[int, int], heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    width = heads * head_dim
    attention = LinearAttention(width, heads, kernel, 5, EPS)
    if kernel == "gelu":
        nn.init.constant_(attention.to_q.bias, 1.5)
        nn.init.constant_(attention.to_k.bias, 1.5)
    x = normal(2, grid[0] * grid[1], width, seed=2).float().requires_grad_()
    parameters = dict(attention.named_parameters())
    output = attention(x, grid)
    upstream = normal(*output.shape, seed=3).float()
    gradients = torch.autograd.grad(output, [x, *parameters.values()], upstream)

    exact_x = x.detach().double().requires_grad_()
    p = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    q, k, v = (exact_x @ p[f"{name}.weight"].T + p[f"{name}.bias"] for name in ("to_q", "to_k", "to_v"))
    core = textbook(q, k, v, heads, kernel, grid, [p["dwc.weight"], p["dwc.bias"]])
    exact = core @ p["to_out.weight"].T + p["to_out.bias"]
    exact_gradients = torch.autograd.grad(exact, [exact_x, *p.values()], upstream.double())

    assert relative_error(output, exact) <= 1e-6
    # A projection's weight and bias together: the bias of K alone nearly cancels out of the function.
    mine: dict[str, list[Tensor]] = {}
    theirs: dict[str, list[Tensor]] = {}
    for name, gradient, exact_gradient in zip(["x", *p], gradients, exact_gradients, strict=True):
        module = name.partition(".")[0]
        mine.setdefault(module, []).append(gradient.flatten())
        theirs.setdefault(module, []).append(exact_gradient.flatten())
    assert list(mine) == ["x", "to_q", "to_k", "to_v", "to_out", "dwc"]
    for module in mine:
        assert relative_error(torch.cat(mine[module]), torch.cat(theirs[module])) <= 2e-6, module


def test_the_epsilons_hardly_change_the_function() -> None:
    q, k, v = inputs_of("relu", 1, 100, 64)
    output = linear_attention(F.relu(q) + EPS, F.relu(k) + EPS, v, 1, EPS)
    scores = F.relu(q) @ F.relu(k).mT
    assert relative_error(output, scores @ v / scores.sum(-1, keepdim=True)) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "head_dim", "scale", "shift"),
    [
        pytest.param(4096, 32, 30, 30, id="4096 tokens, large values"),
        pytest.param(4096, 288, 10, 5, id="4096 tokens, wide head"),
        pytest.param(65536, 32, 1, 0.5, id="65536 tokens"),
        pytest.param(16, 64, 1000, 500, id="huge values, T<d"),
    ],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)], ids=str)
def test_half_precision_neither_overflows_nor_loses_precision(
    tokens: int, head_dim: int, scale: float, shift: float, dtype: torch.dtype, limit: float
) -> None:
    given = (normal(3, 1, tokens, head_dim, seed=4) * scale + shift).to(dtype).requires_grad_()
    q, k, v = given.unbind()
    output = linear_attention(F.relu(q) + EPS, F.relu(k) + EPS, v, 1, EPS)
    q64, k64, v64 = given.detach().double().unbind()
    q64, k64 = F.relu(q64) + EPS, F.relu(k64) + EPS
    exact = q64 @ (k64.mT @ v64) / (q64 @ k64.sum(1, keepdim=True).mT + tokens * EPS)
    assert relative_error(output, exact) <= limit
    assert torch.isfinite(torch.autograd.grad(output, given, torch.ones_like(output))[0]).all()


Triple = tuple[Tensor, Tensor, Tensor]


def core_inputs(tokens: int, head_dim: int, mean: float, dtype: torch.dtype) -> tuple[Triple, Tensor]:
    """q and k after the kernel function, v with a mean of so many standard deviations; an upstream gradient."""
    q, k, v = normal(3, 1, tokens, head_dim, seed=7)
    v += mean * normal(head_dim, seed=8)
    q, k, v = (x.to(dtype).requires_grad_() for x in (F.relu(q) + EPS, F.relu(k) + EPS, v))
    return (q, k, v), normal(1, tokens, head_dim, seed=9).to(dtype)


def exact_core(given: Triple, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients in float64."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in given]
    output = q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT + q.shape[1] * EPS)
    return [output, *torch.autograd.grad(output, leaves, upstream.double())]


# Limits of the output and of the gradients of q, k and v. Where T < d, weights of pairs of tokens are rounded, too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tokens", "head_dim", "mean", "limits"),
    [
        (torch.bfloat16, 4096, 72, 0, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 72, 0.5, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 72, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 288, 1, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 288, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 1024, 576, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 576, 0, (2.2e-3, 4e-3)),
        (torch.bfloat16, 4096, 576, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 288, 0, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 288, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 576, 0, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 576, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 72, 0, (2.2e-3, 4e-3)),
        (torch.bfloat16, 16384, 72, 3, (2.2e-3, 4e-3)),
        (torch.bfloat16, 256, 288, 0, (2.5e-3, 4e-3)),
        (torch.bfloat16, 256, 288, 3, (2.5e-3, 4e-3)),
        (torch.float16, 4096, 72, 0, (4e-4, 6e-4)),
        (torch.float16, 4096, 72, 3, (4e-4, 6e-4)),
        (torch.float16, 65536, 32, 0, (4e-4, 6e-4)),
        (torch.float16, 48, 72, 0, (4e-4, 6e-4)),
        (torch.float16, 48, 72, 3, (4e-4, 6e-4)),
    ],
    ids=str,
)
def test_half_precision_is_as_exact_where_values_have_a_mean(
    dtype: torch.dtype, tokens: int, head_dim: int, mean: float, limits: tuple[float, float]
) -> None:
    given, upstream = core_inputs(tokens, head_dim, mean, dtype)
    output = linear_attention(*given, 1, EPS)
    gradients = torch.autograd.grad(output, given, upstream)
    with torch.inference_mode():
        sampled = linear_attention(*given, 1, EPS)
    exact, *exact_gradients = exact_core(given, upstream)
    assert relative_error(output, exact) <= limits[0]
    assert relative_error(sampled, exact) <= limits[0]
    for mine, theirs in zip(gradients, exact_gradients, strict=True):
        assert relative_error(mine, theirs) <= limits[1]


@pytest.mark.parametrize(
    ("dtype", "tokens", "limits"),
    [
        (torch.bfloat16, 1024, (2.2e-3, 4e-3)),
        (torch.bfloat16, 48, (3e-3, 4e-3)),
        # Fewer tokens have true gradients that float16 cannot hold.
        (torch.float16, 1024, (4e-4, 6e-4)),
    ],
    ids=str,
)
def test_queries_that_the_kernel_cut_off_have_the_gradient_of_the_formula(
    dtype: torch.dtype, tokens: int, limits: tuple[float, float]
) -> None:
    # Their weights do not sum to 1: the eps of the denominator is not small beside the rest of it.
    given, upstream = core_inputs(tokens, 72, 3, dtype)
    dead = torch.arange(tokens) % 8 == 0
    with torch.no_grad():
        given[0][:, dead] = EPS
    output = linear_attention(*given, 1, EPS)
    gradient = torch.autograd.grad(output, given[0], upstream)[0]
    exact, exact_gradient, *_ = exact_core(given, upstream)
    for queries in (dead, ~dead):
        assert relative_error(output[:, queries], exact[:, queries]) <= limits[0]
        assert relative_error(gradient[:, queries], exact_gradient[:, queries]) <= limits[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself where it compiles
def test_compiled_the_core_is_as_exact() -> None:
    # The compiler keeps in float32 what it computes in one pass, and so adds up differences that are not rounded yet.
    given, upstream = core_inputs(512, 32, 0, torch.bfloat16)
    output = torch.compile(linear_attention)(*given, 1, EPS)
    gradients = torch.autograd.grad(output, given, upstream)
    exact, *exact_gradients = exact_core(given, upstream)
    assert relative_error(output, exact) <= 3e-3
    for mine, theirs in zip(gradients, exact_gradients, strict=True):
        assert relative_error(mine, theirs) <= 4e-3


@pytest.mark.parametrize("tokens", [64, 16], ids=["T>d", "T<d"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_core_runs_on_tensors_without_data(dtype: torch.dtype, tokens: int) -> None:
    with FakeTensorMode():
        q, k, v = (torch.ones(2, tokens, 64, dtype=dtype, requires_grad=True) for _ in range(3))
        output = linear_attention(q, k, v, 2, EPS)
        gradients = torch.autograd.grad(output, (q, k, v), torch.ones_like(output))
    assert {(x.shape, x.dtype) for x in (output, *gradients)} == {((2, tokens, 64), dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradients_of_gradients_are_refused_in_half_precision(dtype: torch.dtype) -> None:
    (q, k, v), _ = core_inputs(64, 16, 1, dtype)
    loss = linear_attention(q, k, v, 1, EPS).square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    if dtype == torch.float32:
        gradient.sum().backward()
        assert k.grad is not None
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_both_orders_of_the_products_give_the_same_function() -> None:
    # Every token twice: the averages stay what they are, but the tokens are no longer fewer than the channels.
    q, k, v = inputs_of("relu", 2, 24, 64).abs()
    few = linear_attention(q, k, v, 2, EPS)
    many = linear_attention(q.repeat(1, 2, 1), k.repeat(1, 2, 1), v.repeat(1, 2, 1), 2, EPS)
    torch.testing.assert_close(many, few.repeat(1, 2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "head_dim", "cheaper"), [(16, 64, 16), (64, 16, 16)])
def test_the_cheaper_order_is_the_one_computed(tokens: int, head_dim: int, cheaper: int) -> None:
    q, k, v = torch.rand(3, 1, tokens, head_dim).unbind()
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, 1, EPS)
    denominator = tokens * head_dim
    assert counter.get_total_flops() == 2 * (2 * tokens * head_dim * cheaper + denominator)


@pytest.mark.parametrize("count", [1, 2])
def test_the_convolution_reads_v_where_it_lies(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = LinearAttention(32, 2, "relu", 5, EPS)
    v = torch.randn(count, 15, 32)
    seen: list[tuple[Tensor, Tensor]] = []
    convolve = F.conv2d

    def spy(image: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append((image, convolve(image, *arguments, **options)))
        return seen[0][1]

    monkeypatch.setattr(F, "conv2d", spy)
    attention.convolve(v, (3, 5))
    image, result = seen[0]
    assert image.data_ptr() == v.data_ptr()
    # The result's layout tells whether torch took the input for channels-last: at batch 1 its strides alone do not.
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_the_grid_is_what_is_passed_and_not_guessed_from_the_token_count() -> None:
    attention = LinearAttention(32, 2, "relu", 3, EPS)
    x = torch.randn(1, 60, 32)
    assert not torch.allclose(attention(x, (6, 10)), attention(x, (10, 6)), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_into_the_core(dtype: torch.dtype) -> None:
    attention = GivenProjections(32, 2, "relu", 5)
    qkv = inputs_of("relu", 2, 60, 32).to(dtype)
    q, k, v = qkv.unbind()
    plain = linear_attention(F.relu(q), F.relu(k), v, 2, EPS), attention.convolve(v, (6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_attention(F.relu(q), F.relu(k), v, 2, EPS), attention.convolve(v, (6, 10))
    for mine, theirs in zip(cast, plain, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("tokens", [60, 12], ids=["T>d", "T<d"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_does_not_reach_into_the_gradient(dtype: torch.dtype, tokens: int) -> None:
    given, upstream = core_inputs(tokens, 32, 1, dtype)
    plain = torch.autograd.grad(linear_attention(*given, 2, EPS), given, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(linear_attention(*given, 2, EPS), given, upstream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(cast, plain, strict=True))


def pico(**changes: Any) -> LiTTransformer2DModel:
    """A linear and a softmax layer, with no weight zero: adaLN-zero would make every block the identity."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention": ["linear", "softmax"],
        "linear_num_heads": 2,
        "linear_conv_size": 3,
        "num_classes": 4,
    }
    model: LiTTransformer2DModel = LiTTransformer2DModel(**config | changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    model.eval()
    return model


def blocks(model: LiTTransformer2DModel) -> list[Any]:
    """The layers; a ModuleList says nothing of what is in it."""
    return list(model.blocks)


def call(model: LiTTransformer2DModel, height: int = 8, width: int = 8) -> Tensor:
    """The output for two fixed latents (2, 1, height, width)."""
    channels = model.config.in_channels
    latents = normal(2, channels, height, width, seed=5).float()
    output: Tensor = model(latents, torch.tensor([3, 700]), torch.tensor([0, 4])).sample
    return output


def test_each_layer_attends_as_the_config_says() -> None:
    model = pico(num_layers=3, attention=["softmax", "linear", "softmax"])
    kinds = [type(block.attn) for block in blocks(model)]
    assert kinds == [SoftmaxAttention, LinearAttention, SoftmaxAttention]
    assert all(type(block.attn) is SoftmaxAttention for block in blocks(pico(attention=None)))


def test_the_output_has_the_latents_size_at_any_aspect_ratio() -> None:
    assert call(pico(), 12, 20).shape == (2, 2, 12, 20)
    assert call(pico(patch_size=4), 12, 20).shape == (2, 2, 12, 20)


def test_a_patch_comes_out_where_it_went_in() -> None:
    # Softmax alone would mix everything: with the blocks gated off, a patch only sees itself.
    model = pico()
    for block in blocks(model):
        nn.init.zeros_(block.adaLN_modulation.weight)
        nn.init.zeros_(block.adaLN_modulation.bias)
    latents = torch.zeros(1, 1, 8, 12)
    changed = latents.clone()
    changed[0, 0, 2:4, 6:8] = 1
    step, label = torch.tensor([5]), torch.tensor([1])
    difference = (model(changed, step, label).sample - model(latents, step, label).sample).abs().sum(1)[0]
    assert difference[2:4, 6:8].min() > 0
    difference[2:4, 6:8] = 0
    assert difference.max() == 0


def test_a_scalar_timestep_stands_for_every_sample() -> None:
    model = pico()
    latents, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    one = model(latents, torch.tensor(7), labels, return_dict=False)
    both = model(latents, torch.tensor([7, 7]), labels).sample
    assert isinstance(one, tuple)
    assert torch.equal(one[0], both)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 9)])
def test_sizes_that_patches_do_not_tile_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of the patch size 2, got {height}x{width}"):
        call(pico(), height, width)
    assert call(pico(), 8, 10).shape == (2, 2, 8, 10)


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ({"attention": ["linear"]}, {"attention": ["linear"] * 2}, "for each of 2 layers"),
        ({"attention": ["linear", "lineer"]}, {"attention": ["linear", "softmax"]}, "one of .*'lineer'"),
        ({"linear_kernel": "elu"}, {"linear_kernel": "focused"}, "linear_kernel must be one of .* got 'elu'"),
        ({"linear_conv_size": 4}, {"linear_conv_size": 7}, "linear_conv_size must be one of .* got 4"),
        ({"hidden_size": 30}, {"hidden_size": 36}, "multiple of 4, got 30"),
        ({"num_attention_heads": 3}, {"num_attention_heads": 4}, "num_attention_heads must divide .* got 3"),
        ({"num_attention_heads": 0}, {"num_attention_heads": 1}, "num_attention_heads must divide .* got 0"),
        ({"linear_num_heads": 5}, {"linear_num_heads": 8}, "linear_num_heads must divide .* got 5"),
        # The heads of a kind that no layer has are nobody's business.
        (
            {"linear_num_heads": 5, "attention": ["linear", "softmax"]},
            {"linear_num_heads": 5, "attention": ["softmax", "softmax"]},
            "linear_num_heads must divide",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_the_value(wrong: dict[str, Any], right: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pico(**wrong)
    assert torch.isfinite(call(pico(**right))).all()


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_fused_projections_compute_the_same(kind: str) -> None:
    model = pico(attention=[kind, kind])
    before = call(model)
    model.fuse_qkv_projections()
    assert all(block.attn.qkv_weight is not None for block in blocks(model))
    torch.testing.assert_close(call(model), before, rtol=1e-5, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(call(model), before)
    assert all(block.attn.qkv_weight is None for block in blocks(model))
    assert not any("qkv_" in name for name in model.state_dict())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("conv_size", [3, 5])
def test_gradient_checkpointing_changes_no_bit(conv_size: int, bf16: bool) -> None:
    model = pico(linear_conv_size=conv_size).train()

    def step() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = call(model)
        return output, list(torch.autograd.grad(output.square().sum(), list(model.parameters())))

    output, gradients = step()
    model.enable_gradient_checkpointing()
    again, recomputed = step()
    assert torch.equal(output, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, recomputed, strict=True))


def test_a_model_that_has_sampled_can_be_trained() -> None:
    # The position embedding is kept: one made in inference mode must not get in the way of a backward pass.
    model = pico()
    with torch.inference_mode():
        call(model, 14, 6)
    gradient = torch.autograd.grad(call(model.train(), 14, 6).sum(), model.x_embedder.proj.weight)[0]
    assert gradient.any()


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_was_exported_works_as_before(dtype: torch.dtype, trained: bool) -> None:
    # An export runs on stand-ins for tensors: the position embedding must not be kept from one.
    model = pico(linear_conv_size=5).to(dtype).requires_grad_(trained)
    inputs = normal(1, 1, 10, 14, seed=6).to(dtype), torch.tensor([3]), torch.tensor([2])
    exported = torch.export.export(model, inputs, {"return_dict": False}, strict=False)
    output = model(*inputs).sample
    assert type(output) is Tensor
    torch.testing.assert_close(exported.module()(*inputs, return_dict=False)[0], output, rtol=1e-5, atol=1e-5)


def test_bf16_autocast_stays_close_to_float32() -> None:
    model = pico(attention=["linear", "linear"])
    exact = call(model, 24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(call(model, 24, 40), exact.double()) < 2e-2


def of_captions(**changes: Any) -> LiTTransformer2DModel:
    """As `pico`, of captions."""
    return pico(num_classes=None, null_class=False, caption_channels=8, caption_tokens=5, **changes)


def call_any(model: LiTTransformer2DModel) -> Tensor:
    """The output for two fixed latents (2, 1, 16, 16) and classes or captions, in the dtype of the weights."""
    latents = normal(2, 1, 16, 16, seed=5).to(model.dtype)
    captions = normal(2, 5, 8, seed=6).to(model.dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    of_classes = model.config.num_classes is not None
    output: Tensor = model(
        latents,
        torch.tensor([3, 700]),
        class_labels=torch.tensor([0, 4]) if of_classes else None,
        encoder_hidden_states=None if of_classes else captions,
        encoder_attention_mask=None if of_classes else mask,
    ).sample
    return output


def stream_dtypes(model: LiTTransformer2DModel) -> set[torch.dtype]:
    """The dtypes of what goes into the blocks and comes out of them in one pass."""
    seen: set[torch.dtype] = set()

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.update((arguments[0].dtype, output.dtype))

    handles = [block.register_forward_hook(record) for block in blocks(model)]
    call_any(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", [pico, of_captions], ids=["classes", "captions"])
def test_under_autocast_what_blocks_add_to_stays_float32(make: Callable[..., LiTTransformer2DModel]) -> None:
    model = make(num_layers=6, attention=["linear", "softmax"] * 3)
    exact = call_any(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert stream_dtypes(model) == {torch.float32}
        output = call_any(model)

    for block in blocks(model):
        block.register_forward_pre_hook(lambda module, arguments: (arguments[0].bfloat16(), *arguments[1:]))
        block.register_forward_hook(lambda module, arguments, output: output.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = call_any(model)
    assert relative_error(output, exact) < 0.8 * relative_error(rounded, exact)


@pytest.mark.parametrize("make", [pico, of_captions], ids=["classes", "captions"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_autocast_what_blocks_add_to_is_as_the_weights(
    dtype: torch.dtype, make: Callable[..., LiTTransformer2DModel]
) -> None:
    model = make().to(dtype)
    assert stream_dtypes(model) == {dtype}
    assert call_any(model).dtype == dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself where it compiles
def test_under_autocast_blocks_compile_whole() -> None:
    model = pico()
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(model)
        for block in blocks(model):
            block.forward = torch.compile(type(block).forward, backend="aot_eager", fullgraph=True).__get__(block)
        compiled = call(model)
    assert torch.equal(compiled, plain)


def test_a_model_survives_saving_and_loading(tmp_path: Path) -> None:
    model = pico(linear_kernel="focused", null_class=False, num_classes=5, timestep_freq_shift=1.0, norm_eps=1e-5)
    model.save_pretrained(tmp_path)
    loaded = LiTTransformer2DModel.from_pretrained(tmp_path)
    mine, theirs = ({k: v for k, v in one.config.items() if not k.startswith("_")} for one in (loaded, model))
    assert mine == theirs
    assert torch.equal(call(loaded), call(model))


@pytest.fixture
def active_backend() -> Iterator[None]:
    """set_attention_backend also sets diffusers' default for the process: put it back."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.usefixtures("active_backend")
def test_an_attention_backend_reaches_softmax_layers_only() -> None:
    model = pico()
    before = call(model)
    model.set_attention_backend("_native_math")
    assert blocks(model)[1].attn.processor._attention_backend == "_native_math"
    assert not hasattr(blocks(model)[0].attn, "processor")
    torch.testing.assert_close(call(model), before, rtol=1e-5, atol=1e-5)
    model.set_attention_backend("native")
    assert torch.equal(call(model), before)


@pytest.mark.parametrize(("grid", "base_size"), [((16, 16), 16), ((32, 32), 16), ((12, 20), 16), ((5, 3), 8)], ids=str)
def test_positions_are_those_of_diffusers(grid: tuple[int, int], base_size: int) -> None:
    mine = sincos_position_embedding(48, grid, base_size, torch.device("cpu"))
    theirs = get_2d_sincos_pos_embed(48, grid, base_size=base_size, output_type="pt")
    assert mine.shape == (1, grid[0] * grid[1], 48)
    torch.testing.assert_close(mine[0].double(), theirs.double(), rtol=0, atol=2e-6)
