"""Which file of a folder, or of a repository on the Hub, holds the transformer, told by the names in it."""

import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from litconvert.common.files import read_json
from litconvert.common.hub import WEIGHT_SUFFIXES, is_weights_name
from litconvert.errors import LitconvertError, UsageError, did_you_mean

# As diffusers and transformers name them, a variant (`fp16`) before or behind the number.
SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)+$")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")
LONGEST_NAME = 255  # bytes, of every usual file system
STEM = "diffusion_pytorch_model"


def weights_among(place: str, names: Collection[str], file: str | None) -> str:
    """The file of weights, or the index of their shards.

    Args:
        place: the folder or repository, for messages.
        names: of its files, relative to it.
        file: which one is asked for, by its name in the folder or in the transformer's.

    Raises UsageError where there is none, or where there are several and none is asked for.
    """
    inner = "transformer/" if "transformer/config.json" in names else ""
    if file is not None:
        found = next((name for name in (file, inner + file) if name in names), None)
        if found is None:
            raise UsageError(f"{place}: holds no file {file!r}{did_you_mean(file, names)}")
        return found
    for suffix in ("safetensors", "bin"):
        for name in (f"{inner}{STEM}.{suffix}.index.json", f"{inner}{STEM}.{suffix}"):
            if name in names:
                return name
    mine = sorted(name for name in names if not inner or str(PurePosixPath(name).parent) == inner.rstrip("/"))
    shards = [name for name in mine if is_weights_name(name) and SHARD.search(name)]
    candidates = [name for name in mine if INDEX.search(name) or (is_weights_name(name) and name not in shards)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(
            f"{place}: holds several weight files ({', '.join(candidates)}); choose one with --set source.file=NAME"
        )
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise UsageError(
            f"{place}: holds {len(shards)} shards ({shards[0]}, ...) without their index, a file that ends in "
            ".index.json; download that too"
        )
    raise UsageError(f"{place}: holds no weights ({', '.join(WEIGHT_SUFFIXES)}); give the folder or file that does")


def is_index(name: str) -> bool:
    """Whether a file is called as an index of shards is."""
    return INDEX.search(name) is not None


def shards_of_index(index: Path) -> list[str]:
    """The shards that an index names, all of them beside it.

    Raises LitconvertError for what is no index, and for one that names anything else.
    """
    weight_map = read_json(index).get("weight_map")
    if weight_map is None:
        raise LitconvertError(
            f"{index}: a JSON file without a weight_map, so no index of shards; give the file or the folder that holds "
            "the weights"
        )
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(one, str) for one in files):
        raise LitconvertError(f"{index}: has no weight_map of tensor to file; download it again")
    names = sorted(set(files))
    for name in names:
        # A shard index comes from outside: it may not make us read anything beside it.
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise LitconvertError(f"{index}: names {name[:80]!r}, which is outside its folder; refused")
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise LitconvertError(f"{index}: names a file {name[:40]!r}..., longer than a file's name can be")
    return names
