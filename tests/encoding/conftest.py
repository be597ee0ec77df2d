"""Images in class folders and in shards, and recipes for them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.checkpoint_files import dit_state
from tests.helpers.images import CAPTIONS, COLOURS, png, write_tar
from tests.helpers.pretrained import Pretrained


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
def latent_recipe(tmp_path: Path, pretrained: Pretrained) -> Path:
    """A recipe for a model of four classes that sees the tiny VAE's latents of 64 pixels."""
    torch.save(dit_state(channels=4), tmp_path / "latent.pt")
    path = tmp_path / "latent.yaml"
    path.write_text(
        f"source: {{path: {tmp_path / 'latent.pt'}, num_attention_heads: 2, "
        f"vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        "data: {encode: {batch_size: 2, shard_size: 2}}\n"
    )
    return path


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
