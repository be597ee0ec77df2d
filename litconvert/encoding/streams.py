"""Images that `datasets` reads: tables, what it saved, and data sets on the Hub."""

import glob
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from litconvert.common.hub import hub_errors
from litconvert.encoding.class_folders import File, in_class_order, left_out
from litconvert.encoding.images import ImageSample, as_label, no_number
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WEBDATASET_KEY = "__key__"
"""A column of every webdataset, on the Hub too."""


class StreamedImages:
    """What `datasets` reads: a part is a file of it, or so many rows where rows are counted.

    Args:
        name: of the data set, for messages; a folder, or an id on the Hub.
        data: a data set or a stream of one.
        listing: plain data that changes when the data does.
        captions: captions are needed, not classes.
    """

    def __init__(self, name: str, data: Any, listing: Any, settings: Encode, captions: bool) -> None:
        from datasets import Image as ImageFeature

        self.name, self.listing, self.settings, self.captions = name, listing, settings, captions
        self.remarks: list[str] = []
        features = data.features or {}
        self.images = _image_columns(name, features, settings)
        self.column = _condition_column(name, features, settings, captions=captions)
        names = getattr(features[self.column], "names", None)
        self.classes: Sequence[str] | None = None if names is None else list(names)
        self._labels: Sequence[int] | None = None
        # Names sorted as text are those of folders, as `datasets` found them; any other order is somebody's choice.
        if self.classes is not None and (settings.class_order or self.classes == sorted(self.classes)):
            ordered = in_class_order(name, self.classes, settings.class_order)
            self._labels, self.classes = [ordered.index(one) for one in self.classes], ordered
        self.data = data.select_columns([*self.images, self.column])
        for column in self.images:  # the bytes as they are: a broken image is to be named
            self.data = self.data.cast_column(column, ImageFeature(decode=False))
        self.rows = settings.num_samples  # None: a stream whose rows nobody has counted
        if hasattr(data, "__len__"):
            self.rows = min(len(data), settings.num_samples or len(data))
        # Of a stream: the next row and the iterator that gives it.
        self._open: tuple[int, Iterator[Any] | None] = (0, None)
        self.parts: int = data.num_shards if self.rows is None else -(-self.rows // settings.shard_size)

    def _part(self, part: int) -> tuple[int, Any]:
        """The number of its first row, where rows are counted, and the rows of a part."""
        if self.rows is None:
            return 0, self.data.shard(self.data.num_shards, part)
        first = part * self.settings.shard_size
        count = min(self.settings.shard_size, self.rows - first)
        if hasattr(self.data, "__len__"):
            return first, self.data.skip(first).take(count)
        return first, self._streamed(first, count)

    def _streamed(self, first: int, count: int) -> Iterator[Any]:
        """Rows of a stream, which goes on from the part before: opening it for each would read its beginning each time.

        The rows between are other processes' parts.
        """
        position, stream = self._open
        self._open = (0, None)  # closed unless this part ends well
        if stream is None or position > first:
            position, stream = first, iter(self.data.skip(first))
        yield from islice(stream, first - position, first - position + count)
        self._open = (first + count, stream)

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        first, rows = self._part(part)
        where = f"{self.name}, file {part}, row" if self.rows is None else f"{self.name}, row"
        try:
            for index, row in enumerate(rows, start=first):
                pictures = [row[column] for column in self.images if row[column]]
                if len(pictures) > 1:
                    raise UsageError(
                        f"{where} {index}: has {len(pictures)} images: set data.encode.image_column to one"
                    )
                picture = pictures[0] if pictures else {}
                path = picture.get("path")
                name = f"{where} {index}{f' ({path})' if path else ''}"
                data = picture.get("bytes") or (self._place(path) if path else b"")
                condition, fault = self._condition(row[self.column])
                yield ImageSample(name, data, condition, fault)
        except LitconvertError:
            raise
        except Exception as error:  # datasets raises many kinds for what it cannot read
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LitconvertError(f"{self.name}: part {part} cannot be read ({reason}); repair or remove it") from error

    def _place(self, path: str) -> Path | str:
        """Where an image is whose path a table holds: beside the table, unless it says otherwise."""
        return path if "://" in path else Path(self.name) / path

    def _condition(self, value: Any) -> tuple[int | str, str | None]:
        """A row's caption, of several the first, or its class, nothing or -1 where it has none; and what is wrong."""
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None or value != value:  # a table's NaN is a value that is missing
            return ("" if self.captions else -1), None
        if self.captions:
            return str(value), None
        label = as_label(value)
        if label is None:
            return -1, f"its {self.column} is {no_number(value)}"
        known = self._labels is not None and 0 <= label < len(self._labels)
        return (self._labels[label] if self._labels is not None and known else label), None


def _image_columns(name: str, features: Any, settings: Encode) -> list[str]:
    """The columns of images: the one that is asked for, the only one, or of webdataset shards those of any ending."""
    pictures = [column for column, feature in features.items() if _holds_images(feature)]
    if settings.image_column in pictures:
        return [settings.image_column]
    if pictures and (len(pictures) == 1 or WEBDATASET_KEY in features):
        return pictures
    raise UsageError(
        f"{name}: has no column of images {settings.image_column!r}; its columns are "
        f"{', '.join(features) or 'unknown'}: set data.encode.image_column"
    )


def _holds_images(feature: Any) -> bool:
    """Whether a column holds images, as `datasets` writes them, or files' bytes, as other programs do."""
    from datasets import Image as ImageFeature
    from datasets import Value

    if isinstance(feature, dict):  # with a path beside the bytes, or in their place
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _holds_images(feature["bytes"])
    return isinstance(feature, ImageFeature) or (
        isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    )


def _condition_column(name: str, features: Any, settings: Encode, *, captions: bool) -> str:
    """The column of classes or of captions. Raises UsageError where there is none, or it holds something else."""
    from datasets import ClassLabel, Value

    key = "caption_column" if captions else "label_column"
    column: str = getattr(settings, key)
    if column not in features and WEBDATASET_KEY in features:
        column = "txt" if captions else "cls"
    if column not in features:
        raise UsageError(
            f"{name}: has no column {getattr(settings, key)!r} of {'captions' if captions else 'classes'}; its "
            f"columns are {', '.join(features)}: set data.encode.{key}"
        )
    kind = features[column]
    if captions and not _is_text(kind):
        raise UsageError(f"{name}: the column {column} does not hold texts: set data.encode.caption_column")
    numbers = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "float", "string", "large_string"))
    if not captions and not isinstance(kind, ClassLabel) and not numbers:
        raise UsageError(f"{name}: the column {column} does not hold classes, which are whole numbers")
    return column


def _is_text(kind: Any) -> bool:
    """Whether a column of this feature holds texts, or several for each image."""
    from datasets import LargeList, List, Value

    if isinstance(kind, (List, LargeList)):
        kind = kind.feature
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def from_tables(
    folder: Path, settings: Encode, tables: Sequence[File], files: Sequence[File], captions: bool
) -> StreamedImages:
    """Tables in a folder, those of the split that is asked for. Raises UsageError where there are none of it."""
    kinds = {name.lower().rpartition(".")[2] for name, _ in tables}
    if len(kinds) > 1:
        raise UsageError(f"{folder}: holds tables of two kinds ({', '.join(sorted(kinds))}); name the folder of one")
    splits = {name: split_of(name) for name, _ in tables}
    asked = split_of(settings.split) or settings.split
    chosen = [name for name, split in splits.items() if split == asked]
    if not chosen and asked == "train":
        chosen = [name for name, split in splits.items() if split is None]
    if not chosen:
        known = sorted({split or "train" for split in splits.values()})
        raise UsageError(f"{folder}: has no tables of the split {settings.split!r}: set data.encode.split={known[0]}")
    paths = [glob.escape(str(folder / name)) for name in chosen]
    data = _load(kinds.pop(), str(folder), data_files={"train": paths})
    source = StreamedImages(str(folder), data, list(files), settings, captions)
    if others := [name for name in splits if name not in chosen]:
        source.remarks.append(left_out(others, f"not of the split {settings.split}"))
    return source


def split_of(name: str) -> str | None:
    """The split that a path names, as `datasets` understands names of files; None: it names none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() if any(word in names for word in words)), None)


def from_disk(folder: Path, settings: Encode, files: Sequence[File], captions: bool) -> StreamedImages:
    """What `datasets` saved. Raises UsageError for what it cannot read."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
        data = data[settings.split] if isinstance(data, DatasetDict) else data
    except Exception as error:  # datasets raises many kinds for what it cannot read
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder}: `datasets` cannot read its split {settings.split!r} ({reason})") from error
    return StreamedImages(str(folder), data, list(files), settings, captions)


def from_hub(images: str, settings: Encode, captions: bool) -> StreamedImages:
    """A data set on the Hub, `owner/name` or `owner/name@revision`."""
    from huggingface_hub import HfApi

    name, _, revision = images.partition("@")
    with hub_errors(name):
        sha = HfApi().dataset_info(name, revision=revision or None).sha
    data = _load(name, name, split=settings.split, revision=sha)
    return StreamedImages(name, data, [name, sha], settings, captions)


def _load(path: str, name: str, **options: Any) -> Any:
    from datasets import load_dataset

    options = {"split": "train", **options}
    try:
        with hub_errors(name):
            return load_dataset(path, streaming=True, **options)
    except LitconvertError:
        raise
    except Exception as error:  # datasets raises many kinds for what it cannot read
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name}: `datasets` cannot read it ({reason}); is the split {options['split']!r} (data.encode.split), and "
            "are all samples alike?"
        ) from error
