"""Webdataset shards: whole and sorted, or refused; one bad sample is one bad sample."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from litconvert.data.dataset import open_latents, read_record
from litconvert.encoding.archives import Archives
from litconvert.encoding.image_sources import open_images
from litconvert.encoding.images import ImageSample
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Encode
from tests.helpers.images import encoded, png, write_tar

CLASSES = [(f"{index:04d}", {"png": png((40 * index, 0, 0)), "cls": b"%d" % index}) for index in range(4)]


def read(folder: Path, *, captions: bool = False, settings: Encode | None = None) -> list[ImageSample]:
    source = open_images(str(folder), settings or Encode(), captions=captions)
    assert isinstance(source, Archives)
    return [sample for part in range(source.parts) for sample in source.read(part)]


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def write_members(path: Path, names: list[str], content: bytes = b"1") -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_a_whole_archive_is_read_in_its_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", CLASSES)
    found = read(tmp_path / "shards")
    assert [sample.condition for sample in found] == [0, 1, 2, 3]
    assert [sample.data for sample in found] == [fields["png"] for _, fields in CLASSES]
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "0.tar").write_bytes(gzip.compress((tmp_path / "shards" / "0.tar").read_bytes()))
    assert [sample.data for sample in read(packed)] == [sample.data for sample in found]


@pytest.mark.parametrize("where", ["at a member", "in a header", "in a file", "in the end mark", "empty"])
def test_an_archive_that_ends_too_early_is_refused(tmp_path: Path, where: str) -> None:
    path = tmp_path / "shards" / "0.tar"
    write_tar(path, CLASSES)
    third = members(path)[4]
    ends = {
        "at a member": third.offset,
        "in a header": third.offset + 300,
        "in a file": third.offset_data + 20,
        "in the end mark": members(path)[-1].offset_data + 512 + 100,
        "empty": 0,
    }
    path.write_bytes(path.read_bytes()[: ends[where]])
    with pytest.raises(LitconvertError, match=r"0\.tar: not a whole tar file"):
        read(tmp_path / "shards")


def test_the_second_archive_is_looked_at_too_and_nothing_is_left(tmp_path: Path, latent_recipe: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", CLASSES[:2])
    second = tmp_path / "shards" / "1.tar"
    write_tar(second, CLASSES[2:])
    whole = second.read_bytes()
    second.write_bytes(whole[: members(second)[2].offset])
    with pytest.raises(LitconvertError, match=r"1\.tar: not a whole tar file"):
        encoded(tmp_path / "shards", tmp_path / "data", str(latent_recipe))
    assert not (tmp_path / "data").exists()
    second.write_bytes(whole)
    data = open_latents(encoded(tmp_path / "shards", tmp_path / "data", str(latent_recipe)))
    assert (len(data), data.labels) == (4, (0, 3))


def test_archives_that_were_put_together_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "a.tar", tmp_path / "b.tar"
    write_tar(one, CLASSES[:2])
    write_tar(other, CLASSES[2:])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(UsageError, match="goes on behind its end"):
        read(tmp_path / "shards")


@pytest.mark.parametrize(
    "names",
    [
        ["0.cls", "1.cls", "0.png", "1.png"],  # all of a kind together
        ["a/0.png", "b/0.png", "a/0.cls", "b/0.cls"],
    ],
)
def test_an_archive_that_is_not_sorted_is_refused(tmp_path: Path, names: list[str]) -> None:
    write_members(tmp_path / "shards" / "0.tar", names)
    with pytest.raises(UsageError, match=r"is not sorted: .*--sort=name"):
        read(tmp_path / "shards")


def test_archives_in_an_archive_and_links_are_told(tmp_path: Path) -> None:
    write_members(tmp_path / "imagenet" / "train.tar", ["n01440764.tar", "n01443537.tar"])
    with pytest.raises(UsageError, match=r"holds archives itself \(n01440764\.tar\): unpack it"):
        read(tmp_path / "imagenet")
    write_members(tmp_path / "classes" / "n01440764.tar", ["n01440764_10026.jpg"])
    with pytest.raises(UsageError, match=r"its images have no classes; .*unpack each into a folder of its name"):
        read(tmp_path / "classes")
    path = tmp_path / "links" / "0.tar"
    write_members(path, ["0.png", "0.cls"])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    with pytest.raises(UsageError, match=r"'1\.png' is a link"):
        read(tmp_path / "links")


@pytest.mark.parametrize(
    ("field", "content", "said"),
    [("cls", b"cat", "its cls says 'cat'"), ("cls", b"\xff\xfe", "not text in UTF-8"), ("png", b"no", "not a whole")],
)
def test_one_bad_sample_is_named_or_left_out_and_the_others_are_kept(
    tmp_path: Path, latent_recipe: Path, field: str, content: bytes, said: str
) -> None:
    bad = ("0009", {**CLASSES[0][1], field: content})
    write_tar(tmp_path / "shards" / "0.tar", [CLASSES[1], bad, CLASSES[2]])
    with pytest.raises(LitconvertError, match=r"0\.tar, 0009") as caught:
        encoded(tmp_path / "shards", tmp_path / "data", str(latent_recipe))
    assert said in str(caught.value)
    data = open_latents(encoded(tmp_path / "shards", tmp_path / "data", str(latent_recipe), skip_broken=True))
    assert (len(data), data.labels) == (2, (1, 2))
    assert read_record(tmp_path / "data")["skipped"] == 1


def test_a_number_of_samples_counts_over_archives(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", CLASSES[:2])
    write_tar(tmp_path / "shards" / "1.tar", CLASSES[2:])
    (tmp_path / "shards" / "2.tar").write_bytes(b"")  # is not needed
    found = read(tmp_path / "shards", settings=Encode(num_samples=3))
    assert [sample.condition for sample in found] == [0, 1, 2]


def test_captions_are_texts_of_any_field_that_is_asked_for(tmp_path: Path) -> None:
    samples = [("0", {"jpg": b"", "txt": "ein Fuchs über Schnee".encode(), "json": b"{}"})]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    assert [one.condition for one in read(tmp_path / "shards", captions=True)] == ["ein Fuchs über Schnee"]
    with pytest.raises(UsageError, match="json does not hold texts"):
        read(tmp_path / "shards", captions=True, settings=Encode(caption_column="json"))


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    names = ["README.md", "a/._0001.png", "a/.DS_Store", "__MACOSX/a/0001.png", "a/0001.png", "a/0001.cls"]
    write_members(tmp_path / "shards" / "0.tar", names)
    assert [(one.name.rpartition(", ")[2], one.condition) for one in read(tmp_path / "shards")] == [("a/0001.png", 1)]
