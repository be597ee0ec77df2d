"""Images that a list goes with: a metadata file with a row for each, of its file_name and its class or caption."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from litconvert.encoding.class_folders import SPLIT, File, left_out
from litconvert.encoding.images import ImageSample, as_label, is_image_name, no_number
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.recipe.schema import Encode

FILE_NAME = "file_name"
Row = tuple[int, dict[str, Any] | str]
"""Its number, from 1, and its values, or what is wrong with it."""


@dataclass(frozen=True)
class MetadataFile:
    """A file that is called as a list of images is.

    Attributes:
        name: in the folder.
        rows: of it.
    """

    name: str
    rows: Sequence[Row]

    @classmethod
    def read(cls, folder: Path, name: str) -> "MetadataFile":
        """Raises LitconvertError for one that cannot be read."""
        return cls(name, list(rows_of(folder / name)))

    @property
    def columns(self) -> list[str]:
        """Of any row."""
        return sorted({column for _, values in self.rows if isinstance(values, dict) for column in values})

    @property
    def is_list(self) -> bool:
        """Whether it lists images, with their file_name: others are called metadata, too."""
        return FILE_NAME in self.columns

    @property
    def reason(self) -> str:
        """Why it is no list of images."""
        if self.columns:
            return f"it has no column {FILE_NAME}, and so is no list of images (it has {', '.join(self.columns)[:80]})"
        return "it holds no rows that can be read: write a JSON object a line, or a CSV with a header"


class ListedImages:
    """The images of one or several lists, which are small enough to be read whole.

    Args:
        folder: of it all.
        lists: in it.
        files: all files in it.
        captions: captions are needed, not classes.

    Raises UsageError for lists without what is needed.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self, folder: Path, lists: Sequence[MetadataFile], files: Sequence[File], settings: Encode, *, captions: bool
    ) -> None:
        self.folder, self.captions = folder, captions
        self.column = settings.caption_column if captions else settings.label_column
        lists = _of_split(folder, lists, settings.split)
        _refuse_two(folder, lists)
        rows = [(one.name, row) for one in lists for row in one.rows]
        columns = sorted({column for one in lists for column in one.columns})
        if self.column not in columns:
            key = "caption_column" if captions else "label_column"
            raise UsageError(
                f"{folder / lists[0].name}: has no column {self.column!r} of {'captions' if captions else 'classes'}; "
                f"its columns are {', '.join(columns)}: set data.encode.{key}"
            )
        labels = [values[self.column] for _, (_, values) in rows if isinstance(values, dict) and self.column in values]
        if not captions and labels and all(as_label(value) is None for value in labels):
            raise UsageError(
                f"{folder / lists[0].name}: its column {self.column} holds no class that is a number: the first is "
                f"{no_number(labels[0])}; class folders give names their numbers, or set data.encode.label_column"
            )
        self.rows = rows[: settings.num_samples]
        self.shard_size = settings.shard_size
        self.parts = -(-len(self.rows) // self.shard_size)
        # An edited list may be as long as it was.
        digests = [(one.name, hashlib.sha256((folder / one.name).read_bytes()).hexdigest()) for one in lists]
        self.listing: Any = [*files, *digests]
        listed = {
            str(_beside(name, values[FILE_NAME]))
            for name, (_, values) in rows
            if isinstance(values, dict) and isinstance(values.get(FILE_NAME), str)
        }
        others = [name for name, _ in files if is_image_name(name) and name not in listed]
        self.remarks: list[str] = [left_out(others, f"not in {lists[0].name}")] if others else []

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        for name, (number, values) in self.rows[part * self.shard_size : (part + 1) * self.shard_size]:
            where = f"{self.folder / name}, row {number}"
            nothing: int | str = "" if self.captions else -1
            if isinstance(values, str) or not isinstance(values.get(FILE_NAME), str):
                fault = values if isinstance(values, str) else f"has no {FILE_NAME}"
                yield ImageSample(where, b"", nothing, f"the row {fault}")
                continue
            image = _beside(name, values[FILE_NAME])
            condition, fault = self._condition(values.get(self.column))
            yield ImageSample(f"{where} ({image})", self.folder / image, nothing if fault else condition, fault or None)

    def _condition(self, value: Any) -> tuple[int | str, str]:
        """A row's class or caption, and what is wrong with it."""
        if self.captions:
            value = value[0] if isinstance(value, list) and value else value  # several captions of one image: the first
            if value is None or isinstance(value, str):
                return value or "", ""
            return "", f"its {self.column} is no text"
        if value is None or value == "":
            return -1, ""
        label = as_label(value)
        return (label, "") if label is not None else (-1, f"its {self.column} is {no_number(value)}")


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a list, each read alone where its form allows. Raises LitconvertError for what cannot be opened."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from ((number, _cells(row)) for number, row in enumerate(csv.DictReader(file), 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _row(line)
    except (OSError, ValueError, csv.Error) as error:
        raise LitconvertError(
            f"{path}: cannot be read ({system_cause(error) or str(error).splitlines()[0]}); repair it"
        ) from error


def _cells(row: dict[str | Any, Any]) -> dict[str, Any] | str:
    """A row of a CSV file, whose surplus cells are under None."""
    if None in row:
        return "has more cells than the header: put quotes around texts that hold commas"
    return dict(row)


def _row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "cannot be read"
    return row if isinstance(row, dict) else "is no JSON object"


def _beside(name: str, file: str) -> PurePosixPath:
    """The file that a list names, which is beside it or below."""
    return PurePosixPath(name).parent / file


def _of_split(folder: Path, lists: Sequence[MetadataFile], split: str) -> Sequence[MetadataFile]:
    """Of lists in folders that are parts of a data set, those of the part that is asked for."""
    parts = {one.name: one.name.partition("/")[0] for one in lists if "/" in one.name}
    if len(parts) < len(lists) or not all(map(SPLIT.fullmatch, parts.values())):
        return lists
    chosen = [one for one in lists if parts[one.name] == split]
    if not chosen:
        raise UsageError(
            f"{folder}: has the parts {', '.join(sorted(set(parts.values())))}, and no {split!r}: set data.encode.split"
        )
    return chosen


def _refuse_two(folder: Path, lists: Sequence[MetadataFile]) -> None:
    """Raise UsageError for two lists in one folder, which would take its images twice."""
    places: dict[PurePosixPath, str] = {}
    for one in lists:
        place = PurePosixPath(one.name).parent
        if place in places:
            raise UsageError(f"{folder}: {places[place]} and {one.name} list the same folder; remove one of them")
        places[place] = one.name
