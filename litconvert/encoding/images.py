"""An image to encode: where it is stored, and as a model is trained on it: whole, of the right mode, cropped."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from litconvert.common.hub import hub_errors
from litconvert.errors import LitconvertError

# Pillow reads far more, and starts other programs for some of it (Ghostscript, for EPS under any name).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


class BrokenSample(LitconvertError):
    """An image that cannot be read, or one without its class or caption."""


@dataclass(frozen=True)
class ImageSample:
    """An image as it is stored, and what it is conditioned on.

    Attributes:
        name: for messages.
        data: a file, its content, or an address (owner's file on the Hub, member of a zip) that `content` reads.
        condition: class label or caption; -1 or nothing where there is none.
        fault: what is wrong with it, where that is known.
    """

    name: str
    data: Path | str | bytes
    condition: int | str
    fault: str | None = None


def is_dropping(name: str) -> bool:
    """Whether a file or folder is one that a system or an appliance puts beside those of people."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")


def as_label(value: Any) -> int | None:
    """A class label as tables, lists and shards write it: a whole number, as a number or a text. None: it is none."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}\s*", value, re.ASCII):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def no_number(value: Any) -> str:
    """What is wrong with a value that is no label, as a sentence's part."""
    return f"{str(value)[:40]!r}, which is no whole number"


@cache
def _formats() -> tuple[str, ...]:
    """Of FORMATS those that Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _suffixes() -> frozenset[str]:
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_image_name(name: str) -> bool:
    """Whether a file is called as an image is that can be read."""
    return os.path.splitext(name)[1].lower() in _suffixes()


@contextmanager
def pillow_unbounded() -> Iterator[None]:
    """Let `read_image` alone decide what is too large, not Pillow, whose own limit is one for the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def content(sample: ImageSample) -> Path | bytes:
    """What to decode of a sample, fetched where it is an address.

    Raises LitconvertError, not BrokenSample, for an address that cannot be read: the network may be back later.
    """
    if not isinstance(sample.data, str):
        return sample.data
    from datasets.utils.file_utils import xopen

    try:
        with hub_errors(sample.name), xopen(sample.data, "rb") as file:
            data: bytes = file.read()
    except LitconvertError:
        raise
    except Exception as error:  # file systems raise their own kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LitconvertError(f"{sample.name}: cannot be fetched ({reason}); run the same command again") from error
    return data


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of several heights and widths, that whose aspect ratio is nearest by factor; of equal ones the first."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: round(abs(math.log(one[0] / one[1]) - ratio), 9))


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that the image just covers height and width, and cut out its centre.

    As ADM's `center_crop_arr`, which DiT uses (guided-diffusion, image_datasets.py), for any aspect ratio: halved by
    box filter while it stays large enough, then bicubic.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(resized, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits as one of 8, which Pillow would clip; modes whose white is unknown raise ValueError."""
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} does not say which value is white: save it with 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def _refuse_strip(sample: ImageSample, image: Image.Image, height: int, width: int, max_pixels: int | None) -> None:
    """Raise BrokenSample for an image so thin that it would take gigabytes to be resized until it covers its crop."""
    scale = max(width / image.width, height / image.height)
    if max_pixels is not None and scale > 1 and image.width * image.height * scale**2 > max_pixels:
        raise BrokenSample(
            f"{sample.name}: is {image.width:,} x {image.height:,} pixels, too thin to cover {width} x {height}; "
            "replace or remove it, or leave such out with --skip-broken"
        )


def read_image(
    sample: ImageSample,
    mode: str,
    sizes: Sequence[tuple[int, int]],
    max_pixels: int | None = None,
    otherwise: str = ", or leave broken ones out with --skip-broken",
) -> NDArray[np.uint8]:
    """An image as its viewer shows it, on white where it is transparent, cropped to the nearest size: (C, H, W).

    Args:
        otherwise: what else the caller's user can do about a broken image than replace or remove it.

    Raises BrokenSample for an image that cannot be read whole, or has more than `max_pixels`.
    """
    data = content(sample)
    try:
        with Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise BrokenSample(
                    f"{sample.name}: has {opened.width:,} x {opened.height:,} pixels, more than "
                    f"data.encode.max_pixels={max_pixels}: raise that, make the image smaller, or leave such out with "
                    "--skip-broken"
                )
            image = _eight_bits(ImageOps.exif_transpose(opened))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(mode)
            height, width = nearest_size((image.height, image.width), sizes)
            _refuse_strip(sample, image, height, width, max_pixels)
            cropped = np.asarray(center_crop(image, height, width))
    except (MemoryError, BrokenSample):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "it is of none of the formats that are read: " + ", ".join(_formats())
        raise BrokenSample(f"{sample.name}: not a whole image ({reason}); replace or remove it{otherwise}") from error
    return cropped[None] if cropped.ndim == 2 else cropped.transpose(2, 0, 1)
