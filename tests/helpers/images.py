"""Images and shards of them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from litconvert.conversion.plan import resolve_for
from litconvert.encoding.encode import encode_images

COLOURS = {"green": (0, 200, 0), "blue": (0, 0, 200), "red": (200, 0, 0)}
CAPTIONS = ["a red fox", "two birds by the sea", "a blue house in the snow", "a cat", "red snow"]


def png(colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, content in fields.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def encoded(
    images: Path | str,
    out: Path,
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    source: Path | None = None,
    **options: Any,
) -> Path:
    """A data set made of images for a recipe that is to be resolved, as the command makes it."""
    return encode_images(images, out, resolve_for(recipe, overrides, source), **options)
