"""Tables of images, as any program writes them."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from litconvert.data.dataset import open_latents, read_record
from litconvert.encoding.image_sources import open_images
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode
from tests.helpers.images import encoded, png

IMAGES = [png((50 * index, 0, 0)) for index in range(3)]
BYTES = pyarrow.struct([("bytes", pyarrow.binary())])
BOTH = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.string())])


def write(folder: Path, kind: Any, values: list[Any], labels: list[Any] | None = None) -> Path:
    folder.mkdir()
    columns = {"image": pyarrow.array(values, kind), "label": pyarrow.array(labels or [2, 0, 1])}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "0.parquet")
    return folder


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pyarrow.binary(), IMAGES),
        (pyarrow.large_binary(), IMAGES),
        (BYTES, [{"bytes": one} for one in IMAGES]),
        (BOTH, [{"bytes": one, "path": None} for one in IMAGES]),
    ],
    ids=["binary", "large binary", "struct of bytes", "struct of large bytes and path"],
)
def test_bytes_of_images_are_read_however_they_are_stored(tmp_path: Path, kind: Any, values: list[Any]) -> None:
    source = open_images(str(write(tmp_path / "table", kind, values)), Encode(), captions=False)
    found = list(source.read(0))
    assert [sample.data for sample in found] == IMAGES
    assert [sample.condition for sample in found] == [2, 0, 1]


def test_a_path_in_a_table_is_beside_it(tmp_path: Path, latent_recipe: Path) -> None:
    values = [{"bytes": None, "path": "pictures/x.png"}, *({"bytes": one, "path": None} for one in IMAGES[1:])]
    table = write(tmp_path / "table", BOTH, values)
    (table / "pictures").mkdir()
    (table / "pictures" / "x.png").write_bytes(IMAGES[0])
    assert len(open_latents(encoded(table, tmp_path / "data", str(latent_recipe)))) == 3


@pytest.mark.parametrize(("image", "label"), [(b"no image", 0), (None, 0), (IMAGES[1], None), (IMAGES[1], -1)])
def test_one_bad_row_is_named_or_left_out(
    tmp_path: Path, latent_recipe: Path, image: bytes | None, label: int | None
) -> None:
    table = write(tmp_path / "table", pyarrow.binary(), [IMAGES[0], image, IMAGES[2]], [1, label, 3])
    with pytest.raises(LitconvertError, match=r"table, file 0, row 1: (not a whole image|has no class)"):
        encoded(table, tmp_path / "data", str(latent_recipe))
    data = open_latents(encoded(table, tmp_path / "data", str(latent_recipe), skip_broken=True))
    assert (len(data), data.labels) == (2, (1, 3))
    assert read_record(tmp_path / "data")["skipped"] == 1


def test_a_column_of_numbers_holds_no_images(tmp_path: Path) -> None:
    table = write(tmp_path / "table", pyarrow.list_(pyarrow.uint8()), [[1, 2], [3], [4]])
    with pytest.raises(UsageError, match="no column of images 'image'; its columns are image, label"):
        open_images(str(table), Encode(), captions=False)


def test_class_names_that_are_numbers_sorted_as_text_are_ambiguous(tmp_path: Path) -> None:
    def saved(names: list[str]) -> str:
        place = tmp_path / "-".join(names)
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
        rows = {"image": [{"bytes": one, "path": None} for one in IMAGES], "label": [0, 1, 2]}
        Dataset.from_dict(rows, features=features).save_to_disk(str(place))
        return str(place)

    def found(place: str, **settings: Any) -> list[int | str]:
        return [sample.condition for sample in open_images(place, Encode(**settings), captions=False).read(0)]

    text = saved(["10", "8", "9"])  # as `datasets` finds folders
    with pytest.raises(UsageError, match=r"data\.encode\.class_order"):
        found(text)
    assert found(text, class_order="name") == [0, 1, 2]
    assert found(text, class_order="number") == [2, 0, 1]
    assert found(saved(["8", "9", "10"])) == [0, 1, 2]  # somebody chose it
    assert found(saved(["dog", "cat", "ant"])) == [0, 1, 2]


def test_every_table_of_the_split_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    def table(name: str, label: int) -> None:
        column = pyarrow.array([label])
        pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(IMAGES[:1]), "label": column}), name)

    def found(folder: Path, **settings: Any) -> tuple[list[int | str], list[str]]:
        source = open_images(str(folder), Encode(**settings), captions=False)
        labels = [sample.condition for part in range(source.parts) for sample in source.read(part)]
        return labels, source.remarks

    (tmp_path / "plain").mkdir()
    for label, name in enumerate(("a.parquet", "b[1].PARQUET", "c.parquet")):
        table(str(tmp_path / "plain" / name), label)
    (tmp_path / "plain" / "notes.json").write_text("{}")
    (tmp_path / "plain" / "more.json").write_text("[]")
    assert found(tmp_path / "plain") == ([0, 1, 2], [])
    (tmp_path / "splits").mkdir()
    for label, name in enumerate(("train-0.parquet", "test-0.parquet", "extra.parquet")):
        table(str(tmp_path / "splits" / name), label)
    assert found(tmp_path / "splits") == (
        [0],
        ["2 files are left out, extra.parquet the first of them: not of the split train"],
    )
    assert found(tmp_path / "splits", split="test")[0] == [1]
    with pytest.raises(UsageError, match=r"no tables of the split 'dev': set data\.encode\.split=test"):
        found(tmp_path / "splits", split="dev")


def test_data_made_inside_the_tables_leave_them_as_they_were(tmp_path: Path, latent_recipe: Path) -> None:
    table = write(tmp_path / "table", pyarrow.binary(), IMAGES)
    first = open_latents(encoded(table, table / "out", str(latent_recipe)))
    assert open_latents(encoded(table, table / "out", str(latent_recipe))).digest == first.digest
    assert len(open_latents(encoded(table, tmp_path / "other", str(latent_recipe)))) == 3


def test_labels_are_numbers_however_a_table_writes_them(tmp_path: Path) -> None:
    for name, labels in (("text", ["2", " 0", "-1"]), ("floats", [2.0, 0.0, float("nan")])):
        source = open_images(str(write(tmp_path / name, pyarrow.binary(), IMAGES, labels)), Encode(), captions=False)
        assert [sample.condition for sample in source.read(0)] == [2, 0, -1]
    table = write(tmp_path / "wrong", pyarrow.binary(), IMAGES, ["2", "1_0", "1.5"])
    faults = [sample.fault for sample in open_images(str(table), Encode(), captions=False).read(0)]
    assert faults == [
        None,
        "its label is '1_0', which is no whole number",
        "its label is '1.5', which is no whole number",
    ]


def test_tables_of_unlike_columns_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "table", pyarrow.binary(), IMAGES)
    other = pyarrow.table({"image": pyarrow.array([{"bytes": IMAGES[0]}], BYTES), "label": pyarrow.array([1])})
    pyarrow.parquet.write_table(other, table / "1.parquet")

    def read() -> None:
        source = open_images(str(table), Encode(), captions=False)
        for part in range(source.parts):
            list(source.read(part))

    with pytest.raises(LitconvertError, match=r"table: (part|`datasets`)"):
        read()
