"""Opening a checkpoint, wherever it is."""

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.checkpoints.local import open_local
from litconvert.common.hub import path_of


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
    path = path_of(source)
    if path is None:
        from litconvert.checkpoints.remote import open_hub_checkpoint  # and huggingface_hub

        name, _, at = source.partition("@")
        return open_hub_checkpoint(source, name, revision or at or None, file, weights)
    return open_local(source, path, file=file, weights=weights)
