"""Images to encode, from class folders, webdataset shards, `datasets` folders or the Hub, in parts of their own.

A part is what one process reads alone, and what an interrupted run loses at most.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from litconvert.common.hub import hub_errors
from litconvert.data.images import ImageSample
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode

TABLES = {".parquet", ".arrow"}
METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
# Where the recipe's column is not found in webdataset shards: the extensions of its convention.
WEBDATASET_COLUMNS = {"label_column": "cls", "caption_column": "txt"}
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")
# What `datasets` decodes to numbers and to text.
WEBDATASET_VALUES = {
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), "int64"),
    **dict.fromkeys(("txt", "text", "transcript"), "string"),
}


class ImageSource(Protocol):
    """Images in parts.

    Attributes:
        parts: how many.
        listing: plain data that changes when the images do, without reading them.
        classes: their names in the order of the labels, where they are known.
    """

    parts: int
    listing: Any
    classes: Sequence[str] | None

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        ...


def open_images(images: str, settings: Encode, *, captions: bool) -> ImageSource:
    """Find out what `images` is.

    Args:
        images: a folder of class folders, of webdataset shards (*.tar), of parquet files or of images with a
            metadata.jsonl; a folder that `datasets` saved; or a Hub data set, `owner/name` or `owner/name@revision`,
            which is streamed.
        captions: captions are needed, not classes.

    Raises UsageError for a folder of none of these.
    """
    folder = Path(images)
    if not folder.exists():
        if images.count("/") != 1 or images.startswith((".", "/", "~")):
            raise UsageError(f"{images}: no such folder; name one of images, or a Hub data set (owner/name)")
        return _hub_source(images, settings, captions)
    if not folder.is_dir():
        raise UsageError(f"{images}: not a folder; name the folder that the images or shards are in")
    files = _files(folder)
    suffixes = {os.path.splitext(name)[1].lower() for name, _ in files}
    names = {os.path.basename(name) for name, _ in files}
    if ".tar" in suffixes:
        tars = [entry for entry in files if entry[0].lower().endswith(".tar")]
        paths = [str(folder / name) for name, _ in tars]
        data = _load(
            "webdataset", images, data_files={"train": paths}, features=_webdataset_features(paths[0], settings)
        )
        return StreamedImages(images, data, tars, settings, captions, webdataset=True)
    if {"state.json", "dataset_dict.json"} & names:
        return StreamedImages(images, _from_disk(folder, settings.split), files, settings, captions)
    if suffixes & TABLES or names & METADATA:
        data = _load(images, images, split=settings.split)
        # An edited list of captions may be as long as it was.
        lists = [
            (name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
            for name, _ in files
            if os.path.basename(name) in METADATA
        ]
        return StreamedImages(images, data, [*files, *lists], settings, captions)
    if captions:
        raise UsageError(
            f"{images}: class folders hold no captions, which the model reads: add a metadata.jsonl with file_name and "
            f"{settings.caption_column}, or give webdataset shards (*.tar) of images and texts"
        )
    return ClassFolders(folder, files, settings)


def _files(folder: Path) -> list[tuple[str, int]]:
    """Path inside the folder and size in bytes of every file, sorted; hidden ones are left out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = os.path.join(place, name)
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    reason = error.strerror or error
                    raise UsageError(f"{path}: cannot be read ({reason}); repair or remove it") from error
                found.append((os.path.relpath(path, folder).replace(os.sep, "/"), size))
    return sorted(found)


class ClassFolders:
    """A folder of folders of images: the sorted folder names are the labels 0, 1, ..."""

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]], settings: Encode) -> None:
        suffixes = Image.registered_extensions()
        images = [entry for entry in files if os.path.splitext(entry[0])[1].lower() in suffixes]
        loose = [name for name, _ in images if "/" not in name]
        if not images or loose:
            what = f"{loose[0]} is in none" if loose else "there are none with images in them"
            raise UsageError(
                f"{folder}: images are read from class folders (FOLDER/CLASS/IMAGE), and {what}; the other forms are "
                "webdataset shards (*.tar), parquet files, and a metadata.jsonl"
            )
        self.folder = folder
        self.classes: Sequence[str] | None = sorted({name.partition("/")[0] for name, _ in images})
        folders = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
        if empty := sorted(folders.difference(self.classes)):
            raise UsageError(
                f"{folder / empty[0]}: a class folder without an image, and {len(empty) - 1} more: labels are counted "
                "over the folders, so remove it, or fill it"
            )
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self.files = images[: settings.num_samples]
        self.shard_size = settings.shard_size
        self.parts = -(-len(self.files) // self.shard_size)
        self.listing: Any = images

    def read(self, part: int) -> Iterator[ImageSample]:
        for name, _ in self.files[part * self.shard_size : (part + 1) * self.shard_size]:
            yield ImageSample(str(self.folder / name), self.folder / name, self._labels[name.partition("/")[0]])


class StreamedImages:
    """What `datasets` reads: a part is a file of it, or so many rows where rows are counted.

    Args:
        name: of the data set, for messages.
        data: a data set or a stream of one.
        listing: plain data that changes when the data does.
        captions: captions are needed, not classes.
        webdataset: columns may have the names of the webdataset convention.
    """

    def __init__(
        self, name: str, data: Any, listing: Any, settings: Encode, captions: bool, *, webdataset: bool = False
    ) -> None:
        from datasets import ClassLabel, Value
        from datasets import Image as ImageFeature

        self.name, self.listing, self.settings = name, listing, settings
        features = data.features or {}
        pictures = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
        self.images = [settings.image_column]
        if webdataset and pictures and settings.image_column not in pictures:
            self.images = pictures  # of several extensions; a sample has one of them
        elif settings.image_column not in pictures:
            if len(pictures) != 1:
                raise UsageError(
                    f"{name}: has no column of images {settings.image_column!r}; its columns are "
                    f"{', '.join(features) or 'unknown'}: set data.encode.image_column"
                )
            self.images = pictures
        key = "caption_column" if captions else "label_column"
        self.column = getattr(settings, key)
        if self.column not in features and webdataset:
            self.column = WEBDATASET_COLUMNS[key]
        if self.column not in features:
            raise UsageError(
                f"{name}: has no column {getattr(settings, key)!r} of {'captions' if captions else 'classes'}; its "
                f"columns are {', '.join(features)}: set data.encode.{key}"
            )
        kind = features[self.column]
        if not captions and not isinstance(kind, ClassLabel) and not (isinstance(kind, Value) and "int" in kind.dtype):
            raise UsageError(f"{name}: the column {self.column} does not hold classes, which are whole numbers")
        self.captions = captions
        if captions and not _is_text(kind):
            raise UsageError(f"{name}: the column {self.column} does not hold texts: set data.encode.caption_column")
        self.classes: Sequence[str] | None = list(kind.names) if isinstance(kind, ClassLabel) else None
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
                condition = row[self.column]
                path = picture.get("path")
                name = f"{where} {index}{f' ({path})' if path else ''}"
                if isinstance(condition, list):
                    condition = condition[0] if condition else None  # several captions of one image: the first
                if condition is None:
                    condition = "" if self.captions else -1
                data = picture.get("bytes") or ((path if "://" in path else Path(path)) if path else b"")
                yield ImageSample(name, data, condition)
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            if isinstance(error, LitconvertError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LitconvertError(f"{self.name}: part {part} cannot be read ({reason}); repair or remove it") from error


def _is_text(kind: Any) -> bool:
    """Whether a column of this feature holds texts, or several for each image."""
    from datasets import LargeList, List, Value

    if isinstance(kind, (List, LargeList)):
        kind = kind.feature
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _webdataset_features(path: str, settings: Encode) -> Any:
    """Columns of shards, told by the names in the first one: any of the usual image extensions, numbers and texts.

    None: `datasets` is to find them, which asks that the first samples have the same columns.
    """
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    try:
        with tarfile.open(path) as tar:
            names = [os.path.basename(member.name).partition(".")[2] for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{path}: not a whole tar file ({error}); download it again, or remove it") from error
    fields = {name for name in names if name}
    images = {name for name in fields if name.lower() in WEBDATASET_IMAGES}
    if not images or (settings.image_column in fields and settings.image_column not in images):
        return None
    columns: dict[str, Any] = {name: ImageFeature() for name in sorted({*images, *WEBDATASET_IMAGES})}
    for name in sorted(fields - images):
        if (kind := WEBDATASET_VALUES.get(name.rpartition(".")[2].lower())) is not None:
            columns[name] = Value(kind)
    return Features(columns)


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


def _from_disk(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
        return data[split] if isinstance(data, DatasetDict) else data
    except Exception as error:  # as above
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder}: `datasets` cannot read its split {split!r} ({reason})") from error


def _hub_source(images: str, settings: Encode, captions: bool) -> StreamedImages:
    from huggingface_hub import HfApi

    name, _, revision = images.partition("@")
    with hub_errors(name):
        sha = HfApi().dataset_info(name, revision=revision or None).sha
    data = _load(name, name, split=settings.split, revision=sha)
    return StreamedImages(name, data, [name, sha], settings, captions)
