"""The two least-squares problems of a layer that have a closed form: its output projection and its convolution.

What they are made of is summed over the calibration states in float64, whatever the batches and the processes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from litconvert.conversion.solve_plan import EXACT_WIDTH

# The share of the core that the convolution leaves it at least. What is stored is divided by it.
SMALLEST_SHARE = 0.05
# Of conjugate gradients: the relative residual that is enough, and the most steps.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-13}
MOST_STEPS = 100
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

        G_c w_c = sum_n g_nc A_n^T r_nc,    G_c = sum_n g_nc^2 A_n^T A_n + lambda_c I,    A_n = [F_n, 1].

    Up to a width of `EXACT_WIDTH` they are factorised, a few channels at a time, in float64. Beyond it that is slower
    than conjugate gradients for all channels at once (`benchmarks/projection.py`), which need products with the
    features alone, in coordinates in which the equations of the mean gate are the identity.

    Args:
        width: D, of the features and of the output.
        device: of the sums.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self._batches: list[tuple[Tensor, Tensor]] = []  # A (N, T, D + 1) and the gate (N, 1, D)
        self._moments = torch.zeros(width + 1, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor, gate: Tensor, target: Tensor) -> None:
        """Some samples: features F (N, T, D), gate g (N, 1, D) and target r (N, T, D)."""
        inputs = F.pad(features, (0, 1), value=1.0)  # (N, T, D + 1)
        self._batches.append((inputs, gate))
        # As one product over all samples' tokens: (D + 1, N T) (N T, D)
        self._moments += inputs.double().flatten(0, 1).T @ (gate.double() * target.double()).flatten(0, 1)

    def solve(
        self, ridge: float, weight: Tensor, bias: Tensor, total: SumOverProcesses = alone
    ) -> tuple[Tensor, Tensor]:
        """The weight (D, D) and bias (D,), float64, that are best on the samples that were added.

        Args:
            ridge: lambda_c is so many times the mean of the diagonal of c's normal equations.
            weight, bias: what the ridge draws to; zeros of a fresh projection. A channel whose gate is shut keeps it.
            total: adds up over the processes that share the samples.
        """
        start = torch.cat([weight, bias.unsqueeze(1)], dim=1).to(self.device).double()  # (D, D + 1)
        moments = total(self._moments.clone())  # (D + 1, D)
        if self.width <= EXACT_WIDTH:
            solved = self._exact(ridge, start, moments, total)
        else:
            solved = self._iterative(ridge, start, moments, total)
        return solved[:, :-1].contiguous(), solved[:, -1].contiguous()

    def _exact(self, ridge: float, start: Tensor, moments: Tensor, total: SumOverProcesses) -> Tensor:
        """By factorisation, (D, D + 1)."""
        size = self.width + 1
        # One Gram matrix a sample (D + 1, D + 1), weighted for a few channels at a time.
        gram = start.new_empty(sum(len(inputs) for inputs, _ in self._batches), size, size)
        first = 0
        for inputs, _ in self._batches:
            doubled = inputs.double()
            torch.bmm(doubled.transpose(1, 2), doubled, out=gram[first : first + len(inputs)])
            first += len(inputs)
        gates = [gate.double().squeeze(1).square() for _, gate in self._batches]
        squared = torch.cat(gates) if gates else start.new_zeros(0, self.width)
        solved = torch.empty_like(start)
        for channels in self._chunks():
            equations = total(squared[:, channels].T @ gram.flatten(1)).unflatten(1, (size, size))  # (C, D + 1, D + 1)
            mine = start[channels]
            right = moments[:, channels].T.unsqueeze(2) - equations @ mine.unsqueeze(2)  # (C, D + 1, 1)
            factors = torch.linalg.cholesky(ridged(equations, ridge))
            solved[channels] = mine + torch.cholesky_solve(right, factors).squeeze(2)
        return solved

    def _chunks(self) -> Iterator[slice]:
        """The output channels, as many at a time as memory has room for."""
        size = max(1, CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cpu"]) // (8 * (self.width + 1) ** 2))
        return (slice(first, first + size) for first in range(0, self.width, size))

    def _iterative(self, ridge: float, start: Tensor, moments: Tensor, total: SumOverProcesses) -> Tensor:
        """By conjugate gradients in the dtype of the features, (D, D + 1); start and moments are float64.

        With L L^T the equations of the mean squared gate, what is solved for is u = L^T w: the equations of every
        channel are then near its share times the identity, so that few steps do, and float32 is exact enough.
        """
        mean, share = self._mean_equations(total)
        mean_ridge = ridge * mean.diagonal().mean()
        factor = torch.linalg.cholesky(ridged(mean[None], ridge)[0])  # L, (D + 1, D + 1)
        triangular = torch.linalg.solve_triangular
        inverse = triangular(factor, torch.eye(self.width + 1, dtype=factor.dtype, device=self.device), upper=False)
        # Samples of many tokens are Gram matrices: a product with one is cheaper than with the tokens and back.
        batches, grams = [], []
        for inputs, gate in self._batches:
            flat = (inputs.double().flatten(0, 1) @ inverse.T).to(inputs.dtype)  # (N T, D + 1)
            whitened, squared = flat.unflatten(0, inputs.shape[:2]), gate.square()
            if 2 * inputs.shape[1] > self.width:
                grams.append((torch.bmm(whitened.transpose(1, 2), whitened), squared))  # (N, D + 1, D + 1)
            else:
                batches.append((whitened, squared))
        dtype = self._batches[0][0].dtype if self._batches else torch.float32
        penalty, shares = (mean_ridge * inverse @ inverse.T).to(dtype), share.to(dtype)

        def times(solution: Tensor) -> Tensor:
            """What the normal equations, less their ridge, make of (D + 1, D)."""
            out = torch.zeros_like(solution)
            for whitened, squared in batches:
                out += whitened.flatten(0, 1).T @ ((whitened @ solution) * squared).flatten(0, 1)
            for gram, squared in grams:
                for one, weight in zip(gram, squared, strict=True):
                    out.addmm_(one, solution * weight)
            return total(out)

        right = inverse @ moments - times((factor.T @ start.T).to(dtype)).double()
        moved = conjugate_gradients(
            lambda solution: times(solution) + (penalty @ solution) * shares,
            lambda residual: residual / shares,
            right.to(dtype),
        )
        found: Tensor = inverse.T @ moved.double()  # (D + 1, D)
        return start + found.T

    def _mean_equations(self, total: SumOverProcesses) -> tuple[Tensor, Tensor]:
        """The normal equations of the mean squared gate (D + 1, D + 1), and each channel's share of them (D,)."""
        mean = self._moments.new_zeros(self.width + 1, self.width + 1)
        traces = self._moments.new_zeros(self.width)
        for inputs, gate in self._batches:
            squared = gate.double().square()  # (N, 1, D)
            traces += (squared.squeeze(1) * inputs.double().square().sum((1, 2)).unsqueeze(1)).sum(0)
            weighted = inputs.double() * squared.mean(2, keepdim=True)
            mean += weighted.flatten(0, 1).T @ inputs.double().flatten(0, 1)
        mean, traces = total(mean), total(traces)
        share = traces / mean.diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
        # A gate that is always shut says nothing of its channel.
        return mean, torch.where(share > 0, share, 1.0)


def ridged(equations: Tensor, ridge: float) -> Tensor:
    """Normal equations (C, P, P) with so many times the mean of each diagonal added to it, in place."""
    diagonal = equations.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True)
    # Where nothing was seen, as behind a gate that is always shut, any ridge gives the start.
    diagonal += torch.where(scale > 0, ridge * scale, 1.0)
    return equations


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor
) -> Tensor:
    """Solve times(x) = right for every column (P, C) at once, each to a relative residual of `TOLERANCE`.

    Residuals are measured in the norm of the preconditioner. Source: Hestenes and Stiefel, 1952.
    """
    tolerance = TOLERANCE[right.dtype]
    solution, residual = torch.zeros_like(right), right
    direction = steep = precondition(residual)
    product = (residual * steep).sum(0)
    enough = product * tolerance**2
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(MOST_STEPS):
        if bool((product <= enough).all()):
            break
        moved = times(direction)
        length = product / (direction * moved).sum(0).clamp(min=tiny)
        solution = solution + direction * length
        residual = residual - moved * length
        steep = precondition(residual)
        following = (residual * steep).sum(0)
        direction = steep + direction * (following / product.clamp(min=tiny))
        product = following
    return solution


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
        factors = torch.linalg.cholesky(ridged(equations, ridge))
        solved = torch.cholesky_solve(moments, factors).squeeze(2)  # (d, k^2 + 2)
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
