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
from litconvert.encoding.class_folders import METADATA, ClassFolders, File, left_out, refuse_splits
from litconvert.encoding.images import ImageSample, is_dropping, is_image_name
from litconvert.encoding.lists import ListedImages, MetadataFile
from litconvert.encoding.streams import StreamedImages, from_disk, from_hub, from_tables
from litconvert.errors import UsageError
from litconvert.recipe.schema import Encode

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
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
    remarks: list[str]

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
    files = [MetadataFile.read(folder, name) for name, _ in found.lists]
    lists = [one for one in files if one.is_list]
    wanted = settings.caption_column if captions else settings.label_column
    if lists and (captions or not found.is_classes or any(wanted in one.columns for one in lists)):
        listed = ListedImages(folder, lists, found.files, settings, captions=captions)
        listed.remarks += _left_out(found.packed, "images are those of the list")
        return listed
    if found.packed and (captions or not found.is_classes):
        return _packed(folder, found, settings, captions=captions)
    if captions or not found.is_classes:
        _refuse_no_list(folder, files, settings, captions=captions)
    source = ClassFolders(folder, found.files, found.folders, settings)
    for one in files:
        reason = f"it has no column {wanted}, so that classes are those of the folders" if one.is_list else one.reason
        source.remarks.append(f"{one.name} is left out: {reason}")
    return source


def _packed(folder: Path, found: "_Found", settings: Encode, *, captions: bool) -> ImageSource:
    """Images in archives or in tables. Raises UsageError for both, and beside folders of images that may be classes."""
    if found.archives and found.tables:
        raise UsageError(
            f"{folder}: holds tar files ({found.archives[0][0]}) and tables ({found.tables[0][0]}), of which one kind "
            "is read at a time; name the folder of one"
        )
    if not captions and found.classes > 1:
        raise UsageError(
            f"{folder}: holds {found.packed[0][0]} and folders of images, and it is not clear which is the data; move "
            "one of them elsewhere, or name the folder of the other"
        )
    source: Archives | StreamedImages
    if found.archives:
        if all("/" in name for name, _ in found.archives):
            refuse_splits(folder, found.archives)
        source = Archives(folder, found.archives, settings, captions=captions)
    else:
        source = from_tables(folder, settings, found.tables, found.files, captions)
    source.remarks += _left_out(found.images, "images are those that are packed")
    return source


def _refuse_no_list(folder: Path, files: Sequence[MetadataFile], settings: Encode, *, captions: bool) -> None:
    """Raise UsageError for captions that are nowhere, and where a list that is none is all there is."""
    if files:
        raise UsageError(f"{folder / files[0].name}: is not read, since {files[0].reason}")
    if captions:
        raise UsageError(
            f"{folder}: class folders hold no captions, which the model reads: add a metadata.jsonl with file_name and "
            f"{settings.caption_column}, or give webdataset shards (*.tar) of images and texts"
        )


def _left_out(files: Sequence[File], why: str) -> list[str]:
    return [left_out([name for name, _ in files], why)] if files else []


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
        return [entry for entry in self.files if entry[0].lower().endswith(ARCHIVES)]

    @property
    def lists(self) -> list[File]:
        return [entry for entry in self.files if os.path.basename(entry[0]) in METADATA]

    @property
    def tables(self) -> list[File]:
        lists = self.lists
        return [entry for entry in self.files if entry[0].lower().endswith(TABLES) and entry not in lists]

    @property
    def packed(self) -> list[File]:
        return [*self.archives, *self.tables]

    @property
    def images(self) -> list[File]:
        return [entry for entry in self.files if is_image_name(entry[0])]

    @property
    def classes(self) -> int:
        """How many folders hold images."""
        return len({name.partition("/")[0] for name, _ in self.images if "/" in name})

    @property
    def is_classes(self) -> bool:
        """Whether it is class folders and nothing else; where nothing is packed, whatever holds images in folders."""
        if not self.packed:
            return self.classes > 0
        loose = any("/" not in name for name, _ in self.images)
        return self.classes > 1 and not loose and self.classes == len(self.folders)


def _found(folder: Path, out: Path | None) -> _Found:
    """Every file in a folder and those in it, sorted; hidden ones, and data sets that were made of images, left out."""
    files, inner, made = list[File](), list[str](), None if out is None else out.resolve()
    ancestors: dict[str, tuple[tuple[int, int], ...]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        _refuse_circle(place, ancestors)
        folders[:] = [
            name
            for name in folders
            if not is_dropping(name)
            and not os.path.lexists(os.path.join(place, name, DATA_RECORD))
            and (made is None or Path(place, name).resolve() != made)
        ]
        inner = inner or (list(folders) if place == str(folder) else [])
        for name in names:
            if not is_dropping(name):
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


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder and those in it, but hidden ones.

    Raises UsageError for a folder that is in itself by a link, and for a file that cannot be read.
    """
    return [folder / name for name, _ in _found(folder, None).files]
