"""What was pushed is a full source again: by its id alone it is inspected, sampled, distilled on and evaluated."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from numpy.typing import NDArray
from safetensors.torch import load_file

import litconvert
from litconvert.families.companions import companions_of
from tests.helpers.command import Outcome, command
from tests.helpers.hub import TOKEN, Picos, enter, make_picos, put, sent
from tests.helpers.hub_server import HubServer
from tests.helpers.pretrained import Pretrained, write_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

# Nothing in it is a default, so that every setting that is used is a recorded one.
DIGITS = """
source: {path: "asset:dit-digits", num_attention_heads: 6}
student: {num_attention_heads: 6}
solve: null
data:
  synthesize: {num_samples: 8, scheduler: ddim, steps: 2, batch_size: 4}
distill:
  mixed_precision: "no"
  compile: "no"
  stages:
    - {objective: hybrid, steps: 2, batch_size: 4, learning_rate: 1.0e-4}
sample: {scheduler: dpm-solver++, steps: 3, guidance: 1.5, num_images: 4, seed: 11}
evaluate: {features: digits, num_samples: 20, seeds: [5], scheduler: ddim, steps: 2}
publish: {repo_id: owner/elsewhere, backup_every: 1}
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of which nothing is in the cache."""
    with HubServer(TOKEN) as server:
        enter(server, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="module")
def picos(tmp_path_factory: pytest.TempPathFactory) -> Picos:
    return make_picos(tmp_path_factory.mktemp("picos"))


def done(*arguments: object) -> Outcome:
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    return ended


def images(path: Path) -> NDArray[np.uint8]:
    with np.load(path) as file:
        drawn: NDArray[np.uint8] = file["arr_0"]
    return drawn


def files_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def digits(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student of the digits, pushed as the pipeline tester/digits; every command runs away from it."""
    (tmp_path / "digits.yaml").write_text(DIGITS)
    student = litconvert.convert(None, tmp_path / "student", str(tmp_path / "digits.yaml"))
    litconvert.push(student, "tester/digits", pipeline=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return student


def test_a_pushed_pipeline_samples_with_its_recorded_settings(digits: Path, tmp_path: Path) -> None:
    done("sample", digits, "--npz", "here.npz", "-o", "here.png")
    done("sample", "tester/digits", "--npz", "there.npz", "-o", "there.png")
    assert np.array_equal(images(Path("here.npz")), images(Path("there.npz")))
    assert len(images(Path("there.npz"))) == 4
    done("sample", "tester/digits", "--npz", "other.npz", "-o", "other.png", "--steps", "2")
    assert not np.array_equal(images(Path("here.npz")), images(Path("other.npz")))


def test_inspect_of_the_id_says_what_it_brings_and_downloads_no_weights(digits: Path, hub: HubServer) -> None:
    before = hub.bytes_served
    shown = json.loads(done("inspect", "tester/digits", "--json").out)
    assert shown["beside"]["recipe"] == "tester/digits/recipe.yaml"
    assert shown["beside"]["scheduler"] == "dpm-solver++"
    assert hub.bytes_served - before < 200_000
    assert "dpm-solver++ in 3 steps, guidance 1.5" in done("inspect", "tester/digits").out


@pytest.mark.slow
def test_a_pushed_pipeline_distils_on_as_its_folder_does(digits: Path) -> None:
    done("distill", digits, "here")
    done("distill", "tester/digits", "there")
    here, there = (load_file(Path(run) / "model" / "diffusion_pytorch_model.safetensors") for run in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    recorded = yaml.safe_load(Path("there/recipe.yaml").read_text())
    assert recorded["sample"]["guidance"] == 1.5
    assert recorded["publish"] == {"repo_id": None, "private": False, "pipeline": False, "backup_every": None}
    assert [stage["steps"] for stage in recorded["distill"]["stages"]] == [2]
    # It may be pushed back to where it came from.
    again = json.loads(Path("there/model/litconvert.json").read_text())
    assert again["distillation"]["steps"] == 2
    done("push", "there", "tester/digits", "--pipeline")
    done("distill", "tester/digits", "on", "--set", "distill.stages.0.steps=1")
    assert json.loads(Path("on/model/litconvert.json").read_text())["distillation"]["student"]["steps"] == 2


def test_a_pushed_pipeline_is_evaluated_and_the_cache_is_left_alone(digits: Path, tmp_path: Path) -> None:
    done("inspect", "tester/digits", "--weights")
    before = files_in(tmp_path / "cache")
    scores = json.loads(done("evaluate", "tester/digits", "--json").out)
    assert (scores["num_samples"], scores["seeds"], scores["steps"]) == (20, [5], 2)
    written = {path for path in files_in(tmp_path / "cache") if path not in before}
    assert not [path for path in written if "evaluation" in path]
    assert {path: time for path, time in files_in(tmp_path / "cache").items() if path in before} == before
    here = json.loads(done("evaluate", digits, "--json").out)
    assert here["models"] == scores["models"]


@pytest.mark.slow
def test_a_downloaded_copy_is_a_source_as_its_id_is(digits: Path, hub: HubServer) -> None:
    for path, data in sent(hub, "tester/digits").items():
        place = Path("copy") / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    done("sample", "copy", "--npz", "copy.npz", "-o", "copy.png")
    done("sample", "tester/digits", "--npz", "there.npz", "-o", "there.png")
    assert np.array_equal(images(Path("copy.npz")), images(Path("there.npz")))
    done("distill", "copy", "run")
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["publish"]["repo_id"] is None
    assert json.loads(done("evaluate", "copy", "--json").out)["num_samples"] == 20
    assert Path("copy/evaluation.json").is_file()
    assert json.loads(Path("copy/litconvert.json").read_text())["metrics"]
    assert companions_of("copy").published, "measured or not, it came from the Hub"


@pytest.mark.slow
def test_out_of_the_hub_s_reach_what_was_downloaded_is_used(
    digits: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("evaluate", "tester/digits")
    done("sample", "tester/digits", "--npz", "there.npz", "-o", "there.png")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    done("sample", "tester/digits", "--npz", "again.npz", "-o", "again.png")
    done("evaluate", "tester/digits")
    done("distill", "tester/digits", "run")
    assert len(hub.requests) == count
    assert np.array_equal(images(Path("there.npz")), images(Path("again.npz")))


def test_a_pushed_pipeline_brings_its_own_decoder(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    litconvert.push(picos.latents, "tester/latents", pipeline=True)
    litconvert.push(picos.latents, "tester/plain")
    done("sample", picos.latents, "-n", 2, "--npz", "here.npz", "-o", "here.png")
    drawn = done("sample", "tester/latents", "-n", 2, "--npz", "there.npz", "-o", "there.png")
    assert "VAE: its own, vae/" in drawn.err
    assert np.array_equal(images(Path("here.npz")), images(Path("there.npz")))
    # The model alone has no decoder that others could reach: a folder of that name here is not taken for it.
    (tmp_path / "decoder").symlink_to(picos.folder / "decoder")
    refused = command("sample", "tester/plain", "-n", 2)
    assert refused.code == 2
    assert "source.vae.path" in refused.err
    vae = f"source.vae.path={picos.folder / 'decoder'}"
    done("sample", "tester/plain", "-n", 2, "--set", vae, "--npz", "plain.npz", "-o", "plain.png")
    assert np.array_equal(images(Path("here.npz")), images(Path("plain.npz")))


def test_a_revision_brings_the_decoder_of_that_revision(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    litconvert.push(picos.latents, "tester/latents", pipeline=True)
    first = hub.repositories["tester/latents"].at("main").oid
    done("sample", "tester/latents", "-n", 2, "--npz", "first.npz", "-o", "first.png")
    config = json.loads(sent(hub, "tester/latents")["vae/config.json"])
    put(hub, "tester/latents", {"vae/config.json": json.dumps({**config, "scaling_factor": 0.25}).encode()})
    done("sample", "tester/latents", "-n", 2, "--npz", "second.npz", "-o", "second.png")
    done("sample", f"tester/latents@{first}", "-n", 2, "--npz", "again.npz", "-o", "again.png")
    assert not np.array_equal(images(Path("first.npz")), images(Path("second.npz")))
    assert np.array_equal(images(Path("first.npz")), images(Path("again.npz")))
    planned = litconvert.plan(f"tester/latents@{first}", None, [])
    assert planned.recipe.source.vae is not None
    assert planned.recipe.source.vae.path == f"tester/latents@{first}"


def test_a_student_whose_source_is_elsewhere_asks_for_it_by_name(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    litconvert.push(picos.latents, "tester/latents")
    stage = "distill.stages=[{objective: hybrid, steps: 1, batch_size: 2, learning_rate: 1.0e-3}]"
    sizes = ["--set", stage, "--set", "data.synthesize={num_samples: 4, scheduler: ddim, steps: 2, batch_size: 4}"]
    refused = command("distill", "tester/latents", "run", *sizes)
    assert refused.code == 2
    assert "was converted from latents.safetensors, which is not here: name it with --set source.path" in refused.err
    here = ["--set", f"source.path={picos.folder / 'latents.safetensors'}"]
    gone = command("distill", "tester/latents", "run", *sizes, *here, "--teacher", "gone.pt")
    assert gone.code == 2
    assert "gone.pt: no such file or folder" in gone.err
    ended = done("distill", "tester/latents", "run", *sizes, *here)
    assert "not here and not used: its VAE, decoder" in ended.err


def test_what_is_no_student_on_the_hub_is_refused(hub: HubServer, pretrained: Pretrained, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (pretrained.folder / "sigma").iterdir()}
    put(hub, "tester/softmax", files)
    for arguments in (("distill", "tester/softmax", tmp_path / "run"), ("evaluate", "tester/softmax")):
        refused = command(*arguments)
        assert refused.code == 2
        assert "litconvert.json" in refused.err
    missing = command("distill", "tester/nothing", tmp_path / "run")
    assert missing.code == 1
    assert "no such Hub repository" in missing.err


@pytest.mark.parametrize("where", ["local", "hub"])
def test_a_diffusers_pipeline_brings_its_decoder_t5_and_scheduler(
    hub: HubServer, pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_pipeline(pretrained, tmp_path / "pixart", _class_name="DDIMScheduler")
    name = str(source)
    if where == "hub":
        paths = [path for path in source.rglob("*") if path.is_file()]
        put(hub, "tester/pixart", {path.relative_to(source).as_posix(): path.read_bytes() for path in paths})
        name = "tester/pixart"
    recipe = pretrained.recipe(tmp_path / "recipe.yaml")
    common = ("-p", "a red fox", "--steps", 2, "--guidance", 2.0)
    explicit = ("--recipe", recipe, "--scheduler", "ddim")
    done("sample", pretrained.folder / "sigma", *common, *explicit, "--npz", "told.npz", "-o", "told.png")
    drawn = done("sample", name, *common, "--npz", "own.npz", "-o", "own.png")
    assert np.array_equal(images(Path("told.npz")), images(Path("own.npz")))
    for text in ("VAE: its own, vae/", "text encoder: its own", "scheduler: its own, ddim"):
        assert text in drawn.err
    done("sample", name, *common, "--scheduler", "dpm-solver++", "--npz", "other.npz", "-o", "other.png")
    assert not np.array_equal(images(Path("told.npz")), images(Path("other.npz")))

    sets = ["student.num_attention_heads=2", "student.conv_size=3", "solve=null"]
    student = litconvert.convert(name, tmp_path / "student", None, sets)
    recorded = yaml.safe_load((student / "recipe.yaml").read_text())
    assert recorded["source"]["vae"]["path"] == recorded["source"]["text_encoder"]["path"] == name
    assert recorded["sample"]["scheduler"] == "ddim"
    # The student takes the same decoder and T5, and so does what is pushed of it.
    done("sample", student, *common, "--npz", "student.npz", "-o", "student.png")
    litconvert.push(student, "tester/student", pipeline=True, text_encoder=True)
    done("sample", "tester/student", *common, "--npz", "pushed.npz", "-o", "pushed.png")
    assert np.array_equal(images(Path("student.npz")), images(Path("pushed.npz")))


def test_data_of_a_pipeline_is_encoded_by_its_own_decoder(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litconvert.conversion.plan import resolve_for

    source = write_pipeline(pretrained, tmp_path / "pixart")
    sets = ["student.num_attention_heads=2"]
    for recipe in (None, "pixart-sigma-512"):
        settings = resolve_for(recipe, sets, source).recipe
        assert settings.source.vae is not None
        assert settings.source.vae.path == str(source)
        assert settings.source.text_encoder is not None
        assert settings.source.text_encoder.path == str(source)
    mine = pretrained.recipe(tmp_path / "mine.yaml")
    settings = resolve_for(str(mine), sets, source).recipe
    assert settings.source.vae is not None
    assert settings.source.vae.path == str(pretrained.folder)
