"""The latent dataset: drawn from the teacher, kept as Arrow through `datasets`, and read by index."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.conversion import with_source
from litconvert.draws import generator_of
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.files import digest_of, read_json, require_space, whole_directory, write_whole
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.recipe import Recipe, ResolvedRecipe, resolve
from litconvert.sampling import draw
from litconvert.sources import open_source, read_model

RECORD = "litconvert-latents.json"


@dataclass(frozen=True)
class LatentDataset:
    """Clean latents (or pixels) and their classes.

    Attributes:
        shape: (C, H, W) of a latent.
        labels: smallest and largest class label.
        digest: of what the data was made from; for data from elsewhere, of its content's fingerprint.
    """

    shape: tuple[int, int, int]
    labels: tuple[int, int]
    digest: str
    _data: Any

    def __len__(self) -> int:
        return len(self._data)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (N, C, H, W) float32 and labels (N,) int64 at these indices."""
        # with_format hands over whole columns; row by row is forty times slower.
        rows = self._data[list(indices)]
        return rows["latent"].float(), rows["class_label"].long()


def _features(shape: Sequence[int]) -> Any:
    from datasets import Array3D, Features, Value

    return Features({"latent": Array3D(tuple(shape), "float32"), "class_label": Value("int64")})


def quiet_datasets() -> None:
    """Our own progress bar is the one on screen."""
    from datasets import disable_progress_bars

    disable_progress_bars()


def open_latents(path: str | Path) -> LatentDataset:
    """Open a latent dataset: a folder written by `litconvert latents`, or any `datasets` folder of the same columns.

    Raises UsageError for a folder that is none, and for an empty one.
    """
    import pyarrow.compute
    from datasets import Array3D, load_from_disk

    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data set; draw one with `litconvert latents synthesize`")
    state = folder / "state.json"
    if state.is_file() and not read_json(state).get("_data_files"):
        raise UsageError(f"{folder}: the data set is empty; draw one with `litconvert latents synthesize`")
    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # Arrow and datasets raise many kinds for a folder that is not theirs
        raise UsageError(
            f"{folder}: not a complete data set ({str(error).splitlines()[0]}); "
            "draw one with `litconvert latents synthesize`"
        ) from error
    features = getattr(data, "features", {})
    latent = features.get("latent")
    if not isinstance(latent, Array3D) or "class_label" not in features:
        raise UsageError(
            f"{folder}: needs the columns latent (Array3D) and class_label, has {', '.join(features) or 'none'}"
        )
    if len(data) == 0:
        raise UsageError(f"{folder}: the data set is empty; draw one with `litconvert latents synthesize`")
    record = folder / RECORD
    digest = str(read_json(record)["digest"]) if record.is_file() else str(data._fingerprint)
    channels, height, width = latent.shape
    labels = data.data.column("class_label")
    bounds = pyarrow.compute.min_max(labels).as_py()
    return LatentDataset((channels, height, width), (bounds["min"], bounds["max"]), digest, data.with_format("torch"))


def write_latents(latents: Tensor, labels: Tensor, out: Path, digest: str) -> Path:
    """Write latents (N, C, H, W) and labels (N,) as a dataset folder, whole or not at all."""
    from datasets import Dataset

    quiet_datasets()
    columns = {"latent": latents.numpy(), "class_label": labels.numpy()}
    with whole_directory(out) as folder:
        Dataset.from_dict(columns, features=_features(latents.shape[1:])).save_to_disk(str(folder))
        write_whole(folder / RECORD, _record(digest, len(labels)))
    return out


def _record(digest: str, count: int) -> str:
    return json.dumps({"format": 1, "digest": digest, "samples": count}, indent=2) + "\n"


def synthesis_digest(recipe: Recipe, source_sha256: str, weights: str | None) -> str:
    """Digest of what determines the drawn data. The batch size does so for DDPM, whose own noise is drawn by batch."""
    settings = recipe.data.synthesize.model_dump()
    return digest_of(
        {
            "source": source_sha256,
            "weights": weights,
            "synthesize": settings,
            "timesteps": recipe.diffusion.num_timesteps,
        }
    )


def synthesize(
    source: str | Path | None,
    out: str | Path,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Let the teacher draw the training set.

    Args:
        source: the teacher; None: the recipe's source.
        out: the dataset folder. One drawn from the same inputs is left as it is; an interrupted one is continued.
        recipe, overrides: as for `plan`; the section is `data.synthesize`.
        force: replace an `out` that was drawn from other inputs.
        on_progress: called with samples drawn and samples in all.

    Returns: the dataset folder.
    """
    return synthesize_resolved(with_source(resolve(recipe, overrides), source), Path(out), force, on_progress)


def synthesize_resolved(
    resolved: ResolvedRecipe,
    out: Path,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """`synthesize` for a recipe that is resolved already."""
    recipe = resolved.recipe
    opened = open_source(recipe.source, recipe.inherit.weights)
    if opened.reading.config["caption_channels"] is not None:
        raise UsageError(f"{opened.checkpoint.source}: drawing a training set from captions is not built yet")
    digest = synthesis_digest(recipe, opened.checkpoint.sha256(), opened.checkpoint.weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = read_json(out / RECORD).get("digest") if (out / RECORD).is_file() else None
        if found is None:  # not even --force deletes what is not a data set of ours
            raise LitconvertError(f"{out} exists and is not a data set of litconvert; choose another path")
        if found == digest and not force:
            return out
        if not force:
            raise LitconvertError(
                f"{out} exists and was not drawn from these inputs; choose another path, or replace it with --force"
            )
    model = read_model(opened, torch.float32)
    if torch.cuda.is_available():
        model = model.to("cuda")
    shards = out.parent / f".{out.name}.shards-{digest[:12]}"
    settings = recipe.data.synthesize
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    require_space(out.parent, 2 * 4 * settings.num_samples * int(torch.Size(shape).numel()))
    labels = torch.randint(
        model.config.num_classes, (settings.num_samples,), generator=generator_of(settings.seed, "labels")
    )
    try:
        shards.mkdir(parents=True, exist_ok=True)
        starts = range(0, settings.num_samples, settings.shard_size)
        for start in starts:
            some = labels[start : start + settings.shard_size]
            on_progress(start, settings.num_samples)
            shard = shards / f"{start:09d}"
            if not shard.exists():
                _draw_shard(model, recipe, some, start, shard, lambda done: on_progress(done, settings.num_samples))
        on_progress(settings.num_samples, settings.num_samples)
        _join([shards / f"{start:09d}" for start in starts], out, digest, settings.num_samples)
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    shutil.rmtree(shards, ignore_errors=True)
    return out


def _draw_shard(
    model: LiTTransformer2DModel,
    recipe: Recipe,
    labels: Tensor,
    first: int,
    shard: Path,
    on_progress: Callable[[int], None],
) -> None:
    from datasets import Dataset

    quiet_datasets()
    settings = recipe.data.synthesize
    drawn: list[Tensor] = []
    batches = draw(
        model,
        settings,
        labels,
        seed=settings.seed,
        batch_size=settings.batch_size,
        num_timesteps=recipe.diffusion.num_timesteps,
        first=first,
    )
    for batch in batches:
        if not torch.isfinite(batch).all():
            raise LitconvertError(
                "the teacher drew NaN or infinite values; check the checkpoint with `litconvert inspect --weights`"
            )
        drawn.append(batch)
        on_progress(first + sum(len(one) for one in drawn))
    latents = torch.cat(drawn)
    columns = {"latent": latents.numpy(), "class_label": labels.numpy()}
    with whole_directory(shard) as folder:
        Dataset.from_dict(columns, features=_features(latents.shape[1:])).save_to_disk(str(folder))


def _join(shards: Sequence[Path], out: Path, digest: str, count: int) -> None:
    from datasets import concatenate_datasets, load_from_disk

    data = concatenate_datasets([load_from_disk(str(shard)) for shard in shards])
    with whole_directory(out) as folder:
        data.save_to_disk(str(folder), num_shards=len(shards))
        write_whole(folder / RECORD, _record(digest, count))
