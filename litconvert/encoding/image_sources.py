"""What a folder or a name of images is: class folders, webdataset shards, tables, a list of files, or a Hub data set.

A part of a source is what one process reads alone, and what an interrupted run loses at most.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from litconvert.data.dataset import DATA_RECORD
from litconvert.encoding.archives import Archives
from litconvert.encoding.class_folders import ClassFolders, File, left_out, refuse_splits
from litconvert.encoding.images import ImageSample, is_image_name
from litconvert.encoding.lists import LISTS, ListedImages, columns_of, is_list
from litconvert.encoding.streams import from_disk, from_files, from_hub
from litconvert.errors import UsageError
from litconvert.recipe.schema import Encode

TABLES = (".parquet", ".arrow")


class ImageSource(Protocol):
    """Images in parts.

    Attributes:
        parts: how many.
        listing: plain data that changes when the images do, without reading them.
        classes: their names in the order of the labels, where they are known.
        remarks: what a user should know of what is read and what is not.
    """

    @property
    def parts(self) -> int: ...

    listing: Any
    classes: Sequence[str] | None
    remarks: Sequence[str]

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        ...


def open_images(images: str, settings: Encode, *, captions: bool, out: Path | None = None) -> ImageSource:
    """Find out what `images` is.

    Args:
        images: a folder of class folders, of webdataset shards (*.tar), of parquet files or of images with a
            metadata.jsonl; a folder that `datasets` saved; or a Hub data set, `owner/name` or `owner/name@revision`,
            which is streamed.
        captions: captions are needed, not classes.
        out: the data set that is made of them, which may be in the folder, and is none of them.

    Raises UsageError for a folder of none of these, and of several of them.
    """
    folder = Path(images)
    if not folder.exists():
        if images.count("/") != 1 or images.startswith((".", "/", "~")):
            raise UsageError(f"{images}: no such folder; name one of images, or a Hub data set (owner/name)")
        return from_hub(images, settings, captions)
    if not folder.is_dir():
        raise UsageError(f"{images}: not a folder; name the folder that the images or shards are in")
    found = _found(folder, out)
    if {"state.json", "dataset_dict.json"} & {name for name, _ in found.files}:
        return from_disk(folder, settings, found.files, captions)
    packed = found.archives or found.tables
    if packed and found.archives and found.tables:
        raise UsageError(
            f"{images}: holds tar files ({found.archives[0][0]}) and tables ({found.tables[0][0]}), of which one kind "
            "is read at a time; name the folder of one"
        )
    if packed and not captions and found.classes > 1:
        if found.loose or found.without_images:
            raise UsageError(
                f"{images}: holds {packed[0][0]} and folders of images, and it is not clear which is the data; move "
                "one of them elsewhere, or name the folder of the other"
            )
        return _remarking(_classes(folder, found, settings), left_out([name for name, _ in packed], "packed images"))
    if found.archives:
        refuse_splits(folder, found.archives) if all("/" in name for name, _ in found.archives) else None
        return Archives(folder, found.archives, settings, captions=captions)
    if found.tables:
        return from_files(folder, settings, found.files, captions)
    return _listed_or_classes(folder, found, settings, captions)


def _listed_or_classes(folder: Path, found: "_Found", settings: Encode, captions: bool) -> ImageSource:
    """Images that a list goes with, or class folders."""
    lists = [name for name, _ in found.lists if is_list(folder / name)]
    wanted = settings.caption_column if captions else settings.label_column
    if lists and (captions or not found.classes or any(wanted in columns_of(folder / name) for name in lists)):
        return ListedImages(folder, lists, found.files, settings, captions=captions)
    if captions:
        raise UsageError(
            f"{folder}: class folders hold no captions, which the model reads: add a metadata.jsonl with file_name and "
            f"{settings.caption_column}, or give webdataset shards (*.tar) of images and texts"
        )
    return _classes(folder, found, settings)


def _classes(folder: Path, found: "_Found", settings: Encode) -> ClassFolders:
    return ClassFolders(folder, found.files, found.folders, settings)


def _remarking(source: ClassFolders, remark: str) -> ClassFolders:
    source.remarks = [*source.remarks, remark]
    return source


@dataclass(frozen=True)
class _Found:
    """What is in a folder.

    Attributes:
        files: all of them.
        folders: the names of those right in it.
    """

    files: Sequence[File]
    folders: Sequence[str]

    @property
    def archives(self) -> list[File]:
        return [entry for entry in self.files if entry[0].lower().endswith(".tar")]

    @property
    def lists(self) -> list[File]:
        return [entry for entry in self.files if os.path.basename(entry[0]) in LISTS]

    @property
    def tables(self) -> list[File]:
        lists = self.lists
        return [entry for entry in self.files if entry[0].lower().endswith(TABLES) and entry not in lists]

    @property
    def loose(self) -> bool:
        """Images are right in it."""
        return any("/" not in name and is_image_name(name) for name, _ in self.files)

    @property
    def classes(self) -> int:
        """How many folders hold images."""
        return len({name.partition("/")[0] for name, _ in self.files if "/" in name and is_image_name(name)})

    @property
    def without_images(self) -> bool:
        """A folder holds none."""
        return self.classes < len(self.folders)


def _found(folder: Path, out: Path | None) -> _Found:
    """Every file in a folder and those in it, sorted; hidden ones, and data sets that were made of images, left out."""
    files, inner, made = list[File](), list[str](), None if out is None else out.resolve()
    ancestors: dict[str, tuple[tuple[int, int], ...]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        _refuse_circle(place, ancestors)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not os.path.lexists(os.path.join(place, name, DATA_RECORD))
            and (made is None or Path(place, name).resolve() != made)
        ]
        inner = inner or (list(folders) if place == str(folder) else [])
        for name in names:
            if not name.startswith("."):
                path = os.path.join(place, name)
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    reason = error.strerror or error
                    raise UsageError(f"{path}: cannot be read ({reason}); repair or remove it") from error
                files.append((os.path.relpath(path, folder).replace(os.sep, "/"), size))
    if any(name == DATA_RECORD for name, _ in files):
        raise UsageError(f"{folder}: is a data set already, made of images; name the images, or train with it (--data)")
    return _Found(sorted(files), inner)


def _refuse_circle(place: str, ancestors: dict[str, tuple[tuple[int, int], ...]]) -> None:
    """Raise UsageError for a folder that is in itself, by a link. `ancestors` gets its own."""
    status = os.stat(place)
    above = ancestors.get(os.path.dirname(place), ())
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UsageError(f"{place}: a link to a folder that it is in itself; remove it")
    ancestors[place] = (*above, here)
