"""Checkpoints on this machine: folders, safetensors, pickles, shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litconvert.checkpoints.checkpoint import RUN_INDEX, Checkpoint, Stored
from litconvert.checkpoints.folders import SHARD, shards_of_index, weights_among
from litconvert.checkpoints.kinds import kind_of_file
from litconvert.checkpoints.sets import choose
from litconvert.checkpoints.weights_files import WeightsFile, open_weights
from litconvert.common.files import read_json
from litconvert.common.outputs import refuse_unfinished
from litconvert.common.tensors import TensorInfo
from litconvert.errors import LitconvertError, UsageError


def open_local(source: str, path: Path, *, file: str | None = None, weights: str = "auto") -> Checkpoint:
    """Open a checkpoint on this machine: headers only. Arguments as of `open_checkpoint`, `path` is where it is."""
    refuse_unfinished(path)
    if path.is_dir() and (path / RUN_INDEX).is_file():
        return _open_run_checkpoint(source, path, weights)
    if path.is_dir():
        place = path / weights_among(str(path), _names_in(path), file)
        if not place.is_file():
            raise UsageError(f"{place}: a folder or a device, not a file of weights")
    else:
        place = path
        if file is not None and path.name != Path(file).name:
            raise UsageError(f"{source}: is a file, so source.file={file!r} cannot be chosen from it; leave it out")
        if not path.is_file():
            raise UsageError(
                f"{source}: a device or a pipe, which cannot be mapped; save the checkpoint to a file first"
            )
        if SHARD.search(path.name) and not path.name.split("-of-")[1].startswith("00001"):
            raise UsageError(f"{source}: one of several shards; give their folder, or the index (.index.json) in it")
    files = _files_of_index(place) if kind_of_file(place) == "index" else [place]
    return open_files(source, files, _config_beside(place, in_folder=path.is_dir()), weights=weights)


def open_files(
    source: str,
    files: Sequence[Path],
    config: dict[str, Any] | None,
    *,
    weights: str = "auto",
) -> Checkpoint:
    """Open weight files, shards of one checkpoint or a single one: headers only. Arguments as of `open_checkpoint`."""
    shards: dict[str, WeightsFile] = {}
    opened = [open_weights(path) for path in files]
    for file in opened:
        for name in file.headers:
            if name in shards:
                raise LitconvertError(f"{file.path}: {name!r} is in two shards; download the checkpoint again")
            shards[name] = file
    headers = {name: header for file in opened for name, header in file.headers.items()}
    chosen = choose(source, headers, weights)
    if not chosen.names:
        raise LitconvertError(f"{source}: holds no tensors")
    for file in opened:
        file.settle([name for name in chosen.names.values() if shards[name] is file])
    stored = Stored(
        tuple(files),
        {own: shards[name].tensors[name] for own, name in chosen.names.items()},
        lambda own: shards[chosen.names[own]].read(chosen.names[own]),
        lambda own: shards[chosen.names[own]].extent(chosen.names[own]),
    )
    return Checkpoint(
        source, config, stored.tensors, chosen.weights, chosen.sets, chosen.left_out, None, 0, lambda: stored
    )


def _open_run_checkpoint(source: str, folder: Path, weights: str) -> Checkpoint:
    """A checkpoint that a run of `distill` or `train` wrote."""
    from litconvert.checkpoints.distributed import SETS, open_run_checkpoint, weight_files  # most of a second

    if not (folder / "config.json").is_file():
        raise LitconvertError(
            f"{source}: a checkpoint of litconvert 0.1's first runs, which do not say what model they hold; run the "
            "same `litconvert distill` again: it goes on, and its next checkpoint is one that can be used"
        )
    found, read, chosen = open_run_checkpoint(folder, weights)
    tensors = {name: TensorInfo(shape, dtype) for name, (shape, dtype) in found.items()}
    stored = Stored(weight_files(folder), tensors, read, lambda name: None)
    config = read_json(folder / "config.json")
    return Checkpoint(source, config, tensors, chosen, SETS, (), None, 0, lambda: stored)


def _names_in(folder: Path) -> set[str]:
    """The files of a folder, and of its transformer, relative to it."""
    names = {one.name for one in folder.iterdir()}
    inner = folder / "transformer"
    return names | ({f"transformer/{one.name}" for one in inner.iterdir()} if inner.is_dir() else set())


def _config_beside(weights: Path, *, in_folder: bool) -> dict[str, Any] | None:
    """config.json beside a file of weights, in the folder that was named or of a file named as diffusers does."""
    beside = weights.with_name("config.json")
    mine = in_folder or weights.name.startswith("diffusion_pytorch_model.")
    return read_json(beside) if mine and beside.is_file() else None


def _files_of_index(index: Path) -> list[Path]:
    files = [index.parent / name for name in shards_of_index(index)]
    for file in files:
        if not file.is_file():
            raise LitconvertError(f"{index}: names the shard {file.name[:80]}, which is missing; download it again")
    return files
