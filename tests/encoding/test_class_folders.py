"""Class folders: which label a class has, and what is no class."""

from pathlib import Path

import pytest

from litconvert.data.dataset import open_latents
from litconvert.encoding.class_folders import in_class_order
from litconvert.encoding.image_sources import ImageSource, open_images
from litconvert.errors import UsageError
from litconvert.recipe.schema import ClassOrder, Encode
from tests.helpers.command import command
from tests.helpers.images import encoded, png


def folders(place: Path, *names: str) -> Path:
    """A folder of classes, each with one image that its own name stands in."""
    for name in names:
        (place / name).mkdir(parents=True)
        (place / name / "1.png").write_bytes(png((len(name), 0, 0), (8, 8)))
    return place


def labels(source: ImageSource) -> dict[str, int | str]:
    """The label of each class, told by the name of the folder that an image is in."""
    samples = [sample for part in range(source.parts) for sample in source.read(part)]
    return {Path(sample.name).parent.name: sample.condition for sample in samples}


@pytest.mark.parametrize(
    ("names", "by_name", "by_number"),
    [
        ([str(number) for number in range(12)], "0 1 10 11 2", "0 1 2 3 4"),
        ([f"class_{number}" for number in range(8, 12)], "class_10 class_11 class_8", "class_8 class_9 class_10"),
        (["7", "008", "9", "10"], "008 10 7 9", "7 008 9 10"),
        ([f"imagenet1k_{number}" for number in (9, 10)], "imagenet1k_10 imagenet1k_9", "imagenet1k_9 imagenet1k_10"),
        (["9_nine", "10_ten", "other"], "10_ten 9_nine other", "9_nine 10_ten other"),
    ],
)
def test_numbers_that_sort_two_ways_are_refused_until_one_is_asked_for(
    tmp_path: Path, names: list[str], by_name: str, by_number: str
) -> None:
    place = folders(tmp_path, *names)
    with pytest.raises(UsageError, match="names of the classes hold numbers") as caught:
        open_images(str(place), Encode(), captions=False)
    assert ", ".join(by_name.split()) in str(caught.value)
    assert ", ".join(by_number.split()) in str(caught.value)
    assert "data.encode.class_order=name" in str(caught.value)
    orders: dict[ClassOrder, str] = {"name": by_name, "number": by_number}
    for order, first in orders.items():
        source = open_images(str(place), Encode(class_order=order), captions=False)
        found = labels(source)
        assert sorted(found, key=lambda name: int(found[name]))[: len(first.split())] == first.split()
        assert sorted(found.values()) == list(range(len(names)))


def test_names_with_one_order_need_no_word_about_it() -> None:
    for names in (["b", "a"], ["n01440764", "n01443537"], ["01", "10", "02"], ["3", "1", "2"], ["a9", "a8"], ["cat"]):
        assert in_class_order("photos", names, None) == sorted(names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat", "dog"], "not called by numbers ('cat')"),
        (["0", "1", "10"], "'10' follows '1'"),
        (["1", "01", "2"], "'1' follows '01'"),
    ],
)
def test_numbers_that_do_not_count_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        in_class_order("photos", names, "number")
    assert said in str(caught.value)


def test_the_order_is_recorded_with_the_data(tmp_path: Path, latent_recipe: Path) -> None:
    place = folders(tmp_path / "photos", "9", "10", "11")
    sets = ["data.encode.class_order=number"]
    out = encoded(place, tmp_path / "data", str(latent_recipe), sets)
    facts = command("latents", "show", out, "--json")
    assert '"class_order": "number"' in facts.out
    assert '"9",' in facts.out
    assert open_latents(out).labels == (0, 2)


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    folders(tmp_path / "whole", "train/a", "train/b", "val/a", "val/b")
    with pytest.raises(UsageError, match=r"holds train, val, parts of a data set.*whole/train"):
        open_images(str(tmp_path / "whole"), Encode(), captions=False)
    for name, places in {
        "beside": ["train/a", "train/b", "val/a", "notes"],
        "years": ["train2017/a", "val2017/a"],
        "alone": ["train/a", "train/b", "cat"],
    }.items():
        folders(tmp_path / name, *places)
        with pytest.raises(UsageError, match="parts of a data set"):
            open_images(str(tmp_path / name), Encode(), captions=False)
    folders(tmp_path / "outer", "Photos/a", "Photos/b")
    with pytest.raises(UsageError, match=r"all is in one folder of it, Photos, .*outer/Photos"):
        open_images(str(tmp_path / "outer"), Encode(), captions=False)
    folders(tmp_path / "classes", "train", "aeroplane")
    assert labels(open_images(str(tmp_path / "classes"), Encode(), captions=False)) == {"aeroplane": 0, "train": 1}


def test_what_is_no_image_is_left_out_and_said(tmp_path: Path) -> None:
    place = folders(tmp_path, "a", "b")
    assert open_images(str(place), Encode(), captions=False).remarks == []
    (place / "README.txt").write_text("mine")
    (place / "a" / "drawing.eps").write_text("%!PS")
    source = open_images(str(place), Encode(), captions=False)
    assert source.remarks == ["2 files are left out, README.txt the first of them: no images"]
    assert labels(source) == {"a": 0, "b": 1}


def test_packed_images_are_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"images\.zip is packed: unpack it"):
        open_images(str(tmp_path), Encode(), captions=False)


def test_names_that_are_not_utf8_are_read_or_refused_in_a_sentence(tmp_path: Path, latent_recipe: Path) -> None:
    place = folders(tmp_path / "photos", "a", "b\udcff", "c\n")
    (place / "a" / "broken\udcfe.png").write_bytes(b"no image")
    arguments = ("latents", "encode", place, tmp_path / "data", "-r", latent_recipe)
    outcome = command(*arguments)
    assert outcome.code == 1
    assert "not a whole image" in outcome.err
    assert command(*arguments, "--skip-broken").code == 0
    for json in ([], ["--json"]):
        assert command("latents", "show", tmp_path / "data", *json).code == 0
