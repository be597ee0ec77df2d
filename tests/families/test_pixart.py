"""PixArt-alpha and PixArt-Sigma: outputs against diffusers and against the formula, and what is told from headers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import examine, open_source
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Source
from tests.helpers import reference_models
from tests.helpers.checkpoint_files import pixart_shapes, random_state, write_hollow
from tests.helpers.listener import Hearing

TIMESTEP = torch.tensor([3, 700])
LENGTHS = [2, 5]
PICO: dict[str, Any] = {"width": 48, "layers": 3, "caption_channels": 20, "sample_size": 16}
SQUARE, WIDE = (16, 16), (24, 40)


def inputs(size: tuple[int, int], *, micro_conditions: bool = False, seed: int = 1) -> dict[str, Any]:
    """Latents of two samples, captions of two lengths behind a mask, and micro-conditions."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2, 7, dtype=torch.int64)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = 1
    micro: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if micro_conditions:
        micro = {
            "resolution": torch.tensor([[128.0, 256.0], [512.0, 768.0]]),
            "aspect_ratio": torch.tensor([[0.5], [0.75]]),
        }
    return {
        "hidden_states": torch.randn(2, 4, *size, generator=generator),
        "timestep": TIMESTEP,
        "encoder_hidden_states": torch.randn(2, 7, 20, generator=generator),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": micro,
    }


@torch.no_grad()
def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    result: Tensor = model(**given).sample
    return result


def theirs(*, micro_conditions: bool = False, interpolation_scale: float = 1, sample_size: int = 16) -> Any:
    """A pico PixArt of diffusers, every tensor random."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        sample_size=sample_size,
        cross_attention_dim=48,
        caption_channels=20,
        interpolation_scale=interpolation_scale,
        use_additional_conditions=micro_conditions,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def original_layout(model: Any, interpolation_scale: float = 1) -> dict[str, Tensor]:
    """The weights of diffusers' model under the names of the original code, null caption and positions included."""
    state = model.state_dict()
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }
    if "adaln_single.emb.resolution_embedder.linear_1.weight" in state:
        for ours, emb in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder")):
            renamed |= {f"{ours}.mlp.{2 * i}": f"adaln_single.emb.{emb}.linear_{i + 1}" for i in (0, 1)}
    fused = {}
    result = {"final_layer.scale_shift_table": state["scale_shift_table"]}
    for index in range(len(model.transformer_blocks)):
        ours, block = f"blocks.{index}", f"transformer_blocks.{index}"
        result[f"{ours}.scale_shift_table"] = state[f"{block}.scale_shift_table"]
        renamed |= {
            f"{ours}.attn.proj": f"{block}.attn1.to_out.0",
            f"{ours}.cross_attn.q_linear": f"{block}.attn2.to_q",
            f"{ours}.cross_attn.proj": f"{block}.attn2.to_out.0",
            f"{ours}.mlp.fc1": f"{block}.ff.net.0.proj",
            f"{ours}.mlp.fc2": f"{block}.ff.net.2",
        }
        fused[f"{ours}.attn.qkv"] = [f"{block}.attn1.to_{one}" for one in "qkv"]
        fused[f"{ours}.cross_attn.kv_linear"] = [f"{block}.attn2.to_{one}" for one in "kv"]
    for part in ("weight", "bias"):
        result |= {f"{ours}.{part}": state[f"{name}.{part}"] for ours, name in renamed.items()}
        result |= {
            f"{ours}.{part}": torch.cat([state[f"{name}.{part}"] for name in names]) for ours, names in fused.items()
        }
    result["y_embedder.y_embedding"] = torch.randn(7, 20, generator=torch.Generator().manual_seed(5))
    result["pos_embed"] = model.pos_embed.pos_embed.clone()
    return {name: value.clone() for name, value in result.items()}


HINTS: dict[str, Any] = {"num_attention_heads": 4, "family": "pixart-sigma"}


# Outputs


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=str)
@pytest.mark.parametrize("interpolation_scale", [0.5, 1, 2, 4])
@pytest.mark.parametrize("micro_conditions", [False, True])
def test_both_layouts_equal_diffusers(
    tmp_path: Path, micro_conditions: bool, interpolation_scale: float, size: tuple[int, int]
) -> None:
    model = theirs(micro_conditions=micro_conditions, interpolation_scale=interpolation_scale)
    given = inputs(size, micro_conditions=micro_conditions)
    expected = output(model, given)
    model.save_pretrained(tmp_path / "pixart")
    assert (output(litconvert.load(tmp_path / "pixart"), given) - expected).abs().max() <= 1e-5
    torch.save({"state_dict": original_layout(model)}, tmp_path / "pixart.pth")
    ours = litconvert.load(tmp_path / "pixart.pth", interpolation_scale=float(interpolation_scale), **HINTS)
    assert (output(ours, given) - expected).abs().max() <= 1e-5
    # The interpolation matters, and so do the micro-conditions.
    assert (
        output(theirs(micro_conditions=micro_conditions, interpolation_scale=3), given) - expected
    ).abs().max() > 1e-2
    if micro_conditions:
        other = {**given, "added_cond_kwargs": {**given["added_cond_kwargs"], "aspect_ratio": torch.ones(2, 1)}}
        assert (output(ours, other) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("size", [SQUARE, WIDE, (22, 26)], ids=str)
@pytest.mark.parametrize("layers", [(), (1, 2)], ids=["plain", "kv_compress"])
def test_the_original_layout_equals_the_formula(tmp_path: Path, layers: tuple[int, ...], size: tuple[int, int]) -> None:
    """With KV compression too, where a grid of odd sides leaves rows over; a masked token counts for nothing."""
    state = random_state(pixart_shapes(**PICO, tokens=7, kv_compress=layers, micro_conditions=True))
    torch.save(state, tmp_path / "pixart.pth")
    model = litconvert.load(tmp_path / "pixart.pth", sample_size=16, interpolation_scale=2.0, **HINTS)
    assert [kind == "kv_compress" for kind in model.config.attention] == [layer in layers for layer in range(3)]
    given = inputs(size, micro_conditions=True)
    expected = reference_models.pixart(
        state,
        given["hidden_states"],
        TIMESTEP,
        given["encoder_hidden_states"],
        LENGTHS,
        heads=4,
        base_size=8,
        interpolation=2.0,
        sizes=given["added_cond_kwargs"]["resolution"],
        aspect_ratios=given["added_cond_kwargs"]["aspect_ratio"],
    )
    assert (output(model, given) - expected).abs().max() <= 1e-5
    assert torch.equal(model.state_dict()["conditioning.null_caption"], state["y_embedder.y_embedding"])


def test_a_lit_pixart_in_its_public_layout_equals_the_formula(tmp_path: Path) -> None:
    state = random_state(pixart_shapes(**PICO, tokens=120, linear_heads=3))
    torch.save(state, tmp_path / "lit.pth")
    model = litconvert.load(tmp_path / "lit.pth", sample_size=16, num_attention_heads=4)
    assert (model.config.attention, model.config.linear_num_heads) == (["linear"] * 3, 3)
    given = inputs((24, 40))
    expected = reference_models.pixart(
        state,
        given["hidden_states"],
        TIMESTEP,
        given["encoder_hidden_states"],
        LENGTHS,
        heads=4,
        base_size=8,
    )
    assert (output(model, given) - expected).abs().max() <= 1e-5


def test_the_inputs_of_the_other_kind_of_model_are_refused(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "pixart")
    model = litconvert.load(tmp_path / "pixart")
    given = inputs(SQUARE)
    output(model, given)
    with pytest.raises(ValueError, match="conditioned on captions"):
        model(given["hidden_states"], TIMESTEP, torch.tensor([0, 1]))
    theirs(micro_conditions=True).save_pretrained(tmp_path / "micro")
    with pytest.raises(ValueError, match="micro-conditions"):
        litconvert.load(tmp_path / "micro")(**given)


def test_a_caption_without_tokens_gives_no_nan(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "pixart")
    given = inputs(SQUARE)
    given["encoder_attention_mask"][0] = 0
    assert output(litconvert.load(tmp_path / "pixart"), given).isfinite().all()


# What headers tell

RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "alpha-256": (
        {"sample_size": 32, "tokens": 120},
        {"family": "pixart-alpha", "interpolation_scale": 1.0},
        610_856_096,
    ),
    "alpha-512": (
        {"sample_size": 64, "tokens": 120},
        {"family": "pixart-alpha", "interpolation_scale": 1.0},
        610_856_096,
    ),
    "alpha-1024-MS": (
        {"sample_size": 128, "tokens": 120, "micro_conditions": True},
        {"family": "pixart-alpha", "interpolation_scale": 2.0, "micro_conditions": True},
        611_349_152,
    ),
    "alpha-1024-MS without its null caption": (
        {"sample_size": 128, "tokens": None, "micro_conditions": True},
        {"family": "pixart-alpha", "interpolation_scale": 2.0, "null_caption": False},
        611_349_152,
    ),
    "sigma-256": (
        {"sample_size": 32, "tokens": 300},
        {"family": "pixart-sigma", "interpolation_scale": 0.5},
        610_856_096,
    ),
    "sigma-512-MS": (
        {"sample_size": 64, "tokens": 300},
        {"family": "pixart-sigma", "interpolation_scale": 1.0},
        610_856_096,
    ),
    "sigma-1024-MS": (
        {"sample_size": 128, "tokens": 300},
        {"family": "pixart-sigma", "interpolation_scale": 2.0, "micro_conditions": False},
        610_856_096,
    ),
    "sigma-1024-MS without its null caption": (
        {"sample_size": 128, "tokens": None},
        {"family": "pixart-sigma", "interpolation_scale": 2.0, "null_caption": False},
        610_856_096,
    ),
    "sigma-2K-MS": (
        {"sample_size": 256, "tokens": 300},
        {"family": "pixart-sigma", "interpolation_scale": 4.0},
        610_856_096,
    ),
    "sigma-1024 with KV compression": (
        {"sample_size": 128, "tokens": 300, "kv_compress": tuple(range(14, 28))},
        {"family": "pixart-sigma", "kv_compress_factor": 2},
        610_968_992,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint_is_recognised_by_its_headers_alone(tmp_path: Path, name: str) -> None:
    from litconvert.model.shapes import count_parameters

    made, expected, parameters = RELEASED[name]
    source = open_source(Source(path=str(write_hollow(tmp_path / "pixart.safetensors", pixart_shapes(**made)))))
    reading = source.reading
    assert {
        "family": reading.family,
        **{key: getattr(source.config, key) for key in expected if key != "family"},
    } == expected
    assert count_parameters(source.config) == parameters
    assert (reading.layout, source.config.num_attention_heads) == ("original", 16)
    assert ["16 attention heads" in text for text in reading.unsure] == [True]
    kinds = source.config.attention
    assert [layer for layer, kind in enumerate(kinds) if kind == "kv_compress"] == list(made.get("kv_compress", ()))


@pytest.mark.parametrize(
    ("size", "scale", "micro", "family"),
    [(128, 2, False, "pixart-sigma"), (32, 0.5, False, "pixart-sigma"), (128, None, True, "pixart-alpha")],
)
@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "Transformer2DModel"])
def test_a_released_diffusers_folder_is_recognised(
    tmp_path: Path, size: int, scale: float | None, micro: bool, family: str, class_name: str
) -> None:
    """As PixArtTransformer2DModel and under the name it had at release, Transformer2DModel."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            sample_size=size, caption_channels=4096, interpolation_scale=scale, use_additional_conditions=micro
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    write_hollow(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "_class_name": class_name}))
    source = open_source(Source(path=str(tmp_path)))
    reading = source.reading
    assert (reading.family, reading.layout) == (family, "diffusers")
    assert source.config.interpolation_scale == (scale or 2.0)
    assert source.config.micro_conditions is micro


@pytest.mark.parametrize("size", [32, 64])
def test_alphas_diffusers_folders_name_no_interpolation(tmp_path: Path, size: int) -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(sample_size=size, caption_channels=4096, use_additional_conditions=False)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    (tmp_path / "transformer").mkdir()
    weights = write_hollow(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(dict(model.config)))
    for place in (tmp_path, tmp_path / "transformer", weights):  # a file's config.json is the one beside it
        source = open_source(Source(path=str(place)))
        reading = source.reading
        assert (reading.family, source.config.interpolation_scale) == ("pixart-alpha", 1.0)
        assert "family=pixart-sigma" in reading.unsure[0]
    (tmp_path / "transformer" / "config.json").unlink()
    if size == 32:
        with pytest.raises(UsageError, match="family=pixart-alpha or family=pixart-sigma"):
            open_source(Source(path=str(weights), sample_size=32))


def test_at_256_pixels_a_missing_null_caption_asks_for_the_family(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "pixart.safetensors", pixart_shapes(sample_size=32, tokens=None))
    with pytest.raises(UsageError, match="family=pixart-alpha or family=pixart-sigma"):
        open_source(Source(path=str(path)))
    for family, scale in (("pixart-alpha", 1.0), ("pixart-sigma", 0.5)):
        source = open_source(Source(path=str(path), family=family))
        reading = source.reading
        assert (reading.family, source.config.interpolation_scale) == (family, scale)


def test_at_512_pixels_a_missing_null_caption_is_assumed_and_said(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "pixart.safetensors", pixart_shapes(tokens=None))
    source = open_source(Source(path=str(path)))
    reading = source.reading
    assert reading.family == "pixart-sigma"
    assert "family=pixart-alpha" in reading.unsure[0]


def test_no_position_embedding_asks_for_the_size(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "pixart.safetensors", pixart_shapes(pos_embed=False))
    with pytest.raises(UsageError, match="--sample-size N"):
        open_source(Source(path=str(path)))
    assert open_source(Source(path=str(path), sample_size=64)).config.interpolation_scale == 1.0


def test_an_unreleased_size_says_that_positions_are_not_interpolated(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "pixart.safetensors", pixart_shapes(sample_size=48))
    hints: dict[str, Any] = {"path": str(path), "num_attention_heads": 16}
    assert "interpolation_scale=..." in open_source(Source(**hints)).reading.unsure[0]
    told = open_source(Source(**hints, interpolation_scale=1.5)).reading
    assert (told.config["interpolation_scale"], told.unsure) == (1.5, ())


@pytest.mark.parametrize(("stored", "what"), [("scale", "that of interpolation_scale=2"), ("random", "another one")])
def test_a_stored_position_embedding_dictates_nothing_and_is_said(tmp_path: Path, stored: str, what: str) -> None:
    state = original_layout(theirs(interpolation_scale=2))
    if stored == "random":
        state["pos_embed"] = torch.randn_like(state["pos_embed"])
    path = tmp_path / "pixart.pth"
    torch.save(state, path)
    torch.save({name: value for name, value in state.items() if name != "pos_embed"}, tmp_path / "without.pth")
    source = open_source(Source(path=str(path), **HINTS))
    (remark,) = source.check_recomputed()
    assert f"pos_embed in the file is {what}, and is not used" in remark
    assert remark in examine(source).odd
    without = open_source(Source(path=str(tmp_path / "without.pth"), sample_size=16, **HINTS))
    assert (source.config.values, without.check_recomputed()) == (without.config.values, ())
    # Nor does it dictate the size: the model makes positions for any.
    assert open_source(Source(path=str(path), sample_size=32, **HINTS)).config.sample_size == 32
    heard: list[str] = []
    hints = [f"source.{name}={value}" for name, value in HINTS.items()]
    overrides = [*hints, "student.num_attention_heads=4", "solve=null"]
    litconvert.convert(path, tmp_path / "lit", overrides=overrides, listener=Hearing(note=heard.append))
    assert remark in heard


@pytest.mark.parametrize("family", ["pixart-alpha", "pixart-sigma"])
def test_the_null_caption_of_a_released_folder_is_read(tmp_path: Path, family: str) -> None:
    tokens = {"pixart-alpha": 120, "pixart-sigma": 300}[family]
    theirs().save_pretrained(tmp_path / "pixart")
    file = tmp_path / "pixart" / "diffusion_pytorch_model.safetensors"
    null = torch.randn(tokens, theirs().config.caption_channels)
    save_file({**load_file(file), "caption_projection.y_embedding": null}, file)
    source = open_source(Source(path=str(tmp_path / "pixart")))
    assert (source.reading.family, source.reading.layout) == (family, "diffusers")
    assert f"its null caption has {tokens} tokens" in source.reading.because
    assert (source.config.null_caption, source.config.caption_tokens) == (True, tokens)
    model = litconvert.load(tmp_path / "pixart")
    assert torch.equal(model.state_dict()["conditioning.null_caption"], null)
    overrides = ["student.num_attention_heads=3", "solve=null"]
    student = litconvert.load(litconvert.convert(tmp_path / "pixart", tmp_path / "lit", overrides=overrides))
    assert torch.equal(student.state_dict()["conditioning.null_caption"], null)


def test_the_ema_of_a_training_checkpoint_is_taken_unless_told_otherwise(tmp_path: Path) -> None:
    shapes = pixart_shapes(**PICO, tokens=120)
    raw, averaged = random_state(shapes, seed=1), random_state(shapes, seed=2)
    content = {"state_dict": raw, "state_dict_ema": averaged, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(content, tmp_path / "training.pth")
    hints: dict[str, Any] = {"num_attention_heads": 4, "sample_size": 16}
    for weights, expected in ((None, averaged), ("ema", averaged), ("model", raw)):
        model = litconvert.load(tmp_path / "training.pth", weights=weights, **hints)
        assert torch.equal(model.final_layer.linear.weight, expected["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"norm_type": "ada_norm_zero"}, "config.json has norm_type='ada_norm_zero'"),
        ({"norm_eps": 1e-5}, "config.json has norm_eps=1e-05"),
        ({"caption_channels": 30}, "config.json has caption_channels=30, but the tensors have 20"),
        ({"interpolation_scale": -1}, "interpolation_scale=-1, not a number above 0"),
        ({"num_layers": 3}, "config.json has num_layers=3, but the tensors have 2"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    theirs().save_pretrained(tmp_path / "pixart")
    litconvert.load(tmp_path / "pixart")
    config = json.loads((tmp_path / "pixart" / "config.json").read_text())
    (tmp_path / "pixart" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LitconvertError) as caught:
        litconvert.load(tmp_path / "pixart")
    assert complaint in str(caught.value)


def test_hints_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    theirs(interpolation_scale=2).save_pretrained(tmp_path / "pixart")
    litconvert.load(tmp_path / "pixart", interpolation_scale=2.0)
    with pytest.raises(UsageError, match="leave the hint out"):
        litconvert.load(tmp_path / "pixart", interpolation_scale=4.0)
    with pytest.raises(UsageError, match="num_classes means nothing for a PixArt"):
        litconvert.load(tmp_path / "pixart", num_classes=10)


def test_a_converted_pixart_is_read_as_it_was(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "pixart")
    student = litconvert.convert(tmp_path / "pixart", tmp_path / "student", overrides=["student.num_attention_heads=3"])
    model = litconvert.load(student)
    assert isinstance(model, LiTTransformer2DModel)
    assert model.config.attention == ["linear", "linear"]
    source, made = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("pixart", "student")
    )
    assert torch.equal(made["blocks.1.cross_attn.to_k.weight"], source["transformer_blocks.1.attn2.to_k.weight"])
    save_file(made, tmp_path / "loose.safetensors")
    with pytest.raises(UsageError, match="unknown architecture"):
        litconvert.load(tmp_path / "loose.safetensors")
