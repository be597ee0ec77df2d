"""What is not read says why: the real reason, not one for all; and what is assumed is listed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import describe, open_source
from litconvert.recipe.schema import Source
from tests.helpers.checkpoint_files import dit_state, pixart_shapes, random_state

ALL_BLOCKS = (0, 1)
PIXART: dict[str, Any] = {"width": 48, "layers": 2, "caption_channels": 20, "sample_size": 16}


def opened(folder: Path, state: dict[str, Tensor], **hints: Any) -> Any:
    torch.save(state, folder / "some.pt")
    return open_source(Source(path=str(folder / "some.pt"), **{"num_attention_heads": 2, **hints}))


def refusal(folder: Path, state: dict[str, Tensor], **hints: Any) -> str:
    with pytest.raises(LitconvertError) as refused:
        opened(folder, state, **hints)
    return str(refused.value)


def with_names(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("blocks.0.attn.qkv.lora_A.default.weight", "an adapter that is not merged (LoRA; "),
        ("blocks.1.mlp.fc1.lora_down.weight", "merge it into its model first"),
        ("blocks.0.attn.proj.hada_w1_a", "an adapter that is not merged"),
        ("blocks.0.attn.q_norm.weight", "normalised queries and keys (blocks.0.attn.q_norm.weight)"),
        ("blocks.1.attn.norm_k.weight", "use one that was trained without qk_norm"),
        ("blocks.0.attn.qkv.weight_scale", "quantised weights (blocks.0.attn.qkv.weight_scale)"),
        ("blocks.0.mlp.fc1.weight.absmax", "use the checkpoint that they were made from"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
    ],
)
def test_each_refusal_gives_its_reason(tmp_path: Path, extra: str, reason: str) -> None:
    state = dit_state()
    assert opened(tmp_path, state).reading.family == "dit"
    text = refusal(tmp_path, {**state, extra: torch.ones(4)})
    assert reason in text
    assert "unmodified" not in text
    pixart = random_state(pixart_shapes(**PIXART))
    hints = {"num_attention_heads": 4, "sample_size": 16, "family": "pixart-sigma"}
    assert opened(tmp_path, pixart, **hints).reading.family == "pixart-sigma"
    assert reason in refusal(tmp_path, {**pixart, extra: torch.ones(4)}, **hints)


def test_an_adapter_alone_and_one_around_its_model_are_told_from_damage(tmp_path: Path) -> None:
    alone = {
        f"base_model.model.blocks.{i}.attn.qkv.lora_{ab}.weight": torch.ones(4, 4) for i in ALL_BLOCKS for ab in "AB"
    }
    assert "an adapter that is not merged" in refusal(tmp_path, alone)
    around = {
        f"base_model.model.{name}": value
        for name, value in with_names(dit_state(), "attn.qkv.", "attn.qkv.base_layer.").items()
    }
    assert "an adapter that is not merged" in refusal(tmp_path, around)


def test_a_dit_without_classes_is_unconditional(tmp_path: Path) -> None:
    state = {name: value for name, value in dit_state().items() if not name.startswith("y_embedder")}
    assert "an unconditional DiT, which litconvert does not read" in refusal(tmp_path, state)


def test_extra_and_missing_tensors_have_advice_of_their_own(tmp_path: Path) -> None:
    state = dit_state()
    extra = refusal(tmp_path, {**state, "blocks.0.attn.gate.weight": torch.ones(3)})
    assert "What has no place would be lost, and the model would be another one" in extra
    del state["blocks.0.mlp.fc1.bias"]
    assert "use the complete checkpoint" in refusal(tmp_path, state)


def test_the_training_heads_of_repa_are_left_out_by_name(tmp_path: Path) -> None:
    state = dit_state()
    heads = {f"projectors.0.{layer}.{part}": torch.ones(3) for layer in (0, 2, 4) for part in ("weight", "bias")}
    torch.save({"model": state, "ema": {**state, **heads}, "opt": {}, "steps": 1}, tmp_path / "repa.pt")
    hints: dict[str, Any] = {"num_attention_heads": 2, "family": "sit", "data_timestep": 0}
    source = open_source(Source(path=str(tmp_path / "repa.pt"), **hints))
    assert source.reading.extra.keys() == heads.keys()
    assert "REPA's alignment heads (6 tensors), of training alone" in describe(source)["set_aside"]
    plain = tmp_path / "plain.pt"
    torch.save(state, plain)
    mine, theirs = (litconvert.load(path, **hints).state_dict() for path in (tmp_path / "repa.pt", plain))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    made = litconvert.plan(
        tmp_path / "repa.pt",
        overrides=[f"source.{key}={value}" for key, value in hints.items()] + ["student.num_attention_heads=2"],
    )
    assert {entry.source for entry in made.entries if entry.fate == "dropped"} >= heads.keys()
    old = with_names(state, "blocks.1.", "decoder_blocks.0.")
    assert "REPA's first releases" in refusal(tmp_path, old)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("name", ["some.pt", "some.safetensors"])
def test_a_dtype_that_is_not_read_is_named_where_it_is_used(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    from safetensors.torch import save_file

    def save(state: dict[str, Tensor]) -> Source:
        if name.endswith(".pt"):
            torch.save(state, tmp_path / name)
        else:
            save_file(state, tmp_path / name)
        return Source(path=str(tmp_path / name), num_attention_heads=2)

    state = {f"model.diffusion_model.{key}": value for key, value in dit_state().items()}
    beside = {**state, "cond_stage_model.x": torch.ones(3).to(dtype)}
    assert open_source(save(beside)).checkpoint.left_out == ("cond_stage_model (1 tensor)",)
    key = "model.diffusion_model.blocks.0.attn.qkv.weight"
    with pytest.raises(LitconvertError, match=r"qkv.weight' is (float8|F8|int8|I8).* use the unquantised checkpoint"):
        open_source(save({**state, key: state[key].to(dtype)}))


def test_the_heads_of_a_published_width_are_listed_as_assumed(tmp_path: Path) -> None:
    state = dit_state(width=384, layers=1)
    torch.save(state, tmp_path / "some.pt")
    source = open_source(Source(path=str(tmp_path / "some.pt")))
    assert source.config.num_attention_heads == 6
    assert any(
        text.startswith("6 attention heads, as the published models of width 384") for text in source.reading.unsure
    )
    told = open_source(Source(path=str(tmp_path / "some.pt"), num_attention_heads=12))
    assert not any("attention heads" in text for text in told.reading.unsure)


@pytest.mark.parametrize("told", [None, 1])
def test_one_row_of_classes_is_one_class(tmp_path: Path, told: int | None) -> None:
    state = dit_state()
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:1].clone()
    source = opened(tmp_path, state, num_classes=told)
    assert (source.config.num_classes, source.config.null_class) == (1, False)
    assert any("one row" in text for text in source.reading.unsure) == (told is None)
    student = litconvert.convert(
        tmp_path / "some.pt",
        tmp_path / "lit",
        overrides=["source.num_attention_heads=2", "student.num_attention_heads=2", "solve=null"],
    )
    assert litconvert.load(student).config.num_classes == 1
    with pytest.raises(UsageError, match="the class table has 1 rows; give 1"):
        opened(tmp_path, state, num_classes=2)
