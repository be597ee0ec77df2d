"""The two least-squares problems of a layer that have a closed form: its output projection and its convolution.

Both are met as sums over the calibration states, in float64, so that neither batches nor processes change them.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# The share of the core that the convolution leaves it at least. What is stored is divided by it.
SMALLEST_SHARE = 0.05
# Bytes of normal equations that are made at a time.
CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}

# Adds a tensor up over all processes, in place.
SumOverProcesses = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """The sum over the processes of one process."""
    return values


class ProjectionSums:
    """The output projection (W, b) of one layer: min sum_n || g_n * (F_n W^T + b) - r_n ||^2 + ridge.

    The gate g_n differs by sample n and channel c, so each output channel has normal equations of its own,

        (sum_n g_nc^2 A_n^T A_n + lambda_c I) w_c = sum_n g_nc A_n^T r_nc,    A_n = [F_n, 1].

    The Gram matrices A_n^T A_n (D + 1, D + 1) are kept for each sample, and weighted for a few channels at a time.

    Args:
        width: D, of the features and of the output.
        device: of the sums.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self._grams: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._moments = torch.zeros(width + 1, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor, gate: Tensor, target: Tensor) -> None:
        """Some samples: features F (N, T, D), gate g (N, 1, D) and target r (N, T, D)."""
        inputs = F.pad(features.double(), (0, 1), value=1.0)  # (N, T, D + 1)
        self._grams.append(torch.bmm(inputs.transpose(1, 2), inputs))  # (N, D + 1, D + 1)
        self._gates.append(gate.double().squeeze(1))  # (N, D)
        # As one product over all samples' tokens: (D + 1, N T) (N T, D)
        self._moments += inputs.flatten(0, 1).T @ (gate.double() * target.double()).flatten(0, 1)

    def solve(
        self, ridge: float, weight: Tensor, bias: Tensor, total: SumOverProcesses = alone
    ) -> tuple[Tensor, Tensor]:
        """The weight (D, D) and bias (D,), float64, that are best on the samples that were added.

        Args:
            ridge: lambda_c is so many times the mean of the diagonal of c's normal equations.
            weight, bias: what the ridge draws to; zeros of a fresh projection. A channel whose gate is shut keeps it.
            total: adds up over the processes that share the samples.
        """
        grams = torch.cat(self._grams).flatten(1) if self._grams else self._moments.new_zeros(0, (self.width + 1) ** 2)
        squared = torch.cat(self._gates).square() if self._gates else self._moments.new_zeros(0, self.width)
        moments = total(self._moments.clone())  # (D + 1, D)
        start = torch.cat([weight.double(), bias.double().unsqueeze(1)], dim=1).to(self.device)  # (D, D + 1)
        solved = torch.empty_like(start)
        for channels in self._chunks():
            equations = total(squared[:, channels].T @ grams).unflatten(1, (self.width + 1, -1))  # (C, D + 1, D + 1)
            diagonal = equations.diagonal(dim1=1, dim2=2)  # (C, D + 1), a view
            mine = start[channels]
            right = moments[:, channels].T.unsqueeze(2) - equations @ mine.unsqueeze(2)  # (C, D + 1, 1)
            scale = diagonal.mean(1, keepdim=True)
            # A gate that is always shut says nothing of its channel: any lambda then gives the start.
            diagonal += torch.where(scale > 0, ridge * scale, 1.0)
            factors = torch.linalg.cholesky(equations)
            solved[channels] = mine + torch.cholesky_solve(right, factors).squeeze(2)
        return solved[:, :-1].contiguous(), solved[:, -1].contiguous()

    def _chunks(self) -> Iterator[slice]:
        """The output channels, as many at a time as memory has room for."""
        size = max(1, CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cpu"]) // (8 * (self.width + 1) ** 2))
        return (slice(first, first + size) for first in range(0, self.width, size))


class ConvolutionSums:
    """The convolution of V, where V is the teacher's: min over a, w, b of sum || a y + w * v + b - o ||^2 + ridge.

    o is the teacher's attention before its projection, y the student's core. The convolution is depth-wise and shared
    by the heads, so each channel c of the head dimension is a problem of its own, of k^2 + 2 unknowns, over tokens and
    heads. What is kept is w / a and b / a, since the projection after it absorbs the scale a.

    Args:
        num_heads: of the student; d = D / num_heads.
        conv_size: side k of the kernel.
        head_dim: d.
        device: of the sums.
    """

    def __init__(self, num_heads: int, head_dim: int, conv_size: int, device: torch.device) -> None:
        self.num_heads, self.head_dim, self.conv_size = num_heads, head_dim, conv_size
        unknowns = conv_size**2 + 2
        self._equations = torch.zeros(head_dim, unknowns, unknowns, dtype=torch.float64, device=device)
        self._moments = torch.zeros(head_dim, unknowns, 1, dtype=torch.float64, device=device)

    def add(self, core: Tensor, values: Tensor, target: Tensor, grid: tuple[int, int]) -> None:
        """Some samples: y, v and o, (N, T, D) each, tokens row-major on the grid."""
        for sample in range(len(core)):  # a sample has k^2 + 2 times its tokens here
            inputs = self._inputs(core[sample], values[sample], grid)  # (d, h T, k^2 + 2)
            self._equations += torch.bmm(inputs.transpose(1, 2), inputs)
            wanted = self._by_channel(target[sample].double())  # (d, h T)
            self._moments += torch.bmm(inputs.transpose(1, 2), wanted.unsqueeze(2))

    def solve(self, ridge: float, total: SumOverProcesses = alone) -> tuple[Tensor, Tensor]:
        """The kernel (d, 1, k, k) and the bias (d,), float64.

        Args:
            ridge: times the mean of the diagonal of a channel's normal equations.
            total: adds up over the processes that share the samples.
        """
        equations, moments = total(self._equations.clone()), total(self._moments.clone())
        diagonal = equations.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1, keepdim=True)
        diagonal += torch.where(scale > 0, ridge * scale, 1.0)
        solved = torch.cholesky_solve(moments, torch.linalg.cholesky(equations)).squeeze(2)  # (d, k^2 + 2)
        solved = solved / solved[:, :1].clamp(min=SMALLEST_SHARE)
        kernel = solved[:, 1:-1].reshape(-1, 1, self.conv_size, self.conv_size)
        return kernel, solved[:, -1].contiguous()

    def _by_channel(self, tokens: Tensor) -> Tensor:
        """(T, D) to (d, h T)."""
        by_head: Tensor = tokens.unflatten(1, (self.num_heads, -1))  # (T, h, d)
        return by_head.permute(2, 1, 0).flatten(1)

    def _inputs(self, core: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the unknowns of each channel are multiplied by: the core, the shifted values, and 1."""
        k = self.conv_size
        image = values.double().T.unflatten(1, grid)  # (D, H, W)
        padded = F.pad(image, (k // 2,) * 4)
        shifted = padded.unfold(1, k, 1).unfold(2, k, 1)  # (D, H, W, k, k)
        by_head = shifted.unflatten(0, (self.num_heads, -1)).transpose(0, 1)  # (d, h, H, W, k, k)
        inputs = by_head.reshape(self.head_dim, -1, k * k)  # (d, h T, k^2)
        first = self._by_channel(core.double()).unsqueeze(2)
        return torch.cat([first, inputs, torch.ones_like(first)], dim=2)
