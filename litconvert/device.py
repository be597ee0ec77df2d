"""Which device the work is on."""

import os

import torch


def has_gpu() -> bool:
    """Whether there is a GPU to use: `accelerate launch --cpu`, which sets ACCELERATE_USE_CPU, leaves it alone."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def default_device() -> torch.device:
    """A GPU where there is one to use, or else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")
