"""The model as numbers: the table of its tensors, parameters and multiply-accumulates, held against the model."""

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litconvert.errors import UsageError
from litconvert.model.config import CONFIG_DEFAULTS, ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel, sincos_position_embedding
from litconvert.model.shapes import count_macs, count_parameters, model_tensors, position_embedding

PICO: dict[str, Any] = {"hidden_size": 48, "num_layers": 3, "num_attention_heads": 4, "sample_size": 8}
CAPTIONS: dict[str, Any] = {**PICO, "num_classes": None, "caption_channels": 20, "caption_tokens": 5}
KINDS = ["linear", "softmax", "kv_compress"]
CONFIGS = {
    "softmax": PICO,
    "every kind": {**PICO, "attention": KINDS},
    "other sizes": {**PICO, "mlp_ratio": 3.5, "patch_size": 4, "kv_compress_factor": 4, "linear_conv_size": 3},
    "no convolution": {**PICO, "attention": ["linear"] * 3, "linear_conv_size": 0, "null_class": False},
    "captions": CAPTIONS,
    "captions, all there is": {**CAPTIONS, "attention": KINDS, "null_caption": True, "micro_conditions": True},
}


def model_of(config: dict[str, Any]) -> LiTTransformer2DModel:
    with torch.device("meta"):
        model: LiTTransformer2DModel = LiTTransformer2DModel(**config)
    return model


def test_the_defaults_are_the_models() -> None:
    parameters = inspect.signature(LiTTransformer2DModel.__init__).parameters
    assert {name: one.default for name, one in parameters.items() if name != "self"} == CONFIG_DEFAULTS


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_is_the_models_state_dict(config: dict[str, Any]) -> None:
    model = model_of(config)
    stored = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    table = {name: info.shape for name, info in model_tensors(ModelConfig.of(config)).items()}
    assert table == stored
    assert list(table) == list(stored)
    assert count_parameters(ModelConfig.of(config)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"attention": ["linear"]},
        {"attention": ["linear", "softmax", "quadratic"]},
        {"hidden_size": 50},
        {"num_attention_heads": 5},
        {"attention": ["linear"] * 3, "linear_num_heads": 5},
        {"num_classes": None},
        {"caption_channels": 20},
        {"linear_kernel": "elu"},
        {"linear_conv_size": 4},
        {"prediction": "score"},
    ],
    ids=str,
)
def test_what_the_model_refuses_the_table_refuses(change: dict[str, Any]) -> None:
    model_of(PICO)
    ModelConfig.of(PICO)
    with pytest.raises(ValueError, match=r"must|give one of"):
        model_of({**PICO, **change})
    with pytest.raises(UsageError):
        ModelConfig.of({**PICO, **change})


def test_a_key_that_the_model_has_not_is_refused_and_not_left_out() -> None:
    with pytest.raises(UsageError, match=r"no key 'norm_epsilon' .did you mean 'norm_eps'"):
        ModelConfig.of({**PICO, "norm_epsilon": 1e-5})
    assert ModelConfig.of({**PICO, "_class_name": "LiTTransformer2DModel"}) == ModelConfig.of(PICO)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_the_position_embedding_is_the_models(scale: float) -> None:
    config = ModelConfig.of({**PICO, "sample_size": 24, "interpolation_scale": scale})
    expected = sincos_position_embedding(48, (12, 12), 12, torch.device("cpu"), scale)
    assert torch.equal(position_embedding(config), expected)


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_multiply_accumulates_with_captions_are_those_torch_counts(kind: str, side: int) -> None:
    model = LiTTransformer2DModel(**{**CAPTIONS, "attention": [kind] * 3, "micro_conditions": True})
    given = {
        "encoder_hidden_states": torch.randn(1, 5, 20),
        "added_cond_kwargs": {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)},
    }
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 4, side, side), torch.tensor([3]), **given)
    denominators = 3 * (side // 2) ** 2 * 48 if kind == "linear" else 0
    assert counter.get_total_flops() == 2 * (count_macs(ModelConfig.of(model.config), side) + denominators)


def pico(**config: Any) -> LiTTransformer2DModel:
    """A pico DiT in pixel space, random."""
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "hidden_size": 32, "num_layers": 2}
    heads = {"num_attention_heads": 2, "linear_num_heads": 2, "num_classes": 4}
    model: LiTTransformer2DModel = LiTTransformer2DModel(**{**sizes, **heads, **config}).eval()
    return model


@pytest.mark.parametrize("kind", ["linear", "softmax"])
@pytest.mark.parametrize("side", [6, 8, 16], ids=lambda side: f"{side}x{side}")
def test_counted_multiply_accumulates_are_those_torch_counts(kind: str, side: int) -> None:
    model = pico(attention=[kind] * 2, mlp_ratio=3.5)
    tokens = (side // 2) ** 2
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 1, side, side), torch.tensor([3]), torch.tensor([0]))
    denominators = 2 * tokens * 32 if kind == "linear" else 0
    assert counter.get_total_flops() == 2 * (count_macs(ModelConfig.of(model.config), side) + denominators)


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_a_full_size_model_is_counted_without_memory_for_it(kind: str) -> None:
    with torch.device("meta"):
        model = LiTTransformer2DModel(attention=[kind] * 28)
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    denominators = 28 * 1024 * 1152 if kind == "linear" else 0
    assert counter.get_total_flops() == 2 * (count_macs(ModelConfig.of(model.config), 64) + denominators)


@pytest.mark.parametrize(("image", "expected"), [(512, 1.10), (1024, 1.53), (2048, 3.23)])
def test_a_blocks_work_against_softmax_is_the_known_ratio(image: int, expected: float) -> None:
    assert block_macs("softmax", image) / block_macs("linear", image) == pytest.approx(expected, abs=5e-3)


def test_linear_attention_does_not_pay_at_256_pixels() -> None:
    # 0.99 with the state; the order for T < d makes it break even.
    assert 0.99 < block_macs("softmax", 256) / block_macs("linear", 256) < 1


def block_macs(kind: str, image: int) -> int:
    """Of one DiT-XL block at 4 linear heads, its modulation not counted: what a second layer adds to the model."""
    config = {
        "hidden_size": 1152,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "linear_num_heads": 4,
        "linear_conv_size": 5,
        "mlp_ratio": 4.0,
    }
    one, two = (
        count_macs(ModelConfig.of({**config, "attention": [kind] * n, "num_layers": n}), image // 8) for n in (1, 2)
    )
    return two - one - 6 * 1152**2


@pytest.mark.parametrize(
    ("layers", "width", "heads", "published"),
    [
        pytest.param(12, 384, 6, 32_963_360, id="S"),
        pytest.param(12, 768, 12, 130_512_416, id="B"),
        pytest.param(24, 1024, 16, 458_102_816, id="L"),
        pytest.param(28, 1152, 16, 675_129_632, id="XL"),
    ],
)
def test_the_sizes_of_dit_have_the_published_parameters(layers: int, width: int, heads: int, published: int) -> None:
    with torch.device("meta"):
        model = LiTTransformer2DModel(hidden_size=width, num_layers=layers, num_attention_heads=heads)
    assert (
        count_parameters(ModelConfig.of(model.config)) == published - 16 * 16 * width
    )  # published with the fixed position embedding


def test_linear_attention_adds_the_convolutions_weights_alone() -> None:
    with torch.device("meta"):
        softmax = LiTTransformer2DModel(num_layers=2)
        linear = LiTTransformer2DModel(num_layers=2, attention=["linear"] * 2, linear_num_heads=4)
    assert (
        count_parameters(ModelConfig.of(linear.config)) - count_parameters(ModelConfig.of(softmax.config))
        == 2 * 26 * 1152 // 4
    )
