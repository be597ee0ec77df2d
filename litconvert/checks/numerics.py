"""Attention on the device in half precision, forward and backward, against float64 on the CPU from the same numbers."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litconvert.checks.check import Context, Error, Finding, judge
from litconvert.model import modeling_lit
from litconvert.model.modeling_lit import Block, Condition, LinearAttention, LiTTransformer2DModel, relu_kernel
from litconvert.training.engine import sum_in_float32

EPS = 1e-6
# A check that has taken so long leaves its larger shapes out.
SECONDS = 10.0


@dataclass(frozen=True)
class Shape:
    """Of an attention: samples, tokens (a square number), heads and their width."""

    batch: int
    tokens: int
    heads: int
    head_width: int

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def side(self) -> int:
        return math.isqrt(self.tokens)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads of {self.head_width}"


# DiT-XL/2's linear heads are 4 of 288. Below as many tokens as a head is wide the products have the quadratic order.
SHAPES = (
    Shape(2, 256, 4, 288),
    Shape(2, 256, 2, 576),
    Shape(2, 1024, 4, 72),
    Shape(2, 1024, 4, 288),
    Shape(1, 1024, 2, 576),
    Shape(1, 4096, 4, 72),
    Shape(1, 4096, 4, 288),
    Shape(1, 4096, 2, 576),
)
BLOCK_SHAPE = Shape(1, 1024, 8, 72)


class Limits(NamedTuple):
    """Relative L2 errors: of the output, of the output in the quadratic order, and of gradients."""

    forward: float
    quadratic: float
    gradient: float

    def of(self, name: str, order: str = "linear") -> float:
        """That of the output or of a gradient."""
        if name != "output":
            return self.gradient
        return self.quadratic if order == "quadratic" else self.forward


# A rounding to bf16 alone is 1.7e-3, to float16 2.1e-4. The layer rounds three times on its way, the block six times.
CORE_LIMITS = {"bfloat16": Limits(2.2e-3, 2.5e-3, 4e-3), "float16": Limits(1e-3, 1e-3, 2e-3)}
LAYER_LIMITS = {"bfloat16": Limits(4e-3, 4e-3, 5e-3), "float16": Limits(1e-3, 1e-3, 2e-3)}
BLOCK_LIMITS = {"float32": Limits(1e-5, 1e-5, 1e-5), "bfloat16": Limits(6e-3, 6e-3, 1e-2)}


def check_core(context: Context, dtype: str, shapes: Sequence[Shape] = SHAPES) -> Finding:
    """`modeling_lit.linear_attention`; V has a mean over tokens as large as its spread."""
    kind: torch.dtype = getattr(torch, dtype)
    sum_in_float32(torch.device(context.device))  # as in training

    def measure(shape: Shape) -> dict[str, float]:
        q, k, v, upstream = (_normal(shape, seed) for seed in range(4))
        inputs = {"q": relu_kernel(q, EPS), "k": relu_kernel(k, EPS), "v": v + 1}
        mine = {name: one.to(context.device, kind).requires_grad_() for name, one in inputs.items()}
        theirs = {name: one.to(kind).double().requires_grad_() for name, one in inputs.items()}
        output = modeling_lit.linear_attention(mine["q"], mine["k"], mine["v"], shape.heads, EPS)
        exact = exact_attention(theirs["q"], theirs["k"], theirs["v"], shape.heads)
        return _errors(output, mine, exact, theirs, upstream.to(kind))

    return _judge(measure, shapes, CORE_LIMITS[dtype])


def check_layer(context: Context, dtype: str, shapes: Sequence[Shape] = SHAPES) -> Finding:
    """The whole LinearAttention, convolution and output projection too, from its own queries, keys and values on."""
    kind: torch.dtype = getattr(torch, dtype)
    sum_in_float32(torch.device(context.device))  # as in training

    def measure(shape: Shape) -> dict[str, float]:
        torch.manual_seed(0)
        layer = LinearAttention(shape.width, shape.heads, "relu", 5, EPS)
        nn.init.constant_(layer.to_v.bias, 1.0)
        layer.to(context.device, kind)
        mine: dict[str, Tensor] = {}
        for name in "qkv":

            def keep(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
                mine[name] = output

            getattr(layer, f"to_{name}").register_forward_hook(keep)
        x, upstream = (_normal(shape, seed).to(kind) for seed in range(2))
        output = layer(x.to(context.device), (shape.side, shape.side))
        theirs = {name: one.detach().cpu().double().requires_grad_() for name, one in mine.items()}
        exact = exact_layer(theirs["q"], theirs["k"], theirs["v"], layer, shape)
        return _errors(output, mine, exact, theirs, upstream)

    return _judge(measure, shapes, LAYER_LIMITS[dtype])


def check_softmax_block(context: Context, dtypes: Sequence[str] = tuple(BLOCK_LIMITS)) -> Finding:
    """A transformer block with softmax attention (SDPA), in float32 and in bf16 autocast, and its float64 copy."""
    shape = BLOCK_SHAPE
    sum_in_float32(torch.device(context.device))
    errors, rows = [], []
    for dtype in dtypes:
        torch.manual_seed(0)
        block = _softmax_block(shape)
        x, upstream = (_normal(shape, seed).bfloat16().float() for seed in range(2))
        given = torch.randn(1, shape.width).bfloat16().float()
        sides = []
        for one, kind, device in ((block, torch.float32, context.device), (copy.deepcopy(block), torch.float64, "cpu")):
            one.to(device, kind)
            inputs = {"input": x.detach().to(device, kind).requires_grad_(), **dict(one.named_parameters())}
            condition = given.to(device, kind)
            half = dtype == "bfloat16" and kind == torch.float32
            with torch.autocast(context.device, torch.bfloat16, enabled=half):
                output = one(inputs["input"], Condition(condition, condition), (shape.side, shape.side))
            gradients = torch.autograd.grad(output, list(inputs.values()), upstream.to(device, kind))
            # That of the keys' bias is zero.
            weights = torch.cat([gradient.flatten().cpu().double() for gradient in gradients[1:]])
            sides.append({"output": output, "input": gradients[0], "weights": weights})
        found = {name: relative_error(value, sides[1][name]) for name, value in sides[0].items()}
        rows.append({"precision": dtype, **found})
        limits = BLOCK_LIMITS[dtype]
        errors += [Error(f"{_what(name)}, {dtype}", value, limits.of(name)) for name, value in found.items()]
    return judge(errors, {"shape": asdict(shape), "cases": rows})


def exact_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Linear attention of (N, T, D) after the kernel function, as the formula says it, in the inputs' precision."""
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))  # (N, h, T, d)
    denominator = q @ k.sum(2, keepdim=True).transpose(2, 3) + v.shape[2] * EPS
    return (q @ (k.transpose(2, 3) @ v) / denominator).transpose(1, 2).flatten(2)


def exact_layer(q: Tensor, k: Tensor, v: Tensor, layer: LinearAttention, shape: Shape) -> Tensor:
    """What the layer makes of its queries, keys and values: the convolution is of V seen as (N h, d, H, W)."""
    assert layer.dwc is not None
    weights = {name: value.detach().cpu().double() for name, value in layer.named_parameters()}
    image = v.transpose(1, 2).reshape(-1, shape.head_width, shape.side, shape.side)
    convolved = F.conv2d(
        image, weights["dwc.weight"], weights["dwc.bias"], padding=layer.dwc.padding, groups=shape.head_width
    )
    core = exact_attention(q.relu() + EPS, k.relu() + EPS, v, shape.heads)
    out = core + convolved.reshape(v.shape[0], shape.width, -1).transpose(1, 2)
    return F.linear(out, weights["to_out.weight"], weights["to_out.bias"])


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||; NaN where the value holds NaN or infinity."""
    difference: Tensor = value.detach().cpu().double() - exact.detach().cpu().double()
    error: float = (difference.norm() / exact.detach().cpu().double().norm()).item()
    return error if error < float("inf") else float("nan")


def _errors(
    output: Tensor, inputs: dict[str, Tensor], exact: Tensor, exact_inputs: dict[str, Tensor], upstream: Tensor
) -> dict[str, float]:
    """Relative errors of an output and of the gradients of its inputs, by name."""
    mine = torch.autograd.grad(output, list(inputs.values()), upstream.to(output.device))
    theirs = torch.autograd.grad(exact, list(exact_inputs.values()), upstream.double())
    gradients = zip(inputs, mine, theirs, strict=True)
    return {"output": relative_error(output, exact)} | {name: relative_error(a, b) for name, a, b in gradients}


def _judge(measure: Callable[[Shape], dict[str, float]], shapes: Sequence[Shape], limits: Limits) -> Finding:
    """The finding over shapes, as many as there is time for."""
    began = time.monotonic()
    errors, rows, left_out = [], [], []
    for shape in shapes:
        if time.monotonic() - began > SECONDS:
            left_out.append(str(shape))
            continue
        found = measure(shape)
        order = "quadratic" if shape.tokens < shape.head_width else "linear"
        rows.append({**asdict(shape), "order": order, **found})
        errors += [Error(f"{_what(name)}, {shape}", value, limits.of(name, order)) for name, value in found.items()]
    return judge(errors, {"limits": limits._asdict(), "cases": rows, "left_out": left_out})


def _what(name: str) -> str:
    return name if name == "output" else f"gradient of {name}"


def _normal(shape: Shape, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.batch, shape.tokens, shape.width, generator=generator)


def _softmax_block(shape: Shape) -> Block:
    """With weights that bf16 can hold, none of them zero."""
    config = {"hidden_size": shape.width, "num_layers": 1, "num_attention_heads": shape.heads, "num_classes": 1}
    block: Block = LiTTransformer2DModel(**config).blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(nn.init.normal_(parameter, std=0.04).bfloat16())
    return block
