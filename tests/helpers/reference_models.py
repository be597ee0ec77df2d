"""SiT, LiT and PixArt written from their formulas, on state dicts in the original layouts, in float64.

Independent of litconvert on purpose: sample by sample, head by head, and captions without their padding instead of a
mask. Only names and formulas are shared with the originals.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalised(x: Tensor, eps: float = 1e-6) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + eps)


def number_embedding(state: State, name: str, value: float) -> Tensor:
    """256 sinusoids, cosines first, and an MLP. The angles are rounded to float32, as the originals do."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = (torch.tensor(value, dtype=torch.float32) * frequencies).double()
    return linear(state, f"{name}.mlp.2", silu(linear(state, f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()]))))


def positions(width: int, grid: tuple[int, int], base_size: int, interpolation: float) -> Tensor:
    """(T, D): for every token, sine and cosine of its column, then of its row."""
    quarter = width // 4
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            encoded: list[float] = []
            for place, count in ((column, grid[1]), (row, grid[0])):
                angle = place / (count / base_size) / interpolation
                angles = [angle / 10000 ** (i / quarter) for i in range(quarter)]
                encoded += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(encoded)
    return torch.tensor(rows, dtype=torch.float64)


def patches(state: State, image: Tensor, patch: int) -> Tensor:
    """(C, H, W) to (T, D)."""
    embedded = F.conv2d(
        image[None].double(),
        state["x_embedder.proj.weight"].double(),
        state["x_embedder.proj.bias"].double(),
        stride=patch,
    )
    return embedded[0].flatten(1).T


def unpatched(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(T, p p C) to (C, H, W), one patch at a time."""
    channels = x.shape[1] // patch**2
    image = torch.zeros(channels, grid[0] * patch, grid[1] * patch, dtype=torch.float64)
    for token in range(x.shape[0]):
        top, left = patch * (token // grid[1]), patch * (token % grid[1])
        image[:, top : top + patch, left : left + patch] = x[token].reshape(patch, patch, channels).permute(2, 0, 1)
    return image


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(T, D) queries over (S, D) keys and values."""
    parts = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = a @ b.T / math.sqrt(a.shape[1])
        weights = torch.exp(scores - scores.max(1, keepdim=True).values)
        parts.append(weights / weights.sum(1, keepdim=True) @ c)
    return torch.cat(parts, 1)


def compressed(state: State, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Keys or values (T, D) merged window by window: a weighted sum a channel, then LayerNorm with eps 1e-5."""
    weight, bias = state[f"{name}.sr.weight"].double()[:, 0], state[f"{name}.sr.bias"].double()
    factor, image = weight.shape[-1], x.reshape(*grid, -1)
    merged = []
    for top in range(0, grid[0] - factor + 1, factor):
        for left in range(0, grid[1] - factor + 1, factor):
            window = image[top : top + factor, left : left + factor]
            merged.append((window * weight.permute(1, 2, 0)).sum((0, 1)) + bias)
    stacked = normalised(torch.stack(merged), 1e-5)
    return stacked * state[f"{name}.norm.weight"].double() + state[f"{name}.norm.bias"].double()


def lit_attention(state: State, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """LiT's public layout: ReLU linear attention over all pairs of tokens, plus the shared convolution of V."""
    eps = 1e-6
    q, (k, v) = linear(state, f"{name}.q", x), linear(state, f"{name}.kv", x).chunk(2, 1)
    q, k = q.clamp(min=0) + eps, k.clamp(min=0) + eps
    weight, bias = state[f"{name}.dwc.weight"].double(), state[f"{name}.dwc.bias"].double()
    heads = x.shape[1] // weight.shape[0]
    parts = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = a @ b.T / x.shape[0]
        image = c.T.reshape(1, -1, *grid)
        convolved = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        parts.append(scores @ c / (scores.sum(1, keepdim=True) + eps) + convolved[0].flatten(1).T)
    return linear(state, f"{name}.proj", torch.cat(parts, 1))


def self_attention(state: State, name: str, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """Whichever kind the block's tensors say."""
    if f"{name}.kv.weight" in state:
        return lit_attention(state, name, x, grid)
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, 1)
    if f"{name}.sr.weight" in state:
        k, v = compressed(state, name, k, grid), compressed(state, name, v, grid)
    return linear(state, f"{name}.proj", softmax_attention(q, k, v, heads))


def blocks_of(state: State) -> range:
    return range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")))


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.mlp.fc2", gelu_tanh(linear(state, f"{name}.mlp.fc1", x)))


def class_conditional(
    state: State, x: Tensor, timestep: Tensor, labels: Tensor, *, heads: int, base_size: int, interpolation: float = 1.0
) -> Tensor:
    """DiT, SiT or their LiT: all output channels (N, C, H, W)."""
    patch = state["x_embedder.proj.weight"].shape[-1]
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    outputs = []
    for image, t, label in zip(x, timestep.tolist(), labels.tolist(), strict=True):
        h = patches(state, image, patch)
        h = h + positions(h.shape[1], grid, base_size, interpolation)
        c = number_embedding(state, "t_embedder", t) + state["y_embedder.embedding_table.weight"][label].double()
        for i in blocks_of(state):
            name = f"blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(state, f"{name}.adaLN_modulation.1", silu(c)).chunk(6)
            h = h + gate1 * self_attention(state, f"{name}.attn", normalised(h) * (1 + scale1) + shift1, grid, heads)
            h = h + gate2 * feed_forward(state, name, normalised(h) * (1 + scale2) + shift2)
        shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(c)).chunk(2)
        outputs.append(unpatched(linear(state, "final_layer.linear", normalised(h) * (1 + scale) + shift), grid, patch))
    return torch.stack(outputs)


def pixart(
    state: State,
    x: Tensor,
    timestep: Tensor,
    captions: Tensor,
    lengths: list[int],
    *,
    heads: int,
    base_size: int,
    interpolation: float = 1.0,
    sizes: Tensor | None = None,
    aspect_ratios: Tensor | None = None,
) -> Tensor:
    """PixArt or its LiT: (N, out_channels, H, W). Captions (N, L, C), of which the first `lengths` tokens count."""
    patch = state["x_embedder.proj.weight"].shape[-1]
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    outputs = []
    for n, image in enumerate(x):
        h = patches(state, image, patch)
        h = h + positions(h.shape[1], grid, base_size, interpolation)
        t = number_embedding(state, "t_embedder", float(timestep[n]))
        if sizes is not None and aspect_ratios is not None:
            numbers = [("csize_embedder", float(size)) for size in sizes[n]]
            numbers.append(("ar_embedder", float(aspect_ratios[n])))
            t = t + torch.cat([number_embedding(state, name, value) for name, value in numbers])
        shared = linear(state, "t_block.1", silu(t)).reshape(6, -1)
        text = captions[n, : lengths[n]].double()
        text = linear(state, "y_embedder.y_proj.fc2", gelu_tanh(linear(state, "y_embedder.y_proj.fc1", text)))
        for i in blocks_of(state):
            name = f"blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = state[f"{name}.scale_shift_table"].double() + shared
            h = h + gate1 * self_attention(state, f"{name}.attn", normalised(h) * (1 + scale1) + shift1, grid, heads)
            k, v = linear(state, f"{name}.cross_attn.kv_linear", text).chunk(2, 1)
            attended = softmax_attention(linear(state, f"{name}.cross_attn.q_linear", h), k, v, heads)
            h = h + linear(state, f"{name}.cross_attn.proj", attended)
            h = h + gate2 * feed_forward(state, name, normalised(h) * (1 + scale2) + shift2)
        shift, scale = state["final_layer.scale_shift_table"].double() + t
        outputs.append(unpatched(linear(state, "final_layer.linear", normalised(h) * (1 + scale) + shift), grid, patch))
    return torch.stack(outputs)
