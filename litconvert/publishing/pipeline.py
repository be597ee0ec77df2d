"""A diffusers pipeline around a model: its index, source, scheduler, decoder and text encoder."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litconvert.common.files import read_json
from litconvert.common.hub import split_revision
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.pixart import variant_of
from litconvert.model.config import ModelConfig
from litconvert.publishing.publication import Publication
from litconvert.recipe.schema import Recipe, TextEncoder, Vae

if TYPE_CHECKING:
    from litconvert.model.pipeline_lit import Scheduler

AUTO_MAP = {"AutoModel": "modeling_lit.LiTTransformer2DModel"}


def decoder_of(recipe: Recipe, vae: str | None, config: ModelConfig, model: Path) -> Vae | None:
    """The pipeline's decoder; None in pixel space.

    Raises UsageError for latents without one, and for pixels with one.
    """
    decoder = recipe.source.vae
    if vae is not None:
        decoder = Vae(path=vae)
    if decoder is None and not config.is_pixel_space:
        raise UsageError(
            f"{model}: makes latents of {config.in_channels} channels and its recipe names no decoder: set "
            "source.vae.path in its recipe.yaml (for example stabilityai/sd-vae-ft-ema), or push without --pipeline"
        )
    return decoder


def pipeline_class(config: ModelConfig) -> tuple[str, str]:
    """Module and class of the pipeline that draws with a model of this config."""
    if not config.reads_captions:
        return "pipeline_lit", "LiTPipeline"
    alpha = variant_of(config) == "pixart-alpha"
    return "pipeline_lit_text", "LiTAlphaPipeline" if alpha else "LiTSigmaPipeline"


def lay_out_pipeline(folder: Path, recipe: Recipe, config: ModelConfig, asked: Publication) -> None:
    """What makes a model's folder a diffusers pipeline.

    Args:
        recipe: its `source.vae` is the pipeline's decoder.
        config: the model's.
    """
    captions, decoder = config.reads_captions, recipe.source.vae
    scheduler = _place_scheduler(folder, recipe, config)
    if decoder is not None:
        found = _cached(decoder) if asked.offline else decoder
        _place_decoder(folder, found, decoder, config.in_channels, captions=captions)
    module, name = pipeline_class(config)
    shutil.copyfile(Path(__file__).parents[1] / "model" / f"{module}.py", folder / f"{module}.py")
    index: dict[str, Any] = {
        "_class_name": [module, name],
        "_diffusers_version": version("diffusers"),
        # AutoModel of a subfolder looks its class up here, not in the subfolder's config.
        "auto_map": AUTO_MAP,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["modeling_lit", "LiTTransformer2DModel"],
        "vae": [None, None] if decoder is None else ["diffusers", "AutoencoderKL"],
    }
    if captions:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    if asked.text_encoder:
        assert recipe.source.text_encoder is not None
        _place_text_encoder(folder, recipe.source.text_encoder, offline=asked.offline)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    write_json(folder / "model_index.json", index)


def _place_scheduler(folder: Path, recipe: Recipe, config: ModelConfig) -> "Scheduler":
    """The recipe's scheduler. Raises UsageError for one that the pipeline or the model does not take."""
    from litconvert.sampling.draw import make_scheduler

    if config.reads_captions and recipe.sample.scheduler == "ddpm":
        raise UsageError(
            "the text-to-image pipeline takes no learned variance, which ddpm needs: set sample.scheduler to "
            "dpm-solver++ or ddim in recipe.yaml"
        )
    prediction = config.prediction
    scheduler = make_scheduler(recipe.sample.scheduler, recipe.diffusion.num_timesteps, prediction)
    scheduler.save_pretrained(folder / "scheduler")
    return scheduler


def _place_decoder(folder: Path, found: Vae, named: Vae, in_channels: int, *, captions: bool) -> None:
    """The decoder with its own scaling and shift, or the recipe's; `named` is how messages call what is `found`.

    Raises UsageError for one of other latents than the model's.
    """
    from litconvert.sampling.pictures import load_vae, scaling_of

    vae = load_vae(found)
    if vae.config.latent_channels != in_channels:
        raise UsageError(
            f"{named.path}: decodes latents of {vae.config.latent_channels} channels, the model makes "
            f"{in_channels}; set source.vae.path in recipe.yaml to the source's own decoder"
        )
    if captions and scaling_of(vae)[1]:
        raise UsageError(
            f"{named.path}: shifts its latents (shift_factor), which diffusers' PixArt pipelines do not undo; push "
            "without --pipeline, or name the source's own decoder"
        )
    vae.save_pretrained(folder / "vae")
    _forget_origin(folder / "vae" / "config.json")


def _place_text_encoder(folder: Path, named: TextEncoder, *, offline: bool) -> None:
    """T5 and its tokenizer."""
    from litconvert.sampling.captions import load_text_encoder

    tokenizer, encoder = load_text_encoder(named, offline=offline)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    for written in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
        _forget_origin(folder / written)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _forget_origin(path: Path) -> None:
    """Take out of a config where diffusers or transformers loaded it from."""
    kept = {key: value for key, value in read_json(path).items() if key not in ("_name_or_path", "name_or_path")}
    write_json(path, kept)


def _cached(vae: Vae) -> Vae:
    """A decoder of the Hub as its folder in the Hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(vae.path).exists():
        return vae
    path, revision = split_revision(vae.path)
    try:
        config = hf_hub_download(path, "config.json", subfolder=vae.subfolder, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise LitconvertError(
            f"{vae.path}: a dry run downloads nothing, and this decoder is not in the Hub's cache; "
            f"fetch it first (`hf download {path}`)"
        ) from error
    return vae.model_copy(update={"path": str(Path(config).parent), "subfolder": None})
