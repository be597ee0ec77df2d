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


@dataclass(frozen=True)
class Destination:
    """Where in its repository a publication is committed, and what of others it may replace.

    Attributes:
        revision: branch, which must exist, or `refs/pr/N`; None: main.
        create_pr: open a pull request against main instead.
        private: create the repository as private; refused when it exists and is public.
        replace: overwrite and delete what is not litconvert's and in the way.
        replace_card: overwrite a README.md that litconvert did not write, or that was edited since.
        message: of the commit; None: one that names litconvert.
    """

    revision: str | None = None
    create_pr: bool = False
    private: bool = False
    replace: bool = False
    replace_card: bool = False
    message: str | None = None
