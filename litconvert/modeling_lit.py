"""LiTTransformer2DModel: a class-conditional diffusion transformer whose layers attend with softmax or linearly.

Teacher, student and hybrids are this one class; a layer's attention is a word in the config. The file needs torch and
diffusers only, and is shipped beside the weights, so a published model loads where litconvert is not installed.

Shapes in comments: N batch, T tokens, D width, C latent channels, H and W the latent's height and width, p patch size.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

ATTENTION_KINDS = ("linear", "softmax")
CONV_SIZES = (0, 3, 5, 7)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: shift and scale (N, D) tokens x (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int], base_size: int, device: torch.device) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, (1, T, D) float32, tokens row-major.

    Half of the channels encode the column, half the row, each sin then cos at frequencies 10000^(-2i/(D/2)) (MAE, DiT).
    `base_size` is the grid's side at training time: other grids are stretched over the same extent, as diffusers does.
    """
    # While torch.export or torch.compile trace, tensors are stand-ins, which must not be kept for later calls.
    build = _sincos_position_embedding if torch.compiler.is_compiling() else _kept_position_embedding
    return build(hidden_size, grid, base_size, device)


def _sincos_position_embedding(hidden_size: int, grid: tuple[int, int], base_size: int, device: torch.device) -> Tensor:
    # Computed outside inference mode: a cached inference tensor could not be used in training later.
    with torch.inference_mode(False):
        frequencies: Tensor = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

        def encode(positions: Tensor) -> Tensor:
            angles = torch.outer(positions, frequencies)
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        height, width = grid
        rows = encode(torch.arange(height, dtype=torch.float64) * (base_size / height))
        columns = encode(torch.arange(width, dtype=torch.float64) * (base_size / width))
        embedding = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1)
        return embedding.float().unsqueeze(0).to(device)


_kept_position_embedding = lru_cache(maxsize=16)(_sincos_position_embedding)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off on the tensor's device; the meta device has none."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


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


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    """Normalised linear attention, per head O_i = q_i S / (q_i . mean_T(k) + eps), with the state S = mean_T(k^T v).

    Args:
        q, k: (N, T, D) after the kernel function phi.
        v: (N, T, D).
        num_heads: heads; d = D / num_heads.
        eps: added to the denominator.

    Returns: (N, T, D) in the dtype of v.

    The state S (d, d) is not built when T < d: (q k^T) v is the same function and then the cheaper order.
    Mean of k, denominator and division are float32. v and each channel of k (to a mean near 1) are scaled by T^-1/2, by
    powers of two, which round nothing, and q the other way; and q is divided, not the product. S is then no larger than
    v, and the product is the result: half precision rounds it once, and float16 does not overflow.
    Source: LiT (arXiv 2501.12976), the attention listing.
    """
    tokens, width = v.shape[1:]
    head_dim = width // num_heads
    heads = []
    # Autocast would send the float32 products back to half precision.
    with without_autocast(v):
        k_mean = k.mean(dim=1, keepdim=True, dtype=wide_dtype(k))  # (N, 1, D)
        v_scale = 2.0 ** -round(math.log2(tokens) / 2)
        # The scales cancel out, in the gradient too. The minimum is for GELU, whose mean can be near zero.
        with torch.no_grad():
            k_scale = v_scale * torch.exp2(-k_mean.abs().clamp(min=0.125).log2().ceil())
            q_scale = 1 / (k_scale * v_scale * tokens)
        v = v * v_scale
        k = (k * k_scale.to(k.dtype)).to(v.dtype)
        q = q * q_scale  # (N, T, D) float32
        k_mean = (k_mean / q_scale).transpose(1, 2)  # (N, D, 1)
        # Head by head: a slice of the token layout is a strided batch that bmm reads in place; (N, h, T, d) is cloned.
        for start in range(0, width, head_dim):
            head = slice(start, start + head_dim)
            k_head, v_head = k[..., head], v[..., head]  # (N, T, d)
            denominator = torch.bmm(q[..., head], k_mean[:, head]) + eps  # (N, T, 1)
            q_head = (q[..., head] / denominator).to(v.dtype)  # (N, T, d)
            if tokens < head_dim:
                heads.append(torch.bmm(torch.bmm(q_head, k_head.transpose(1, 2)), v_head))  # (N, T, d)
            else:
                heads.append(torch.bmm(q_head, torch.bmm(k_head.transpose(1, 2), v_head)))  # (N, T, d)
    return heads[0] if num_heads == 1 else torch.cat(heads, dim=-1)


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
    """softmax(q k^T / sqrt(d)) v through diffusers' dispatcher, so that `set_attention_backend` reaches kept layers."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: "SoftmaxAttention", x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in attn.project(x))  # (N, T, h, d)
        out: Tensor = dispatch_attention_fn(
            q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
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
        return self.processor(self, x)


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
        # Half-precision depth-wise convolutions have no fast CPU kernel.
        dtype = torch.float32 if v.device.type == "cpu" else v.dtype
        with without_autocast(v):
            out = F.conv2d(
                image.to(dtype),
                weight.to(dtype),
                None if bias is None else bias.to(dtype),
                padding=weight.shape[-1] // 2,
                groups=weight.shape[0],
            )
        return out.permute(0, 2, 3, 1).flatten(1, 2).to(v.dtype)  # (N, T, D)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.project(x)  # (N, T, D) each
        out = linear_attention(self.kernel(q, self.eps), self.kernel(k, self.eps), v, self.num_heads, self.eps)
        if self.dwc is not None:
            out = out + self.convolve(v, grid)
        projected: Tensor = self.to_out(out)  # (N, T, D)
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
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)
        return out


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep (256 channels, cos then sin, period 10000), then an MLP with SiLU."""

    channels = 256

    def __init__(self, hidden_size: int, freq_shift: float) -> None:
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


class ClassConditioning(nn.Module):
    """The condition vector c = timestep embedding + class embedding. Row `num_classes` of the table: the null class."""

    def __init__(self, hidden_size: int, num_classes: int, null_class: bool, freq_shift: float) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(hidden_size, freq_shift)
        self.class_embedder = nn.Embedding(num_classes + null_class, hidden_size)

    def forward(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        out: Tensor = self.timestep_embedder(timestep) + self.class_embedder(class_labels)  # (N, D)
        return out


class Block(nn.Module):
    """adaLN-zero transformer block (DiT)."""

    def __init__(self, hidden_size: int, mlp_ratio: float, norm_eps: float, attn: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(hidden_size, round(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        modulation = self.adaLN_modulation(F.silu(c)).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # (N, D) each
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)  # (N, T, D)
        x = x + gate_mlp.unsqueeze(1) * self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """adaLN and the projection from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(F.silu(c)).chunk(2, dim=1)  # (N, D) each
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))  # (N, T, p * p * out_channels)
        return out


class LiTTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A class-conditional diffusion transformer (DiT) with softmax or linear self-attention per layer (LiT).

    Args:
        sample_size: side of the latent at training time; other sizes and aspect ratios work, with positions stretched.
        patch_size: side of a patch.
        in_channels, out_channels: channels of the latent and of the output (twice as many with a learned variance).
        hidden_size: width D, a multiple of 4.
        num_layers: blocks.
        num_attention_heads: heads of softmax layers.
        attention: the kind of each layer, `softmax` or `linear`; None is softmax everywhere.
        linear_num_heads: heads of linear layers.
        linear_kernel: `relu`, `gelu` or `focused`.
        linear_conv_size: side of the depth-wise convolution, 0 (none), 3, 5 or 7.
        linear_eps: added to the kernel function and to the denominator.
        num_classes: classes, not counting the null class.
        null_class: the class table has one more row, at index `num_classes`, for guidance.
        mlp_ratio: inner width of the feed-forward over D.
        timestep_freq_shift: 0 for weights trained with DiT's code, 1 for weights trained with diffusers'.
        norm_eps: eps of the LayerNorm before the feed-forward (the one that diffusers' config changes): 1e-6 for
            weights trained with DiT's code, 1e-5 for diffusers'. All other LayerNorms have 1e-6 in both.
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
        num_classes: int = 1000,
        null_class: bool = True,
        mlp_ratio: float = 4.0,
        timestep_freq_shift: float = 0.0,
        norm_eps: float = 1e-6,
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
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {hidden_size}")
        heads = {
            "softmax": ("num_attention_heads", num_attention_heads),
            "linear": ("linear_num_heads", linear_num_heads),
        }
        for name, count in (heads[kind] for kind in sorted(set(kinds))):
            if count < 1 or hidden_size % count:
                raise ValueError(f"{name} must divide hidden_size {hidden_size}, got {count}")

        def attend(kind: str) -> Attention:
            if kind == "linear":
                return LinearAttention(hidden_size, linear_num_heads, linear_kernel, linear_conv_size, linear_eps)
            return SoftmaxAttention(hidden_size, num_attention_heads)

        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.conditioning = ClassConditioning(hidden_size, num_classes, null_class, timestep_freq_shift)
        self.blocks = nn.ModuleList(Block(hidden_size, mlp_ratio, norm_eps, attend(kind)) for kind in kinds)
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Without auto_map: diffusers reads it to find this class, and then warns that it is unexpected."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)

    def initialize_weights(self) -> None:
        """DiT's initialisation; the convolutions of linear layers keep Conv2d's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.conditioning.class_embedder.weight, std=0.02)
        nn.init.normal_(self.conditioning.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.conditioning.timestep_embedder.linear_2.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and the model's first output is zero.
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

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
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise and, with twice the channels, the raw variance.

        Args:
            hidden_states: noisy latents (N, C, H, W); H and W multiples of the patch size.
            timestep: (N,) or a scalar.
            class_labels: (N,) int64; `config.num_classes` is the null class. Conditions are never dropped in here.
            return_dict: a Transformer2DModelOutput, or a tuple of one tensor.

        Returns: (N, out_channels, H, W).
        """
        height, width = hidden_states.shape[-2:]
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"height and width must be multiples of the patch size {p}, got {height}x{width}")
        grid = (height // p, width // p)
        timestep = timestep.reshape(-1).expand(hidden_states.shape[0])

        x = self.x_embedder(hidden_states)  # (N, T, D)
        base_size = self.config.sample_size // p
        x = x + sincos_position_embedding(self.config.hidden_size, grid, base_size, x.device).to(x.dtype)
        c = self.conditioning(timestep, class_labels)  # (N, D)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, grid)  # (N, T, D)
            else:
                x = block(x, c, grid)  # (N, T, D)
        sample = self.unpatchify(self.final_layer(x, c), grid)  # (N, out_channels, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, T, p * p * out_channels) to (N, out_channels, H, W)."""
        height, width = grid
        p = self.config.patch_size
        x = x.reshape(x.shape[0], height, width, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, height * p, width * p)


def count_parameters(model: nn.Module) -> int:
    """Parameters, without the fixed position embedding (which is not one here)."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(config: dict[str, Any], latent_size: int) -> int:
    """Multiply-accumulates of one forward pass of one square latent of side `latent_size`.

    Per token: patch embedding, 4 D^2 of projections, 2 r D^2 of feed-forward (r = mlp_ratio), the output projection;
    attention core 2 T D (softmax, or linear when T < d) or 2 d D (linear), plus k^2 D for the convolution. Per image:
    the embedders and 6 D^2 of modulation a layer. Norms, activations and the denominator (D a token) are not counted.
    """
    d_model: int = config["hidden_size"]
    p: int = config["patch_size"]
    tokens = (latent_size // p) ** 2
    head_dim = d_model // config["linear_num_heads"]
    core = {
        "softmax": 2 * tokens * d_model,
        "linear": 2 * min(tokens, head_dim) * d_model + config["linear_conv_size"] ** 2 * d_model,
    }
    kinds = config["attention"] or ["softmax"] * config["num_layers"]
    projections = 4 * d_model**2 + 2 * round(config["mlp_ratio"] * d_model) * d_model
    per_token: int = p * p * (config["in_channels"] + config["out_channels"]) * d_model
    per_token += sum(projections + core[kind] for kind in kinds)
    per_image = (TimestepEmbedding.channels + d_model) * d_model + (6 * len(kinds) + 2) * d_model**2
    return tokens * per_token + per_image
