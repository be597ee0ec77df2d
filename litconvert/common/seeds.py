"""Every random number as a function of what it is for: never of a generator's history.

A resumed run, and a run on another number of processes, therefore draw the same.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator_of(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one purpose at one place, such as ("noise", step, sample)."""
    digest = hashlib.blake2b(repr((seed, purpose, *indices)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


@lru_cache(maxsize=4)
def permutation(seed: int, purpose: str, length: int, *indices: int) -> Tensor:
    """An order of `length` things, (length,) int64. The last few are kept, since a batch can straddle two epochs."""
    return torch.randperm(length, generator=generator_of(seed, purpose, *indices))
