"""Make `dit-digits.safetensors`, the teacher that ships with litconvert, from its training checkpoint.

    python -m benchmarks.make_dit_digits ../shared/checkpoints/dit-digits.pt

The EMA weights in float16, original keys. The position embedding is left out: a formula gives it.
"""

import sys
from pathlib import Path

import torch

from litconvert.checkpoints.opening import open_checkpoint
from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.tensors import TensorInfo

ASSETS = Path(__file__).parents[1] / "litconvert" / "assets"


def main(source: str) -> None:
    """Write the asset into the package."""
    checkpoint = open_checkpoint(source, weights="ema")
    tensors = {
        name: TensorInfo(info.shape, torch.float16) for name, info in checkpoint.tensors.items() if name != "pos_embed"
    }
    out = ASSETS / "dit-digits.safetensors"
    metadata = {"format": "pt", "source": Path(source).name, "weights": "ema"}
    write_safetensors(out, LazyTensors(tensors, checkpoint.read), metadata)
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
