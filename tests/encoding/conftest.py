"""Images in class folders and in shards, and recipes for them."""

from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.images import CAPTIONS, COLOURS, png, write_tar


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in three class folders, of several sizes and modes."""
    folder = tmp_path / "photos"
    sizes = [("green", "1.png", (20, 30)), ("green", "2.jpg", (64, 40)), ("blue", "1.png", (9, 9))]
    for name, file, size in [*sizes, ("red", "deep/1.png", (33, 16)), ("red", "2.png", (8, 8))]:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, COLOURS[name]).save(path)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "thumb.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three webdataset shards of images, captions and classes."""
    for part, some in enumerate(([0, 1], [2, 3], [4])):
        samples = [
            (
                f"{index:04d}",
                {"png": png((50 * index, 0, 0)), "txt": CAPTIONS[index].encode(), "cls": b"%d" % (index % 4)},
            )
            for index in some
        ]
        write_tar(tmp_path / "shards" / f"{part:05d}.tar", samples)
    return tmp_path / "shards"
