"""The plan and its execution: every tensor accounted for, inherited bit by bit or fresh from seed and name."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import litconvert
from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.common.tensors import TensorInfo
from litconvert.conversion import convert as conversion
from litconvert.conversion.convert import fresh_tensor
from litconvert.conversion.plan import ConversionPlan
from litconvert.errors import LitconvertError, UsageError
from litconvert.model import modeling_lit
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import model_tensors
from litconvert.recipe.resolve import resolve
from tests.helpers.checkpoint_files import dit_shapes, dit_state, write_hollow
from tests.helpers.command import command

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMBINATIONS = ["+".join(chosen) or "none" for count in range(5) for chosen in itertools.combinations("qkvo", count)]


def written(out: Path) -> dict[str, Tensor]:
    return dict(load_file(out / WEIGHTS))


def student_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A softmax DiT in the original layout under the names of the student, Q, K and V apart."""
    names = {
        "x_embedder.proj": "x_embedder.proj",
        "t_embedder.mlp.0": "conditioning.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "conditioning.timestep_embedder.linear_2",
        "y_embedder.embedding_table": "conditioning.class_embedder",
        "final_layer.linear": "final_layer.linear",
        "final_layer.adaLN_modulation.1": "final_layer.adaLN_modulation",
    }
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, part = name.rpartition(".")
        if stem in names:
            result[f"{names[stem]}.{part}"] = value
        elif stem.endswith(".attn.qkv"):
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                result[f"{stem.removesuffix('qkv')}to_{letter}.{part}"] = rows
        elif stem.startswith("blocks."):
            stem = stem.replace("adaLN_modulation.1", "adaLN_modulation").replace(".mlp.", ".ff.")
            result[f"{stem.replace('.attn.proj', '.attn.to_out')}.{part}"] = value
    return result


def assert_adds_up(plan: ConversionPlan) -> None:
    """The groups hold each tensor of the source once, each tensor of the student once, and every parameter."""
    groups, totals = plan.groups, plan.totals
    solved = [] if plan.solve is None else ["solved"]
    assert list(groups) == ["inherited", "fresh", *solved, "recomputed", "dropped"]
    assert sum(group["source_tensors"] for group in groups.values()) == len(plan.source.checkpoint.tensors)
    assert totals["source_tensors"] == len(plan.source.checkpoint.tensors)
    stored = sum(groups[fate]["student_tensors"] for fate in ("inherited", "fresh", *solved))
    assert stored == totals["student_tensors_stored"] == len(model_tensors(plan.config))
    assert sum(group["student_tensors"] for group in groups.values()) == totals["student_tensors"] == stored + 1
    others = sum(groups[fate]["parameters"] for fate in ("fresh", *solved))
    assert groups["inherited"]["parameters"] + others == totals["student_parameters"]
    kept = sum(entry.numel for entry in plan.entries if entry.fate in ("inherited", "solved") and entry.source)
    assert kept + groups["dropped"]["parameters"] == totals["source_parameters"]
    fixed = groups["recomputed"]["parameters"]
    assert totals["student_parameters_with_pos_embed"] == totals["student_parameters"] + fixed
    assert totals["source_parameters_with_pos_embed"] == totals["source_parameters"] + fixed
    targets = [entry.target for entry in plan.entries if entry.target is not None]
    assert len(targets) == len(set(targets))


# The plan


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any reading of values fails."""

    def refuse(checkpoint: Checkpoint, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "sha256", refuse)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_the_plan_of_dit_xl_2_from_headers_alone(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"DiT-XL-2-256x256.{form}"
    if form == "pt":
        torch.save({name: torch.empty(shape, device="meta") for name, shape in dit_shapes().items()}, path)
    else:
        write_hollow(path, dit_shapes())
    plan = litconvert.plan(path, "dit-xl-2-256", ["solve=null"])
    assert plan.totals["source_tensors"] == 292
    assert plan.totals["source_parameters_with_pos_embed"] == 675_129_632
    assert plan.totals["student_parameters"] == 675_044_384
    assert plan.totals["student_parameters_with_pos_embed"] == 675_339_296
    assert_adds_up(plan)
    width, layers = 1152, 28
    groups = plan.groups
    assert groups["inherited"]["source_tensors"] == groups["inherited"]["student_tensors"] == 292 - 1 - 4 * layers
    assert (groups["fresh"]["source_tensors"], groups["fresh"]["student_tensors"]) == (0, 10 * layers)
    assert (groups["recomputed"]["source_tensors"], groups["recomputed"]["student_tensors"]) == (1, 1)
    assert (groups["dropped"]["source_tensors"], groups["dropped"]["student_tensors"]) == (4 * layers, 0)
    assert groups["dropped"]["parameters"] == layers * 4 * (width * width + width)
    assert groups["fresh"]["parameters"] == layers * (4 * (width * width + width) + 26 * width // 4)
    assert groups["recomputed"]["parameters"] == 256 * width
    assert plan.totals["student_bytes"] == 4 * plan.totals["student_parameters"]
    assert [row["image_size"] for row in plan.macs] == [256, 512, 1024, 2048]
    assert [row["tokens"] for row in plan.macs] == [256, 1024, 4096, 16384]
    assert [row["ratio"] for row in plan.macs] == pytest.approx([0.99, 1.10, 1.53, 3.23], abs=0.02)
    # DiT's paper counts 118.64 GFLOPs, meaning multiply-accumulates, at 256px and 524.60 at 512px.
    assert plan.macs[0]["source_macs"] == pytest.approx(118.64e9, rel=0.005)
    assert plan.macs[1]["source_macs"] == pytest.approx(524.60e9, rel=0.005)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(
    ("recipe", "width", "layers", "heads", "parameters"),
    [
        ("dit-s-2-256", 384, 12, 2, 32_963_360),
        ("dit-b-2-256", 768, 12, 3, 130_512_416),
        ("dit-l-2-256", 1024, 24, 4, 458_102_816),
    ],
)
def test_the_other_sizes_gain_26_parameters_a_head_channel_and_layer(
    tmp_path: Path, recipe: str, width: int, layers: int, heads: int, parameters: int
) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", dit_shapes(width=width, layers=layers))
    plan = litconvert.plan(path, recipe)
    assert plan.totals["source_parameters_with_pos_embed"] == parameters
    assert plan.totals["student_parameters_with_pos_embed"] == parameters + layers * 26 * width // heads
    assert_adds_up(plan)


@pytest.mark.usefixtures("no_values")
def test_a_stranger_s_size_of_latent_is_planned_at_its_own_sizes(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", dit_shapes(sample_size=64))
    plan = litconvert.plan(path, "dit-xl-2-512")
    assert plan.config.sample_size == 64
    assert plan.groups["recomputed"]["parameters"] == 1024 * 1152


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("attention", COMBINATIONS)
def test_every_combination_of_inherited_projections_adds_up(
    pico_checkpoint: Path, pico_recipe: Path, attention: str
) -> None:
    plan = litconvert.plan(pico_checkpoint, str(pico_recipe), [f"inherit.attention={attention}"])
    assert_adds_up(plan)
    letters = attention.replace("none", "")
    inherited = {entry.target for entry in plan.entries if entry.fate == "inherited"}
    for letter, projection in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}.items():
        for layer, part in itertools.product((0, 1), ("weight", "bias")):
            assert (f"blocks.{layer}.attn.{projection}.{part}" in inherited) == (letter in letters)
    # A fused tensor of which any row is inherited counts as inherited on the source's side.
    fused, output = set(letters) & set("qkv"), "o" in letters
    expected = (0 if fused else 4) + (0 if output else 4)
    assert plan.groups["dropped"]["source_tensors"] == expected


@pytest.mark.usefixtures("no_values")
def test_the_plan_names_the_rows_and_the_copies_behind_a_tensor(tmp_path: Path, pico_checkpoint: Path) -> None:
    plan = litconvert.plan(
        pico_checkpoint,
        "digits",
        [
            "source={num_attention_heads: 2}",
            "student.num_attention_heads=2",
            "inherit.attention=k",
            "student.dtype=null",
            "solve=null",
        ],
    )
    entry = next(entry for entry in plan.entries if entry.target == "blocks.1.attn.to_k.weight")
    assert (entry.fate, entry.source, entry.rows) == ("inherited", "blocks.1.attn.qkv.weight", (32, 64))
    dropped = [entry for entry in plan.entries if entry.fate == "dropped" and entry.source == entry.copies[0]]
    assert {entry.rows for entry in dropped if entry.source == "blocks.1.attn.qkv.weight"} == {(0, 32), (64, 96)}


def test_plan_prints_both_counts_and_as_json_everything(pico_checkpoint: Path, pico_recipe: Path) -> None:
    shown = command("plan", pico_checkpoint, "--recipe", pico_recipe, "--tensors")
    assert shown.code == 0
    made = litconvert.plan(pico_checkpoint, str(pico_recipe))
    for key in ("source", "student"):
        for suffix in ("", "_with_pos_embed"):
            assert f"{made.totals[f'{key}_parameters{suffix}']:,}" in shown.out
    data = json.loads(command("plan", pico_checkpoint, "--recipe", pico_recipe, "--json").out)
    assert data == json.loads(json.dumps(made.to_json()))
    assert len(data["tensors"]) == len(made.entries)


def test_the_student_s_shape_is_checked_in_the_plan(pico_checkpoint: Path, pico_recipe: Path) -> None:
    litconvert.plan(pico_checkpoint, str(pico_recipe), ["student.num_attention_heads=4", "student.softmax_layers=[1]"])
    with pytest.raises(UsageError, match=r"student\.num_attention_heads=3 does not divide the width 32"):
        litconvert.plan(pico_checkpoint, str(pico_recipe), ["student.num_attention_heads=3"])
    with pytest.raises(UsageError, match=r"names layer 2, but the source has layers 0 to 1"):
        litconvert.plan(pico_checkpoint, str(pico_recipe), ["student.softmax_layers=[2]"])


def test_a_students_linear_layers_go_on_as_they_are(tmp_path: Path, pico_student: Path, pico_recipe: Path) -> None:
    """At another size, too: a student of one resolution is where that of the next begins."""
    resized = ["source={sample_size: 16}"]
    plan = litconvert.plan(pico_student, str(pico_recipe), resized)
    assert {entry.fate for entry in plan.entries if entry.target != "pos_embed"} == {"inherited"}
    out = litconvert.convert(pico_student, tmp_path / "larger", str(pico_recipe), resized)
    before, after = litconvert.load(pico_student), litconvert.load(out)
    assert (before.config.sample_size, after.config.sample_size) == (8, 16)
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)
    with pytest.raises(UsageError, match=r"go on with its own \(--set student\.num_attention_heads=2\)"):
        litconvert.plan(pico_student, str(pico_recipe), ["source={}", "student.num_attention_heads=4"])


def test_no_source_is_refused(pico_recipe: Path) -> None:
    with pytest.raises(UsageError, match="no source is named: give SRC"):
        litconvert.plan(None, str(pico_recipe))


# What is inherited


@pytest.mark.parametrize("attention", COMBINATIONS)
def test_inherited_tensors_are_bit_equal_to_their_source(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_state: dict[str, Tensor], attention: str
) -> None:
    out = litconvert.convert(pico_checkpoint, tmp_path / "out", str(pico_recipe), [f"inherit.attention={attention}"])
    plan = litconvert.plan(pico_checkpoint, str(pico_recipe), [f"inherit.attention={attention}"])
    expected, found = student_of(pico_state), written(out)
    assert set(found) == {entry.target for entry in plan.entries if entry.fate in ("inherited", "fresh")}
    for entry in plan.entries:
        if entry.fate == "inherited":
            assert torch.equal(found[str(entry.target)], expected[str(entry.target)])
        elif entry.fate == "fresh" and entry.target in expected:
            assert not torch.equal(found[entry.target], expected[entry.target])


def test_diffusers_and_our_own_layout_are_inherited_bit_by_bit_too(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_state: dict[str, Tensor]
) -> None:
    expected = student_of(pico_state)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
    )
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    state: dict[str, Tensor] = {}
    for name, value in expected.items():
        stem, _, part = name.rpartition(".")
        if stem.startswith("conditioning."):
            inner = stem.removeprefix("conditioning.").replace("class_embedder", "class_embedder.embedding_table")
            state |= {f"transformer_blocks.{layer}.norm1.emb.{inner}.{part}": value for layer in (0, 1)}
            continue
        stem = (
            renamed.get(stem, stem).replace("blocks.", "transformer_blocks.").replace(".attn.to_out", ".attn1.to_out.0")
        )
        stem = stem.replace(".attn.", ".attn1.").replace(".adaLN_modulation", ".norm1.linear")
        state[f"{stem.replace('.ff.fc1', '.ff.net.0.proj').replace('.ff.fc2', '.ff.net.2')}.{part}"] = value
    theirs.load_state_dict(state, strict=True)
    theirs.save_pretrained(tmp_path / "diffusers")
    litconvert.load(pico_checkpoint, num_attention_heads=2).save_pretrained(tmp_path / "ours")
    for name in ("diffusers", "ours"):
        settings = ["source={}", "inherit.attention=all"]
        out = litconvert.convert(tmp_path / name, tmp_path / f"{name}-student", str(pico_recipe), settings)
        found = written(out)
        for key, value in expected.items():
            assert torch.equal(found[key], value)
        assert_adds_up(litconvert.plan(tmp_path / name, str(pico_recipe), settings))


def test_the_choice_of_weights_decides_what_is_inherited(
    tmp_path: Path, training_checkpoint: Path, pico_recipe: Path
) -> None:
    for weights, seed in {"auto": 2, "ema": 2, "model": 1}.items():
        out = litconvert.convert(
            training_checkpoint, tmp_path / weights, str(pico_recipe), [f"inherit.weights={weights}"]
        )
        expected = student_of(dit_state(seed=seed))
        assert torch.equal(written(out)["blocks.0.ff.fc1.weight"], expected["blocks.0.ff.fc1.weight"])
        recorded = json.loads((out / "litconvert.json").read_text())["source"]["weights"]
        assert recorded == ("model" if weights == "model" else "ema")


def test_kept_softmax_layers_inherit_all_their_attention(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_state: dict[str, Tensor]
) -> None:
    out = litconvert.convert(pico_checkpoint, tmp_path / "out", str(pico_recipe), ["student.softmax_layers=[1]"])
    expected, found = student_of(pico_state), written(out)
    kept = [name for name in found if name.startswith("blocks.1.")]
    assert sorted(kept) == sorted(name for name in expected if name.startswith("blocks.1."))
    assert all(torch.equal(found[name], expected[name]) for name in kept)
    assert "blocks.0.attn.dwc.weight" in found
    assert litconvert.load(out).config.attention == ["linear", "softmax"]


def test_a_conversion_that_keeps_every_layer_is_the_source_itself(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    settings = ["student.softmax_layers=[0, 1]"]
    out = litconvert.convert(pico_checkpoint, tmp_path / "out", str(pico_recipe), settings)
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 4]))
    with torch.no_grad():
        before = litconvert.load(pico_checkpoint, num_attention_heads=2)(*inputs).sample
        assert torch.equal(litconvert.load(out)(*inputs).sample, before)
    assert litconvert.plan(pico_checkpoint, str(pico_recipe), settings).groups["fresh"]["student_tensors"] == 0


# What is fresh


def fresh(out: Path) -> dict[str, Tensor]:
    return {name: value for name, value in written(out).items() if ".attn." in name}


def test_fresh_tensors_are_a_function_of_seed_and_name_alone(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    def converted(name: str, *overrides: str) -> dict[str, Tensor]:
        return fresh(litconvert.convert(pico_checkpoint, tmp_path / name, str(pico_recipe), overrides))

    first = converted("first")
    torch.manual_seed(123)
    again = converted("again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    fewer = converted("fewer", "inherit.attention=q+o", "student.softmax_layers=[0]")
    for name in ("blocks.1.attn.to_k.weight", "blocks.1.attn.to_v.weight", "blocks.1.attn.dwc.weight"):
        assert torch.equal(first[name], fewer[name])
    other = converted("other", "seed=1")
    drawn = [name for name in first if name.endswith("weight") or ".dwc." in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    values = [tuple(first[name].flatten()[:4].tolist()) for name in drawn]
    assert len(set(values)) == len(values)


def test_fresh_tensors_do_not_depend_on_the_order_in_which_they_are_made() -> None:
    infos = {f"blocks.{layer}.attn.to_q.weight": TensorInfo((8, 8), torch.float32) for layer in range(4)}
    forwards = {name: fresh_tensor(name, info, 0, 5) for name, info in infos.items()}
    backwards = {name: fresh_tensor(name, infos[name], 0, 5) for name in reversed(infos)}
    assert all(torch.equal(forwards[name], backwards[name]) for name in infos)


@pytest.mark.parametrize("conv_size", [0, 3, 5, 7])
def test_fresh_tensors_start_as_the_paper_s_do(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, conv_size: int
) -> None:
    settings = [f"student.conv_size={conv_size}"]
    found = fresh(litconvert.convert(pico_checkpoint, tmp_path / "out", str(pico_recipe), settings))
    for name, value in found.items():
        if ".dwc." in name:
            # Conv2d's default: uniform in 1 / sqrt(fan in), and a depth-wise filter's fan in is k x k.
            bound = 1 / conv_size
        elif name.endswith("bias"):
            assert not value.any()
            continue
        else:
            bound = math.sqrt(6 / sum(value.shape))  # Xavier, uniform
        assert value.abs().max() <= bound
        if value.numel() > 100:
            assert value.abs().max() > 0.95 * bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    dwc = {name: tuple(value.shape) for name, value in found.items() if ".dwc." in name}
    if conv_size == 0:
        assert dwc == {}
    else:
        assert dwc["blocks.0.attn.dwc.weight"] == (16, 1, conv_size, conv_size)
        assert found["blocks.0.attn.dwc.bias"].any()


# What is written


def test_a_model_directory_has_all_that_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    out = litconvert.convert("pico.pt", "student", "pico.yaml", ["seed=3"])
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", WEIGHTS, "modeling_lit.py", "recipe.yaml", "litconvert.json"]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["_class_name"] == "LiTTransformer2DModel"
    assert config["auto_map"] == {"AutoModel": "modeling_lit.LiTTransformer2DModel"}
    assert config["attention"] == ["linear", "linear"]
    assert (out / "modeling_lit.py").read_text() == Path(modeling_lit.__file__).read_text()
    record = json.loads((out / "litconvert.json").read_text())
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "litconvert": record["digest"]}
    made = litconvert.plan("pico.pt", "pico.yaml", ["seed=3"])
    assert record["plan"]["groups"] == made.groups
    assert record["plan"]["totals"] == made.totals
    assert record["seed"] == 3
    assert record["source"]["sha256"] == made.source.checkpoint.sha256()
    assert (record["source"]["family"], record["source"]["layout"]) == ("dit", "original")
    # Found again from any folder.
    recipe = resolve(str(out)).recipe
    assert recipe.source.path == record["source"]["path"] == str(pico_checkpoint.resolve())
    assert recipe.student == resolve("pico.yaml").recipe.student


def test_a_local_teacher_is_recorded_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.pt").write_bytes(pico_checkpoint.read_bytes())
    teachers = {"large.pt": str(tmp_path / "large.pt"), "owner/name": "owner/name"}
    for given, recorded in teachers.items():
        out = litconvert.convert("pico.pt", f"student-{given[:2]}", "pico.yaml", [f"distill.teacher.path={given}"])
        teacher = resolve(str(out)).recipe.distill.teacher
        assert teacher is not None
        assert teacher.path == recorded


def snapshot(out: Path) -> dict[str, tuple[int, int, bytes]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}


def test_the_same_conversion_again_touches_nothing(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    out = tmp_path / "out"
    litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    before = snapshot(out)
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(pico_checkpoint.read_bytes())
    for source in (pico_checkpoint, copy):
        litconvert.convert(source, out, str(pico_recipe))
        assert snapshot(out) == before


@pytest.mark.parametrize(
    "override",
    ["seed=1", "student.conv_size=5", "inherit.attention=q", "student.dtype=float16", "source.license.id=mit"],
)
def test_other_inputs_are_refused_and_force_replaces(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, override: str
) -> None:
    out = tmp_path / "out"
    litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    before = snapshot(out)
    with pytest.raises(LitconvertError, match=rf"other inputs \({override.partition('=')[0]} was .* --force"):
        litconvert.convert(pico_checkpoint, out, str(pico_recipe), [override])
    assert snapshot(out) == before
    litconvert.convert(pico_checkpoint, out, str(pico_recipe), [override], force=True)
    assert snapshot(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pico.pt", "pico.yaml"]


def test_a_directory_that_lost_a_file_is_not_taken_for_done(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    out = tmp_path / "out"
    litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    (out / WEIGHTS).unlink()
    with pytest.raises(LitconvertError, match=r"out is incomplete: .*--force"):
        litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    litconvert.convert(pico_checkpoint, out, str(pico_recipe), force=True)
    assert (out / WEIGHTS).is_file()


def test_another_source_is_another_input(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    out = tmp_path / "out"
    litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    torch.save(dit_state(seed=9), pico_checkpoint)
    with pytest.raises(LitconvertError, match=r"other inputs \(the source's file\)"):
        litconvert.convert(pico_checkpoint, out, str(pico_recipe))


def test_the_source_is_never_replaced(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    for out in (tmp_path, pico_checkpoint):
        with pytest.raises(UsageError, match="is the source itself, or holds it"):
            litconvert.convert(pico_checkpoint, out, str(pico_recipe), force=True)
    assert pico_checkpoint.is_file()
    litconvert.convert(pico_checkpoint, tmp_path / "out", str(pico_recipe), force=True)


def test_dry_run_writes_nothing_and_says_so(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    before = sorted(tmp_path.iterdir())
    arguments: Sequence[object] = ("convert", pico_checkpoint, tmp_path / "a" / "out", "--recipe", pico_recipe)
    shown = command(*arguments, "--dry-run")
    assert shown.code == 0
    assert "nothing written (--dry-run)" in shown.err
    assert sorted(tmp_path.iterdir()) == before
    data = json.loads(command(*arguments, "--dry-run", "--json", "-q").out)
    assert data["out"] is None
    assert sorted(tmp_path.iterdir()) == before
    done = command(*arguments, "--json", "-q")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["out"] == str(tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / WEIGHTS).is_file()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_conversion_that_fails_midway_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pico_checkpoint: Path,
    pico_recipe: Path,
    failure: BaseException,
) -> None:
    out, calls = tmp_path / "out", list[str]()

    def fail(name: str, *arguments: Any) -> Tensor:
        calls.append(name)
        if len(calls) == 5:
            raise failure
        return fresh_tensor(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "fresh_tensor", fail)
        expected = LitconvertError if isinstance(failure, OSError) else type(failure)
        with pytest.raises(expected, match="the disk is full" if isinstance(failure, OSError) else None):
            litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pico.pt", "pico.yaml"]
    litconvert.convert(pico_checkpoint, out, str(pico_recipe))
    before = snapshot(out)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "fresh_tensor", fail)
        with pytest.raises(expected):
            litconvert.convert(pico_checkpoint, out, str(pico_recipe), ["seed=1"], force=True)
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pico.pt", "pico.yaml"]


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_output_and_the_next_one_cleans_up(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    script = (
        "import os, signal, sys, litconvert\n"
        "from litconvert.common.listener import Listener, Task\n"
        "seen = []\n"
        "class Killing(Listener, Task):\n"
        "    def task(self, name, total): return self\n"
        "    def advance(self, count=1, remark=''):\n"
        "        seen.append(count)\n"
        "        if len(seen) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "litconvert.convert(sys.argv[1], sys.argv[2], sys.argv[3], listener=Killing())\n"
    )
    arguments = [str(pico_checkpoint), str(tmp_path / "out"), str(pico_recipe)]
    outcome = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert outcome.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("pico.pt", "pico.yaml")]
    assert len(left) == 2, "its folder and its lock"
    assert all(name.startswith(".out.partial-") for name in left)
    litconvert.convert(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pico.pt", "pico.yaml"]


def test_a_student_loads_here_and_in_diffusers_with_the_same_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_student: Path
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 4]))
    models = [
        litconvert.load(pico_student),
        LiTTransformer2DModel.from_pretrained(pico_student),
        AutoModel.from_pretrained(str(pico_student), trust_remote_code=True),
    ]
    assert type(models[2]) is not LiTTransformer2DModel
    with torch.no_grad():
        outputs = [model(*inputs).sample for model in models]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert outputs[0].abs().max() > 0


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_the_student_s_dtype_is_the_source_s_unless_the_recipe_says_otherwise(
    tmp_path: Path, pico_recipe: Path, pico_state: dict[str, Tensor], name: str
) -> None:
    dtype: torch.dtype = getattr(torch, name)
    source = tmp_path / "source.safetensors"
    save_file({key: value.to(dtype) for key, value in pico_state.items()}, source)
    kept = written(litconvert.convert(source, tmp_path / "kept", str(pico_recipe)))
    assert {value.dtype for value in kept.values()} == {dtype}
    save_file(pico_state, source)
    cast = written(litconvert.convert(source, tmp_path / "cast", str(pico_recipe), [f"student.dtype={name}"]))
    assert {value.dtype for value in cast.values()} == {dtype}
    assert kept.keys() == cast.keys()
    assert all(torch.equal(kept[key], cast[key]) for key in kept)


def test_a_cast_that_overflows_is_refused(tmp_path: Path, pico_recipe: Path, pico_state: dict[str, Tensor]) -> None:
    pico_state["blocks.0.mlp.fc1.weight"][0, 0] = 70_000.0
    torch.save(pico_state, tmp_path / "large.pt")
    litconvert.convert(tmp_path / "large.pt", tmp_path / "brain", str(pico_recipe), ["student.dtype=bfloat16"])
    with pytest.raises(LitconvertError, match=r"blocks\.0\.ff\.fc1\.weight holds values up to 7e\+04, beyond float16"):
        litconvert.convert(tmp_path / "large.pt", tmp_path / "half", str(pico_recipe), ["student.dtype=float16"])
    assert not (tmp_path / "half").exists()


def test_a_double_source_needs_a_dtype(tmp_path: Path, pico_recipe: Path, pico_state: dict[str, Tensor]) -> None:
    torch.save({name: value.double() for name, value in pico_state.items()}, tmp_path / "double.pt")
    with pytest.raises(UsageError, match=r"is float64; set student\.dtype=float32"):
        litconvert.convert(tmp_path / "double.pt", tmp_path / "out", str(pico_recipe))
    out = litconvert.convert(tmp_path / "double.pt", tmp_path / "out", str(pico_recipe), ["student.dtype=float32"])
    assert {value.dtype for value in written(out).values()} == {torch.float32}


# inspect


def test_inspect_says_what_a_checkpoint_is(training_checkpoint: Path) -> None:
    shown = command("inspect", training_checkpoint, "--num-attention-heads", 2, "--weights", "--json")
    assert shown.code == 0
    facts = json.loads(shown.out)
    assert (facts["family"], facts["layout"], facts["weights"], facts["sets"]) == (
        "dit",
        "original",
        "ema",
        ["ema", "model"],
    )
    assert facts["tensors"] == 2 * 10 + 12
    assert facts["values"]["facts"][0].startswith("every value is finite")
    assert facts["values"]["odd"] == facts["values"]["broken"] == []
    assert len(facts["unsure"]) == 2
    assert "DiT, original layout" in command("inspect", training_checkpoint, "--num-attention-heads", 2).out


@pytest.mark.parametrize(
    ("zeroed", "remark"),
    [
        (r"final_layer\.linear\.weight", "1 other weights are all zero (final_layer.linear.weight)"),
        (r".*adaLN_modulation\.1\.weight", "the modulation of 3 layers is all zero (blocks.0.adaLN_modulation.weight)"),
    ],
)
def test_inspect_names_what_is_all_zero(
    tmp_path: Path, pico_state: dict[str, Tensor], zeroed: str, remark: str
) -> None:
    for name in pico_state:
        if re.fullmatch(zeroed, name):
            pico_state[name].zero_()
    torch.save(pico_state, tmp_path / "untrained.pt")
    shown = command("inspect", tmp_path / "untrained.pt", "--num-attention-heads", 2, "--weights", "--json")
    assert shown.code == 0
    assert remark in json.loads(shown.out)["values"]["odd"][0]


def test_inspect_names_everything_that_is_broken_and_fails(tmp_path: Path, pico_state: dict[str, Tensor]) -> None:
    pico_state["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    pico_state["blocks.1.mlp.fc2.bias"][3] = float("inf")
    pico_state["pos_embed"] += 0.1
    torch.save(pico_state, tmp_path / "broken.pt")
    shown = command("inspect", tmp_path / "broken.pt", "--num-attention-heads", 2, "--weights", "--json")
    assert shown.code == 1
    broken = json.loads(shown.out)["values"]["broken"]
    for name, text in zip(("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.bias"), broken, strict=True):
        assert name in text
    assert "cannot be used" in shown.err


def test_inspect_says_that_an_ema_was_never_updated(tmp_path: Path, training_checkpoint: Path) -> None:
    def odd(path: Path) -> list[str]:
        shown = command("inspect", path, "--num-attention-heads", 2, "--weights", "--json")
        return list(json.loads(shown.out)["values"]["odd"])

    assert odd(training_checkpoint) == []
    state = dit_state()
    torch.save({"model": state, "ema": {name: value.clone() for name, value in state.items()}}, tmp_path / "equal.pt")
    assert "the EMA equals the raw weights" in odd(tmp_path / "equal.pt")[0]


def test_an_asset_tells_what_its_file_does_not_and_which_recipe_is_its_own(tmp_path: Path) -> None:
    shown = json.loads(command("inspect", "asset:dit-digits", "--json").out)
    assert (shown["config"]["num_attention_heads"], shown["config"]["sample_size"], shown["unsure"]) == (6, 16, [])
    told = litconvert.load("asset:dit-digits", recipe="digits")
    assert litconvert.load("asset:dit-digits").config == told.config
    # What is given wins.
    assert litconvert.load("asset:dit-digits", num_attention_heads=3).config.num_attention_heads == 3
    student = litconvert.convert("asset:dit-digits", tmp_path / "student", overrides=["solve=null"])
    by_name = litconvert.plan(None, "digits")
    assert litconvert.plan("asset:dit-digits").recipe_name == "digits"
    recorded = resolve(str(student)).recipe
    assert (recorded.student, recorded.distill) == (by_name.recipe.student, by_name.recipe.distill)
    assert recorded.source.license == by_name.recipe.source.license
    assert command("convert", "asset:dit-digits", tmp_path / "by-command", "--no-solve", "-q").code == 0
    # Another file of the same tensors is asked for.
    weights = Path(litconvert.__file__).parent / "assets" / "dit-digits.safetensors"
    with pytest.raises(UsageError, match="sample_size=N"):
        litconvert.plan(weights)


def test_without_a_recipe_the_packaged_one_for_the_source_is_taken(tmp_path: Path) -> None:
    from tests.helpers.checkpoint_files import pixart_shapes

    path = write_hollow(tmp_path / "sigma.safetensors", pixart_shapes(sample_size=128))
    plan = litconvert.plan(path)
    assert plan.recipe.distill.stages[0].steps == 66_666
    assert plan.recipe.source.path == str(path)
    assert plan.totals["student_parameters"] == 610_856_096 + 28 * 26 * 1152 // 4
    assert (plan.recipe_name, plan.to_json()["recipe"]) == ("pixart-sigma-1024", "pixart-sigma-1024")
    assert "recipe: pixart-sigma-1024" in command("plan", path).out
    assert (
        plan.source.reading.because == litconvert.plan(path, "pixart-sigma-512", ["source={}"]).source.reading.because
    )
    other = write_hollow(tmp_path / "odd.safetensors", dit_shapes(layers=1, sample_size=48))
    assert litconvert.plan(other).recipe.distill.stages == ()
    assert "recipe: none, the defaults" in command("plan", other).out
    # Its stages may be changed; the defaults have none.
    assert litconvert.plan(path, overrides=["distill.stages.0.steps=7"]).recipe.distill.stages[0].steps == 7
    for overrides in (["distill.stages.0.steps=7"], ["student.conv_siz=3"], ["seed"]):
        with pytest.raises(UsageError, match="--set"):
            litconvert.plan(other, overrides=overrides)
    # The packaged recipe's hints are of the released checkpoint, not of one fine-tuned on ten classes.
    tuned = write_hollow(tmp_path / "tuned.safetensors", dit_shapes(width=384, layers=12, rows=11))
    assert litconvert.plan(tuned).config.num_classes == 10
    assert litconvert.plan(tuned).recipe_name == "dit-s-2-256"
