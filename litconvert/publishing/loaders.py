"""What stock loaders would take from a repository in place of what is pushed, or mix with it, told by names alone."""

import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath

# Folders of a pipeline. diffusers looks into each that model_index.json names, one without a component too.
COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
# As diffusers, transformers and peft name weights. Behind that come a variant and a shard's number, in either order.
# Not among them is Flax (diffusion_flax_model.msgpack, flax_model.msgpack): neither library loads it any more.
_STEMS = "diffusion_pytorch_model|pytorch_model|model|adapter_model"
_WEIGHTS = re.compile(rf"(?:{_STEMS})(?P<more>[.-][\w.-]+?)?\.(?P<suffix>safetensors|bin|onnx|flashpack)")
# Of an index the variant comes behind the weights' ending: no loader looks for model.fp16.safetensors.index.json.
_INDEX = re.compile(
    rf"(?:{_STEMS})\.(?P<suffix>safetensors|bin)(?:\.(?P<older>[\w-]+))?\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
# In a component's folder diffusers judges by these, however a file is called: one folder with nothing but pickles makes
# it leave out the safetensors of all others.
_ANY_WEIGHTS = (".safetensors", ".bin", ".onnx", ".flashpack", ".pt", ".pth", ".ckpt")


def in_the_way(ours: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Which of a repository's other files may not stay beside ours, and why.

    diffusers takes an index of shards before a single file, transformers a single file before an index; a variant is
    loaded where it is asked for, a pickle where safetensors are not wanted. Checked against diffusers 0.42 and
    transformers 5.23.

    Args:
        ours: paths that are pushed. With model_index.json they are a pipeline's.
        others: paths that the repository holds beside them.

    Returns: path to reason, in the order of `others`.
    """
    return {path: why for path in others if (why := _why(path, ours)) is not None}


def _why(path: str, ours: Collection[str]) -> str | None:
    """Why a file may not stay; None: it may."""
    if clash := next(_clashes(path, ours), None):
        return f"a file and a folder of one name ({clash})"
    folder, name = PurePosixPath(path).parent.as_posix(), PurePosixPath(path).name
    if "model_index.json" not in ours:
        return _why_beside_model(path, folder, name)
    if path == "config.json":
        return "who loads the repository without a subfolder gets the model that it describes"
    if folder == ".":
        return _why_weights(name)
    if folder not in COMPONENTS:
        return None
    if folder == "tokenizer":
        # Without a tokenizer of ours none is loaded, and what lies there is nobody's.
        return "a tokenizer is loaded from every file of its folder" if _has(folder, ours) else None
    if name.endswith(".py"):
        return "diffusers would run it as the component's code"
    if name == "adapter_config.json":
        return "transformers would add its adapter to the model"
    known = _why_weights(name)
    if known is None and name.endswith(_ANY_WEIGHTS):
        return f"other weights in {folder}/, a folder of the pipeline"
    return known


def _why_beside_model(path: str, folder: str, name: str) -> str | None:
    """The same beside a model without a pipeline, whose files are at the root."""
    if path == "model_index.json":
        return "makes the repository another model's pipeline, which DiffusionPipeline would load"
    if folder == "transformer" and (name == "config.json" or name.endswith(_ANY_WEIGHTS) or _INDEX.fullmatch(name)):
        return "the transformer of another model, which is read before the root"
    return _why_weights(name) if folder == "." else None


def _why_weights(name: str) -> str | None:
    """Why a file under a name that loaders look for may not stay; None for any other name."""
    if found := _INDEX.fullmatch(name):
        if variant := found["variant"] or found["older"]:
            return f"an index of shards that variant={variant!r} loads"
        loader = "diffusers loads its shards first" if found["suffix"] == "safetensors" else "use_safetensors=False"
        return f"an index of other shards ({loader})"
    if (found := _WEIGHTS.fullmatch(name)) is None:
        return None
    more = found["more"] or ""
    if variant := _SHARD.sub("", more).strip("."):
        return f"weights that variant={variant!r} loads"
    if _SHARD.fullmatch(more):
        return "a shard of other weights"
    return (
        "other weights (use_safetensors=False)" if found["suffix"] == "bin" else "other weights that loaders look for"
    )


def _has(folder: str, ours: Collection[str]) -> bool:
    return any(path.startswith(f"{folder}/") for path in ours)


def _clashes(path: str, ours: Collection[str]) -> Iterator[str]:
    """Names that would be a file and a folder at once, which git does not have."""
    yield from (one for one in ours if one.startswith(f"{path}/") or path.startswith(f"{one}/"))
