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
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
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
    matches = [NUMBERED.fullmatch(name) for name in names]
    numbers = {name: int(match[2]) for name, match in zip(names, matches, strict=True) if match}
    # Names that are alike but for their number: 0, 1, 2 or class-0, class-1, class-2.
    numbered = len(numbers) == len(names) and len({(match[1], match[3]) for match in matches if match}) == 1
    if not numbered:
        if order == "number":
            odd = next((name for name in by_name if name not in numbers), by_name[-1])
            raise UsageError(
                f"{place}: data.encode.class_order=number, and the classes are not called by numbers ({odd!r}); leave "
                "it out"
            )
        return by_name
    by_number = sorted(by_name, key=numbers.__getitem__)
    if order is None and by_number != by_name:
        at = next(i for i, pair in enumerate(zip(by_name, by_number, strict=True)) if pair[0] != pair[1])
        raise UsageError(
            f"{place}: the classes are called by numbers, and their order gives the labels: sorted as text they are "
            f"{_around(by_name, at)}, as numbers {_around(by_number, at)}; set data.encode.class_order=name (as "
            "torchvision, and so DiT's own training, sorts folders) or =number"
        )
    if order == "number":
        for before, after in pairwise(by_number):
            if numbers[after] != numbers[before] + 1:
                raise UsageError(
                    f"{place}: data.encode.class_order=number, and {after!r} follows {before!r}: labels are counted "
                    "without a gap; add or rename what is missing, or give labels in a metadata.jsonl (file_name and "
                    "label)"
                )
    return by_number


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
        others = [name for name, _ in files if not is_image_name(name)]
        self.remarks: Sequence[str] = [left_out(others, "no images")] if others else []

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
    deep = [name for name, _ in files if name.count("/") > 1]
    if len(inner) > 1 and all(name.lower() in SPLITS for name in inner):
        raise UsageError(
            f"{folder}: holds {', '.join(inner)}, which are parts of a data set and no classes; name one of them, "
            f"for example {folder / next((name for name in inner if name.lower().startswith('train')), inner[0])}"
        )
    if len(inner) == 1 and len(deep) == len(files):
        raise UsageError(
            f"{folder}: all is in one folder of it, {inner[0]}, which holds folders itself; name "
            f"that: {folder / inner[0]}"
        )


def _no_images(files: Sequence[File]) -> str:
    archives = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
    packed = next((name for name, _ in files if name.lower().endswith(archives)), None)
    if packed is not None:
        return f"{packed} is packed: unpack it"
    return "there are none with images in them"
