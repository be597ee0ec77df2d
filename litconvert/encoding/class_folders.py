"""Images in class folders, and which label each class has."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from litconvert.encoding.images import ImageSample, is_image_name
from litconvert.errors import UsageError
from litconvert.recipe.schema import ClassOrder, Encode

# A name of one number, whatever stands around it.
NUMBERED = re.compile(r"(\D*)(\d+)(\D*)", re.ASCII)
NUMBERS = re.compile(r"(\d+)", re.ASCII)
# What the parts of data sets are called: train, val2017, test_1.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""As `datasets` calls lists of images."""
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval)[-_ ]?\d*", re.IGNORECASE)
File = tuple[str, int]
"""Path inside a folder, with slashes, and size in bytes."""


def in_class_order(place: str, names: Sequence[str], order: ClassOrder | None) -> list[str]:
    """Names of classes in the order of their labels 0, 1, ...

    Args:
        place: whose classes they are, for messages.
        order: `name` sorts as text, as torchvision's ImageFolder does; `number` by the number in each name; None: as
            text where both are the same.

    Raises UsageError where the orders differ and none is asked for, and for `number` where the numbers do not count.
    """
    by_name = sorted(names)
    if order == "name":
        return by_name
    by_number = sorted(by_name, key=_natural)
    if order is None and by_number != by_name:
        at = next(i for i, pair in enumerate(zip(by_name, by_number, strict=True)) if pair[0] != pair[1])
        raise UsageError(
            f"{place}: the names of the classes hold numbers, and their order gives the labels: as text they are "
            f"{_around(by_name, at)}, as numbers {_around(by_number, at)}; set data.encode.class_order=name (as "
            "torchvision, and so DiT's own training, sorts folders) or =number"
        )
    if order == "number":
        _refuse_gaps(place, by_number)
    return by_number


def _natural(name: str) -> list[str | int]:
    """A key that sorts the numbers in names as numbers."""
    return [int(part) if index % 2 else part for index, part in enumerate(NUMBERS.split(name))]


def _refuse_gaps(place: str, names: Sequence[str]) -> None:
    """Raise UsageError for names without a number and, of names that are alike but for it, for one that is missing."""
    if odd := next((name for name in names if not NUMBERS.search(name)), None):
        if not any(map(NUMBERS.search, names)):
            raise UsageError(
                f"{place}: data.encode.class_order=number, and the classes are not called by numbers ({odd!r}); leave "
                "it out"
            )
        return
    matches = [NUMBERED.fullmatch(name) for name in names]
    if len({match and (match[1], match[3]) for match in matches}) > 1:
        return
    for (before, one), (after, other) in pairwise(zip(names, matches, strict=True)):
        if one and other and int(other[2]) != int(one[2]) + 1:
            raise UsageError(
                f"{place}: data.encode.class_order=number, and {after!r} follows {before!r}: labels are counted "
                "without a gap; add or rename what is missing, or give labels in a metadata.jsonl (file_name and label)"
            )


def _around(names: Sequence[str], index: int) -> str:
    shown = names[max(0, index - 3) : index + 4]
    before, after = "..., " if index > 3 else "", ", ..." if index + 4 < len(names) else ""
    return before + ", ".join(shown) + after


class ClassFolders:
    """A folder of folders of images: the ordered folder names are the labels 0, 1, ...

    Args:
        folder: that holds the class folders.
        files: in it.
        folders: the names of all folders right in it.

    Raises UsageError where that is not what the folder is.
    """

    def __init__(self, folder: Path, files: Sequence[File], folders: Sequence[str], settings: Encode) -> None:
        images = [entry for entry in files if is_image_name(entry[0])]
        loose = [name for name, _ in images if "/" not in name]
        if not images or loose:
            what = f"{loose[0]} is in none" if loose else _no_images(files)
            raise UsageError(
                f"{folder}: images are read from class folders (FOLDER/CLASS/IMAGE), and {what}; the other forms are "
                "webdataset shards (*.tar), parquet files, and a metadata.jsonl"
            )
        names = sorted({name.partition("/")[0] for name, _ in images})
        refuse_splits(folder, images)
        if empty := sorted(set(folders).difference(names)):
            raise UsageError(
                f"{folder / empty[0]}: a class folder without an image, and {len(empty) - 1} more: labels are counted "
                "over the folders, so remove it, or fill it"
            )
        self.folder = folder
        self.classes: Sequence[str] | None = in_class_order(str(folder), names, settings.class_order)
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self.files = images[: settings.num_samples]
        self.shard_size = settings.shard_size
        self.parts = -(-len(self.files) // self.shard_size)
        self.listing: Any = images
        # A list is spoken of by whoever looked at it.
        others = [name for name, _ in files if not is_image_name(name) and not name.endswith(METADATA)]
        self.remarks: list[str] = [left_out(others, "no images")] if others else []

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        for name, _ in self.files[part * self.shard_size : (part + 1) * self.shard_size]:
            yield ImageSample(str(self.folder / name), self.folder / name, self._labels[name.partition("/")[0]])


def left_out(names: Sequence[str], what: str) -> str:
    """A sentence about files that are not read."""
    if len(names) == 1:
        return f"{names[0]} is left out: {what}"
    return f"{len(names):,} files are left out, {names[0]} the first of them: {what}"


def refuse_splits(folder: Path, files: Sequence[File]) -> None:
    """Raise UsageError where the folders in a folder are parts of a data set, or one that holds them all."""
    inner = sorted({name.partition("/")[0] for name, _ in files if "/" in name})
    deep = {name.partition("/")[0] for name, _ in files if name.count("/") > 1}
    parts = [name for name in inner if SPLIT.fullmatch(name)]
    if len(parts) > 1 or deep.intersection(parts):
        chosen = next((name for name in parts if name.lower().startswith("train")), parts[0])
        raise UsageError(
            f"{folder}: holds {', '.join(parts)}, parts of a data set, which are no classes; name one, for example "
            f"{folder / chosen}"
        )
    if len(inner) == 1 and all(name.count("/") > 1 for name, _ in files):
        raise UsageError(
            f"{folder}: all is in one folder of it, {inner[0]}, which holds folders itself; name that: "
            f"{folder / inner[0]}"
        )


def _no_images(files: Sequence[File]) -> str:
    archives = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
    packed = next((name for name, _ in files if name.lower().endswith(archives)), None)
    if packed is not None:
        return f"{packed} is packed: unpack it"
    return "there are none with images in them"
