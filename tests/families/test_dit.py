"""SiT, which only a hint tells from DiT, and LiT's public layout: against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import open_source
from litconvert.model.shapes import count_parameters
from litconvert.recipe.schema import Source
from tests.helpers import reference_models
from tests.helpers.checkpoint_files import dit_shapes, random_state, write_hollow

PICO: dict[str, Any] = {"width": 48, "layers": 2, "sample_size": 16, "rows": 6}
LABELS = torch.tensor([0, 3, 5])
GENERATOR = torch.Generator().manual_seed(1)
NOISY = torch.randn(3, 4, 16, 16, generator=GENERATOR)
WIDE = torch.randn(3, 4, 24, 40, generator=GENERATOR)


@torch.no_grad()
def output(model: Any, noisy: Tensor, timestep: Tensor) -> Tensor:
    result: Tensor = model(noisy, timestep, LABELS).sample
    return result


# SiT


@pytest.mark.parametrize("noisy", [NOISY, WIDE], ids=["square", "12x20"])
def test_a_sit_equals_the_formula(tmp_path: Path, noisy: Tensor) -> None:
    """Timesteps in [0, 1] go to the embedder unscaled, and the second half of the channels is discarded."""
    state = random_state(dit_shapes(**PICO))
    torch.save(state, tmp_path / "sit.pt")
    model = litconvert.load(tmp_path / "sit.pt", family="sit", num_attention_heads=4, sample_size=16)
    timestep = torch.tensor([0.0, 0.37, 1.0])
    expected = reference_models.class_conditional(state, noisy, timestep, LABELS, heads=4, base_size=8)
    result = output(model, noisy, timestep)
    assert result.shape == noisy.shape
    assert (result - expected[:, :4]).abs().max() <= 1e-5


def test_only_the_hint_tells_sit_from_dit(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "SiT-XL-2-256.safetensors", dit_shapes())
    as_dit = open_source(Source(path=str(path)))
    assert (as_dit.reading.family, as_dit.config.prediction) == ("dit", "noise")
    assert any("family=sit" in text for text in as_dit.reading.unsure)
    as_sit = open_source(Source(path=str(path), family="sit"))
    assert (as_sit.reading.family, as_sit.config.prediction, as_sit.config.data_timestep) == ("sit", "velocity", 1)
    assert count_parameters(as_sit.config) == 675_129_632 - 256 * 1152
    reversed_time = open_source(Source(path=str(path), family="sit", data_timestep=0))
    assert reversed_time.config.data_timestep == 0


def test_a_diffusers_file_is_no_sit(tmp_path: Path) -> None:
    shapes = {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (5, 48)}
    path = write_hollow(tmp_path / "odd.safetensors", shapes)
    with pytest.raises(UsageError, match="not of family sit"):
        open_source(Source(path=str(path), family="sit"))


def test_an_unknown_family_is_refused_with_those_there_are(pico_checkpoint: Path) -> None:
    litconvert.load(pico_checkpoint, family="dit", num_attention_heads=2)
    with pytest.raises(UsageError, match=r"unknown family 'sitt' \(did you mean 'sit'\?\); there are litconvert, dit"):
        litconvert.load(pico_checkpoint, family="sitt", num_attention_heads=2)


def test_hints_that_mean_nothing_are_refused(pico_checkpoint: Path) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=2)
    hints: list[dict[str, Any]] = [
        {"interpolation_scale": 2.0},
        {"data_timestep": 0},
        {"linear_num_heads": 2},
        {"linear_kernel": "gelu"},
        {"linear_eps": 1e-4},
    ]
    for hint in hints:
        with pytest.raises(UsageError, match=f"{next(iter(hint))} means nothing for"):
            litconvert.load(pico_checkpoint, num_attention_heads=2, **hint)


@pytest.mark.parametrize("block", ["99999999999", "9" * 120])
def test_a_layer_beyond_the_file_is_refused(tmp_path: Path, block: str) -> None:
    path = write_hollow(tmp_path / "odd.safetensors", {f"blocks.{block}.attn.qkv.weight": (3, 1)} | dit_shapes(**PICO))
    with pytest.raises(LitconvertError, match=r"names a layer beyond|has no numbered layers|is not part of"):
        open_source(Source(path=str(path), num_attention_heads=4))
    alone = write_hollow(tmp_path / "alone.safetensors", {f"blocks.{block}.attn.qkv.weight": (3, 1)})
    with pytest.raises(LitconvertError):
        open_source(Source(path=str(alone), num_attention_heads=4))


# LiT's public layout


@pytest.mark.parametrize("noisy", [NOISY, WIDE], ids=["square", "12x20"])
def test_a_lit_equals_the_formula(tmp_path: Path, noisy: Tensor) -> None:
    state = random_state(dit_shapes(**PICO, linear_heads=3))
    torch.save(state, tmp_path / "lit.pt")
    model = litconvert.load(tmp_path / "lit.pt", sample_size=16)
    assert (model.config.attention, model.config.linear_num_heads) == (["linear", "linear"], 3)
    timestep = torch.tensor([0, 500, 999])
    expected = reference_models.class_conditional(state, noisy, timestep, LABELS, heads=4, base_size=8)
    assert (output(model, noisy, timestep) - expected).abs().max() <= 1e-5


def test_a_lit_of_full_size_is_recognised_by_its_headers(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "lit.safetensors", dit_shapes(linear_heads=2))
    hints: dict[str, Any] = {"family": "dit", "linear_kernel": "relu", "linear_eps": 1e-6, "num_classes": 1000}
    source = open_source(Source(path=str(path), **hints))
    reading = source.reading
    assert (reading.layout, reading.unsure, source.config.linear_conv_size) == ("lit", (), 5)
    assert count_parameters(source.config) == 675_129_632 - 256 * 1152 + 28 * 26 * 1152 // 2


def test_without_a_convolution_the_linear_heads_are_asked_for(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in dit_shapes(**PICO, linear_heads=3).items() if ".dwc." not in name}
    path = write_hollow(tmp_path / "lit.safetensors", shapes)
    with pytest.raises(UsageError, match="linear_num_heads=N"):
        open_source(Source(path=str(path)))
    config = open_source(Source(path=str(path), linear_num_heads=3)).config.values
    assert (config["linear_num_heads"], config["linear_conv_size"]) == (3, 0)
    with_one = write_hollow(tmp_path / "with.safetensors", dit_shapes(**PICO, linear_heads=3))
    with pytest.raises(UsageError, match="so it is 3; leave linear_num_heads out"):
        open_source(Source(path=str(with_one), linear_num_heads=2))
