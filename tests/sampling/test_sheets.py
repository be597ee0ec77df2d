"""Sheets of samples: the pixels are the samples', every part and picture is labelled, the ending is the format."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from litconvert.errors import UsageError
from litconvert.sampling.sheets import GAP, Part, save_sheet


def flat(count: int, side: int, channels: int) -> NDArray[np.uint8]:
    """Images of one grey each, none of them white."""
    greys = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1) * 40 + 10
    return greys.repeat(side, 1).repeat(side, 2).repeat(channels, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_pixel_and_a_title_above_each_part(tmp_path: Path, channels: int) -> None:
    images = flat(5, 32, channels)
    path = tmp_path / "new" / "sheet.png"
    save_sheet(path, [Part("Teacher", images), Part("Student", images[::-1])], columns=3, scale=2)
    picture = np.asarray(Image.open(path))
    assert picture.ndim == (2 if channels == 1 else 3)
    grey = picture if channels == 1 else picture[..., 0]
    half = len(grey) // 2
    assert grey.shape[1] == 3 * (64 + GAP) + GAP
    for part, order in ((grey[:half], range(5)), (grey[half:], reversed(range(5)))):
        head = half - 2 * (64 + GAP) - GAP
        assert (part[:head] < 100).any(), "no title"
        for index, value in enumerate(order):
            top, left = head + index // 3 * (64 + GAP), GAP + index % 3 * (64 + GAP)
            assert (part[top : top + 64, left : left + 64] == value * 40 + 10).all()


def test_each_picture_has_its_label_below_and_a_long_one_is_cut(tmp_path: Path) -> None:
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    plain, labelled, long = (tmp_path / f"{name}.png" for name in ("plain", "labelled", "long"))
    save_sheet(plain, [Part("x", images)])
    save_sheet(labelled, [Part("x", images, ["7", ""])])
    save_sheet(long, [Part("x", images, ["a red fox in fresh snow, morning light, and so on and on", "b" * 100])])
    pixels = [np.asarray(Image.open(path).convert("L")) for path in (plain, labelled, long)]
    heights = [len(one) for one in pixels]
    assert heights[0] < heights[1] < heights[2] <= heights[0] + 3 * (heights[1] - heights[0])
    below = pixels[1][heights[0] - GAP :]
    assert (below[:, : 64 + GAP] < 100).any(), "the first has a label"
    assert not (below[:, 64 + 2 * GAP :] < 100).any(), "the second has none"
    cut = pixels[2][heights[0] - GAP :]
    assert (cut[:, 64 + GAP : 64 + 2 * GAP] == 255).all(), "a label stays below its picture"


@pytest.mark.parametrize(
    ("name", "form"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_ending_decides_the_format(tmp_path: Path, name: str, form: str) -> None:
    save_sheet(tmp_path / name, [Part("x", flat(2, 16, 3))])
    with Image.open(tmp_path / name) as picture:
        assert picture.format == form
    with pytest.raises(UsageError, match="give it one of these endings"):
        save_sheet(tmp_path / "a.gif", [Part("x", flat(2, 16, 3))])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
