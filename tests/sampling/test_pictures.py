"""A VAE's own scaling and shift: what its file says wins, and what a recipe says beside it may not contradict it."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.pipeline_lit import LiTPipeline
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Vae
from litconvert.sampling.pictures import load_vae, scaling_of, to_images
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command

BLOCKS: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 2,
}


def saved_vae(
    folder: Path, numbers: Mapping[str, float | None] = MappingProxyType({}), *, without: tuple[str, ...] = ()
) -> Path:
    """A small VAE of 4 channels whose config.json lacks some keys."""
    torch.manual_seed(0)
    AutoencoderKL(**BLOCKS, latent_channels=4, **numbers).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: one for key, one in config.items() if key not in without}))
    return folder


@pytest.mark.parametrize(("scaling", "shift"), [(1.5305, 0.0609), (0.3611, 0.1159), (0.13025, None)])
def test_the_vae_s_own_numbers_are_used_throughout(tmp_path: Path, scaling: float, shift: float | None) -> None:
    folder = saved_vae(tmp_path / "vae", {"scaling_factor": scaling, "shift_factor": shift})
    reference = AutoencoderKL.from_pretrained(folder).eval()
    torch.save(dit_state(channels=4, sample_size=8, rows=3), tmp_path / "m.pt")
    (tmp_path / "images" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a" / "0.png")
    source = ("--source", tmp_path / "m.pt", "--num-attention-heads", 2)
    done = command("latents", "encode", tmp_path / "images", tmp_path / "data", *source, "--vae", folder)
    assert done.code == 0, done.err
    data = litconvert.open_latents(tmp_path / "data")
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = reference.encode(image).latent_dist.mean
    expected = (mean - (shift or 0.0)) * scaling
    clean = data.read(0, [0], noise=torch.zeros_like(mean)).clean
    torch.testing.assert_close(clean, expected, atol=2e-3, rtol=2e-3)
    # And back: in sheets, in our pipeline, and in what is published.
    with torch.no_grad():
        decoded = reference.decode(expected / scaling + (shift or 0.0)).sample
    wanted = (decoded * 127.5 + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.array_equal(to_images(expected, load_vae(Vae(path=str(folder)))), wanted)
    pipeline = LiTPipeline(transformer=None, scheduler=None, vae=reference)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.decode(expected), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_number_of_the_recipe_may_say_what_the_file_does_not(tmp_path: Path) -> None:
    silent = saved_vae(tmp_path / "silent", without=("scaling_factor", "shift_factor"))
    assert scaling_of(load_vae(Vae(path=str(silent)))) == (0.18215, 0.0)
    assert scaling_of(load_vae(Vae(path=str(silent), scaling_factor=0.7, shift_factor=0.2))) == (0.7, 0.2)
    assert (
        scaling_of(load_vae(Vae(path=str(saved_vae(tmp_path / "same", {"scaling_factor": 0.7})), scaling_factor=0.7)))[
            0
        ]
        == 0.7
    )


@pytest.mark.parametrize(("key", "own", "asked"), [("scaling_factor", 0.13025, 0.18215), ("shift_factor", 0.1, 0.0)])
def test_a_number_that_contradicts_the_file_is_refused(tmp_path: Path, key: str, own: float, asked: float) -> None:
    folder = saved_vae(tmp_path / "vae", {key: own})
    with pytest.raises(UsageError, match=rf"source\.vae\.{key} is {asked:g}, but the VAE .* says {own:g} itself"):
        load_vae(Vae.model_validate({"path": str(folder), key: asked}))


def test_a_vae_that_normalises_channels_is_refused(tmp_path: Path) -> None:
    folder = saved_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(LitconvertError, match="normalises each channel of its latents"):
        load_vae(Vae(path=str(folder)))


def test_a_vae_that_is_replaced_brings_its_own_folder_and_numbers() -> None:
    given = "source.vae={path: a, subfolder: vae, scaling_factor: 0.5, shift_factor: 0.1}"
    both = resolve(None, [given, "source.vae.path=b"]).recipe.source.vae
    assert both == Vae(path="b")
    told = resolve(None, [given, "source.vae.scaling_factor=0.7", "source.vae.path=b"])
    assert told.recipe.source.vae == Vae(path="b", scaling_factor=0.7)
    assert told.origins["source.vae.scaling_factor"] == "--set"
    assert resolve("pixart-sigma-512", ["source.vae.path=b"]).recipe.source.vae == Vae(path="b")
