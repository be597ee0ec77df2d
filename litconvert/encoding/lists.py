"""Images that a list goes with: a metadata file with a row for each, of its file_name and its class or caption."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from litconvert.encoding.class_folders import SPLITS, File, left_out
from litconvert.encoding.images import ImageSample, is_image_name
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.recipe.schema import Encode

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""As `datasets` calls them."""
FILE_NAME = "file_name"
Row = tuple[int, dict[str, Any] | None]
"""Its number, from 1, and its values; None: it cannot be read."""


class ListedImages:
    """The images of one or several lists, which are small enough to be read whole.

    Args:
        folder: of it all.
        lists: the names of the lists in it.
        files: all files in it.
        captions: captions are needed, not classes.

    Raises UsageError for lists without what is needed.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self, folder: Path, lists: Sequence[str], files: Sequence[File], settings: Encode, *, captions: bool
    ) -> None:
        self.folder, self.captions = folder, captions
        self.column = settings.caption_column if captions else settings.label_column
        lists = _of_split(folder, lists, settings.split)
        rows = [(name, row) for name in lists for row in rows_of(folder / name)]
        columns = {column for _, (_, values) in rows for column in values or ()}
        if self.column not in columns:
            key = "caption_column" if captions else "label_column"
            raise UsageError(
                f"{folder / lists[0]}: has no column {self.column!r} of {'captions' if captions else 'classes'}; its "
                f"columns are {', '.join(sorted(columns))}: set data.encode.{key}"
            )
        self.rows = rows[: settings.num_samples]
        self.shard_size = settings.shard_size
        self.parts = -(-len(self.rows) // self.shard_size)
        # An edited list may be as long as it was.
        digests = [(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in lists]
        self.listing: Any = [*files, *digests]
        listed = {str(_beside(name, values[FILE_NAME])) for name, (_, values) in rows if values and FILE_NAME in values}
        others = [name for name, _ in files if is_image_name(name) and name not in listed]
        self.remarks: Sequence[str] = [left_out(others, f"not in {lists[0]}")] if others else []

    def read(self, part: int) -> Iterator[ImageSample]:
        """The images of a part, always in the same order."""
        for name, (number, values) in self.rows[part * self.shard_size : (part + 1) * self.shard_size]:
            where = f"{self.folder / name}, row {number}"
            nothing: int | str = "" if self.captions else -1
            if values is None or not isinstance(values.get(FILE_NAME), str):
                fault = "cannot be read" if values is None else f"has no {FILE_NAME}"
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
        if isinstance(value, int) and not isinstance(value, bool):
            return value, ""
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            return int(value), ""
        return -1, f"its {self.column} is {str(value)[:40]!r}, which is no whole number"


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a list, each read alone where its form allows. Raises LitconvertError for what cannot be opened."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from ((number, dict(row)) for number, row in enumerate(csv.DictReader(file), 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _row(line)
    except (OSError, ValueError, csv.Error) as error:
        raise LitconvertError(
            f"{path}: cannot be read ({system_cause(error) or str(error).splitlines()[0]}); repair it"
        ) from error


def is_list(path: Path) -> bool:
    """Whether a file of such a name lists images, with their file_name: others are called metadata, too."""
    return FILE_NAME in columns_of(path)


def columns_of(path: Path) -> list[str]:
    """The columns of a list's first row that can be read; none where there is none."""
    try:
        return next((list(values) for _, values in rows_of(path) if values), [])
    except LitconvertError:
        return []


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _beside(name: str, file: str) -> PurePosixPath:
    """The file that a list names, which is beside it or below."""
    return PurePosixPath(name).parent / file


def _of_split(folder: Path, lists: Sequence[str], split: str) -> Sequence[str]:
    """Of lists in folders that are parts of a data set, those of the part that is asked for."""
    parts = {name: name.partition("/")[0] for name in lists if "/" in name}
    if len(parts) < len(lists) or not all(part.lower() in SPLITS for part in parts.values()):
        return lists
    chosen = [name for name, part in parts.items() if part == split]
    if not chosen:
        raise UsageError(
            f"{folder}: has the parts {', '.join(sorted(set(parts.values())))}, and no {split!r}: set data.encode.split"
        )
    return chosen
