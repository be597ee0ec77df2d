"""Data sets, read whole."""

import torch
from torch import Tensor

from litconvert.data.dataset import LatentDataset


def everything(data: LatentDataset, bucket: int = 0) -> Tensor:
    """Every sample of a bucket, the noise of its posterior 0: (N, C, H, W)."""
    indices = range(len(data.buckets[bucket]))
    return data.read(bucket, indices, noise=torch.zeros(len(indices), *data.buckets[bucket].shape)).clean
