"""The walk through the layers, for every kind of model: what it gives, that it is the same however it is made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from litconvert.common.listener import Listener, Task
from litconvert.conversion.provenance import Provenance
from litconvert.data.dataset import write_latents
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.recipe.schema import Solve
from litconvert.sampling.captions import Captions, write_embeddings
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Passes, Streams
from tests.helpers.command import command
from tests.helpers.listener import Advances, Hearing

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "hidden_size": 24,
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_classes": 4,
}
TEXT = {"num_classes": None, "caption_channels": 12, "caption_tokens": 5, "null_caption": True}
MODELS: dict[str, dict[str, Any]] = {
    "classes": {},
    "pixels, no variance": {"in_channels": 1, "out_channels": 1},
    "velocity": {"prediction": "velocity"},
    "velocity, data at 0": {"prediction": "velocity", "data_timestep": 0},
    "captions": TEXT,
    "micro-conditions": {**TEXT, "micro_conditions": True},
    "KV compression": {**TEXT, "attention": ["kv_compress", "softmax", "kv_compress"]},
    "no null class": {"null_class": False},
}
SETTINGS = ("solve.states=24", "solve.held_out=8", "solve.drawing_steps=2", "solve.mixed_precision=no")


def source_of(folder: Path, changes: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A random model of ours on disk, every tensor non-zero."""
    torch.manual_seed(seed)
    model = LiTTransformer2DModel(**{**SMALL, **changes})
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(0.3 * torch.randn_like(value) / (value[0].numel() ** 0.5 if value.dim() > 1 else 1))
            if "adaLN" in name or "modulation" in name:
                value.mul_(3)  # gates that differ from sample to sample
    model.save_pretrained(folder)
    return folder


def converted(source: Path, out: Path, *sets: str, listener: Listener | None = None) -> Path:
    overrides = ("student.num_attention_heads=2", "student.conv_size=3", *SETTINGS, *sets)
    return litconvert.convert(source, out, None, overrides, listener=listener or Listener())


def weights(student: Path) -> dict[str, Tensor]:
    return dict(load_file(student / WEIGHTS))


def solved_record(student: Path) -> dict[str, Any]:
    return dict(Provenance.read(student).solve or {})


def blocks_of(model: LiTTransformer2DModel) -> list[Block]:
    return [cast(Block, block) for block in model.blocks]


def states_of(config: ModelConfig, count: int = 8, side: int = 8) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Inputs of a model."""
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(count, config.in_channels, side, side, generator=generator)
    share = torch.rand(count, generator=generator)
    timestep = share if config.predicts_velocity else (share * 1000).long()
    if not config.reads_captions:
        return (noisy, timestep), {"class_labels": torch.arange(count) % config.classes}
    features = torch.randn(count, config.caption_tokens, config.caption_width, generator=generator)
    arguments: dict[str, Any] = {"encoder_hidden_states": features}
    if config.micro_conditions:
        arguments["added_cond_kwargs"] = {
            "resolution": torch.full((count, 2), 8.0 * side),
            "aspect_ratio": torch.ones(count, 1),
        }
    return (noisy, timestep), arguments


@torch.no_grad()
def distance(source: Path, student: Path) -> float:
    """||student's - teacher's||^2 / ||teacher's||^2 of the outputs on inputs that nobody has seen."""
    teacher, pupil = litconvert.load(source), litconvert.load(student)
    inputs, condition = states_of(ModelConfig.of(teacher.config))
    theirs, mine = (model(*inputs, **condition, return_dict=False)[0].double() for model in (teacher, pupil))
    return float((mine - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("inherit", ["none", "q+k+v"])
def test_every_kind_of_model_is_nearer_to_its_teacher_once_it_is_solved(
    tmp_path: Path, kind: str, inherit: str
) -> None:
    source = source_of(tmp_path / "source", MODELS[kind])
    inherited = f"inherit.attention={inherit}"
    plain = converted(source, tmp_path / "plain", inherited, "solve=null")
    closed = converted(source, tmp_path / "closed", inherited, "solve.local_steps=0")
    stepped = converted(source, tmp_path / "stepped", inherited, "solve.local_steps=20", "solve.local_batch_size=8")
    before, after = distance(source, plain), distance(source, closed)
    assert after < 0.5 * before
    assert distance(source, stepped) < 2 * after  # so few states are soon learnt by heart
    record = solved_record(closed)
    assert [one["layer"] for one in record["layers"]] == [0, 1, 2]
    assert record["layers"][-1]["after"] < record["layers"][-1]["before"]
    assert record["output"]["after"] < record["output"]["before"]


def test_what_the_walk_changes_is_what_the_plan_calls_solved(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    for number, (inherit, steps) in enumerate([("none", 0), ("none", 2), ("q+k+v", 0), ("k", 0), ("all", 2)]):
        sets = (f"inherit.attention={inherit}", f"solve.local_steps={steps}")
        plan = litconvert.plan(source, None, ("student.num_attention_heads=2", "student.conv_size=3", *SETTINGS, *sets))
        plain = weights(converted(source, tmp_path / f"plain-{number}", sets[0], "solve=null"))
        solved = weights(converted(source, tmp_path / f"solved-{number}", *sets))
        changed = {name for name in plain if not torch.equal(plain[name], solved[name])}
        named = {entry.target for entry in plan.entries if entry.fate == "solved"}
        assert changed == named
        groups = plan.groups
        assert groups["solved"]["student_tensors"] == len(named)
        assert sum(group["source_tensors"] for group in groups.values()) == plan.totals["source_tensors"]
        assert json.loads((tmp_path / f"solved-{number}" / "litconvert.json").read_text())["plan"]["groups"] == groups


def test_kept_layers_are_left_as_they_are(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    student = converted(source, tmp_path / "student", "student.softmax_layers=[1]", "solve.local_steps=0")
    mine, theirs = weights(student), weights(source)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith("blocks.1."))
    assert not torch.equal(mine["blocks.2.attn.to_out.weight"], theirs["blocks.2.attn.to_out.weight"])
    assert solved_record(student)["solved_layers"] == [0, 2]


@pytest.mark.parametrize("conv_size", [0, 3, 5])
def test_a_linear_teacher_is_found_again_from_its_queries_keys_and_values(tmp_path: Path, conv_size: int) -> None:
    """What solves it exactly are the convolution and the projection that it has."""
    shape = {"attention": ["linear"] * 3, "linear_num_heads": 2, "linear_conv_size": conv_size}
    source = source_of(tmp_path / "source", shape)
    teacher = litconvert.load(source)

    inputs, condition = states_of(ModelConfig.of(teacher.config), count=64)
    student = LiTTransformer2DModel(**ModelConfig.of(teacher.config).values).eval()
    student.load_state_dict(teacher.state_dict())
    for model in (teacher, student):
        model.requires_grad_(False)
    with torch.no_grad():
        x, embedded, grid = teacher.embed(*inputs, **condition)
        streams = Streams(grid, embedded, torch.zeros(64), x.clone(), x.clone())
        passes = Passes(torch.device("cpu"), 16, bf16=False)
        solver = LayerSolver(Solve(ridge=1e-8, convolution_ridge=1e-8), passes, 0, 0, 0.0, [64])
        for theirs, mine in zip(blocks_of(teacher), blocks_of(student), strict=True):
            for name, parameter in mine.attn.named_parameters():
                if "to_out" in name or "dwc" in name:
                    parameter.zero_()
            solver.solve(theirs, mine, [streams], draws=0, convolution=True)
            passes.after_attention(theirs, streams)
            streams.student = passes.through(mine, streams.student, streams)
        expected, found = (model(*inputs, **condition, return_dict=False)[0] for model in (teacher, student))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_size_of_a_batch_changes_rounding_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    sets = ("inherit.attention=q+k+v", "solve.local_steps=0")
    one, many = (
        litconvert.load(converted(source, tmp_path / f"{size}", *sets, f"solve.batch_size={size}")) for size in (1, 32)
    )
    inputs, condition = states_of(ModelConfig.of(one.config))
    with torch.no_grad():
        first, second = (model(*inputs, **condition, return_dict=False)[0] for model in (one, many))
    assert float((first - second).abs().max() / second.abs().max()) < 1e-5


def test_the_same_seed_solves_to_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    sets = ("solve.local_steps=3", "solve.local_batch_size=8")
    first, again = (weights(converted(source, tmp_path / name, *sets)) for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(converted(source, tmp_path / "other", *sets, "seed=1"))
    assert not torch.equal(first["blocks.0.attn.to_out.weight"], other["blocks.0.attn.to_out.weight"])


class Stop(Exception):
    """What a test ends a walk with."""


class StopsAfter(Listener):
    """Ends the walk when so many layers are done."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def task(self, name: str, total: int) -> Task:
        return Advances(total, self.advanced) if name == "solve" else Task()

    def advanced(self, done: int, total: int) -> None:
        if done == self.layers:
            raise Stop


class Names(Listener):
    """Keeps the names of tasks."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def task(self, name: str, total: int) -> Task:
        self.heard.append(name)
        return Task()


@pytest.mark.parametrize("walks", [1, 2])
def test_a_walk_that_is_stopped_after_any_layer_goes_on_to_the_same_bits(tmp_path: Path, walks: int) -> None:
    source = source_of(tmp_path / "source", {})
    sets = ("inherit.attention=q+k+v", "solve.local_steps=3", "solve.local_batch_size=8", f"solve.walks={walks}")
    whole = weights(converted(source, tmp_path / "whole", *sets))
    out = tmp_path / "student"
    solved = []
    for stop in range(1, 3 * walks + 1):
        with pytest.raises(Stop):
            converted(source, out, *sets, listener=StopsAfter(stop))
        assert not out.exists()
        (kept,) = tmp_path.glob(".student.solving-*")
        solved.append(len(list(kept.glob("walk-*"))))
    assert solved == list(range(1, 3 * walks + 1))
    found = weights(converted(source, out, *sets))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not list(tmp_path.glob(".student.solving-*"))
    assert solved_record(out)["layers"] == solved_record(tmp_path / "whole")["layers"]


@pytest.mark.parametrize("inherited", ["none", "q+k+v"])
def test_a_walk_that_goes_on_where_another_device_chooses_otherwise_is_the_one_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: str
) -> None:
    source = source_of(tmp_path / "source", {})
    sets = (f"inherit.attention={inherited}", "solve.local_batch_size=8")
    monkeypatch.setattr("litconvert.conversion.solve_plan.LOCAL_STEPS", 3)
    whole = converted(source, tmp_path / "whole", *sets)
    out, notes = tmp_path / "student", list[str]()
    with pytest.raises(Stop):
        converted(source, out, *sets, listener=StopsAfter(1))
    monkeypatch.setattr("litconvert.conversion.solve_plan.CPU_MACS", 0)  # closed forms alone, and of the projection
    chosen = litconvert.plan(source, None, ("student.num_attention_heads=2", *SETTINGS, *sets)).solve
    assert chosen is not None
    assert chosen.local_steps == 0
    before = weights(source)
    converted(source, out, *sets, listener=Hearing(note=notes.append))
    found, expected = weights(out), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(before[name], value) for name, value in weights(source).items())
    assert any(note.startswith("goes on: 1 of 3 layers are solved") for note in notes)
    for key in ("local_steps", "states", "layers", "output"):
        assert solved_record(out)[key] == solved_record(whole)[key]
    assert Provenance.read(out).plan == Provenance.read(whole).plan
    assert (solved_record(out)["resumed_at"], "resumed_at" in solved_record(whole)) == (1, False)


@pytest.mark.parametrize("broken", [0, -1])
def test_images_that_are_no_numbers_are_refused_and_nothing_solved_on_them_is_kept(tmp_path: Path, broken: int) -> None:
    source = source_of(tmp_path / "source", {})
    images = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 4
    write_latents(images, labels, tmp_path / "good", "good")
    images[broken] = float("nan")
    write_latents(images, labels, tmp_path / "bad", "bad")
    sets = ("solve.local_steps=1", "solve.states_per_image=1")
    with pytest.raises(litconvert.LitconvertError, match="NaN or infinite"):
        converted(source, tmp_path / "student", f"solve.data={tmp_path / 'bad'}", *sets)
    for kept in tmp_path.glob(".student.solving-*/walk-*"):
        assert all(value.isfinite().all() for value in load_file(kept).values())
    assert not (tmp_path / "student").exists()
    converted(source, tmp_path / "student", f"solve.data={tmp_path / 'good'}", *sets)


def test_a_process_without_a_state_of_a_grid_has_nothing_to_fit() -> None:
    settings = Solve()
    solver = LayerSolver(settings, Passes(torch.device("cpu"), 4, False), 0, 1, 1e-3, [1], process=1, processes=2)
    block = blocks_of(LiTTransformer2DModel(**SMALL))[0]
    stream, condition = torch.zeros(0, 16, SMALL["hidden_size"]), cast(Any, None)
    empty = Streams((4, 4), condition, torch.zeros(0), stream, stream)
    assert solver._problem(block, empty) is None


def test_captions_that_nothing_is_drawn_for_are_refused(tmp_path: Path) -> None:
    write_embeddings(Captions(torch.randn(1, 5, 12), torch.ones(1, 5).long()), tmp_path / "captions.safetensors")
    given = f"solve.embeddings={tmp_path / 'captions.safetensors'}"
    with pytest.raises(UsageError, match="since the model draws classes: leave it out"):
        converted(source_of(tmp_path / "classes", {}), tmp_path / "student", given)
    with pytest.raises(UsageError, match="since the data has captions of its own: leave it out"):
        converted(source_of(tmp_path / "text", TEXT), tmp_path / "student", given, f"solve.data={tmp_path}")


def test_a_student_is_solved_once_and_not_again(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    out = converted(source, tmp_path / "student", "solve.local_steps=0")
    before = (out / WEIGHTS).stat().st_mtime_ns
    converted(source, out, "solve.local_steps=0")
    assert (out / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(litconvert.LitconvertError, match=r"solve\.local_steps was 0 and is 1"):
        converted(source, out, "solve.local_steps=1")


def test_given_images_are_solved_on_and_no_others_are_drawn(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    names = Names()
    latents = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    data = write_latents(latents, torch.arange(12) % 4, tmp_path / "data", "some")
    out = converted(source, tmp_path / "student", f"solve.data={data}", "solve.local_steps=0", listener=names)
    assert names.heard == ["solve", "convert"]
    assert solved_record(out)["draws"] is False
    other = write_latents(2 * latents, torch.arange(12) % 4, tmp_path / "other", "others")
    with pytest.raises(litconvert.LitconvertError, match="the data set"):
        converted(source, out, f"solve.data={other}", "solve.local_steps=0")
    wrong = write_latents(torch.zeros(4, 3, 8, 8), torch.arange(4), tmp_path / "wrong", "wrong")
    with pytest.raises(UsageError, match="takes 4 channels"):
        converted(source, tmp_path / "another", f"solve.data={wrong}", "solve.local_steps=0")


def test_images_of_several_aspect_ratios_are_solved_on_together(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    generator = torch.Generator().manual_seed(0)
    data = tmp_path / "data"
    for height, width in ((8, 8), (6, 12)):
        latents = torch.randn(12, 4, height, width, generator=generator)
        write_latents(latents, torch.arange(12) % 4, data / f"{height}x{width}", "some")
    record = {"format": 2, "digest": "both", "kind": "latents", "buckets": ["8x8", "6x12"]}
    (data / "litconvert-latents.json").write_text(json.dumps(record))
    given = (f"solve.data={data}", "solve.local_steps=6", "solve.local_batch_size=8", "solve.states=64")
    solved = converted(source, tmp_path / "solved", *given)
    plain = converted(source, tmp_path / "plain", "solve=null")
    teacher, mine, start = (litconvert.load(path) for path in (source, solved, plain))
    for height, width in ((8, 8), (6, 12)):
        noisy = torch.randn(4, 4, height, width, generator=generator)
        inputs = (noisy, torch.tensor([50, 300, 600, 900]), torch.arange(4))
        with torch.no_grad():
            theirs, found, before = (model(*inputs, return_dict=False)[0] for model in (teacher, mine, start))
        assert (found - theirs).square().sum() < 0.5 * (before - theirs).square().sum()


def test_a_model_of_captions_is_solved_on_given_captions_or_says_why_it_is_not(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {**TEXT, "null_caption": False})
    out = converted(source, tmp_path / "unsolved")
    assert Provenance.read(out).solve is None
    said = command("convert", source, tmp_path / "said", "--set", "student.num_attention_heads=2")
    assert said.code == 0
    assert said.out.splitlines()[0].startswith("Not solved: no captions are at hand")
    with pytest.raises(UsageError, match=r"nowhere.safetensors: no such file; `litconvert sample"):
        converted(source, tmp_path / "solved", f"solve.embeddings={tmp_path / 'nowhere.safetensors'}")
    features = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    write_embeddings(Captions(features, mask), tmp_path / "captions.safetensors")
    solved = converted(
        source, tmp_path / "solved", f"solve.embeddings={tmp_path / 'captions.safetensors'}", "solve.local_steps=0"
    )
    assert distance(source, solved) < 0.5 * distance(source, out)


def test_convert_says_what_solving_takes_before_it_and_how_near_it_came_in_its_first_line(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {})
    sets = [
        part for one in ("student.num_attention_heads=2", "student.conv_size=3", *SETTINGS) for part in ("--set", one)
    ]
    said = command("convert", source, tmp_path / "student", *sets)
    assert said.code == 0
    assert "3 layers are solved on 24 states of 8 images that the teacher draws" in said.err
    first = said.out.splitlines()[0]
    output = solved_record(tmp_path / "student")["output"]
    assert first.startswith(f"The student's output is {output['after']:.2%} off the teacher's")
    planned = command("plan", source, *sets)
    assert "3 layers are solved on 24 states" in planned.out


@pytest.mark.parametrize("options", [["--data", "x"], ["--embeddings", "y"]])
def test_not_solving_and_solving_on_something_contradict_each_other(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").touch()
    given = [options[0], tmp_path / options[1]]
    said = command("convert", source_of(tmp_path / "source", {}), tmp_path / "out", "--no-solve", *given)
    assert said.code == 2
    assert "--no-solve solves nothing" in said.err
