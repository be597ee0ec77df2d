"""Every random draw, as a function of what it is for: never of a generator's history.

A resumed run, and a run on another number of processes, therefore draw the same.
"""

import hashlib

import torch
from torch import Tensor


def generator_of(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one purpose at one place, such as ("noise", step, sample)."""
    digest = hashlib.blake2b(repr((seed, purpose, *indices)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order in which an epoch visits the data, (length,) int64."""
    return torch.randperm(length, generator=generator_of(seed, "order", epoch))
