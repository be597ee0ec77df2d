"""What the families promise: a checkpoint, in whatever layout, computes what its own code computes, or is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import open_source
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Source
from tests.helpers.checkpoint_files import dit_shapes, dit_state, write_hollow

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOISY = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TIMESTEP = torch.tensor([0, 500, 999])
LABELS = torch.tensor([0, 3, 4])


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """The model's output on fixed inputs, the null class among the labels."""
    result: Tensor = model(NOISY, TIMESTEP, class_labels=LABELS).sample
    return result


@pytest.fixture(scope="module")
def theirs() -> DiTTransformer2DModel:
    """A pico DiT of diffusers: every tensor random, adaLN too, and the embedders the same in every block."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def as_trained(theirs: DiTTransformer2DModel) -> Tensor:
    """Its output under the convention that DiT's weights were trained with: no timestep shift, eps 1e-6."""
    blocks = theirs.transformer_blocks
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    result = output(theirs)
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
        block.norm3.eps = 1e-5
    return result


def as_folder(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    model.save_pretrained(folder)
    return folder, {}


def as_shards(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, {}


def as_bin(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    model.save_pretrained(folder, safe_serialization=False)
    assert not list(folder.glob("*.safetensors"))
    return folder, {}


def as_bin_shards(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    model.save_pretrained(folder, safe_serialization=False, max_shard_size="20KB")
    assert len(list(folder.glob("*.bin"))) > 3
    return folder, {}


def as_pipeline(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (folder / "vae").mkdir()
    (folder / "vae" / WEIGHTS).write_bytes(b"not read")
    return folder, {}


def as_file(model: DiTTransformer2DModel, folder: Path) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    save_file(model.state_dict(), folder / "dit.safetensors")
    return folder / "dit.safetensors", {"num_attention_heads": 2, "sample_size": 8}


FORMS = [as_folder, as_shards, as_bin, as_bin_shards, as_pipeline, as_file]
Form = Callable[[DiTTransformer2DModel, Path], tuple[Path, dict[str, Any]]]


def original_layout(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """The weights of diffusers' model under the names of facebookresearch/DiT, Q, K and V fused."""
    theirs = model.state_dict()
    emb = "transformer_blocks.0.norm1.emb"
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{emb}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{emb}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for index in range(len(model.transformer_blocks)):
        ours, block = f"blocks.{index}", f"transformer_blocks.{index}"
        renamed |= {
            f"{ours}.adaLN_modulation.1": f"{block}.norm1.linear",
            f"{ours}.attn.proj": f"{block}.attn1.to_out.0",
            f"{ours}.mlp.fc1": f"{block}.ff.net.0.proj",
            f"{ours}.mlp.fc2": f"{block}.ff.net.2",
        }
    state = {
        f"{ours}.{part}": theirs[f"{name}.{part}"] for ours, name in renamed.items() for part in ("weight", "bias")
    }
    state["y_embedder.embedding_table.weight"] = theirs[f"{emb}.class_embedder.embedding_table.weight"]
    state["pos_embed"] = model.pos_embed.pos_embed.clone()
    for index in range(len(model.transformer_blocks)):
        for part in ("weight", "bias"):
            fused = [theirs[f"transformer_blocks.{index}.attn1.to_{one}.{part}"] for one in "qkv"]
            state[f"blocks.{index}.attn.qkv.{part}"] = torch.cat(fused)
    return state


# The original layout


@pytest.mark.parametrize(("weights", "oracle"), [(None, "out_ema"), ("ema", "out_ema"), ("model", "out_model")])
def test_the_real_checkpoint_reproduces_the_original_code(shared: Path, weights: str | None, oracle: str) -> None:
    recorded = load_file(shared / "dit-digits.oracle.safetensors")
    model = litconvert.load(shared / "dit-digits.pt", weights=weights, num_attention_heads=6)
    with torch.no_grad():
        result = model(recorded["x"], recorded["t"], class_labels=recorded["y"]).sample
    assert (result - recorded[oracle]).abs().max() <= 1e-5
    # The two sets of weights are far enough apart to be told from each other.
    assert (recorded["out_ema"] - recorded["out_model"]).abs().max() > 1e-3


def test_an_unknown_width_asks_for_the_heads_and_says_why(shared: Path) -> None:
    with pytest.raises(UsageError, match=r"width 192 is none of the published sizes.*num_attention_heads=N") as caught:
        litconvert.load(shared / "dit-digits.pt")
    assert "--num-attention-heads" in str(caught.value)
    assert litconvert.load(shared / "dit-digits.pt", num_attention_heads=6).config.num_attention_heads == 6


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_the_published_widths_tell_their_heads(tmp_path: Path, width: int, heads: int) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", dit_shapes(width=width, layers=1))
    config = open_source(Source(path=str(path))).config.values
    assert config["num_attention_heads"] == heads
    assert config["hidden_size"] == width
    assert (config["sample_size"], config["num_classes"], config["null_class"]) == (32, 1000, True)
    assert (config["in_channels"], config["out_channels"], config["mlp_ratio"]) == (4, 8, 4.0)


def test_heads_that_do_not_divide_the_width_are_refused(pico_checkpoint: Path) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=4)
    with pytest.raises(UsageError, match="num_attention_heads=3 does not divide the width 32"):
        litconvert.load(pico_checkpoint, num_attention_heads=3)


def test_the_original_layout_equals_the_same_weights_in_diffusers(
    tmp_path: Path, theirs: DiTTransformer2DModel, as_trained: Tensor
) -> None:
    torch.save(original_layout(theirs), tmp_path / "dit.pt")
    model = litconvert.load(tmp_path / "dit.pt", num_attention_heads=2)
    assert not model.training
    assert (output(model) - as_trained).abs().max() <= 1e-5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "base_model.", "module._orig_mod."])
def test_wrapper_prefixes_are_taken_off(tmp_path: Path, pico_state: dict[str, Tensor], prefix: str) -> None:
    torch.save(pico_state, tmp_path / "plain.pt")
    torch.save({prefix + name: value for name, value in pico_state.items()}, tmp_path / "wrapped.pt")
    plain, wrapped = (litconvert.load(tmp_path / f"{name}.pt", num_attention_heads=2) for name in ("plain", "wrapped"))
    assert torch.equal(output(plain), output(wrapped))


def test_a_prefix_of_some_keys_only_is_no_wrapper(tmp_path: Path, pico_state: dict[str, Tensor]) -> None:
    pico_state["net.t_embedder.mlp.0.weight"] = pico_state.pop("t_embedder.mlp.0.weight")
    torch.save(pico_state, tmp_path / "odd.pt")
    with pytest.raises(LitconvertError, match=r"t_embedder\.mlp\.0\.weight is missing"):
        litconvert.load(tmp_path / "odd.pt", num_attention_heads=2)


def test_a_training_checkpoint_gives_its_ema_unless_told_otherwise(training_checkpoint: Path) -> None:
    hints: dict[str, Any] = {"num_attention_heads": 2}
    seeds = {"model": 1, "ema": 2}
    expected = {}
    for name, seed in seeds.items():
        torch.save(dit_state(seed=seed), training_checkpoint.with_name(f"{name}.pt"))
        expected[name] = output(litconvert.load(training_checkpoint.with_name(f"{name}.pt"), **hints))
    assert torch.equal(output(litconvert.load(training_checkpoint, **hints)), expected["ema"])
    for name in seeds:
        assert torch.equal(output(litconvert.load(training_checkpoint, weights=name, **hints)), expected[name])
    opened = open_source(Source(path=str(training_checkpoint), num_attention_heads=2))
    assert (opened.checkpoint.weights, opened.checkpoint.sets) == ("ema", ("ema", "model"))


def test_a_choice_where_there_is_none_is_refused(tmp_path: Path, pico_checkpoint: Path) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=2)
    with pytest.raises(UsageError, match="one set of weights"):
        litconvert.load(pico_checkpoint, weights="ema", num_attention_heads=2)
    torch.save({"model": dit_state(), "opt": {}}, tmp_path / "raw.pt")
    assert litconvert.load(tmp_path / "raw.pt", num_attention_heads=2) is not None
    with pytest.raises(UsageError, match=r"one set of weights \(model\)"):
        litconvert.load(tmp_path / "raw.pt", weights="ema", num_attention_heads=2)


def test_a_state_dict_under_its_usual_name_is_read(tmp_path: Path, pico_state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": pico_state, "epoch": 3}, tmp_path / "wrapped.pth")
    assert litconvert.load(tmp_path / "wrapped.pth", num_attention_heads=2).config.num_layers == 2


def test_a_class_table_without_a_null_class(pico_checkpoint: Path) -> None:
    guided = litconvert.load(pico_checkpoint, num_attention_heads=2)
    assert (guided.config.num_classes, guided.config.null_class) == (4, True)
    plain = litconvert.load(pico_checkpoint, num_attention_heads=2, num_classes=5)
    assert (plain.config.num_classes, plain.config.null_class) == (5, False)
    assert torch.equal(output(guided), output(plain))
    with pytest.raises(UsageError, match=r"the class table has 5 rows; give 4 .* or 5"):
        litconvert.load(pico_checkpoint, num_attention_heads=2, num_classes=7)


def test_no_position_embedding_asks_for_the_size(tmp_path: Path, pico_state: dict[str, Tensor]) -> None:
    torch.save(pico_state, tmp_path / "with.pt")
    del pico_state["pos_embed"]
    torch.save(pico_state, tmp_path / "without.pt")
    with pytest.raises(UsageError, match="--sample-size N"):
        litconvert.load(tmp_path / "without.pt", num_attention_heads=2)
    models = [
        litconvert.load(tmp_path / "with.pt", num_attention_heads=2),
        litconvert.load(tmp_path / "without.pt", num_attention_heads=2, sample_size=8),
    ]
    assert torch.equal(output(models[0]), output(models[1]))
    with pytest.raises(UsageError, match="sample_size=16, but pos_embed has 16 positions, so it is 8"):
        litconvert.load(tmp_path / "with.pt", num_attention_heads=2, sample_size=16)


def test_a_trained_position_embedding_is_refused(tmp_path: Path, pico_state: dict[str, Tensor]) -> None:
    pico_state["pos_embed"] += 0.01
    torch.save(pico_state, tmp_path / "trained.pt")
    with pytest.raises(LitconvertError, match=r"pos_embed differs from the fixed sine-cosine embedding by 0\.01"):
        litconvert.load(tmp_path / "trained.pt", num_attention_heads=2)


@pytest.mark.parametrize("shape", [(16, 32), (1, 16, 30), (1, 15, 32), (2, 16, 32)])
def test_a_misshapen_position_embedding_is_refused_by_its_header(
    tmp_path: Path, pico_state: dict[str, Tensor], shape: tuple[int, ...]
) -> None:
    pico_state["pos_embed"] = torch.zeros(shape)
    torch.save(pico_state, tmp_path / "odd.pt")
    with pytest.raises(LitconvertError, match="pos_embed has"):
        open_source(Source(path=str(tmp_path / "odd.pt"), num_attention_heads=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_source_is_kept(tmp_path: Path, pico_state: dict[str, Tensor], dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in pico_state.items()}, tmp_path / "cast.pt")
    model = litconvert.load(tmp_path / "cast.pt", num_attention_heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    table = pico_state["y_embedder.embedding_table.weight"].to(dtype)
    assert torch.equal(model.state_dict()["conditioning.class_embedder.weight"], table)


def test_the_original_layout_names_sit_as_what_it_might_be(pico_checkpoint: Path) -> None:
    source = Source(path=str(pico_checkpoint), num_attention_heads=2)
    assert any("SiT" in text for text in open_source(source).reading.unsure)
    settled = open_source(source.model_copy(update={"family": "dit", "num_classes": 4}))
    assert settled.reading.unsure == ()


def test_the_loaded_model_outlives_its_file(tmp_path: Path, pico_checkpoint: Path) -> None:
    model = litconvert.load(pico_checkpoint, num_attention_heads=2)
    before = output(model)
    with pico_checkpoint.open("r+b") as file:
        file.write(b"\0" * pico_checkpoint.stat().st_size)
    assert torch.equal(output(model), before)


# The diffusers layout


@pytest.mark.parametrize("form", FORMS)
def test_a_diffusers_model_equals_itself_under_either_convention(
    tmp_path: Path, theirs: DiTTransformer2DModel, as_trained: Tensor, form: Form
) -> None:
    source, hints = form(theirs, tmp_path / "dit")
    assert (output(litconvert.load(source, **hints)) - as_trained).abs().max() <= 1e-5
    unchanged = litconvert.load(source, timestep_freq_shift=1.0, norm_eps=1e-5, **hints)
    assert (output(unchanged) - output(theirs)).abs().max() <= 1e-5
    # The conventions are far apart, and each of the two hints matters.
    assert (output(theirs) - as_trained).abs().max() > 0.1
    assert (output(litconvert.load(source, norm_eps=1e-5, **hints)) - as_trained).abs().max() > 1e-5


def test_an_integer_is_a_fine_shift(tmp_path: Path, theirs: DiTTransformer2DModel) -> None:
    source, _ = as_folder(theirs, tmp_path / "dit")
    model = litconvert.load(source, timestep_freq_shift=1, norm_eps=1e-5)
    assert torch.equal(output(model), output(theirs))


def test_the_assumed_convention_is_said(tmp_path: Path, theirs: DiTTransformer2DModel) -> None:
    source, _ = as_folder(theirs, tmp_path / "dit")
    assert "timestep_freq_shift=... norm_eps=..." in open_source(Source(path=str(source))).reading.unsure[0]
    told = Source(path=str(source), timestep_freq_shift=1, norm_eps=1e-5)
    assert open_source(told).reading.unsure == ()


@pytest.mark.parametrize("missing", ["num_attention_heads", "sample_size"])
def test_a_single_file_asks_for_what_config_json_would_tell(
    tmp_path: Path, theirs: DiTTransformer2DModel, missing: str
) -> None:
    source, hints = as_file(theirs, tmp_path / "dit")
    litconvert.load(source, **hints)
    del hints[missing]
    with pytest.raises(UsageError, match=f"{missing}=N"):
        litconvert.load(source, **hints)


@pytest.mark.parametrize(
    "part",
    ["timestep_embedder.linear_1.weight", "timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"],
)
def test_embedder_copies_that_differ_are_refused_by_name(
    tmp_path: Path, theirs: DiTTransformer2DModel, part: str
) -> None:
    source, _ = as_folder(theirs, tmp_path / "dit")
    assert litconvert.load(source) is not None
    state = load_file(source / WEIGHTS)
    name = f"transformer_blocks.1.norm1.emb.{part}"
    state[name] = state[name].clone()
    state[name].view(-1)[-1] += 1e-6
    save_file(state, source / WEIGHTS)
    with pytest.raises(
        LitconvertError, match=f"{re.escape(name.replace('.1.', '.0.', 1))} and {re.escape(name)} differ"
    ):
        litconvert.load(source)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_layers": 3}, "config.json has num_layers=3, but the tensors have 2"),
        ({"patch_size": 4}, "config.json has patch_size=4, but the tensors have 2"),
        ({"out_channels": 1}, "config.json has out_channels=1, but the tensors have 2"),
        ({"norm_type": "ada_norm"}, "config.json has norm_type='ada_norm'"),
        ({"activation_fn": "geglu"}, "config.json has activation_fn='geglu'"),
        ({"num_attention_heads": "two"}, "config.json has num_attention_heads='two', not a number"),
        ({"num_attention_heads": 3}, "does not divide the width 32"),
        ({"num_embeds_ada_norm": 10}, "the class table has 5 rows"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, theirs: DiTTransformer2DModel, change: dict[str, Any], complaint: str
) -> None:
    source, _ = as_folder(theirs, tmp_path / "dit")
    litconvert.load(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LitconvertError, match=re.escape(complaint)):
        litconvert.load(source)


def test_a_hint_that_contradicts_the_config_is_refused(tmp_path: Path, theirs: DiTTransformer2DModel) -> None:
    source, _ = as_folder(theirs, tmp_path / "dit")
    litconvert.load(source, num_attention_heads=2, sample_size=8, num_classes=4)
    hints: list[dict[str, Any]] = [{"num_attention_heads": 4}, {"sample_size": 16}, {"num_classes": 5}]
    for hint in hints:
        with pytest.raises(UsageError, match="leave the hint out"):
            litconvert.load(source, **hint)


# litconvert's own layout


def test_a_saved_model_is_read_as_it_was(tmp_path: Path, pico_checkpoint: Path) -> None:
    model = litconvert.load(pico_checkpoint, num_attention_heads=2, timestep_freq_shift=0.5)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("whole", "shards"):
        again = litconvert.load(tmp_path / name)
        assert (
            dict(again.config).items()
            >= {key: model.config[key] for key in ("timestep_freq_shift", "norm_eps")}.items()
        )
        assert torch.equal(output(again), output(model))


def test_a_converted_student_is_read_as_it_was(tmp_path: Path, pico_student: Path) -> None:
    student = litconvert.load(pico_student)
    assert student.config.attention == ["linear", "linear"]
    student.save_pretrained(tmp_path / "again")
    assert torch.equal(output(litconvert.load(tmp_path / "again")), output(student))


def test_a_model_whose_config_names_no_layer_is_softmax_throughout(tmp_path: Path, pico_recipe: Path) -> None:
    model = LiTTransformer2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_classes=4,
    )
    assert model.config.attention is None
    model.save_pretrained(tmp_path / "model")
    source = open_source(Source(path=str(tmp_path / "model")))
    assert source.config.attention == ("softmax", "softmax")
    out = litconvert.convert(tmp_path / "model", tmp_path / "student", str(pico_recipe), ["source={}"])
    assert litconvert.load(out).config.attention == ["linear", "linear"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"attention": ["linear", "quadratic"]}, "attention must name one of"),
        ({"linear_num_heads": 3}, "linear_num_heads must divide hidden_size 32"),
        ({"hidden_size": "wide"}, "config.json has hidden_size='wide'"),
        ({"hidden_size": 30}, "config.json: hidden_size must be a multiple of 4, got 30"),
        ({"hidden_size": -32}, "config.json has hidden_size=-32"),
        ({"patch_size": 0}, "config.json has patch_size=0"),
        ({"num_layers": 10**9}, "config.json has num_layers=1000000000"),
    ],
    ids=str,
)
def test_a_broken_config_of_our_own_is_refused(pico_student: Path, change: dict[str, Any], complaint: str) -> None:
    litconvert.load(pico_student)
    config = json.loads((pico_student / "config.json").read_text())
    (pico_student / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LitconvertError, match=re.escape(complaint)):
        litconvert.load(pico_student)


def test_our_own_directories_need_no_hints_and_take_none_that_differ(pico_student: Path) -> None:
    heads = litconvert.load(pico_student).config.num_attention_heads
    assert litconvert.load(pico_student, num_attention_heads=heads).config.num_attention_heads == heads
    with pytest.raises(UsageError, match=r"says num_attention_heads=2, not 4; leave num_attention_heads out.*=null"):
        litconvert.load(pico_student, num_attention_heads=4)


# Hints


@pytest.mark.parametrize(
    ("hints", "complaint"),
    [
        ({"num_attention_head": 2}, "unknown hint 'num_attention_head' (did you mean 'num_attention_heads'?)"),
        ({"num_attention_heads": 0}, "hint num_attention_heads: Input should be greater than 0"),
        ({"num_attention_heads": "2"}, "hint num_attention_heads: Input should be a valid integer"),
        ({"num_attention_heads": 2, "family": 3}, "hint family: Input should be a valid string"),
        ({"num_attention_heads": 2, "norm_eps": 0}, "hint norm_eps: Input should be greater than 0"),
    ],
    ids=str,
)
def test_a_wrong_hint_is_a_usage_error(pico_checkpoint: Path, hints: dict[str, Any], complaint: str) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=2)
    with pytest.raises(UsageError, match=re.escape(complaint)):
        litconvert.load(pico_checkpoint, **hints)


def test_a_forced_family_is_the_only_one_tried(pico_student: Path, pico_checkpoint: Path) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=2, family="dit")
    with pytest.raises(UsageError, match="not of family dit"):
        litconvert.load(pico_student, family="dit")


def test_hints_may_come_from_a_recipe(pico_checkpoint: Path, pico_recipe: Path) -> None:
    model = litconvert.load(pico_checkpoint, recipe=str(pico_recipe))
    assert torch.equal(output(model), output(litconvert.load(pico_checkpoint, num_attention_heads=2)))
