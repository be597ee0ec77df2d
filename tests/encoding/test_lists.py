"""Images that a list goes with, row by row."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from litconvert.data.dataset import open_latents, read_record
from litconvert.encoding.image_sources import open_images
from litconvert.encoding.lists import ListedImages
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode
from tests.helpers.images import encoded, png

ROWS: list[dict[str, Any]] = [
    {"file_name": "0.png", "caption": "a fox", "label": 2},
    {"file_name": "deep/1.png", "caption": "a \N{SNOWMAN}, two", "label": 0},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, one of them in a folder."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("0.png", "deep/1.png", "2.png")):
        (folder / name).write_bytes(png((40 * index, 0, 0)))
    return folder


def opened(folder: Path, *, captions: bool = True, **settings: Any) -> ListedImages:
    source = open_images(str(folder), Encode(**settings), captions=captions)
    assert isinstance(source, ListedImages)
    return source


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"metadata.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "csv":
        lines = [",".join(rows[0]), *(f'{row["file_name"]},"{row["caption"]}",{row["label"]}' for row in rows)]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_every_form_of_list_is_read(images: Path, form: str) -> None:
    write(images, form, ROWS)
    source = opened(images)
    assert [sample.condition for sample in source.read(0)] == [row["caption"] for row in ROWS]
    assert [sample.data for sample in source.read(0)] == [images / row["file_name"] for row in ROWS]
    assert [sample.condition for sample in opened(images, captions=False).read(0)] == [2, 0]
    assert source.remarks == [f"2.png is left out: not in metadata.{form}"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"file_name": "2.png", ', "the row cannot be read"),
        ('{"label": 1}', "the row has no file_name"),
        ('{"file_name": "2.png", "label": "cat"}', "its label is 'cat', which is no whole number"),
        ('{"file_name": "2.png", "label": null}', "has no class"),
        ('{"file_name": "9.png", "label": 1}', "not a whole image"),
    ],
)
def test_one_bad_row_is_named_or_left_out(
    tmp_path: Path, images: Path, latent_recipe: Path, row: str, said: str
) -> None:
    text = "\n".join([json.dumps(ROWS[0]), row, json.dumps(ROWS[1])])
    (images / "metadata.jsonl").write_text(text)
    with pytest.raises(LitconvertError, match=r"metadata\.jsonl, row 2") as caught:
        encoded(images, tmp_path / "data", str(latent_recipe))
    assert said in str(caught.value)
    data = open_latents(encoded(images, tmp_path / "data", str(latent_recipe), skip_broken=True))
    assert (len(data), data.labels) == (2, (0, 2))
    assert read_record(tmp_path / "data")["skipped"] == 1


def test_of_lists_in_parts_of_a_data_set_one_is_read(images: Path) -> None:
    for part, label in (("train", 1), ("test", 3)):
        (images / part).mkdir()
        (images / part / "x.png").write_bytes(png((0, 0, 0)))
        (images / part / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "label": label}))
    assert [sample.condition for sample in opened(images, captions=False).read(0)] == [1]
    assert [sample.data for sample in opened(images, captions=False, split="test").read(0)] == [images / "test/x.png"]
    with pytest.raises(UsageError, match="has the parts test, train, and no 'dev'"):
        opened(images, captions=False, split="dev")


def test_a_list_without_the_column_says_which_it_has(images: Path) -> None:
    write(images, "jsonl", ROWS)
    with pytest.raises(UsageError, match=r"no column 'text' of captions; its columns are caption, file_name, label"):
        opened(images, caption_column="text")


def test_a_comma_in_a_text_without_quotes_is_a_bad_row(tmp_path: Path, images: Path, text_recipe: Path) -> None:
    (images / "metadata.csv").write_text("file_name,caption\n0.png,a red fox, in the snow\n2.png,a cat\n")
    first, second = opened(images).read(0)
    assert first.fault == "the row has more cells than the header: put quotes around texts that hold commas"
    assert second.condition == "a cat"
    with pytest.raises(UsageError, match="no column 'text' of captions"):
        opened(images, caption_column="text")


def test_two_lists_of_one_folder_are_refused(images: Path) -> None:
    write(images, "jsonl", ROWS)
    write(images, "csv", ROWS)
    with pytest.raises(UsageError, match=r"metadata\.csv and metadata\.jsonl list the same folder"):
        opened(images)


def test_a_column_that_a_later_row_has_counts(images: Path) -> None:
    rows = [{"file_name": "2.png"}, *ROWS]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [sample.condition for sample in opened(images, captions=False).read(0)] == [-1, 2, 0]


def test_names_of_classes_are_no_labels(tmp_path: Path, images: Path, latent_recipe: Path) -> None:
    rows = [{"file_name": "0.png", "label": "cat"}, {"file_name": "2.png", "label": "--5"}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=r"holds no class that is a number: the first is 'cat'"):
        opened(images, captions=False)
    (images / "metadata.jsonl").write_text('{"file_name": "9.png", "label": 1}')
    with pytest.raises(UsageError, match=r"all 1 images were left out as broken, .*row 1"):
        encoded(images, tmp_path / "data", str(latent_recipe), skip_broken=True)
