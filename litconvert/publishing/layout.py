"""What a repository of a model holds: laid out in a folder, and rehearsed, before anything is sent."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from torch import Tensor

from litconvert.checkpoints.writing import write_weights
from litconvert.common.files import read_json
from litconvert.common.hub import check_repo_id, is_hub_id
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.directory import WEIGHTS_STEM, is_checkpoint, model_source, read_provenance, weights_of
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.families.pixart import variant_of
from litconvert.families.sources import OpenSource, open_source
from litconvert.model.shapes import is_pixel_space
from litconvert.publishing.card import model_card
from litconvert.recipe.resolve import read_recorded
from litconvert.recipe.schema import Recipe, Source, Vae
from litconvert.runs.directory import is_run, model_of

AUTO_MAP = {"AutoModel": "modeling_lit.LiTTransformer2DModel"}


# Of the pictures drawn while training, the newest so many go up; those drawn before and after it always do.
STEP_PICTURES = 4


def prepare(
    directory: str | Path,
    folder: str | Path,
    *,
    repo_id: str,
    pipeline: bool = False,
    vae: str | None = None,
    text_encoder: bool = False,
    weights: str = "auto",
    offline: bool = False,
) -> None:
    """Fill an empty folder with exactly what goes up, and rehearse it. The model directory is only read.

    Args:
        directory, repo_id, pipeline, vae, text_encoder: as for `push`.
        folder: filled; weights are links to the model directory's, or of a checkpoint written.
        weights: of a checkpoint, `ema`, `model` or `auto`, the moving average.
        offline: take a decoder and a text encoder of the Hub from its cache only.

    Raises UsageError for a directory that is none of ours, LitconvertError for one that is incomplete or broken.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    model, pictures = find_model(Path(directory), raw=weights == "model")
    provenance = without_local_paths(read_provenance(model))
    recipe = read_recorded(model / "recipe.yaml")
    source = rehearse(model, weights)
    if source.checkpoint.weights is not None:
        provenance = {**provenance, "set": source.checkpoint.weights}
    if source.checkpoint.weights == "model":
        provenance["metrics"] = {}  # those that are kept are of the moving average
    config = {key: value for key, value in read_json(model / "config.json").items() if key != "_name_or_path"}
    captions = config.get("caption_channels") is not None
    decoder = _decoder(recipe, vae, config, model) if pipeline else None
    if text_encoder and not (pipeline and captions and recipe.source.text_encoder):
        raise UsageError(
            f"{model}: a text encoder goes into the pipeline of a model of captions: give --pipeline, and name it as "
            "source.text_encoder.path in its recipe.yaml"
        )
    if pipeline:
        recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"vae": decoder})})
    public_recipe = without_local_paths(recipe.model_dump(mode="json"))
    try:
        transformer = folder / "transformer" if pipeline else folder
        transformer.mkdir(parents=True, exist_ok=True)
        _write_json(transformer / "config.json", {**config, "auto_map": AUTO_MAP})
        _place_weights(source, model, transformer, recipe, str(provenance["digest"]))
        # AutoModel looks beside the weights or, in a pipeline's repository, at the root; DiffusionPipeline beside them.
        shipped = model / "modeling_lit.py"
        for place in {folder, transformer}:
            (place / "modeling_lit.py").write_text(shipped.read_text() if shipped.is_file() else model_source())
        if pipeline:
            _lay_out_pipeline(folder, recipe, decoder, config, text_encoder=text_encoder, offline=offline)
        _write_json(folder / "litconvert.json", provenance)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(public_recipe, sort_keys=False))
        names = [f"images/{picture.name}" for picture in pictures]
        for picture, name in zip(pictures, names, strict=True):
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / name)
        card = model_card(
            provenance,
            public_recipe,
            config,
            repo_id,
            pipeline=pipeline,
            text_encoder=text_encoder,
            pictures=names,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise LitconvertError(f"cannot lay out the files to push: {system_cause(error) or error}") from error


def _place_weights(source: OpenSource, model: Path, folder: Path, recipe: Recipe, digest: str) -> None:
    """The weights as safetensors: those of a model directory linked, those of a checkpoint written."""
    if not is_checkpoint(model):
        for file in source.checkpoint.files:
            _link(file, folder / file.name)
        for index in (path for path in weights_of(model) if path.suffix == ".json"):
            shutil.copyfile(index, folder / index.name)
        return
    dtype = recipe.student.dtype
    tensors = {
        name: TensorInfo(info.shape, DTYPES[dtype] if dtype else info.dtype)
        for name, info in source.checkpoint.tensors.items()
    }
    header = {"format": "pt", "litconvert": digest}
    most = recipe.student.max_shard_bytes

    def produce(name: str) -> Tensor:
        return source.values(name).to(tensors[name].dtype)

    write_weights(folder, WEIGHTS_STEM, tensors, produce, lambda: header, max_shard_bytes=most)


def find_model(directory: Path, *, raw: bool = False) -> tuple[Path, list[Path]]:
    """The model directory of what the user named, and the pictures that belong to it.

    Of a run (RUN, or RUN@STEP for one of its checkpoints) the model is its finished one, or else a checkpoint.

    Raises UsageError when it is neither a model directory nor a run that holds a model.
    """
    model = Path(model_of(str(directory), raw=raw))
    if not model.is_dir():
        raise UsageError(f"{directory}: no such folder; name the one that `litconvert convert` or `distill` wrote")
    pictures: list[Path] = []
    run = directory if directory.is_dir() else Path(str(directory).rpartition("@")[0])
    if model != directory and is_run(run):
        drawn = sorted((run / "samples").glob("*.png"))
        steps = [picture for picture in drawn if picture.name.startswith("step-")]
        pictures = [run / "curves.png"] if (run / "curves.png").is_file() else []
        pictures += [picture for picture in drawn if picture not in steps[:-STEP_PICTURES]]
        if is_checkpoint(model):  # what was drawn later is of other weights
            pictures = [picture for picture in drawn if picture.stem in ("teacher", "before")]
            pictures += [step for step in steps if step.stem <= model.name][-STEP_PICTURES:]
    else:
        read_provenance(model)
    for name in ("config.json",) if is_checkpoint(model) else ("config.json", "modeling_lit.py"):
        if not (model / name).is_file():
            raise LitconvertError(f"{model}: {name} is missing, so it cannot be loaded; convert or distil it again")
    return model, pictures


def rehearse(model: Path, weights: str = "auto") -> OpenSource:
    """Load every tensor as the config wants it, strictly, so that nothing broken goes up.

    Args:
        weights: of a checkpoint, `ema`, `model` or `auto`, the moving average.

    Raises LitconvertError for weights that are missing, do not fit the config or are not finite.
    """
    if not weights_of(model) and not is_checkpoint(model):
        raise LitconvertError(f"{model}: the weights are missing or incomplete; convert or distil it again")
    source = open_source(Source(path=str(model)), weights)
    if source.reading.family != "litconvert":
        raise UsageError(f"{model}: holds a {source.reading.family} checkpoint; `litconvert convert` it first")
    for name in source.reading.origins:
        source.values(name)
    return source


def without_local_paths(value: Any, key: str = "") -> Any:
    """Plain data with every local path cut down to its file name: nobody's folders are published."""
    if isinstance(value, dict):
        return {name: without_local_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    absolute = value.startswith(("/", "~", "file:")) or PureWindowsPath(value).is_absolute()
    local = key == "path" and not value.startswith("asset:") and not is_hub_id(value)
    return PureWindowsPath(value).name if absolute or local else value


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    """The same bytes in another place, without copying gigabytes where the system allows."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def _decoder(recipe: Recipe, vae: str | None, config: Mapping[str, Any], model: Path) -> Vae | None:
    """The pipeline's decoder; None in pixel space.

    Raises UsageError for latents without one, and for pixels with one.
    """
    decoder = recipe.source.vae
    if vae is not None:
        decoder = decoder.model_copy(update={"path": vae, "subfolder": None}) if decoder else Vae(path=vae)
    if decoder is None and not is_pixel_space(config["in_channels"]):
        raise UsageError(
            f"{model}: makes latents of {config['in_channels']} channels and its recipe names no decoder: set "
            "source.vae.path in its recipe.yaml (for example stabilityai/sd-vae-ft-ema), or push without --pipeline"
        )
    return decoder


def pipeline_class(config: Mapping[str, Any]) -> tuple[str, str]:
    """Module and class of the pipeline that draws with a model of this config."""
    if config.get("caption_channels") is None:
        return "pipeline_lit", "LiTPipeline"
    alpha = variant_of(config) == "pixart-alpha"
    return "pipeline_lit_text", "LiTAlphaPipeline" if alpha else "LiTSigmaPipeline"


def _lay_out_pipeline(
    folder: Path,
    recipe: Recipe,
    decoder: Vae | None,
    config: Mapping[str, Any],
    *,
    text_encoder: bool,
    offline: bool,
) -> None:
    """What makes a model's folder a diffusers pipeline: the index, the pipeline's source, scheduler, decoder, T5."""
    from litconvert.sampling.captions import load_text_encoder
    from litconvert.sampling.draw import make_scheduler
    from litconvert.sampling.pictures import load_vae

    captions, in_channels = config.get("caption_channels") is not None, config["in_channels"]
    if captions and recipe.sample.scheduler == "ddpm":
        raise UsageError(
            "the text-to-image pipeline takes no learned variance, which ddpm needs: set sample.scheduler to "
            "dpm-solver++ or ddim in recipe.yaml"
        )
    prediction = config.get("prediction", "noise")
    scheduler = make_scheduler(recipe.sample.scheduler, recipe.diffusion.num_timesteps, prediction)
    scheduler.save_pretrained(folder / "scheduler")
    if decoder is not None:
        vae = load_vae(_cached(decoder) if offline else decoder)
        if vae.config.latent_channels != in_channels:
            raise UsageError(
                f"{decoder.path}: decodes latents of {vae.config.latent_channels} channels, the model makes "
                f"{in_channels}; set source.vae.path in recipe.yaml to the source's own decoder"
            )
        vae.register_to_config(scaling_factor=decoder.scaling_factor)
        vae.save_pretrained(folder / "vae")
        _forget_origin(folder / "vae" / "config.json")
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
    if text_encoder:
        assert recipe.source.text_encoder is not None
        tokenizer, encoder = load_text_encoder(recipe.source.text_encoder, offline=offline)
        tokenizer.save_pretrained(folder / "tokenizer")
        encoder.save_pretrained(folder / "text_encoder")
        for written in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
            _forget_origin(folder / written)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    _write_json(folder / "model_index.json", index)


def _forget_origin(path: Path) -> None:
    """Take out of a config where diffusers or transformers loaded it from."""
    kept = {key: value for key, value in read_json(path).items() if key not in ("_name_or_path", "name_or_path")}
    _write_json(path, kept)


def _cached(vae: Vae) -> Vae:
    """A decoder of the Hub as its folder in the Hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(vae.path).exists():
        return vae
    try:
        config = hf_hub_download(vae.path, "config.json", subfolder=vae.subfolder, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise LitconvertError(
            f"{vae.path}: a dry run downloads nothing, and this decoder is not in the Hub's cache; "
            f"fetch it first (`hf download {vae.path}`)"
        ) from error
    return vae.model_copy(update={"path": str(Path(config).parent), "subfolder": None})
