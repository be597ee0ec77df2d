"""Every kind of model through the whole line by its commands: encode, convert, distil, sample, push."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import litconvert
from litconvert.runs.directory import RunDirectory
from tests.helpers.checkpoint_files import dit_shapes, random_state
from tests.helpers.command import command
from tests.helpers.hub import TOKEN, enter, sent
from tests.helpers.hub_server import HubServer
from tests.helpers.pretrained import Pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
CAPTIONS = ("a red fox in the snow", "two birds by the sea", "a blue house", "the cat in the house")
SCHEDULE = "batch_size: 4, learning_rate: 1.0e-3, ema_decay: 0.5, condition_dropout: 0.3"
HYBRID = (
    f"[{{objective: hybrid, steps: 3, {SCHEDULE}}},{{objective: hybrid, steps: 5, feature_weight: 0.5, {SCHEDULE}}}]"
)
FLOW = (
    f"[{{objective: flow_matching, steps: 3, {SCHEDULE}}},"
    f"{{objective: flow_matching, steps: 5, feature_weight: 0.5, {SCHEDULE}}}]"
)


def picture(index: int, height: int = 64, width: int = 64) -> Image.Image:
    """A coloured gradient, another one each time."""
    values = torch.linspace(0, 255, height * width * 3).roll(index * 997).view(height, width, 3)
    return Image.fromarray(values.to(torch.uint8).numpy())


def captioned_shard(path: Path, count: int = 8, sizes: tuple[tuple[int, int], ...] = ((64, 64),)) -> Path:
    """A webdataset shard of pictures with captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for index in range(count):
            image = io.BytesIO()
            picture(index, *sizes[index % len(sizes)]).save(image, "PNG")
            for name, content in (("png", image.getvalue()), ("txt", CAPTIONS[index % 4].encode())):
                info = tarfile.TarInfo(f"{index:04d}.{name}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    return path


def succeed(*arguments: object) -> str:
    """Run a command that must work; its stdout."""
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def assert_trained(run: Path, student: Path, terms: set[str]) -> None:
    """Every step is recorded with these terms, every linear attention moved, and the pictures are there."""
    rows = RunDirectory(run).read_metrics()
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert terms <= {name for name, value in rows[-1].items() if value}
    before, after = load_file(student / WEIGHTS), load_file(run / "model" / WEIGHTS)
    assert all(not torch.equal(after[name], value) for name, value in before.items() if ".attn." in name)
    for name in ("teacher", "before", "after"):
        with Image.open(run / "samples" / f"{name}.png") as sheet:
            assert np.ptp(np.asarray(sheet.convert("L"), dtype=np.int64)) > 10  # not one grey
    assert (run / "timestep_errors.csv").stat().st_size > 0


@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_a_pixart_with_its_t5_and_vae(pretrained: Pretrained, tmp_path: Path, kind: str) -> None:
    """alpha has micro-conditions; pictures of two aspect ratios; T5's features stored."""
    recipe = pretrained.recipe(tmp_path / "recipe.yaml")
    source, student, data, run = pretrained.folder / kind, tmp_path / "student", tmp_path / "data", tmp_path / "run"
    captioned_shard(tmp_path / "images" / "0.tar", sizes=((64, 64), (48, 96)))
    sizes = "data.encode.sizes=[[64, 64], [48, 96]]"
    succeed("latents", "encode", tmp_path / "images", data, "--source", source, "-r", recipe, "--set", sizes, "--flip")
    shown = json.loads(succeed("latents", "show", data, "--json", "--out", tmp_path / "sheet.png", "-r", recipe))
    assert shown["samples"] == 8
    succeed("convert", source, student, "--recipe", recipe)
    stages = ("--set", f"distill.stages={HYBRID}", "--set", "data.flip=true")
    succeed("distill", student, run, "--data", data, *stages, "-q")
    assert_trained(run, student, {"noise", "variational_bound", "teacher_noise", "teacher_variance", "features"})
    succeed("sample", run, "--prompt", "a red fox", "--out", tmp_path / "fox.png")
    with HubServer(TOKEN) as server, pytest.MonkeyPatch.context() as monkeypatch:
        enter(server, monkeypatch)
        succeed("push", run, "tester/fox", "--pipeline")
        names = set(sent(server, "tester/fox"))
    assert {"README.md", "model_index.json", f"transformer/{WEIGHTS}", "vae/config.json"} <= names


def test_captions_encoded_on_the_fly_teach_what_stored_ones_do(pretrained: Pretrained, tmp_path: Path) -> None:
    recipe, student = pretrained.recipe(tmp_path / "recipe.yaml"), tmp_path / "student"
    captioned_shard(tmp_path / "images" / "0.tar")
    litconvert.convert(pretrained.folder / "sigma", student, str(recipe))
    losses = []
    for captions in ("embeddings", "text"):
        data, run = tmp_path / captions, tmp_path / f"run-{captions}"
        sets = ("--set", f"data.encode.captions={captions}", "--source", pretrained.folder / "sigma", "-r", recipe)
        succeed("latents", "encode", tmp_path / "images", data, *sets)
        # In float32: the rounding of bf16 would hide that of the features.
        exact = ("--set", "distill.mixed_precision=no")
        succeed("distill", student, run, "--data", data, "--set", f"distill.stages={HYBRID}", *exact, "-q")
        losses.append([float(row["loss"]) for row in RunDirectory(run).read_metrics()])
    # Stored features are float16.
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_the_teacher_of_captions_draws_its_own_training_set(pretrained: Pretrained, tmp_path: Path) -> None:
    recipe, student, run = pretrained.recipe(tmp_path / "recipe.yaml"), tmp_path / "student", tmp_path / "run"
    litconvert.convert(pretrained.folder / "sigma", student, str(recipe))
    draw = "data.synthesize={num_samples: 6, steps: 2, batch_size: 3, shard_size: 4, scheduler: dpm-solver++}"
    succeed("distill", student, run, "--set", draw, "--set", f"distill.stages={HYBRID}", "-q")
    assert_trained(run, student, {"noise", "features"})


@pytest.mark.parametrize("data_timestep", [0, 1])
def test_a_sit_with_its_vae(pretrained: Pretrained, tmp_path: Path, data_timestep: int) -> None:
    state = random_state(dit_shapes(width=48, layers=2, sample_size=8, rows=6))
    torch.save(state, tmp_path / "sit.pt")
    recipe, student, data, run = (tmp_path / name for name in ("recipe.yaml", "student", "data", "run"))
    recipe.write_text(
        f"source: {{family: sit, num_attention_heads: 4, sample_size: 8, data_timestep: {data_timestep},"
        f" vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        "student: {num_attention_heads: 2, conv_size: 3}\n"
        "sample: {scheduler: flow-euler, steps: 3, num_images: 5}\n"
        f"distill: {{stages: {FLOW}}}\n"
    )
    for index in range(10):
        path = tmp_path / "images" / f"class-{index % 5}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    succeed("latents", "encode", tmp_path / "images", data, "--source", tmp_path / "sit.pt", "-r", recipe)
    succeed("convert", tmp_path / "sit.pt", student, "--recipe", recipe)
    succeed("distill", student, run, "--data", data, "-q")
    assert_trained(run, student, {"velocity", "teacher_velocity", "features"})
    assert not any(row["variational_bound"] or row["teacher_variance"] for row in RunDirectory(run).read_metrics())
    succeed("sample", run, "--classes", "1,3", "--num", "2", "--out", tmp_path / "samples.png")
    with HubServer(TOKEN) as server, pytest.MonkeyPatch.context() as monkeypatch:
        enter(server, monkeypatch)
        succeed("push", run, "tester/sit", "--pipeline")
        names = set(sent(server, "tester/sit"))
    assert {"README.md", "model_index.json", f"transformer/{WEIGHTS}", "vae/config.json"} <= names


def test_a_teacher_trained_from_nothing_is_a_source_like_any_other(tmp_path: Path) -> None:
    recipe, data, teacher = tmp_path / "teacher.yaml", tmp_path / "data", tmp_path / "teacher"
    recipe.write_text(
        "scratch: {sample_size: 8, in_channels: 3, hidden_size: 32, num_layers: 2, num_attention_heads: 2,"
        " num_classes: 2}\n"
        "distill: {stages: [{objective: hybrid, noise_weight: 0, variance_weight: 0, steps: 8, batch_size: 4,"
        " learning_rate: 1.0e-3, ema_decay: 0.5}]}\n"
        "sample: {scheduler: ddim, steps: 2, num_images: 4}\n"
    )
    for index in range(6):
        path = tmp_path / "images" / f"class-{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index, 8, 8).save(path)
    succeed("latents", "encode", tmp_path / "images", data, "--recipe", recipe)
    said = succeed("train", teacher, "--recipe", recipe, "--data", data, "-q").splitlines()
    assert said == ["Trained for 8 steps.", f"model: {teacher / 'model'}"]
    rows = RunDirectory(teacher).read_metrics()
    assert len(rows) == 8
    assert not rows[0]["teacher_noise"]
    model = litconvert.load(teacher / "model")
    assert set(model.config.attention or ["softmax"]) == {"softmax"}
    # And then it teaches.
    student, run = tmp_path / "student", tmp_path / "run"
    own = ("--set", "student={num_attention_heads: 2, conv_size: 3}", "--set", f"distill.stages={HYBRID}")
    succeed("convert", teacher / "model", student, *own)
    succeed("distill", student, run, "--data", data, *own, "-q")
    assert RunDirectory(run).last_step() == 8
