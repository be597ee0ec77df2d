"""What a folder of images is taken for, whatever lies beside them."""

import json
from pathlib import Path

import pytest

from litconvert.data.dataset import open_latents
from litconvert.encoding.archives import Archives
from litconvert.encoding.class_folders import ClassFolders
from litconvert.encoding.image_sources import open_images
from litconvert.encoding.lists import ListedImages
from litconvert.errors import UsageError
from litconvert.recipe.schema import Encode
from tests.helpers.images import encoded, png, write_tar

SAMPLES = [("0", {"png": png((9, 0, 0)), "cls": b"1", "txt": b"a fox"})]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(png((0, 9, 0)))
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "stray", ["a.tar", "a/inner.tar", "b/metadata.csv", "metadata.jsonl", "b/x.parquet", "state.txt", "b/state.json"]
)
def test_a_stray_file_does_not_change_what_class_folders_are(classes: Path, stray: str) -> None:
    (classes / stray).write_text("id,caption\n1,x\n")
    source = open_images(str(classes), Encode(), captions=False)
    assert isinstance(source, ClassFolders)
    assert source.classes == ["a", "b"]
    assert any(stray in remark for remark in source.remarks)


def test_shards_and_folders_of_images_that_are_no_classes_are_two_things(classes: Path) -> None:
    (classes / "empty").mkdir()
    write_tar(classes / "0.tar", SAMPLES)
    with pytest.raises(UsageError, match=r"0\.tar and folders of images, and it is not clear which is the data"):
        open_images(str(classes), Encode(), captions=False)
    # Captions are in the shards alone.
    assert isinstance(open_images(str(classes), Encode(), captions=True), Archives)


def test_an_image_beside_shards_is_no_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", SAMPLES)
    (tmp_path / "preview.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "example.png").write_bytes(png((0, 0, 0)))
    source = open_images(str(tmp_path), Encode(), captions=False)
    assert isinstance(source, Archives)
    assert [sample.condition for sample in source.read(0)] == [1]


def test_two_kinds_of_packed_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", SAMPLES)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"tar files \(0\.tar\) and tables \(0\.parquet\)"):
        open_images(str(tmp_path), Encode(), captions=False)
    for part in ("train", "val"):
        write_tar(tmp_path / "whole" / f"{part}.tar", SAMPLES)
        (tmp_path / "parts" / part).mkdir(parents=True)
        write_tar(tmp_path / "parts" / part / "0.tar", SAMPLES)
    with pytest.raises(UsageError, match="parts of a data set"):
        open_images(str(tmp_path / "parts"), Encode(), captions=False)


def test_a_list_with_the_column_is_the_data_and_one_without_is_not(classes: Path) -> None:
    rows = [{"file_name": f"{name}/1.png", "caption": name, "kind": 3} for name in ("a", "b")]
    (classes / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert isinstance(open_images(str(classes), Encode(), captions=False), ClassFolders)
    assert isinstance(open_images(str(classes), Encode(), captions=True), ListedImages)
    assert isinstance(open_images(str(classes), Encode(label_column="kind"), captions=False), ListedImages)


def test_data_may_be_made_inside_the_images_and_are_none_of_them(classes: Path, latent_recipe: Path) -> None:
    for out in (classes / "latents", classes / "b" / "deep"):
        first = open_latents(encoded(classes, out, str(latent_recipe)))
        again = open_latents(encoded(classes, out, str(latent_recipe)))
        assert (len(first), first.digest) == (2, again.digest)
    with pytest.raises(UsageError, match="is a data set already"):
        open_images(str(classes / "latents"), Encode(), captions=False)


@pytest.mark.parametrize("out", [".", "a", ".."])
def test_data_may_not_take_the_place_of_the_images(classes: Path, latent_recipe: Path, out: str) -> None:
    place = classes / out
    before = sorted(classes.rglob("*"))
    with pytest.raises(UsageError, match="is the source itself, or holds it"):
        encoded(classes if out != "a" else classes / "a", place, str(latent_recipe), force=True)
    assert sorted(classes.rglob("*")) == before


def test_a_folder_that_is_in_itself_by_a_link_is_refused(classes: Path) -> None:
    (classes / "a" / "again").symlink_to(classes)
    with pytest.raises(UsageError, match="a link to a folder that it is in itself"):
        open_images(str(classes), Encode(), captions=False)
