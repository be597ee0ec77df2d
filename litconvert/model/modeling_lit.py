"""LiTTransformer2DModel: a diffusion transformer of classes or captions, whose layers attend with softmax or linearly.

Teacher, student and hybrids are this one class; a layer's attention is a word in the config. The file needs torch and
diffusers only, and is shipped beside the weights, so a published model loads where litconvert is not installed.

Shapes in comments: N batch, T tokens, D width, C latent channels, H and W the latent's height and width, p patch size,
L caption tokens.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ATTENTION_KINDS = ("linear", "softmax", "kv_compress")
CONV_SIZES = (0, 3, 5, 7)
PREDICTIONS = ("noise", "velocity")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: shift and scale (N, 1, D) tokens x (N, T, D). Under autocast, in the dtype of products."""
    if under_autocast(x):
        # Cast once: autocast would cast it for each product that reads it, and each would keep its copy.
        out = torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype))
        return out.to(torch.get_autocast_dtype(x.device.type))
    return x * (1 + scale) + shift  # as diffusers rounds it; addcmul would save a pass, and differ


def sincos_position_embedding(
    hidden_size: int,
    grid: tuple[int, int],
    base_size: int,
    device: torch.device,
    interpolation_scale: float = 1.0,
) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, (1, T, D) float32, tokens row-major.

    Half of the channels encode the column, half the row, each sin then cos at frequencies 10000^(-2i/(D/2)) (MAE, DiT).
    `base_size` is the grid's side at training time: other grids are stretched over the same extent, as diffusers does.
    Positions are divided by `interpolation_scale` (PixArt's pe_interpolation).
    """
    # While torch.export or torch.compile trace, tensors are stand-ins, which must not be kept for later calls.
    build = _sincos_position_embedding if torch.compiler.is_compiling() else _kept_position_embedding
    return build(hidden_size, grid, base_size, device, interpolation_scale)


def _sincos_position_embedding(
    hidden_size: int, grid: tuple[int, int], base_size: int, device: torch.device, interpolation_scale: float
) -> Tensor:
    # Computed outside inference mode: a cached inference tensor could not be used in training later.
    with torch.inference_mode(False):
        frequencies: Tensor = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

        def encode(along: Tensor) -> Tensor:
            angles = torch.outer(along, frequencies)
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        def positions(count: int) -> Tensor:
            # Rounded to float32 before the sines, as the original code does.
            return (torch.arange(count, dtype=torch.float32) / (count / base_size) / interpolation_scale).double()

        height, width = grid
        rows, columns = encode(positions(height)), encode(positions(width))
        embedding = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1)
        return embedding.float().unsqueeze(0).to(device)


_kept_position_embedding = lru_cache(maxsize=16)(_sincos_position_embedding)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off on the tensor's device; the meta device has none."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on where the tensor is, and would cast it."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return on and x.dtype != torch.float64


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and quotients: float32 for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def relu_kernel(x: Tensor, eps: float) -> Tensor:
    """phi(x) = ReLU(x) + eps (LiT)."""
    return F.relu(x) + eps


def gelu_kernel(x: Tensor, eps: float) -> Tensor:
    """phi(x) = GELU(x) + eps (LiT's ablation). GELU goes below zero, so the denominator can come near zero."""
    return F.gelu(x) + eps


def focused_kernel(x: Tensor, eps: float) -> Tensor:
    """phi(x) = f^3 ||f|| / ||f^3|| with f = ReLU(x) + eps (FLatten, focusing factor 3), norms over all D channels.

    In float32 at least: a cube leaves float16's range at 40.
    """
    f = F.relu(x).to(wide_dtype(x)) + eps
    cubed = f**3
    norm = torch.linalg.vector_norm
    scale: Tensor = norm(f, dim=-1, keepdim=True) / norm(cubed, dim=-1, keepdim=True)
    return (cubed * scale).to(x.dtype)


LINEAR_KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": relu_kernel,
    "gelu": gelu_kernel,
    "focused": focused_kernel,
}


def heads_of(x: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(N, T, D) to a view (N, T, d) for each head.

    Head by head: a slice of the token layout is a strided batch that bmm reads in place; (N, h, T, d) is cloned.
    By unbind, whose gradient is one pass; that of a slice is a whole tensor of zeros for each head.
    """
    heads: tuple[Tensor, ...] = x.unflatten(-1, (num_heads, -1)).unbind(2)
    return heads


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    """Normalised linear attention, per head O_i = q_i S / (q_i . sum_T(k) + T eps), with the state S = k^T v (d, d).

    Args:
        q, k: (N, T, D) after the kernel function phi.
        v: (N, T, D).
        num_heads: heads; d = D / num_heads.
        eps: added to the denominator.

    Returns: (N, T, D) in the dtype of v.

    The state is not built when T < d: (q k^T) v is the same function and then the cheaper order. Sums over tokens,
    rather than means, need no pass that scales k or v. Sum of k, denominator and division are float32, and q is
    divided, not the product: half precision rounds the result once.
    Source: LiT (arXiv 2501.12976), the attention listing.
    """
    tokens, width = v.shape[1:]
    # Autocast would send the float32 products back to half precision.
    with without_autocast(v):
        if v.dtype != wide_dtype(v):
            return half_precision_linear_attention(q, k.to(v.dtype), v, num_heads, eps)
        k_sum = k.sum(dim=1, keepdim=True, dtype=wide_dtype(k))  # (N, 1, D)
        parts = (q.to(k_sum.dtype), k.to(v.dtype), v, k_sum)
        outputs = []
        for q_head, k_head, v_head, k_sum_head in zip(*(heads_of(part, num_heads) for part in parts), strict=True):
            denominator = torch.bmm(q_head, k_sum_head.transpose(1, 2)) + tokens * eps  # (N, T, 1)
            weighted = (q_head * denominator.reciprocal()).to(v.dtype)  # (N, T, d)
            if tokens < width // num_heads:
                outputs.append(torch.bmm(torch.bmm(weighted, k_head.transpose(1, 2)), v_head))  # (N, T, d)
            else:
                outputs.append(torch.bmm(weighted, torch.bmm(k_head.transpose(1, 2), v_head)))  # (N, T, d)
    return outputs[0] if num_heads == 1 else torch.cat(outputs, dim=-1)


def half_precision_linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    """`linear_attention` of k and v in bf16 or float16."""
    tokens = v.shape[1]
    k_sum = k.detach().sum(dim=1, keepdim=True, dtype=torch.float32)  # (N, 1, D)
    v_scale = 1.0
    if v.dtype == torch.float16:
        v_scale = 2.0 ** -round(math.log2(tokens) / 2)
        q, k, v, k_sum = scaled_for_float16(q, k, v, k_sum, v_scale)
    out: Tensor = HalfPrecisionLinearAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, k_sum, num_heads, tokens * eps, v_scale
    )
    return out


def scaled_for_float16(
    q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor, v_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (float32), k, v and the sum of k such that no product of linear attention overflows float16.

    v, and each channel of k to a mean near 1, are scaled by `v_scale`, about T^-1/2, so that the state k^T v is no
    larger than v; q the other way, so that the result and the denominator stay. By powers of two, which round nothing.
    """
    # The scales cancel out, in the gradient too. The minimum is for GELU, whose mean can be near zero.
    with torch.no_grad():
        k_scale = v_scale * torch.exp2(-(k_sum / v.shape[1]).abs().clamp(min=0.125).log2().ceil())
        q_scale = 1 / (k_scale * v_scale)
    return q * q_scale, k * k_scale.to(k.dtype), v * v_scale, k_sum / q_scale


class HalfPrecisionLinearAttention(torch.autograd.Function):
    """`linear_attention` in half precision, whose gradient attends to v less its mean over tokens.

    With the weights W_ij = q_i . k_j / z_i, z_i = q_i . sum_T(k) + T eps, O = W v and the gradient g of O, that of q is

        dq_i = (sum_j (g_i . v_j) k_j - (g_i . O_i) sum_T(k)) / z_i.

    What a mean of v over tokens adds to the two terms all but cancels out of the difference, the rounding of the first
    does not: in bf16, with a mean of 0.5 to 3 standard deviations and 4096 tokens, dq is wrong by 5 to 32 %. But for
    any constant m, O_i = W_i (v - m) + w_i m with w_i = sum_j W_ij = 1 - T eps / z_i. So m is the mean, and constant
    in the gradient: dv = W^T g holds as it is.

    Args of apply:
        q: (N, T, D) in float32, or as k.
        k, v: (N, T, D) in bf16, or in float16 and scaled (`scaled_for_float16`).
        k_sum: v_scale sum_T(k), (N, 1, D) float32; the gradient that goes through it is in that of k.
        num_heads: heads.
        eps: T eps.
        v_scale: what v was scaled by.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_sum: Tensor, num_heads: int, eps: float, v_scale: float
    ) -> Tensor:
        tokens, width = v.shape[1:]
        trained = any(ctx.needs_input_grad)
        # Sampling does without: the output is as exact either way.
        centred, mean, removed = without_mean(v) if trained else (v, None, None)
        add_back = [None] * num_heads if removed is None else heads_of(removed / v_scale, num_heads)
        few = tokens < width // num_heads
        parts = (q, v if few else centred, k_sum)
        outputs, saved = [], []
        for q_head, v_head, k_sum_head, k_head, mean_head in zip(
            *(heads_of(part, num_heads) for part in parts), copied_heads_of(k, num_heads), add_back, strict=True
        ):
            q_head = q_head.to(torch.float32, copy=True)
            z = torch.bmm(k_sum_head, q_head.transpose(1, 2)).transpose(1, 2).add_(eps)  # (N, T, 1)
            scale = z.reciprocal_()
            weighted = q_head.mul_(scale).to(v.dtype)  # (N, T, d)
            if few:
                product = torch.bmm(weighted, k_head.transpose(1, 2))  # (N, T, T)
                outputs.append(torch.bmm(product, v_head))  # (N, T, d)
            else:
                state = product = torch.bmm(k_head.transpose(1, 2), v_head)  # (N, d, d)
                if mean_head is not None:
                    state = (product + k_sum_head.transpose(1, 2) * mean_head).to(v.dtype)
                outputs.append(torch.bmm(weighted, state))  # (N, T, d)
            if trained:
                saved += [weighted, scale, product]
        ctx.save_for_backward(k, centred, mean, k_sum, *saved)
        ctx.num_heads, ctx.eps, ctx.v_scale, ctx.q_dtype = num_heads, eps, v_scale, q.dtype
        return outputs[0] if num_heads == 1 else torch.cat(outputs, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        k, centred, mean, k_sum, *saved = ctx.saved_tensors
        tokens, width = k.shape[1:]
        parts = (heads_of(part, ctx.num_heads) for part in (k, centred, mean, k_sum))
        q_gradients, k_gradients, v_gradients = [], [], []
        with without_autocast(k):
            for g, k_head, v_head, mean_head, k_sum_head, weighted, scale, product in zip(
                copied_heads_of(gradient, ctx.num_heads), *parts, saved[::3], saved[1::3], saved[2::3], strict=True
            ):
                if tokens < width // ctx.num_heads:
                    product_gradient = torch.bmm(g, v_head.transpose(1, 2))  # (N, T, T)
                    weighted_gradient = torch.bmm(product_gradient, k_head)  # (N, T, d)
                    k_factors, v_factors = (product_gradient.transpose(1, 2), weighted), (product.transpose(1, 2), g)
                else:
                    product_gradient = torch.bmm(weighted.transpose(1, 2), g)  # (N, d, d)
                    weighted_gradient = torch.bmm(g, product.transpose(1, 2))  # (N, T, d)
                    k_factors, v_factors = (v_head, product_gradient.transpose(1, 2)), (k_head, product_gradient)
                weighted, weighted_gradient = weighted.float(), weighted_gradient.float()
                # z_i times the gradient of z_i, through w_i m and through W_i (v - m): (N, T, 1)
                z_gradient = torch.bmm(g, mean_head.transpose(1, 2)) * (scale * (ctx.eps / ctx.v_scale))
                z_gradient = z_gradient - (weighted_gradient * weighted).sum(dim=-1, keepdim=True)
                k_sum_gradient = torch.bmm(z_gradient.transpose(1, 2), weighted) * ctx.v_scale  # (N, 1, d)
                q_gradient = weighted_gradient.addcmul_(z_gradient, k_sum_head).mul_(scale)  # (N, T, d)
                q_gradients.append(q_gradient.to(ctx.q_dtype))
                k_gradients.append(torch.baddbmm(k_sum_gradient.to(k.dtype), *k_factors))  # (N, T, d)
                v_gradients.append(torch.bmm(*v_factors))  # (N, T, d)
            q, k, v = (torch.cat(heads, dim=-1) for heads in (q_gradients, k_gradients, v_gradients))
        return q, k, v, None, None, None, None


def without_mean(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v less its mean over tokens, and that mean, all in the dtype of v; and what was removed on average, in float32.

    The last two, (N, 1, D), differ by more than the rounding of the mean: v is on a grid, so all tokens with the same
    exponent are rounded the same way when the mean is subtracted, and what they lose does not average out.
    """
    true_mean = v.mean(dim=1, keepdim=True, dtype=torch.float32)
    mean = true_mean.to(v.dtype)
    centred = v - mean
    # A product reads what was rounded. torch.compile would add up differences before they are, in the same pass; with
    # one row of ones, too. The sums are small, so half precision holds them; divided by T, float16 would not.
    sums = torch.bmm(v.new_ones(v.shape[0], 2, v.shape[1]), centred)[:, :1]
    return centred, mean, true_mean - sums.float() / v.shape[1]


def copied_heads_of(x: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """As `heads_of`, on a CPU copied: its bmm would do it for every product, and slowly for a transposed operand."""
    if x.device.type != "cpu":
        return heads_of(x, num_heads)
    heads: tuple[Tensor, ...] = x.unflatten(-1, (num_heads, -1)).movedim(2, 0).contiguous().unbind()
    return heads


class Attention(nn.Module):
    """What every kind of self-attention shares: separate Q, K, V and output projections, fused on request."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.qkv_weight: Tensor | None
        self.qkv_bias: Tensor | None
        # Not persistent: a fused model saves the same tensors as any other.
        self.register_buffer("qkv_weight", None, persistent=False)
        self.register_buffer("qkv_bias", None, persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (N, T, D) each."""
        if self.qkv_weight is not None:
            q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
            return q, k, v
        return self.to_q(x), self.to_k(x), self.to_v(x)

    @torch.no_grad()
    def fuse(self) -> None:
        """One product for Q, K and V. The separate projections stay, and share no memory with the fused one."""
        parts = (self.to_q, self.to_k, self.to_v)
        self.qkv_weight = torch.cat([part.weight for part in parts])
        self.qkv_bias = torch.cat([part.bias for part in parts])

    def unfuse(self) -> None:
        """Back to the separate projections."""
        self.qkv_weight = self.qkv_bias = None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        raise TypeError("use a kind of attention: SoftmaxAttention or LinearAttention")


class SoftmaxProcessor:
    """softmax(q k^T / sqrt(d) + bias) v through diffusers' dispatcher, so that `set_attention_backend` reaches it."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in (q, k, v))  # (N, T or L, h, d)
        out: Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=bias, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        projected: Tensor = attn.to_out(out.flatten(2))  # (N, T, D)
        return projected


class SoftmaxAttention(Attention, AttentionModuleMixin):  # type: ignore[misc]
    """Multi-head softmax self-attention."""

    _default_processor_cls = SoftmaxProcessor
    _available_processors = (SoftmaxProcessor,)

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size)
        self.num_heads = num_heads
        self.processor = SoftmaxProcessor()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.processor(self, *self.project(x))


class KVCompressAttention(SoftmaxAttention):
    """Softmax self-attention over fewer keys and values (PixArt-Sigma).

    Keys and values, after their projections, each go through one shared depth-wise convolution of side and stride
    `factor` over the grid and one shared LayerNorm. What does not fill a window at the edge is left out.
    """

    def __init__(self, hidden_size: int, num_heads: int, factor: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.sr = nn.Conv2d(hidden_size, hidden_size, factor, stride=factor, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)

    def compress(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, T, D) to (N, T / factor^2, D)."""
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (N, D, H/p, W/p)
        out: Tensor = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        return out

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.project(x)  # (N, T, D) each
        return self.processor(self, q, self.compress(k, grid), self.compress(v, grid))


class CrossAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]
    """Multi-head softmax attention from image tokens to caption tokens, with its own number of heads."""

    _default_processor_cls = SoftmaxProcessor
    _available_processors = (SoftmaxProcessor,)

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.processor = SoftmaxProcessor()

    def forward(self, x: Tensor, caption: Tensor, bias: Tensor | None) -> Tensor:
        return self.processor(self, self.to_q(x), self.to_k(caption), self.to_v(caption), bias)


def depthwise_convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, D, H, W) with a kernel (D, 1, k, k) for each channel, to the same size."""
    return F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class DepthwiseConvolutionOnCPU(torch.autograd.Function):
    """`depthwise_convolution` with a weight gradient of its own: PyTorch's is slow on a CPU for kernels above 3 x 3.

    That gradient is a depth-wise convolution itself, of the image with the output's gradient as its kernel.
    """

    elements = 400_000  # of images at a time: fewer are mostly overhead, and more leave the caches

    @staticmethod
    def forward(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise_convolution(image, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        image, weight, bias = ctx.saved_tensors
        side = weight.shape[-1]
        width, *grid = image.shape[1:]
        image_gradient = depthwise_convolution(gradient, weight.flip(2, 3), None)
        weight_gradient = torch.zeros_like(weight)
        some = max(1, DepthwiseConvolutionOnCPU.elements // image[0].numel())
        for images, kernels in zip(image.split(some), gradient.split(some), strict=True):
            seen = images.reshape(1, -1, *grid)  # samples beside each other, as channels
            found = F.conv2d(seen, kernels.reshape(-1, 1, *grid), padding=side // 2, groups=seen.shape[1])
            weight_gradient += found.view(-1, width, side, side).sum(0).unsqueeze(1)
        return image_gradient, weight_gradient, None if bias is None else gradient.sum((0, 2, 3))


class LinearAttention(Attention):
    """LiT's self-attention: linear attention plus a depth-wise convolution of V, both before the output projection.

    The convolution's weights are shared by the heads: Conv2d(d, d, groups=d) on V seen as (N h, d, H, W).
    """

    def __init__(self, hidden_size: int, num_heads: int, kernel: str, conv_size: int, eps: float) -> None:
        super().__init__(hidden_size)
        self.num_heads = num_heads
        self.kernel = LINEAR_KERNELS[kernel]
        self.eps = eps
        head_dim = hidden_size // num_heads
        self.dwc = (
            nn.Conv2d(head_dim, head_dim, conv_size, padding=conv_size // 2, groups=head_dim) if conv_size else None
        )

    def convolve(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The depth-wise convolution over the grid, tokens (N, T, D) to tokens (N, T, D).

        Repeating the small shared weight lets V stay where it is: (N, D, H, W) in channels-last strides is a view of
        the tokens, whereas (N h, d, H, W) is a copy, and a slow layout for the convolution.
        """
        assert self.dwc is not None
        weight = self.dwc.weight.repeat(self.num_heads, 1, 1, 1)  # (D, 1, k, k)
        bias = None if self.dwc.bias is None else self.dwc.bias.repeat(self.num_heads)
        image = v.unflatten(1, grid).permute(0, 3, 1, 2)  # (N, D, H/p, W/p)
        on_cpu = v.device.type == "cpu"
        # Half-precision depth-wise convolutions have no fast CPU kernel.
        dtype = wide_dtype(v) if on_cpu else v.dtype
        trained = on_cpu and torch.is_grad_enabled() and weight.requires_grad and weight.shape[-1] > 3
        convolve = DepthwiseConvolutionOnCPU.apply if trained else depthwise_convolution
        with without_autocast(v):
            out = convolve(image.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return out.permute(0, 2, 3, 1).flatten(1, 2).to(v.dtype)  # (N, T, D)

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Linear attention without the convolution, and the values, (N, T, D) each."""
        q, k, v = self.project(x)  # (N, T, D) each
        return linear_attention(self.kernel(q, self.eps), self.kernel(k, self.eps), v, self.num_heads, self.eps), v

    def features(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the output projection reads, (N, T, D)."""
        out, v = self.core(x)
        return out if self.dwc is None else out + self.convolve(v, grid)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        projected: Tensor = self.to_out(self.features(x, grid))  # (N, T, D)
        return projected


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (N, T, D)
        return out


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, (N, C, H, W) to (N, T, D)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Copied: every pass over tokens would keep the transposed strides, up to the last block, and be slower; and
        # Inductor gives wrong gradients with them on a CPU (torch 2.13).
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (N, T, D)
        return out


class TimestepEmbedding(nn.Module):
    """Sinusoids of a number (256 channels, cos then sin, period 10000), then an MLP with SiLU."""

    channels = 256

    def __init__(self, hidden_size: int, freq_shift: float = 0.0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.linear_1 = nn.Linear(self.channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        sinusoids = get_timestep_embedding(
            timestep, self.channels, flip_sin_to_cos=True, downscale_freq_shift=self.freq_shift
        )
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))  # (N, D)
        return out


class CaptionProjection(nn.Module):
    """Text features to width D: linear, GELU (tanh approximation), linear."""

    def __init__(self, caption_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, caption: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))  # (N, L, D)
        return out


class Condition(NamedTuple):
    """What a conditioning module makes of its inputs, for the blocks and the final layer.

    Attributes:
        blocks: what each block's modulation takes: (N, D) for adaLN-zero, (N, 6, D) for adaLN-single.
        final: what the final layer's takes: (N, D) for adaLN-zero, (N, 1, D) for adaLN-single.
        caption: tokens that cross-attention reads (N, L, D), or None.
        caption_bias: added to cross-attention's logits (N, 1, 1, L), or None.
    """

    blocks: Tensor
    final: Tensor
    caption: Tensor | None = None
    caption_bias: Tensor | None = None


class ClassConditioning(nn.Module):
    """DiT: c = timestep embedding + class embedding. Row `num_classes` of the table is the null class."""

    def __init__(self, hidden_size: int, num_classes: int, null_class: bool, freq_shift: float) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(hidden_size, freq_shift)
        self.class_embedder = nn.Embedding(num_classes + null_class, hidden_size)

    def forward(
        self,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Condition:
        if class_labels is None or encoder_hidden_states is not None:
            raise ValueError("this model is conditioned on classes: give class_labels, and no encoder_hidden_states")
        c = self.timestep_embedder(timestep) + self.class_embedder(class_labels)  # (N, D)
        return Condition(blocks=c, final=c)


class CaptionConditioning(nn.Module):
    """PixArt: one modulation of the timestep for all blocks (adaLN-single), and caption tokens for cross-attention.

    With micro-conditions the timestep embedding t has the embeddings of the image's height, width and aspect ratio
    added, D / 3 channels each. `null_caption` is the text embedding of a dropped caption, kept for training and
    guidance; forward never uses it by itself.
    """

    null_caption: Tensor | None

    def __init__(
        self, hidden_size: int, caption_channels: int, null_tokens: int, micro_conditions: bool, freq_shift: float
    ) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(hidden_size, freq_shift)
        self.resolution_embedder = TimestepEmbedding(hidden_size // 3) if micro_conditions else None
        self.aspect_ratio_embedder = TimestepEmbedding(hidden_size // 3) if micro_conditions else None
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.caption_projection = CaptionProjection(caption_channels, hidden_size)
        self.register_buffer("null_caption", torch.zeros(null_tokens, caption_channels) if null_tokens else None)

    def forward(
        self,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Condition:
        if encoder_hidden_states is None or class_labels is not None:
            raise ValueError("this model is conditioned on captions: give encoder_hidden_states, and no class_labels")
        t = self.timestep_embedder(timestep)  # (N, D)
        if self.resolution_embedder is not None:
            t = t + self.embed_size(t.shape[0], added_cond_kwargs or {})
        shared = self.modulation(F.silu(t)).unflatten(-1, (6, -1))  # (N, 6, D)
        caption = self.caption_projection(encoder_hidden_states.to(t.dtype)).reshape(t.shape[0], -1, t.shape[1])
        bias = None
        if encoder_attention_mask is not None:
            # As diffusers: a bias of -10000 rather than -inf, so that a caption without tokens gives no NaN.
            mask = encoder_attention_mask.reshape(t.shape[0], 1, 1, -1).to(t.dtype)
            bias = (1 - mask) * -10000.0
        return Condition(shared, t.unsqueeze(1), caption, bias)

    def embed_size(self, count: int, micro: dict[str, Any]) -> Tensor:
        """Height, width and aspect ratio of the image, (N, D)."""
        assert self.resolution_embedder is not None
        assert self.aspect_ratio_embedder is not None
        if micro.get("resolution") is None or micro.get("aspect_ratio") is None:
            raise ValueError(
                "this model has micro-conditions: give added_cond_kwargs={'resolution': (N, 2), 'aspect_ratio': (N, 1)}"
            )
        resolution = self.resolution_embedder(micro["resolution"].flatten()).reshape(-1, 2 * self._third)
        aspect_ratio = self.aspect_ratio_embedder(micro["aspect_ratio"].flatten())
        return torch.cat([resolution, aspect_ratio], dim=1).expand(count, -1)  # (N, D)

    @property
    def _third(self) -> int:
        return self.modulation.in_features // 3


class AdaLNZero(nn.Linear):
    """adaLN-zero: SiLU and a projection of the condition (N, D) to shifts, scales and gates (N, parts, D)."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(hidden_size, parts * hidden_size)
        self.parts = parts

    def forward(self, condition: Tensor) -> Tensor:
        modulation: Tensor = super().forward(F.silu(condition)).unflatten(-1, (self.parts, -1))
        return modulation


class AdaLNSingle(nn.Module):
    """adaLN-single: a learned table (parts, D) on top of what all blocks share, (N, parts or 1, D)."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(parts, hidden_size) / hidden_size**0.5)

    def forward(self, condition: Tensor) -> Tensor:
        modulation: Tensor = self.scale_shift_table + condition
        return modulation


class Block(nn.Module):
    """A transformer block: modulated self-attention, cross-attention where there are captions, feed-forward."""

    def __init__(
        self,
        hidden_size: int,
        mlp_ratio: float,
        norm_eps: float,
        attn: Attention,
        cross_attn: CrossAttention | None,
        modulation: AdaLNZero | AdaLNSingle,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.cross_attn = cross_attn
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(hidden_size, round(hidden_size * mlp_ratio))
        self.adaLN_modulation = modulation

    def forward(self, x: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        shift_msa, scale_msa, gate_msa, *mlp = self.modulation(condition)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)  # (N, T, D)
        return self.after_attention(x, condition, *mlp)

    def modulation(self, condition: Condition) -> tuple[Tensor, ...]:
        """Shift, scale and gate of self-attention, then those of the feed-forward, (N, 1, D) each."""
        parts: tuple[Tensor, ...] = self.adaLN_modulation(condition.blocks).chunk(6, dim=1)
        return parts

    def after_attention(self, x: Tensor, condition: Condition, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Cross-attention where there are captions, and the feed-forward, (N, T, D) to (N, T, D)."""
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, condition.caption, condition.caption_bias)  # (N, T, D)
        x = x + gate * self.ff(modulate(self.norm2(x), shift, scale))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """adaLN and the projection from tokens to patches."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, modulation: AdaLNZero | AdaLNSingle
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        shift, scale = self.adaLN_modulation(condition.final).chunk(2, dim=1)  # (N, 1, D) each
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))  # (N, T, p * p * out_channels)
        return out


class LiTTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A diffusion transformer of classes (DiT, SiT) or captions (PixArt), each layer with its own kind of attention.

    Args:
        sample_size: side of the latent at training time; other sizes and aspect ratios work, with positions stretched.
        patch_size: side of a patch.
        in_channels, out_channels: channels of the latent and of the output (twice as many with a learned variance).
        hidden_size: width D, a multiple of 4.
        num_layers: blocks.
        num_attention_heads: heads of softmax and KV-compressed layers and of cross-attention.
        attention: the kind of each layer, `softmax`, `linear` or `kv_compress`; None is softmax everywhere.
        linear_num_heads: heads of linear layers.
        linear_kernel: `relu`, `gelu` or `focused`.
        linear_conv_size: side of the depth-wise convolution, 0 (none), 3, 5 or 7.
        linear_eps: added to the kernel function and to the denominator.
        num_classes: classes, not counting the null class; None for a model of captions.
        null_class: the class table has one more row, at index `num_classes`, for guidance.
        mlp_ratio: inner width of the feed-forward over D.
        timestep_freq_shift: 0 for weights trained with DiT's code, 1 for weights trained with diffusers'.
        norm_eps: eps of the LayerNorm before the feed-forward (the one that diffusers' config changes): 1e-6 for
            weights trained with DiT's code, 1e-5 for diffusers'. All other LayerNorms have 1e-6 in both.
        caption_channels: width of the text features; None for a model of classes.
        caption_tokens: longest caption it was trained on, in tokens.
        null_caption: the text features of a dropped caption are stored (`conditioning.null_caption`).
        micro_conditions: the image's size and aspect ratio are conditions too (PixArt-alpha at 1024).
        interpolation_scale: positions are divided by it (PixArt).
        kv_compress_factor: side of the windows that KV-compressed layers merge keys and values of.
        prediction: `noise`, or `velocity` (SiT): then timesteps are in [0, 1], and of the output channels only the
            first `in_channels` are returned, since the others were not trained.
        data_timestep: of a model that predicts velocity, the end of [0, 1] where x_t is data: 1 (SiT: x_t = t data +
            (1 - t) noise, velocity = data - noise) or 0 (x_t = (1 - t) data + t noise, velocity = noise - data).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["x_embedder", "norm"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention: list[str] | None = None,
        linear_num_heads: int = 4,
        linear_kernel: str = "relu",
        linear_conv_size: int = 5,
        linear_eps: float = 1e-6,
        num_classes: int | None = 1000,
        null_class: bool = True,
        mlp_ratio: float = 4.0,
        timestep_freq_shift: float = 0.0,
        norm_eps: float = 1e-6,
        caption_channels: int | None = None,
        caption_tokens: int = 0,
        null_caption: bool = False,
        micro_conditions: bool = False,
        interpolation_scale: float = 1.0,
        kv_compress_factor: int = 2,
        prediction: str = "noise",
        data_timestep: int = 1,
    ) -> None:
        super().__init__()
        kinds = ["softmax"] * num_layers if attention is None else list(attention)
        if len(kinds) != num_layers or set(kinds) - set(ATTENTION_KINDS):
            raise ValueError(
                f"attention must name one of {ATTENTION_KINDS} for each of {num_layers} layers, got {kinds}"
            )
        if linear_kernel not in LINEAR_KERNELS:
            raise ValueError(f"linear_kernel must be one of {tuple(LINEAR_KERNELS)}, got {linear_kernel!r}")
        if linear_conv_size not in CONV_SIZES:
            raise ValueError(f"linear_conv_size must be one of {CONV_SIZES}, got {linear_conv_size}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {hidden_size}")
        if (num_classes is None) == (caption_channels is None):
            raise ValueError(
                f"a model has classes or captions: give one of num_classes ({num_classes}) and caption_channels "
                f"({caption_channels}), and None for the other"
            )
        if micro_conditions and hidden_size % 3:
            raise ValueError(f"micro_conditions need a hidden_size that is a multiple of 3, got {hidden_size}")
        if null_caption and caption_tokens < 1:
            raise ValueError(f"null_caption needs its length, caption_tokens, got {caption_tokens}")
        has_softmax = caption_channels is not None or bool(set(kinds) - {"linear"})
        heads = {"num_attention_heads": num_attention_heads} if has_softmax else {}
        heads |= {"linear_num_heads": linear_num_heads} if "linear" in kinds else {}
        for name, count in heads.items():
            if count < 1 or hidden_size % count:
                raise ValueError(f"{name} must divide hidden_size {hidden_size}, got {count}")

        def attend(kind: str) -> Attention:
            if kind == "linear":
                return LinearAttention(hidden_size, linear_num_heads, linear_kernel, linear_conv_size, linear_eps)
            if kind == "kv_compress":
                return KVCompressAttention(hidden_size, num_attention_heads, kv_compress_factor)
            return SoftmaxAttention(hidden_size, num_attention_heads)

        modulation = AdaLNZero if caption_channels is None else AdaLNSingle
        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.conditioning: ClassConditioning | CaptionConditioning
        if caption_channels is None:
            assert num_classes is not None
            self.conditioning = ClassConditioning(hidden_size, num_classes, null_class, timestep_freq_shift)
        else:
            self.conditioning = CaptionConditioning(
                hidden_size,
                caption_channels,
                caption_tokens if null_caption else 0,
                micro_conditions,
                timestep_freq_shift,
            )
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                mlp_ratio,
                norm_eps,
                attend(kind),
                CrossAttention(hidden_size, num_attention_heads) if caption_channels is not None else None,
                modulation(hidden_size, 6),
            )
            for kind in kinds
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels, modulation(hidden_size, 2))
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Without auto_map: diffusers reads it to find this class, and then warns that it is unexpected."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)

    def initialize_weights(self) -> None:
        """DiT's and PixArt's initialisation; the convolutions of linear layers keep Conv2d's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        for module in self.conditioning.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # The model's first output is zero; with adaLN-zero every block starts as the identity, too.
        nn.init.zeros_(self.final_layer.linear.weight)
        for module in self.modules():
            if isinstance(module, AdaLNZero):
                nn.init.zeros_(module.weight)
            elif isinstance(module, CrossAttention):
                nn.init.zeros_(module.to_out.weight)
            elif isinstance(module, KVCompressAttention):  # starts as the mean of each window
                nn.init.constant_(module.sr.weight, 1 / module.sr.weight[0].numel())
                assert module.sr.bias is not None
                nn.init.zeros_(module.sr.bias)

    def fuse_qkv_projections(self) -> None:
        """Merge Q, K and V of every layer into one product, for inference. `unfuse_qkv_projections` undoes it."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse()

    def unfuse_qkv_projections(self) -> None:
        """Back to separate projections, which were kept."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.unfuse()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise and, with twice the channels, the raw variance; or the velocity. Drops no condition.

        Args:
            hidden_states: noisy latents (N, C, H, W); H and W multiples of the patch size.
            timestep: (N,) or a scalar; in [0, 1] for a model that predicts velocity.
            class_labels: (N,) int64, for a model of classes; `config.num_classes` is the null class.
            encoder_hidden_states: text features (N, L, caption_channels), for a model of captions.
            encoder_attention_mask: (N, L), 1 where a token counts; None: all count.
            added_cond_kwargs: with micro-conditions, `resolution` (N, 2), height and width of the image in pixels, and
                `aspect_ratio` (N, 1), height over width.
            return_dict: a Transformer2DModelOutput, or a tuple of one tensor.

        Returns: (N, out_channels, H, W); (N, in_channels, H, W) for a model that predicts velocity.
        """
        x, condition, grid = self.embed(
            hidden_states, timestep, class_labels, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs
        )
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, grid)  # (N, T, D)
            else:
                x = block(x, condition, grid)  # (N, T, D)
        sample = self.output(x, condition, grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Condition, tuple[int, int]]:
        """What the first block reads: tokens (N, T, D), the condition, and the grid. Arguments as of `forward`."""
        height, width = hidden_states.shape[-2:]
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"height and width must be multiples of the patch size {p}, got {height}x{width}")
        grid = (height // p, width // p)
        timestep = timestep.reshape(-1).expand(hidden_states.shape[0])

        x = self.x_embedder(hidden_states)  # (N, T, D)
        base_size = self.config.sample_size // p
        positions = sincos_position_embedding(
            self.config.hidden_size, grid, base_size, x.device, self.config.interpolation_scale
        )
        # Under autocast they stay float32, and with them what all blocks add to, as in DiT's code.
        x = x + (positions if under_autocast(x) else positions.to(x.dtype))  # (N, T, D)
        condition = self.conditioning(
            timestep, class_labels, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs
        )
        return x, condition, grid

    def output(self, x: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        """The model's output (N, C, H, W) from what the last block gives, (N, T, D)."""
        sample = self.unpatchify(self.final_layer(x, condition), grid)  # (N, out_channels, H, W)
        return sample[:, : self.config.in_channels] if self.config.prediction == "velocity" else sample

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, T, p * p * out_channels) to (N, out_channels, H, W)."""
        height, width = grid
        p = self.config.patch_size
        x = x.reshape(x.shape[0], height, width, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, height * p, width * p)
