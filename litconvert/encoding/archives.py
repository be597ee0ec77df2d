"""Webdataset shards: tar files in which the files of a sample have one name and stand beside each other.

Read with tarfile rather than by `datasets`, which takes an archive that was cut short for a whole one, and gives up a
whole archive for one bad label.
"""

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from litconvert.encoding.class_folders import File
from litconvert.encoding.images import ImageSample, as_label, is_dropping, is_image_name, no_number
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode

# Key and field of a member, as webdataset splits names: at the first dot of the last part.
MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
# Fields for images, where data.encode.image_column names none that is there, and for classes and captions, likewise.
IMAGES = ("jpg", "jpeg", "png", "webp")
FIELDS = {"label_column": "cls", "caption_column": "txt"}
NO_TEXTS = ("cls", "cls2", "index", "inx", "id", "json", "jsn")
PACKED = ("tar", "tgz", "gz", "bz2", "xz", "zst", "zip")
# What tarfile raises for a damaged archive, numbers beyond all files among it.
DAMAGE = (OSError, EOFError, OverflowError, ValueError, MemoryError, zlib.error, lzma.LZMAError, tarfile.TarError)
BLOCK = 512
CHUNK = 1 << 20
Sample = dict[str, tarfile.TarInfo]


class Archives:
    """Images in tar files, each of them a part.

    Args:
        folder: that they are in.
        files: the tar files in it.
        captions: captions are needed, not classes.

    Raises UsageError for archives that hold no samples of images and their conditions.
    """

    classes: Sequence[str] | None = None

    def __init__(self, folder: Path, files: Sequence[File], settings: Encode, *, captions: bool) -> None:
        self.folder, self.captions, self.remarks = folder, captions, list[str]()
        self.listing: Any = list(files)
        self.paths = [folder / name for name, _ in files]
        self.limits: list[int | None] = [None] * len(self.paths)
        self.image, self.condition = self._fields(settings)
        if settings.num_samples is not None:
            self._limit(settings.num_samples)

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self.paths)

    def _limit(self, count: int) -> None:
        """Keep the archives that the first so many samples are in."""
        limits: list[int | None] = []
        for path in self.paths:
            with opened(path) as tar:
                here = sum(1 for _, sample in samples(path, tar) if self._is_sample(sample))
            limits.append(min(here, count))
            count -= here
            if count <= 0:
                break
        self.paths, self.limits = self.paths[: len(limits)], limits

    def _fields(self, settings: Encode) -> tuple[str | None, str]:
        """The fields of images (None: any of the usual ones) and of conditions, of the first archive."""
        path = self.paths[0]
        try:
            with opened(path) as tar:
                members = [member.name for member in tar if member.isfile() and not _is_dropping(member)]
        except DAMAGE as error:
            raise _not_whole(path, str(error)) from error
        pairs = [match.groups() for match in map(MEMBER.fullmatch, members) if match]
        fields = sorted({field for _, field in pairs})
        told = f"its files end in {', '.join(fields) or 'nothing'}"
        if packed := next((name for name in members if name.lower().rpartition(".")[2] in PACKED), None):
            raise UsageError(f"{path}: holds archives itself ({packed}): unpack it, and give the folder of those")
        image = settings.image_column if settings.image_column in fields else None
        if image is None and not any(field.lower() in IMAGES for field in fields):
            other = next((field for field in fields if is_image_name(f".{field}")), None)
            raise UsageError(
                f"{path}: holds no images that end in {', '.join(IMAGES)}; {told}: set data.encode.image_column"
                + (f"={other}" if other else "")
            )
        key = "caption_column" if self.captions else "label_column"
        condition = getattr(settings, key)
        condition = condition if condition in fields else FIELDS[key]
        if condition not in fields:
            what = "captions" if self.captions else "classes"
            advice = "" if self.captions else ", or, if each archive is a class, unpack each into a folder of its name"
            raise UsageError(f"{path}: its images have no {what}; {told}: set data.encode.{key}{advice}")
        if self.captions and condition.rpartition(".")[2].lower() in NO_TEXTS:
            raise UsageError(f"{path}: {condition} does not hold texts: set data.encode.caption_column")
        return image, condition

    def read(self, part: int) -> Iterator[ImageSample]:
        """The samples of an archive, in its order. Raises LitconvertError for one that is not whole or not sorted."""
        path, limit = self.paths[part], self.limits[part]
        name = path.relative_to(self.folder)
        with opened(path) as tar:
            whole = ((key, sample) for key, sample in samples(path, tar) if self._is_sample(sample))
            for index, (key, sample) in enumerate(whole):
                if limit is not None and index >= limit:
                    return
                where, images = f"{self.folder}, {name}, {key}", self._images(sample)
                if len(images) > 1:
                    raise UsageError(
                        f"{where}: has {len(images)} images ({', '.join(images)}): set data.encode.image_column to one"
                    )
                data = _bytes_of(tar, sample[images[0]]) if images else b""
                condition, fault = self._condition(tar, sample)
                yield ImageSample(f"{where}.{images[0]}" if images else where, data, condition, fault)

    def _images(self, sample: Sample) -> list[str]:
        """The fields of its images."""
        return [one for one in sample if (one.lower() in IMAGES if self.image is None else one == self.image)]

    def _is_sample(self, sample: Sample) -> bool:
        """Whether it has an image or a condition: a README has neither."""
        return self.condition in sample or bool(self._images(sample))

    def _condition(self, tar: tarfile.TarFile, sample: Sample) -> tuple[int | str, str | None]:
        """A sample's class or caption, and what is wrong with it."""
        if self.condition not in sample:
            return ("" if self.captions else -1), None
        content = _bytes_of(tar, sample[self.condition])
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return ("" if self.captions else -1), f"its {self.condition} is not text in UTF-8"
        if self.captions:
            return text, None
        label = as_label(text)
        return (label, None) if label is not None else (-1, f"its {self.condition} says {no_number(text)}")


def _is_dropping(member: tarfile.TarInfo) -> bool:
    return any(map(is_dropping, (part for part in member.name.split("/") if part not in ("", ".", ".."))))


def opened(path: Path) -> tarfile.TarFile:
    """A tar file. Raises UsageError for what is none."""
    try:
        return tarfile.open(path)
    except DAMAGE as error:
        raise _not_whole(path, str(error)) from error


def samples(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, Sample]]:
    """Key and members by field of each sample of an archive, in its order.

    Raises UsageError for an archive that ends before its end, goes on behind it, holds links, or is not sorted.
    """
    seen, key, sample = set[str](), "", Sample()
    try:
        for member in tar:
            match = None if _is_dropping(member) else MEMBER.fullmatch(member.name)
            if match is None or not (member.isfile() or member.islnk() or member.issym()):
                continue
            if not member.isfile() or member.issparse():
                what = "is stored with holes" if member.isfile() else "is a link to another file"
                raise UsageError(
                    f"{path}: {member.name[:80]!r} {what}; write the archive anew with the files themselves "
                    "(tar --hard-dereference -h, without -S)"
                )
            if match[1] != key:
                if sample:
                    yield key, sample
                key, sample = match[1], {}
                if key in seen:
                    raise UsageError(
                        f"{path}: is not sorted: more files of sample {key[:80]!r} come after those of others; write "
                        "it anew with each sample's files beside each other (tar --sort=name)"
                    )
                seen.add(key)
            if match[2] in sample:
                raise UsageError(f"{path}: holds {member.name[:80]!r} twice; write it anew with each sample once")
            sample[match[2]] = member
        _check_end(path, tar)
    except DAMAGE as error:
        raise _not_whole(path, str(error)) from error
    if sample:
        yield key, sample


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """An archive ends in blocks of zeros, and with them: tarfile stops at whatever is no header, and says nothing."""
    file = cast("BinaryIO", tar.fileobj)
    file.seek(tar.offset)
    first = file.read(BLOCK)
    if len(first) < BLOCK or any(first):
        raise _not_whole(path, "it ends before its end mark")
    while chunk := file.read(CHUNK):
        if any(chunk):
            raise UsageError(
                f"{path}: goes on behind its end, as two archives do that were put together; unpack it, and pack one"
            )


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        return b"" if file is None else file.read()
    except DAMAGE as error:
        raise _not_whole(Path(str(tar.name)), str(error)) from error


def _not_whole(path: Path, reason: str) -> LitconvertError:
    reason = reason.splitlines()[0] if reason else "it is damaged"
    return UsageError(f"{path}: not a whole tar file ({reason}); download it again, or remove it")
