"""Opening a checkpoint, wherever it is."""

import os
import re
from pathlib import Path

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.checkpoints.local import open_local
from litconvert.common.tensors import WEIGHT_SUFFIXES
from litconvert.errors import UsageError


def open_checkpoint(
    source: str, *, file: str | None = None, weights: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint: headers only.

    Args:
        source: a file (.safetensors, .pt, .pth, .bin, .ckpt), a folder in diffusers' layout or with one weights file, a
            Hub id (`owner/name`, `owner/name@revision`), or `asset:NAME` for one that ships with litconvert.
        file: which file to read, in a folder or repository that holds several.
        weights: `ema`, `model`, or `auto` (EMA if present, else the only set).
        revision: of a Hub id.

    Raises LitconvertError for what cannot be read, and UsageError for what must be settled first.
    """
    path = Path(source)
    if source.startswith("asset:"):
        path = Path(__file__).parents[1] / "assets" / f"{source.removeprefix('asset:')}.safetensors"
        if not path.is_file():
            known = sorted(f"asset:{asset.stem}" for asset in path.parent.glob("*.safetensors"))
            raise UsageError(f"{source}: no such asset; there are {', '.join(known)}")
    elif not os.path.exists(path):  # Path.exists raises for a name that is too long
        name, _, at = source.partition("@")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).suffix in WEIGHT_SUFFIXES:
            raise UsageError(f"{source}: no such file or folder, and not a Hub id (owner/name)")
        from litconvert.checkpoints.remote import open_hub_checkpoint  # and huggingface_hub

        return open_hub_checkpoint(source, name, revision or at or None, file, weights)
    return open_local(source, path, file=file, weights=weights)
