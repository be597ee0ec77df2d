"""Which tensors of a file are the model: wrappers in names, moving averages of every usual name and shape."""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.checkpoints.opening import open_checkpoint
from litconvert.checkpoints.sets import DEPTH, Header, choose, flattened
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.checkpoint_files import dit_state

RAW = dit_state(seed=1)
AVERAGE = {name: value if name == "pos_embed" else value + 1 for name, value in RAW.items()}


def opened(folder: Path, content: Mapping[str, Any], weights: str = "auto") -> Checkpoint:
    torch.save(content, folder / "some.pt")
    return open_checkpoint(str(folder / "some.pt"), weights=weights)


def assert_is(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """All of these tensors and nothing else."""
    assert checkpoint.tensors.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(checkpoint.read(name), value), name


def renamed(state: Mapping[str, Tensor], before: str, *, within: str = "") -> dict[str, Tensor]:
    """Names with something before them, and `within` put behind each block's number."""
    names = {
        name: name.replace("blocks.0.", f"blocks.0.{within}").replace("blocks.1.", f"blocks.1.{within}")
        for name in state
    }
    return {before + names[name]: value for name, value in state.items()}


@pytest.mark.parametrize("as_safetensors", [False, True])
@pytest.mark.parametrize(
    ("before", "within"),
    [
        ("", ""),
        ("module.", ""),
        ("_orig_mod.", "_checkpoint_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._orig_mod."),
        ("model.diffusion_model.", ""),
        ("net.", ""),
        ("model.net.module.", "_checkpoint_wrapped_module."),
        ("pipe.denoiser.dit.", ""),
        ("ema_model.module.", ""),
    ],
)
def test_wrappers_are_taken_out_wherever_they_stand(
    tmp_path: Path, before: str, within: str, as_safetensors: bool
) -> None:
    state = renamed(RAW, before, within=within)
    if as_safetensors:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "some.safetensors")
        assert_is(open_checkpoint(str(tmp_path / "some.safetensors")), RAW)
    else:
        assert_is(opened(tmp_path, state), RAW)


AVERAGES: dict[str, Any] = {
    "ema": AVERAGE,
    "ema_model": AVERAGE,
    "model_ema": AVERAGE,
    "ema_state_dict": AVERAGE,
    "state_dict_ema": AVERAGE,
    "EMA": {"module": AVERAGE, "updates": 7},
    "ema_0.9999": AVERAGE,
    "averaged": {"n_averaged": torch.tensor(3), **renamed(AVERAGE, "module.")},
    "ema_list": list(AVERAGE.values()),
    "ema_object": {"decay": 0.99, "optimization_step": 3, "shadow_params": list(AVERAGE.values())},
    "swa": {"shadow": AVERAGE},
    "ema_of_parameters": [value for name, value in AVERAGE.items() if name != "pos_embed"],
    "shadow": {name: value for name, value in AVERAGE.items() if name != "pos_embed"},
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("raw", ["model", "state_dict", "net"])
def test_a_moving_average_is_found_under_its_usual_names_and_shapes(tmp_path: Path, raw: str, name: str) -> None:
    content = {raw: RAW, name: AVERAGES[name], "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}
    average = opened(tmp_path, content)
    assert (average.weights, average.sets, average.left_out) == ("ema", ("ema", "model"), ("opt (1 tensor)",))
    assert_is(average, AVERAGE)
    assert_is(opened(tmp_path, content, "ema"), AVERAGE)
    assert_is(opened(tmp_path, content, "model"), RAW)


def test_a_file_without_dictionaries_tells_its_sets_by_prefixes(tmp_path: Path) -> None:
    both = {
        **renamed(RAW, "model."),
        **renamed(AVERAGE, "ema."),
        "first_stage_model.x": torch.ones(2),
        "step": torch.tensor(1),
    }
    save_file({name: value.clone() for name, value in both.items()}, tmp_path / "both.safetensors")
    average = open_checkpoint(str(tmp_path / "both.safetensors"))
    assert (average.weights, average.sets) == ("ema", ("ema", "model"))
    assert average.set_aside == ("model (--set inherit.weights=model takes it)", "first_stage_model (1 tensor)")
    assert_is(average, AVERAGE)
    top = {**RAW, **renamed(AVERAGE, "ema_model.")}
    save_file({name: value.clone() for name, value in top.items()}, tmp_path / "top.safetensors")
    assert_is(open_checkpoint(str(tmp_path / "top.safetensors")), AVERAGE)
    assert_is(open_checkpoint(str(tmp_path / "top.safetensors"), weights="model"), RAW)


def test_what_lies_beside_the_models_is_said_and_not_read(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {**RAW, "optimizer": {"m": list(RAW.values())}, "vae": {"decoder.x": torch.ones(1)}})
    assert_is(checkpoint, RAW)
    assert checkpoint.set_aside == (f"optimizer ({len(RAW)} tensors)", "vae (1 tensor)")
    assert (checkpoint.weights, checkpoint.sets) == (None, ())
    # Without a dictionary to tell what is the model's the family is asked, which refuses what it does not know.
    assert "vae.x" in opened(tmp_path, {**RAW, "vae.x": torch.ones(1)}).tensors


def test_several_of_a_kind_ask_which(tmp_path: Path) -> None:
    content = {"ema1": AVERAGE, "ema2": RAW, "model": RAW}
    with pytest.raises(UsageError, match=r"several moving averages \(ema1, ema2\); choose one with --set inherit"):
        opened(tmp_path, content)
    assert_is(opened(tmp_path, content, "ema1"), AVERAGE)
    assert opened(tmp_path, content, "ema2").set_aside[0] == "ema1 (--set inherit.weights=ema1 takes it)"
    with pytest.raises(UsageError, match=r"several models \(student, teacher\)"):
        opened(tmp_path, {"student": RAW, "teacher": AVERAGE})
    assert_is(opened(tmp_path, {"student": RAW, "teacher": AVERAGE}, "teacher"), AVERAGE)
    with pytest.raises(UsageError, match=r"has no 'studnet' weights \(did you mean 'student'\?\)"):
        opened(tmp_path, {"student": RAW, "teacher": AVERAGE}, "studnet")


def test_a_list_that_fits_no_model_is_left_aside_and_said(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"model": RAW, "ema": list(AVERAGE.values())[:-1]})
    assert_is(checkpoint, RAW)
    assert checkpoint.set_aside == (f"ema ({len(RAW) - 1} tensors)",)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    name = "x_embedder.proj.weight"
    with pytest.raises(LitconvertError, match=rf"holds {name} twice, as {name} and module\.{name}"):
        opened(tmp_path, {**RAW, f"module.{name}": RAW[name]})


def test_content_that_holds_itself_or_lies_deep_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    around: dict[str, Any] = {"a": torch.ones(1)}
    around["self"] = around
    assert list(flattened(around)) == ["a"]
    deep: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(DEPTH + 5):
        deep = {"b": deep}
    assert flattened(deep) == {}
    wide: Any = [0] * 10
    for _ in range(DEPTH - 1):
        wide = [wide] * 10
    monkeypatch.setattr("litconvert.checkpoints.sets.PARTS", 1000)
    with pytest.raises(LitconvertError, match="more than 1,000 parts"):
        flattened({"wide": wide})


def test_names_of_any_kind_give_a_set_or_a_sentence() -> None:
    parts = ["", "module", "ema", "model", "blocks.0.attn.qkv.weight", "x_embedder.proj.weight", "0", "n_averaged", "."]
    for few in itertools.permutations(parts, 3):
        names = [".".join(few), ".".join(few[:2]), few[0]]
        with contextlib.suppress(LitconvertError):
            assert set(choose("some.pt", {name: Header((1,)) for name in names}).names.values()) <= set(names)
