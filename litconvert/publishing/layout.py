"""What a repository of a model holds: laid out in a folder, and rehearsed, before anything is sent."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_weights
from litconvert.common.files import read_json
from litconvert.common.hub import check_repo_id, is_hub_id
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.directory import WEIGHTS_STEM, is_checkpoint, model_source, weights_of
from litconvert.conversion.provenance import Provenance
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.families.sources import OpenSource, open_student
from litconvert.model.config import ModelConfig
from litconvert.publishing.card import model_card
from litconvert.publishing.pipeline import AUTO_MAP, decoder_of, lay_out_pipeline, write_json
from litconvert.publishing.publication import Publication
from litconvert.recipe.resolve import read_recorded
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import is_run, model_of

# Of the pictures drawn while training, the newest so many go up; those drawn before and after it always do.
STEP_PICTURES = 4


@dataclass(frozen=True)
class Contents:
    """A model that is whole, and what goes up with it.

    Attributes:
        model: its directory.
        weights: rehearsed.
        recipe: of a pipeline with the decoder that is asked for.
        config: of the model, and as config.json is `written`.
        provenance: litconvert.json, of these weights, without local paths.
        pictures: of the run, in the order of the card.
    """

    model: Path
    weights: OpenSource
    recipe: Recipe
    config: ModelConfig
    written: Mapping[str, Any]
    provenance: Provenance
    pictures: tuple[Path, ...]

    @classmethod
    def of(cls, asked: Publication) -> "Contents":
        """Read and checked; nothing is written.

        Raises UsageError for a directory that is none of ours, LitconvertError for one that is incomplete or broken.
        """
        model, pictures = find_model(asked.directory, raw=asked.weights == "model")
        provenance = Provenance.of(without_local_paths(Provenance.read(model).record))
        recipe = read_recorded(model / "recipe.yaml")
        weights = rehearse(model, asked.weights)
        if weights.checkpoint.weights is not None:
            provenance = replace(provenance, set=weights.checkpoint.weights)
        if weights.checkpoint.weights == "model":
            # Those that are kept, and what was drawn while it was trained, are of the moving average.
            provenance = replace(provenance, metrics={})
            pictures = [picture for picture in pictures if picture.stem in ("teacher", "before")]
        written = {key: value for key, value in read_json(model / "config.json").items() if key != "_name_or_path"}
        config = weights.config
        captions = config.reads_captions
        decoder = decoder_of(recipe, asked.vae, config, model) if asked.pipeline else None
        if asked.text_encoder and not (asked.pipeline and captions and recipe.source.text_encoder):
            raise UsageError(
                f"{model}: a text encoder goes into the pipeline of a model of captions: give --pipeline, and name it "
                "as source.text_encoder.path in its recipe.yaml"
            )
        if asked.pipeline:
            recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"vae": decoder})})
        return cls(model, weights, recipe, config, written, provenance, tuple(pictures))


def prepare(asked: Publication, folder: str | Path) -> None:
    """Fill an empty folder with exactly what goes up, and rehearse it. The model directory is only read.

    Weights are links to the model directory's, or of a checkpoint written.

    Raises UsageError for a directory that is none of ours, LitconvertError for one that is incomplete or broken.
    """
    check_repo_id(asked.repo_id)
    contents = Contents.of(asked)
    try:
        _lay_out(contents, asked, Path(folder))
    except OSError as error:
        raise LitconvertError(f"cannot lay out the files to push: {system_cause(error) or error}") from error


def _lay_out(contents: Contents, asked: Publication, folder: Path) -> None:
    """Write all of it; a pipeline's transformer has a folder of its own."""
    transformer = folder / "transformer" if asked.pipeline else folder
    transformer.mkdir(parents=True, exist_ok=True)
    write_json(transformer / "config.json", {**contents.written, "auto_map": AUTO_MAP})
    _place_weights(contents, transformer)
    # AutoModel looks beside the weights or, in a pipeline's repository, at the root; DiffusionPipeline beside them.
    shipped = contents.model / "modeling_lit.py"
    for place in {folder, transformer}:
        (place / "modeling_lit.py").write_text(shipped.read_text() if shipped.is_file() else model_source())
    if asked.pipeline:
        lay_out_pipeline(folder, contents.recipe, contents.config, asked)
    write_json(folder / "litconvert.json", contents.provenance.record)
    recipe = without_local_paths(contents.recipe.model_dump(mode="json"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    names = [f"images/{picture.name}" for picture in contents.pictures]
    for picture, name in zip(contents.pictures, names, strict=True):
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / name)
    card = model_card(contents.provenance, recipe, contents.config, asked, pictures=names)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _place_weights(contents: Contents, folder: Path) -> None:
    """The weights as safetensors: those of a model directory linked, those of a checkpoint written."""
    source, model, recipe = contents.weights, contents.model, contents.recipe
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
    header = {"format": "pt", "litconvert": contents.provenance.digest}
    most = recipe.student.max_shard_bytes

    def produce(name: str) -> Tensor:
        return source.values(name).to(tensors[name].dtype)

    write_weights(folder, WEIGHTS_STEM, LazyTensors(tensors, produce), lambda: header, max_shard_bytes=most)


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
        pictures = [run / name for name in ("comparison.png", "curves.png") if (run / name).is_file()]
        pictures += [picture for picture in drawn if picture not in steps[:-STEP_PICTURES]]
        if is_checkpoint(model):  # what was drawn later is of other weights
            pictures = [picture for picture in drawn if picture.stem in ("teacher", "before")]
            pictures += [step for step in steps if step.stem <= model.name][-STEP_PICTURES:]
    else:
        Provenance.read(model)
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
    source = open_student(model, weights)
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


def _link(source: Path, target: Path) -> None:
    """The same bytes in another place, without copying gigabytes where the system allows."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
