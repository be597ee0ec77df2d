"""`convert --to`: the same weights in another layout, exactly, there and back; and what a layout cannot hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import litconvert
from litconvert.conversion.relayout import write_layout
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import OpenSource, open_source
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import position_embedding
from litconvert.recipe.schema import Source
from tests.helpers.checkpoint_files import dit_shapes, pixart_shapes, random_state
from tests.helpers.command import command

DIT: dict[str, Any] = {"width": 48, "layers": 2, "sample_size": 16, "rows": 6}
PIXART: dict[str, Any] = {"width": 48, "layers": 2, "sample_size": 16, "caption_channels": 20, "tokens": 120}
HINTS: dict[str, Any] = {"num_attention_heads": 4, "sample_size": 16}

ORIGINALS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "DiT": (dit_shapes(**DIT), {}),
    "SiT": (dit_shapes(**DIT), {"family": "sit"}),
    "LiT of classes": (dit_shapes(**DIT, linear_heads=3), {}),
    "PixArt": (pixart_shapes(**PIXART), {}),
    "PixArt with micro-conditions": (pixart_shapes(**PIXART, micro_conditions=True), {}),
    "PixArt with KV compression": (pixart_shapes(**PIXART, kv_compress=(1,)), {}),
    "LiT of captions": (pixart_shapes(**PIXART, linear_heads=3), {}),
}


def original(path: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], OpenSource]:
    """A state dict in the original layout with its position embedding, and the source it makes on disk."""
    shapes, hints = ORIGINALS[name]
    state = {key: value.to(dtype) for key, value in random_state(shapes).items()}
    config = ModelConfig(hidden_size=48, sample_size=16, patch_size=2)
    state["pos_embed"] = position_embedding(config).to(dtype)
    container = {"state_dict": state} if "y_embedder.y_embedding" in state else state
    torch.save(container, path)
    return state, open_source(Source(path=str(path), **HINTS, **hints))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("name", ["DiT", "PixArt", "PixArt with micro-conditions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_diffusers_and_back_is_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state, source = original(tmp_path / "source.pth", name, dtype)
    (note,), _ = write_layout(source, tmp_path / "theirs", "diffusers")
    assert ("embeds timesteps with a shift of 1" if name == "DiT" else "conditioning.null_caption") in note
    cls = DiTTransformer2DModel if name == "DiT" else PixArtTransformer2DModel
    theirs, loaded = cls.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_attention_heads == 4
    again = open_source(Source(path=str(tmp_path / "theirs")))
    write_layout(again, tmp_path / "again.pth", "original")
    content = torch.load(tmp_path / "again.pth", weights_only=True)
    written = content if name == "DiT" else content["state_dict"]
    # diffusers' layout has no place for the null caption, and says so above.
    assert equal(written, {key: value for key, value in state.items() if key != "y_embedder.y_embedding"})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_our_own_directory_goes_back_to_the_original_layout(tmp_path: Path, name: str, suffix: str) -> None:
    """Linear layers in LiT's public layout."""
    state, source = original(tmp_path / "source.pth", name)
    from litconvert.families.sources import read_model

    read_model(source).save_pretrained(tmp_path / "ours")
    ours = open_source(Source(path=str(tmp_path / "ours")))
    notes, count = write_layout(ours, tmp_path / f"again{suffix}", "original")
    assert count == len(state)
    # The width is no published one, from which heads would be read; without softmax and captions nothing has any.
    hints = (["family=sit"] if name == "SiT" else []) + (["num_attention_heads=4"] if name != "LiT of classes" else [])
    assert [note.split("source.")[1] for note in notes] == hints
    if suffix == ".pt":
        content = torch.load(tmp_path / "again.pt", weights_only=True)
        assert equal(content.get("state_dict", content), state)
    else:
        assert equal(load_file(tmp_path / "again.safetensors"), state)


def test_the_outputs_are_those_of_the_source(tmp_path: Path) -> None:
    _, source = original(tmp_path / "source.pth", "PixArt")
    write_layout(source, tmp_path / "theirs", "diffusers")
    given = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 5, 20),
    }
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "theirs")
    mine = litconvert.load(tmp_path / "source.pth", **HINTS)
    with torch.no_grad():
        expected = theirs(**given, added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample
        assert (mine(**given).sample - expected).abs().max() <= 1e-5


def test_a_file_of_views_is_written_without_what_they_share(tmp_path: Path) -> None:
    _, source = original(tmp_path / "source.pth", "DiT")
    write_layout(source, tmp_path / "again.pt", "original")
    assert (tmp_path / "again.pt").stat().st_size < 1.05 * (tmp_path / "source.pth").stat().st_size


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("LiT of classes", "diffusers has no linear DiT"),
        ("LiT of captions", "diffusers has no linear PixArt-alpha"),
        ("PixArt with KV compression", "diffusers has no KV compression"),
        ("SiT", "SiT has no diffusers layout"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    _, source = original(tmp_path / "source.pth", name)
    write_layout(source, tmp_path / "fine.pt", "original")
    with pytest.raises(UsageError, match=complaint):
        write_layout(source, tmp_path / "theirs", "diffusers")
    assert not (tmp_path / "theirs").exists()


def test_a_class_table_without_a_null_class_has_no_place_in_diffusers(tmp_path: Path) -> None:
    original(tmp_path / "source.pth", "DiT")
    source = open_source(Source(path=str(tmp_path / "source.pth"), num_classes=6, num_attention_heads=4))
    with pytest.raises(UsageError, match="always has a null class"):
        write_layout(source, tmp_path / "theirs", "diffusers")


def test_the_command_line(tmp_path: Path) -> None:
    state, _ = original(tmp_path / "source.pth", "PixArt")
    heads = ("--num-attention-heads", 4)
    source = tmp_path / "source.pth"
    dry = command("convert", source, tmp_path / "theirs", "--to", "diffusers", "--dry-run", *heads)
    assert (dry.code, (tmp_path / "theirs").exists()) == (0, False)
    shown = command("convert", source, tmp_path / "theirs", "--to", "diffusers", *heads)
    assert (shown.code, shown.out.strip()) == (0, str(tmp_path / "theirs"))
    assert "there is no place for it: conditioning.null_caption" in shown.err
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["use_additional_conditions"] is False
    again = command("convert", source, tmp_path / "theirs", "--to", "diffusers", *heads)
    assert (again.code, "replace it with --force" in again.err) == (1, True)
    assert command("convert", source, tmp_path / "theirs", "--to", "diffusers", "--force", *heads).code == 0
    unnamed = command("convert", source, tmp_path / "folder", "--to", "original", *heads)
    assert (unnamed.code, "name it .pth, .pt or .safetensors" in unnamed.err) == (2, True)
    assert command("convert", source, tmp_path / "x", "--to", "jax", *heads).code == 2
    for lost in (("--seed", 3), ("--set", "student.dtype=bfloat16")):
        assert command("convert", source, tmp_path / "x.pt", "--to", "original", *lost, *heads).code == 2
    shards = ("--set", "student.max_shard_bytes=20000", "--json")
    shown = command("convert", source, tmp_path / "shards", "--to", "diffusers", *shards, *heads)
    assert json.loads(shown.out)["layout"] == "diffusers"
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert open_source(Source(path=str(tmp_path / "shards"))).reading.family == "pixart-alpha"
    itself = command("convert", source, source, "--to", "original", "--force", *heads)
    assert (itself.code, "is the source itself" in itself.err) == (2, True)
    assert equal(torch.load(source, weights_only=True)["state_dict"], state)


def test_a_broken_source_leaves_nothing(tmp_path: Path) -> None:
    state, _ = original(tmp_path / "source.pth", "DiT")
    state["blocks.1.mlp.fc2.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "broken.safetensors")
    broken = open_source(Source(path=str(tmp_path / "broken.safetensors"), num_attention_heads=4))
    for out, to in (("theirs", "diffusers"), ("again.pt", "original")):
        with pytest.raises(LitconvertError, match="holds NaN"):
            write_layout(broken, tmp_path / out, to)
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", "broken.safetensors"}


def test_force_deletes_neither_the_source_nor_what_is_not_a_model(tmp_path: Path) -> None:
    holder, precious = tmp_path / "holder", tmp_path / "precious"
    holder.mkdir()
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    _, source = original(holder / "source.pth", "PixArt")
    before = (holder / "source.pth").read_bytes()
    with pytest.raises(UsageError, match="is the source itself, or holds it"):
        write_layout(source, holder, "diffusers", force=True)
    with pytest.raises(LitconvertError, match=r"holds what is no part of a diffusers model: thesis\.txt; move it away"):
        write_layout(source, precious, "diffusers", force=True)
    folder = tmp_path / "folder.pt"
    folder.mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        write_layout(source, folder, "original", force=True)
    options = ["source.num_attention_heads=4", "student.num_attention_heads=3"]
    with pytest.raises(
        LitconvertError, match=r"is not a result of litconvert \(it holds thesis\.txt\); remove it yourself"
    ):
        litconvert.convert(holder / "source.pth", precious, overrides=options, force=True)
    assert ((holder / "source.pth").read_bytes(), (precious / "thesis.txt").read_text()) == (before, "years")
    write_layout(source, tmp_path / "theirs", "diffusers")
    write_layout(source, tmp_path / "theirs", "diffusers", force=True)
    again = open_source(Source(path=str(tmp_path / "theirs")))
    with pytest.raises(UsageError, match="is the source itself"):
        write_layout(again, tmp_path / "theirs", "diffusers", force=True)


def test_what_the_original_layout_cannot_say_is_named_with_the_hint_that_restores_it(tmp_path: Path) -> None:
    original(tmp_path / "source.pth", "PixArt")
    options = ["source.num_attention_heads=4", "student={num_attention_heads: 3, kernel: focused, eps: 1.0e-4}"]
    student = litconvert.convert(tmp_path / "source.pth", tmp_path / "student", overrides=options)
    notes, _ = write_layout(open_source(Source(path=str(student))), tmp_path / "lit.pth", "original")
    assert [note.split("source.")[1] for note in notes] == [
        "linear_kernel=focused",
        "linear_eps=0.0001",
        "num_attention_heads=4",
    ]
    given = torch.randn(1, 4, 16, 16), torch.tensor([7])
    caption = torch.randn(1, 5, 20)
    expected = litconvert.load(student)(*given, encoder_hidden_states=caption).sample
    told = litconvert.load(tmp_path / "lit.pth", num_attention_heads=4, linear_kernel="focused", linear_eps=1e-4)
    assert torch.equal(told(*given, encoder_hidden_states=caption).sample, expected)
    untold = open_source(Source(path=str(tmp_path / "lit.pth"), num_attention_heads=4))
    assert [text.split(",")[0] for text in untold.reading.unsure if "does not tell" in text] == [
        "the file does not tell linear_kernel",
        "the file does not tell linear_eps",
    ]


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    _, source = original(tmp_path / "source.pth", "DiT")
    (tmp_path / ".again.pt.partial-999999999").write_text("half")
    write_layout(source, tmp_path / "again.pt", "original")
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", "again.pt"}
