"""The model directory, what `convert` and `distill` write and `push` publishes."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from litconvert.checkpoints.checkpoint import RUN_INDEX
from litconvert.checkpoints.writing import LazyTensors, write_weights
from litconvert.common.files import read_json
from litconvert.common.listener import UNSEEN, Task
from litconvert.common.outputs import MODEL, contents, is_unfinished, refuse_foreign, refuse_stranger
from litconvert.conversion.provenance import Provenance
from litconvert.errors import LitconvertError
from litconvert.model.config import ModelConfig
from litconvert.recipe.inputs import Inputs
from litconvert.recipe.schema import Recipe

WEIGHTS_STEM = "diffusion_pytorch_model"


def write_description(folder: Path, *, config: ModelConfig, recipe: Recipe, provenance: Provenance) -> None:
    """Write what says of weights what they are: config.json, recipe.yaml, litconvert.json."""
    header = {
        "_class_name": "LiTTransformer2DModel",
        "_diffusers_version": version("diffusers"),
        "auto_map": {"AutoModel": "modeling_lit.LiTTransformer2DModel"},
    }
    (folder / "config.json").write_text(json.dumps({**header, **config.values}, indent=2) + "\n")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "litconvert.json").write_text(json.dumps(provenance.record, indent=2) + "\n")


def model_source() -> str:
    """The source of the model's class, which is shipped beside its weights."""
    return (Path(__file__).parents[1] / "model" / "modeling_lit.py").read_text()


def write_model_directory(
    folder: Path,
    *,
    config: ModelConfig,
    tensors: LazyTensors,
    recipe: Recipe,
    provenance: Callable[[], Provenance],
    task: Task = UNSEEN,
) -> None:
    """Fill a (temporary) folder as a model directory: config, weights, the model's source, recipe and provenance.

    `provenance` is asked for after the last tensor, so that its digests can be computed meanwhile. `task` is advanced
    by one after each tensor.
    """
    (folder / "modeling_lit.py").write_text(model_source())
    write_weights(
        folder,
        WEIGHTS_STEM,
        tensors,
        lambda: {"format": "pt", "litconvert": provenance().digest},
        max_shard_bytes=recipe.student.max_shard_bytes,
        task=task,
    )
    write_description(folder, config=config, recipe=recipe, provenance=provenance())


def is_checkpoint(folder: Path) -> bool:
    """Whether a model's folder is a checkpoint of a run, whose weights are in torch's distributed format."""
    return (folder / RUN_INDEX).is_file()


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a model directory: one, or shards with their index; empty when some are missing."""
    whole, index = folder / f"{WEIGHTS_STEM}.safetensors", folder / f"{WEIGHTS_STEM}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    shards = [folder / str(name) for name in sorted(names)]
    return [index, *shards] if shards and all(shard.is_file() for shard in shards) else []


def refuse_changed_source(folder: Path, provenance: Provenance, path: str | None, sha256: str) -> None:
    """Raise LitconvertError when a source is not the file any more that this model directory was converted from."""
    if sha256 != provenance.source.get("sha256"):
        raise LitconvertError(
            f"{path} has changed since {folder} was converted from it; convert it again, or restore it"
        )


def already_done(out: Path, inputs: Inputs, *, force: bool) -> bool:
    """Whether `out` is the result of these very inputs. Raises when it is something else and is not to be replaced."""
    if not out.exists() or (out.is_dir() and not contents(out)):
        return False
    if out.is_dir() and is_unfinished(out):
        refuse_foreign(out, MODEL)
        return False
    if not (out / "litconvert.json").is_file():
        refuse_stranger(out, "a result")
    try:
        found = Provenance.read(out).record
    except LitconvertError:
        found = {}
    if inputs.made(found) and not force:
        others = ("config.json", "modeling_lit.py", "recipe.yaml")
        if not weights_of(out) or not all((out / name).is_file() for name in others):
            raise LitconvertError(f"{out} is incomplete: a file was taken out of it; make it again with --force")
        return True
    refuse_foreign(out, MODEL)
    if force:
        return False
    what = f"was made from other inputs ({inputs.changes(found)})" if found else "has a litconvert.json that is broken"
    raise LitconvertError(f"{out} exists and {what}; choose another path, or replace it with --force")
