"""What a folder of images is taken for, whatever lies beside them."""

import json
import tarfile
from pathlib import Path

import pytest

from litconvert.data.dataset import open_latents
from litconvert.encoding.archives import Archives
from litconvert.encoding.class_folders import ClassFolders
from litconvert.encoding.image_sources import open_images
from litconvert.encoding.lists import ListedImages
from litconvert.errors import LitconvertError, UsageError
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


def test_a_list_is_the_data_whatever_is_packed_beside_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "photos" / "orig.tar", SAMPLES)
    (tmp_path / "photos" / "statistics.parquet").write_bytes(b"PAR1")
    (tmp_path / "photos" / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "photos" / "images" / f"{name}.png").write_bytes(png((0, 9, 0)))
    rows = [{"file_name": f"images/{name}.png", "caption": name, "label": 3} for name in ("a", "b")]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for captions in (False, True):
        source = open_images(str(tmp_path / "photos"), Encode(), captions=captions)
        assert isinstance(source, ListedImages)
        assert [one.condition for one in source.read(0)] == (["a", "b"] if captions else [3, 3])
        assert any("orig.tar" in remark for remark in source.remarks)


def test_what_lies_beside_what_is_packed_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.png").write_bytes(png((0, 9, 0)))
    source = open_images(str(tmp_path), Encode(), captions=False)
    assert isinstance(source, Archives)
    assert source.remarks == ["one/x.png is left out: images are those that are packed"]
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "one" / "x.png", "1.png")
        (tmp_path / "cls").write_text("2")
        tar.add(tmp_path / "cls", "1.cls")
    source = open_images(str(tmp_path), Encode(), captions=False)
    assert [one.condition for part in range(source.parts) for one in source.read(part)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"file_name": "a/1.png", "label": 1}]', "holds no rows that can be read"),
        (b'{"image": "a/1.png", "label": 1}', "no column file_name"),
    ],
)
def test_a_list_that_is_none_is_never_passed_over_in_silence(classes: Path, content: bytes, said: str) -> None:
    (classes / "metadata.jsonl").write_bytes(content)
    with pytest.raises(LitconvertError, match=said):
        open_images(str(classes), Encode(), captions=True)
    source = open_images(str(classes), Encode(), captions=False)
    assert isinstance(source, ClassFolders)
    assert any(said in remark for remark in source.remarks)


def test_a_list_in_another_encoding_is_no_reason_to_take_the_folders(classes: Path) -> None:
    (classes / "metadata.jsonl").write_bytes('{"file_name": "a/1.png", "label": 1}'.encode("utf-16"))
    for captions in (False, True):
        with pytest.raises(LitconvertError, match=r"metadata\.jsonl: cannot be read"):
            open_images(str(classes), Encode(), captions=captions)


def test_what_appliances_put_beside_images_is_none_of_them(classes: Path) -> None:
    for name in ("@eaDir", "__MACOSX", ".thumbs"):
        (classes / name).mkdir()
        (classes / name / "1.png").write_bytes(png((0, 9, 0)))
    source = open_images(str(classes), Encode(), captions=False)
    assert source.classes == ["a", "b"]
