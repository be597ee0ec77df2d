"""Images of any format that is meant to be read, and of no other."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from litconvert.encoding.images import (
    FORMATS,
    BrokenSample,
    ImageSample,
    as_label,
    is_image_name,
    pillow_unbounded,
    read_image,
)
from litconvert.errors import LitconvertError
from tests.helpers.images import encoded, png

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
PDF = b"%PDF-1.4\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'


@pytest.mark.parametrize("content", [EPS, PDF, SVG, b"", b"\0" * 100], ids=["eps", "pdf", "svg", "empty", "zeros"])
def test_what_is_no_raster_image_is_refused_and_starts_nothing(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    with pytest.raises(BrokenSample, match=r"x\.jpg: not a whole image \(it is of none of the formats"):
        read_image(ImageSample("x.jpg", content, 0), "RGB", [(8, 8)])


@pytest.mark.parametrize("name", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
def test_every_named_format_is_read(name: str) -> None:
    assert name in FORMATS
    file = BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(file, name)
    read = read_image(ImageSample("x", file.getvalue(), 0), "RGB", [(8, 8)])
    assert np.abs(read[:, 4, 4].astype(int) - [200, 0, 0]).max() <= 2


def test_names_of_images_are_those_of_these_formats() -> None:
    assert all(map(is_image_name, ["a.png", "b/c.JPEG", "d.webp", "e.tif"]))
    assert not any(map(is_image_name, ["a.eps", "b.pdf", "c.txt", "png", "d.h5"]))


def test_a_very_large_image_is_read_up_to_the_limit_that_is_set(
    tmp_path: Path, latent_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as if the image had 200 million
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(png((9, 0, 0), (80, 80)))
    encoded(tmp_path / "photos", tmp_path / "data", str(latent_recipe))
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(LitconvertError, match=r"80 x 80 pixels, more than data\.encode\.max_pixels=6399"):
        encoded(tmp_path / "photos", tmp_path / "other", str(latent_recipe), ["data.encode.max_pixels=6399"])
    encoded(tmp_path / "photos", tmp_path / "other", str(latent_recipe), ["data.encode.max_pixels=6400"])
    with pillow_unbounded(), pytest.raises(BrokenSample, match="max_pixels=10"):
        read_image(ImageSample("x", png((9, 0, 0), (4, 4)), 0), "RGB", [(8, 8)], 10)


def test_an_image_that_is_a_line_is_named_before_it_takes_the_memory() -> None:
    line = png((9, 0, 0), (60_000, 1))
    with pytest.raises(BrokenSample, match=r"is 60,000 x 1 pixels, too thin to cover 512 x 512"):
        read_image(ImageSample("x", line, 0), "RGB", [(512, 512)], 178_956_970)
    assert read_image(ImageSample("x", png((9, 0, 0), (600, 10)), 0), "RGB", [(16, 16)], 20_000).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), ("3", 3), (" -1\n", -1), (2.0, 2), (True, None), ("1_0", None), ("--5", None), (1.5, None), ("", None)],
)
def test_a_label_is_a_whole_number_as_any_reader_finds_it(value: object, label: int | None) -> None:
    assert as_label(value) == label
