"""Training data on disk: latents, VAE posteriors or pixels with their conditions, kept as Arrow through `datasets`.

A data set of one shape is a plain `datasets` folder, one of several shapes a folder of them named HxW. Beside them is a
record (litconvert-latents.json) of what the columns cannot tell. The columns:

    latent            Array3D (C, H, W). float32: what the model sees. uint8: pixels, read as value / 127.5 - 1.
                      Of a posterior (2C, H, W): the VAE's mean and log variance, unscaled.
    latent_flipped    the posterior of the mirrored image
    class_label       int64
    caption           the caption's text
    caption_features  list of float16, T5's features of the caption's tokens, one after the other, without padding
    caption_tokens    int64, how many tokens those are
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.files import read_json, require_utf8, write_whole
from litconvert.common.outputs import DATA_SET, refuse_unfinished, whole_directory
from litconvert.errors import UsageError
from litconvert.model.config import is_pixel_space
from litconvert.sampling.captions import Captions, read_embeddings, write_embeddings

DATA_RECORD = "litconvert-latents.json"
NULL_CAPTION = "null-caption.safetensors"
FORMAT_VERSION = 2
ADVICE = "draw one with `litconvert latents synthesize`, or make one of images with `litconvert latents encode`"

LatentKind = Literal["latents", "moments"]
ConditionKind = Literal["class", "caption", "text"]
# The columns of numbers that are read.
NUMBERS = ("latent", "latent_flipped", "class_label", "caption_features", "caption_tokens")
# The column that shows what samples are conditioned on. A caption's text is stored beside its features.
CONDITION_COLUMNS: dict[str, ConditionKind] = {"class_label": "class", "caption_features": "caption", "caption": "text"}


class Samples(NamedTuple):
    """Some samples of one bucket."""

    clean: Tensor
    """(N, C, H, W) float32, what the model sees."""
    class_labels: Tensor | None = None
    """(N,) int64."""
    captions: list[Tensor] | None = None
    """Features of each caption (L_i, caption_channels), float16, without padding."""
    texts: list[str] | None = None
    """Captions that are kept as text, to be encoded on the fly."""


class _Column:
    """Rows of numbers straight from the mapped file: twenty times faster than through the formats of `datasets`."""

    def __init__(self, column: Any) -> None:
        import pyarrow

        self._chunks: list[tuple[NDArray[Any], NDArray[Any]]] = []  # all numbers, and where each row begins
        for chunk in column.chunks:
            values, offsets = getattr(chunk, "storage", chunk), np.arange(len(chunk) + 1)
            while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
                inner = values.offsets.to_numpy()
                offsets = (inner - inner[0])[offsets]
                values = values.flatten()
            self._chunks.append((values.to_numpy(), offsets))
        self._starts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._chunks)])

    def __getitem__(self, index: int) -> NDArray[Any]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        values, offsets = self._chunks[chunk]
        row = index - self._starts[chunk]
        return values[offsets[row] : offsets[row + 1]]


@dataclass(frozen=True)
class Bucket:
    """The samples of one height and width.

    Attributes:
        shape: (C, H, W) of what the model sees.
        data: of `datasets`.
    """

    shape: tuple[int, int, int]
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def columns(self) -> dict[str, _Column]:
        """The columns of numbers that are known, by name; what else lies in the data set is nobody's business."""
        names = [name for name in NUMBERS if name in self.data.column_names]
        return {name: _Column(self.data.data.column(name)) for name in names}

    def numbers(self, name: str, indices: Sequence[int]) -> list[NDArray[Any]]:
        """A column's rows, flat and read-only."""
        return [self.columns[name][index] for index in indices]

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions as text."""
        column = self.data.data.column("caption")
        return [str(column[index].as_py()) for index in indices]


@dataclass(frozen=True)
class LatentDataset:
    """Clean latents or pixels, and what they are conditioned on.

    Attributes:
        buckets: samples of one height and width each, in a fixed order.
        kind: `moments` are a VAE's posterior, drawn from anew at each visit; `latents` are what the model sees.
        condition: classes, captions as features, or captions as text.
        labels: smallest and largest class.
        digest: of what the data was made from; for data from elsewhere, of its content's fingerprint.
        scaling_factor, shift_factor: what a sample of the posterior is multiplied by, once the shift is subtracted;
            latents are stored so.
        flipped: posteriors of the mirrored images are stored too.
        pixels: images as they are, which are mirrored at reading.
        caption_channels: width of the text features.
        caption_tokens: the longest stored caption.
        null_caption: features (L, C) and mask (L,) of the empty prompt, where they are stored.
        vae, text_encoder: what made the latents and the text features, as the recipe's sections; None: not known.
    """

    buckets: tuple[Bucket, ...]
    kind: LatentKind
    condition: ConditionKind
    labels: tuple[int, int] | None
    digest: str
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    flipped: bool = False
    pixels: bool = False
    caption_channels: int | None = None
    caption_tokens: int | None = None
    null_caption: tuple[Tensor, Tensor] | None = None
    vae: Mapping[str, Any] | None = None
    text_encoder: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def read(
        self, bucket: int, indices: Sequence[int], *, noise: Tensor | None = None, flip: Tensor | None = None
    ) -> Samples:
        """The samples at these indices of a bucket.

        Args:
            noise: (N, C, H, W), with which the posterior is drawn from; moments need it.
            flip: (N,) bool, which samples are mirrored; None: none.

        Raises UsageError for a mirrored sample where the data holds none.
        """
        chosen = self.buckets[bucket]
        clean = self._stored(chosen, indices, flip)
        if self.kind == "moments":
            assert noise is not None
            mean, log_variance = clean.chunk(2, dim=1)
            # As diffusers' DiagonalGaussianDistribution.
            sample = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
            clean = self.scaling_factor * (sample - self.shift_factor)
        if self.condition == "class":
            labels = np.concatenate(chosen.numbers("class_label", indices))
            return Samples(clean, class_labels=torch.from_numpy(labels).long())
        if self.condition == "text":
            return Samples(clean, texts=chosen.texts(indices))
        shape = (-1, cast(int, self.caption_channels))
        features = [one.reshape(shape).copy() for one in chosen.numbers("caption_features", indices)]
        return Samples(clean, captions=[torch.from_numpy(one) for one in features])

    def _stored(self, bucket: Bucket, indices: Sequence[int], flip: Tensor | None) -> Tensor:
        """What is stored of these samples, (N, C or 2C, H, W) float32."""
        if flip is None or self.pixels:
            rows = bucket.numbers("latent", indices)
        elif self.flipped:
            columns = [bucket.columns["latent_flipped" if mirrored else "latent"] for mirrored in flip.tolist()]
            rows = [column[index] for column, index in zip(columns, indices, strict=True)]
        else:
            raise UsageError(
                "the data holds no mirrored latents, and a mirrored latent is not the latent of the mirrored image; "
                "encode the images with data.flip=true, or train with data.flip=false"
            )
        images = torch.from_numpy(np.stack(rows)).view(len(indices), -1, *bucket.shape[1:])
        images = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
        if flip is not None and self.pixels:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return images


def open_latents(path: str | Path) -> LatentDataset:
    """Open a data set: a folder written by `litconvert latents`, or any `datasets` folder of the same columns.

    Raises UsageError for a folder that is none, and for an empty one; LitconvertError for one that is not filled yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data set; {ADVICE}")
    require_utf8(folder)
    refuse_unfinished(folder)
    record = read_record(folder)
    if record.get("format", 1) > FORMAT_VERSION:
        raise UsageError(f"{folder}: written by a later litconvert; update this one")
    kind: LatentKind = record.get("kind", "latents")
    names = record.get("buckets") or ["."]
    buckets = tuple(_open_bucket(folder / name, kind) for name in names)
    present = set(buckets[0].data.column_names)
    condition = next((CONDITION_COLUMNS[name] for name in CONDITION_COLUMNS if name in present), None)
    if condition is None:
        raise UsageError(f"{folder}: needs a column class_label, caption or caption_features, has {', '.join(present)}")
    channels, tokens = _caption_sizes(buckets) if condition == "caption" else (None, None)
    null_caption = None
    if (folder / NULL_CAPTION).is_file():
        null = read_embeddings(folder / NULL_CAPTION)
        null_caption = (null.features[0], null.mask[0])
    return LatentDataset(
        buckets=buckets,
        kind=kind,
        condition=condition,
        labels=_bounds(buckets, "class_label") if condition == "class" else None,
        digest=str(record.get("digest") or buckets[0].data._fingerprint),
        scaling_factor=float(record.get("scaling_factor", 1.0)) if kind == "moments" else 1.0,
        shift_factor=float(record.get("shift_factor", 0.0)) if kind == "moments" else 0.0,
        flipped="latent_flipped" in present,
        pixels=kind == "latents" and bool(record.get("pixels", is_pixel_space(buckets[0].shape[0]))),
        caption_channels=channels,
        caption_tokens=tokens,
        null_caption=null_caption,
        vae=record.get("vae"),
        text_encoder=record.get("text_encoder"),
    )


def _open_bucket(folder: Path, kind: LatentKind) -> Bucket:
    from datasets import Array3D, load_from_disk

    state = folder / "state.json"
    if state.is_file() and not read_json(state).get("_data_files"):
        raise UsageError(f"{folder}: the data set is empty; {ADVICE}")
    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # Arrow and datasets raise many kinds for a folder that is not theirs
        reason = str(error).splitlines()[0]
        raise UsageError(f"{folder}: not a complete data set ({reason}); {ADVICE}") from error
    features = getattr(data, "features", {})
    latent = features.get("latent")
    if not isinstance(latent, Array3D) or not CONDITION_COLUMNS.keys() & features.keys():
        raise UsageError(
            f"{folder}: needs the columns latent (Array3D) and class_label or caption, has "
            f"{', '.join(features) or 'none'}"
        )
    if len(data) == 0:
        raise UsageError(f"{folder}: the data set is empty; {ADVICE}")
    for name in features:
        if data.data.column(name).null_count:
            raise UsageError(f"{folder}: the column {name} has rows without a value; leave them out")
    channels, height, width = latent.shape
    return Bucket((channels // 2 if kind == "moments" else channels, height, width), data)


def _bounds(buckets: Sequence[Bucket], name: str) -> tuple[int, int]:
    import pyarrow.compute

    bounds = [pyarrow.compute.min_max(bucket.data.data.column(name)).as_py() for bucket in buckets]
    return min(bound["min"] for bound in bounds), max(bound["max"] for bound in bounds)


def _caption_sizes(buckets: Sequence[Bucket]) -> tuple[int, int]:
    """Width of the text features, and the longest caption."""
    first = buckets[0]
    width = len(first.numbers("caption_features", [0])[0]) // int(first.numbers("caption_tokens", [0])[0][0])
    return width, _bounds(buckets, "caption_tokens")[1]


def features_of(arrays: Mapping[str, tuple[Sequence[int], str]], condition: ConditionKind) -> Any:
    """The schema of a bucket's folder.

    Args:
        arrays: shape (C, H, W) and dtype of `latent` and, where there is one, `latent_flipped`.
    """
    from datasets import Array3D, Features, List, Value

    columns: dict[str, Any] = {name: Array3D(tuple(shape), dtype) for name, (shape, dtype) in arrays.items()}
    if condition == "class":
        columns["class_label"] = Value("int64")
    else:
        columns["caption"] = Value("string")
    if condition == "caption":
        columns |= {"caption_features": List(Value("float16")), "caption_tokens": Value("int64")}
    return Features(columns)


def quiet_datasets() -> None:
    """Our own progress bar is the one on screen."""
    from datasets import disable_progress_bars

    disable_progress_bars()


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a data set; empty where there is none, as of data from elsewhere."""
    return read_json(folder / DATA_RECORD) if (folder / DATA_RECORD).is_file() else {}


def record_text(made_from: Mapping[str, Any], samples: int, **facts: Any) -> str:
    """The record: format, digest (and inputs), samples, and kind, condition, scaling_factor, pixels, buckets where they
    matter."""
    return json.dumps({"format": FORMAT_VERSION, **made_from, "samples": samples, **facts}, indent=2) + "\n"


def write_latents(latents: Tensor, labels: Tensor, out: Path, digest: str) -> Path:
    """Write latents (N, C, H, W) and labels (N,) as a data set, whole or not at all."""
    from datasets import Dataset

    quiet_datasets()
    columns = {"latent": latents.numpy(), "class_label": labels.numpy()}
    features = features_of({"latent": (latents.shape[1:], "float32")}, "class")
    with whole_directory(out, DATA_SET) as folder:
        Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
        write_whole(
            folder / DATA_RECORD, record_text({"digest": digest}, len(labels), kind="latents", condition="class")
        )
    return out


def write_captioned(latents: Tensor, captions: Captions, out: Path, digest: str) -> Path:
    """Write latents (N, C, H, W) and their N encoded captions, whose texts are not known, whole or not at all."""
    from datasets import Dataset

    quiet_datasets()
    lengths = [int(mask.sum()) for mask in captions.mask]
    pairs = zip(captions.features, captions.mask, strict=True)
    features = [one[mask.bool()].half().numpy().reshape(-1) for one, mask in pairs]
    columns = {
        "latent": latents.numpy(),
        "caption": [""] * len(latents),
        "caption_features": features,
        "caption_tokens": lengths,
    }
    schema = features_of({"latent": (latents.shape[1:], "float32")}, "caption")
    with whole_directory(out, DATA_SET) as folder:
        Dataset.from_dict(columns, features=schema).save_to_disk(str(folder))
        if captions.null_features is not None and captions.null_mask is not None:
            null = Captions(captions.null_features, captions.null_mask)
            write_embeddings(null, folder / NULL_CAPTION)
        record = record_text({"digest": digest}, len(latents), kind="latents", condition="caption")
        write_whole(folder / DATA_RECORD, record)
    return out
