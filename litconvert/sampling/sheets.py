"""Sheets of samples: every part has a title, every picture what it was asked for, and the file's ending its format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from litconvert.common.files import picture_format, printable, whole_file

GAP, MOST_LINES = 4, 3


@dataclass(frozen=True)
class Part:
    """Pictures under one title.

    Attributes:
        title: what they are of.
        images: (N, H, W, C) uint8, C = 1 or 3.
        labels: what each was asked for; none where nothing was.
    """

    title: str
    images: NDArray[np.uint8]
    labels: Sequence[str] = ()


def save_sheet(path: Path, parts: Sequence[Part], *, columns: int = 10, scale: int = 1) -> None:
    """Write the parts one above the other, row by row, whole or not at all.

    Args:
        path: .png, .jpg or .webp.
        columns: pictures side by side at most.
        scale: each pixel becomes so many, squared.
    """
    form = picture_format(path)
    drawn = [_drawn(part, columns, scale) for part in parts]
    width, height = max(one.width for one in drawn), sum(one.height for one in drawn)
    sheet = Image.new(drawn[0].mode, (width, height), "white")
    top = 0
    for one in drawn:
        sheet.paste(one, (0, top))
        top += one.height
    with whole_file(path) as temporary:
        sheet.save(temporary, format=form)


def _drawn(part: Part, columns: int, scale: int) -> Image.Image:
    """One part as a picture of its own."""
    count, height, width, channels = part.images.shape
    height, width, columns = height * scale, width * scale, min(columns, count)
    small = _font(max(11, min(28, width // 12)))
    whole = columns * (width + GAP) + GAP
    large = _font(max(13, min(36, whole // 40)))
    titles = _wrapped(part.title, large, whole - 2 * GAP, 8)
    labels = [_wrapped(label, small, width, MOST_LINES) for label in part.labels]
    below = max(map(len, labels), default=0) * _line(small)
    head = len(titles) * _line(large) + GAP
    rows = -(-count // columns)
    sheet = Image.new("L" if channels == 1 else "RGB", (whole, head + rows * (height + below + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(titles):
        pen.text((GAP, GAP // 2 + number * _line(large)), text, fill="black", font=large)
    for index, image in enumerate(part.images):
        top = head + (index // columns) * (height + below + GAP)
        left = GAP + (index % columns) * (width + GAP)
        pixels = image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet.paste(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), (left, top))
        for number, text in enumerate(labels[index] if labels else ()):
            pen.text((left, top + height + number * _line(small)), text, fill="black", font=small)
    return sheet


def _font(size: int) -> FreeTypeFont:
    """The font that matplotlib brings: Pillow's own has Latin letters alone."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _line(font: FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    return round(1.25 * font.size)


def _wrapped(text: str, font: FreeTypeFont, width: int, most: int) -> list[str]:
    """Text in at most so many lines of that width; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = printable(text).split()
    while words and len(lines) < most:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        if words and len(lines) == most - 1:
            line += " ..."
        lines.append(_cut(line, font, width))
    return lines


def _cut(line: str, font: FreeTypeFont, width: int) -> str:
    """A line that is no wider."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip(" .") + "..."
