"""What is asked for when a model is to be published."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Publication:
    """A model, where it goes, and as what.

    Attributes:
        directory: a model directory, or that of a run, or RUN@STEP.
        repo_id: `owner/name`.
        pipeline: a full diffusers pipeline instead of the model alone.
        vae: folder or Hub id of the pipeline's decoder; None: the recipe's.
        text_encoder: the recipe's T5 and its tokenizer go into the pipeline too.
        weights: of a checkpoint, `ema`, `model` or `auto`, the moving average.
        offline: take a decoder and a text encoder of the Hub from its cache only.
    """

    directory: Path
    repo_id: str
    pipeline: bool = False
    vae: str | None = None
    text_encoder: bool = False
    weights: str = "auto"
    offline: bool = False
