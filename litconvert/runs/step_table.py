"""A CSV file of what happened at which step, written while a run goes on."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from litconvert.common.files import whole_file
from litconvert.errors import LitconvertError, system_cause


class StepTable:
    """Rows in the order of their steps; the first column is `step`.

    Appending neither reads nor rewrites, so that it costs the same at step one and at step a million. What a killed
    process leaves behind is at most one half-written line at the end, which `rows` skips and `replace` removes.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)

    def rows(self) -> Iterator[dict[str, str]]:
        """Every complete row, one at a time."""
        for columns, cells in self._records():
            yield dict(zip(columns, cells, strict=True))

    def _records(self) -> Iterator[tuple[list[str], list[str]]]:
        """The file's columns, and the cells of a complete row; plain lists, since a long run has a million of them."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", errors="replace") as file:
            # A line without its end was cut short, even where what is left of it happens to have all columns.
            reader = csv.reader(line for line in file if line.endswith("\n"))
            columns = next(reader, [])
            for cells in reader:
                if columns[:1] == ["step"] and len(cells) == len(columns) and cells[0].isdigit():
                    yield columns, cells

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Floats are kept to 8 digits; None, and columns that are not given, are left empty.

        Raises ValueError for a column that the table has not.
        """
        try:
            with self.path.open("a", newline="") as file:
                self._write(file, [row], header=file.tell() == 0)
        except OSError as error:
            raise LitconvertError(f"cannot write {self.path}: {system_cause(error) or error}") from error

    def replace(self, first: int, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Forget every row from step `first` on and add these. The file is replaced whole, and has a header then."""
        with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
            self._write(file, (), header=True)
            # A column that this version has not is dropped, one that an older version had not is left empty.
            csv.writer(file, lineterminator="\n").writerows(
                cells if tuple(columns) == self.columns else self._as_now(columns, cells)
                for columns, cells in self._records()
                if int(cells[0]) < first
            )
            self._write(file, rows, header=False)

    def _as_now(self, columns: list[str], cells: list[str]) -> list[str]:
        row = dict(zip(columns, cells, strict=True))
        return [row.get(column, "") for column in self.columns]

    def _write(self, file: TextIO, rows: Iterable[Mapping[str, Any]], *, header: bool) -> None:
        writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(
            {key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
