"""Every random draw, as a function of what it is for: never of a generator's history.

A resumed run, and a run on another number of processes, therefore draw the same.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from litconvert.latents import LatentDataset


def generator_of(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one purpose at one place, such as ("noise", step, sample)."""
    digest = hashlib.blake2b(repr((seed, purpose, *indices)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order in which an epoch visits the data, (length,) int64."""
    return torch.randperm(length, generator=generator_of(seed, "order", epoch))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, drawn once for student and teacher alike.

    Attributes:
        clean: x_0 (N, C, H, W).
        noise: eps (N, C, H, W).
        timestep: (N,) int64.
        class_labels: (N,) int64, some of them the null class.
    """

    clean: Tensor
    noise: Tensor
    timestep: Tensor
    class_labels: Tensor


def draw_batch(
    data: "LatentDataset",
    positions: range,
    *,
    seed: int,
    step: int,
    batch_size: int,
    num_timesteps: int,
    null_class: int,
    condition_dropout: float,
) -> Batch:
    """The samples at these positions of a step's global batch.

    Everything is a function of (seed, step, position): the sample, its noise, its timestep, and whether its condition
    is dropped. Neither the number of processes nor an interruption changes a draw.
    """
    indices, noise, timesteps, dropped = [], [], [], []
    for position in positions:
        visit = step * batch_size + position
        epoch, place = divmod(visit, len(data))
        indices.append(int(_order(seed, epoch, len(data))[place]))
        generator = generator_of(seed, "sample", step, position)
        noise.append(torch.randn(data.shape, generator=generator))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        dropped.append(torch.rand((), generator=generator) < condition_dropout)
    clean, labels = data.read(indices)
    labels = torch.where(torch.stack(dropped), torch.full_like(labels, null_class), labels)
    return Batch(clean, torch.stack(noise), torch.stack(timesteps), labels)


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def _order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation of an epoch; the last two are kept, since a batch can straddle two epochs."""
    key = (seed, epoch, length)
    if key not in _ORDERS:
        for old in list(_ORDERS)[:-1]:
            del _ORDERS[old]
        _ORDERS[key] = permutation(seed, epoch, length)
    return _ORDERS[key]
