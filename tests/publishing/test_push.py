"""What `push` sends to the Hub, and that it loads in stock diffusers where litconvert cannot be imported."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import litconvert
from litconvert.common.hub import check_repo_id
from litconvert.errors import LitconvertError, UsageError
from litconvert.publishing.layout import prepare, without_local_paths
from litconvert.publishing.publication import Publication
from tests.helpers.hub import RECIPE, TOKEN, Picos, card_of, enter, planned_files, sent
from tests.helpers.hub_server import HubServer
from tests.helpers.listener import Hearing

# Of huggingface_hub's own upload of large files, and of diffusers' own call of huggingface_hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Runs in a process of its own: litconvert is blocked, the Hub is the stand-in, nothing is cached.
STRANGER = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "litconvert":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
given = load_file(folder / "inputs.safetensors")
request = json.loads((folder / "request.json").read_text())
outputs = {}
with torch.no_grad():
    for name, arguments in request["models"].items():
        model = AutoModel.from_pretrained(**arguments, trust_remote_code=True)
        assert not model.training
        outputs[name] = model(given["hidden_states"], given["timestep"], given["class_labels"]).sample
    for name, arguments in request["pipelines"].items():
        pipeline = DiffusionPipeline.from_pretrained(**arguments, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        channels = pipeline.transformer.config.in_channels
        settings = dict(num_inference_steps=3, guidance_scale=2.0, latents=given[f"noise_{channels}"])
        labels = given["class_labels"].tolist()
        for kind in ("latent", "pt"):
            outputs[f"{name}_{kind}"] = pipeline(labels, output_type=kind, **settings).images
assert not any(name.partition(".")[0] == "litconvert" for name in sys.modules)
save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")
"""


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edited(model: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a model directory with parts of its litconvert.json replaced."""
    copy = copied(model, tmp_path)
    record = json.loads((copy / "litconvert.json").read_text())
    (copy / "litconvert.json").write_text(json.dumps({**record, **changes}))
    return copy


@dataclass(frozen=True)
class Loaded:
    """Outputs before the push and after it, and what the loading process said."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    said: str


@pytest.fixture(scope="module")
def loaded(picos: Picos, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Push every layout, then load all of it in one fresh process that has no litconvert."""
    folder = tmp_path_factory.mktemp("stranger")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([0, 2]),
        "noise_1": torch.randn(2, 1, 8, 8, generator=generator),
        "noise_4": torch.randn(2, 4, 8, 8, generator=generator),
    }
    with HubServer(TOKEN) as server, pytest.MonkeyPatch.context() as monkeypatch:
        enter(server, monkeypatch)
        litconvert.push(picos.pixels, "tester/plain")
        first = server.repositories["tester/plain"].at("main").oid
        litconvert.push(picos.pixels, "tester/plain", commit_message="again")
        litconvert.push(picos.pixels, "tester/pipeline", pipeline=True)
        litconvert.push(picos.latents, "tester/latents", pipeline=True)
        litconvert.push(picos.flow, "tester/flow", pipeline=True)
        request = {
            "models": {
                "plain": {"pretrained_model_or_path": "tester/plain"},
                "pinned": {"pretrained_model_or_path": "tester/plain", "revision": first},
                "subfolder": {"pretrained_model_or_path": "tester/pipeline", "subfolder": "transformer"},
            },
            "pipelines": {
                "pixels": {"pretrained_model_name_or_path": "tester/pipeline"},
                "latents": {"pretrained_model_name_or_path": "tester/latents"},
                "flow": {"pretrained_model_name_or_path": "tester/flow"},
            },
        }
        save_file(inputs, folder / "inputs.safetensors")
        (folder / "request.json").write_text(json.dumps(request))
        environment = {**os.environ, **server.environment(), "HF_HOME": str(folder / "home")}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        process = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
        )
    assert process.returncode == 0, process.stderr

    with torch.no_grad():
        model = litconvert.load(picos.pixels)
        output = model(inputs["hidden_states"], inputs["timestep"], inputs["class_labels"]).sample
    before = dict.fromkeys(request["models"], output)
    decoder = load_decoder(picos.folder / "decoder")
    for name, source, channels in (("pixels", picos.pixels, 1), ("latents", picos.latents, 4), ("flow", picos.flow, 4)):
        drawn = litconvert.sample(
            litconvert.load(source),
            noise=inputs[f"noise_{channels}"],
            class_labels=inputs["class_labels"],
            scheduler="flow-euler" if name == "flow" else "ddim",
            steps=3,
            guidance=2.0,
        )
        with torch.no_grad():
            decoded = decoder.decode(drawn / 0.5).sample if channels == 4 else drawn
        before |= {f"{name}_latent": drawn, f"{name}_pt": (decoded / 2 + 0.5).clamp(0, 1)}
    return Loaded(before, load_file(folder / "outputs.safetensors"), process.stderr)


def load_decoder(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "pinned", "subfolder"),
        *("pixels_latent", "pixels_pt", "latents_latent", "latents_pt", "flow_latent", "flow_pt"),
    ],
)
def test_a_fresh_process_without_litconvert_computes_the_same_bits(loaded: Loaded, name: str) -> None:
    assert loaded.before[name].abs().max() > 0
    assert torch.equal(loaded.after[name], loaded.before[name])


@pytest.mark.slow
def test_loading_warns_of_no_unexpected_types(loaded: Loaded) -> None:
    assert "Expected types" not in loaded.said


@pytest.mark.parametrize("pipeline", [False, True], ids=["plain", "pipeline"])
def test_the_dry_run_sends_nothing_and_lists_exactly_what_a_push_sends(
    hub: HubServer, picos: Picos, pipeline: bool
) -> None:
    before = snapshot(picos.latents)
    notes: list[str] = []
    hearing = Hearing(note=notes.append)
    url = litconvert.push(picos.latents, "tester/m", pipeline=pipeline, dry_run=True, listener=hearing)
    assert {method for method, _, _ in hub.requests} == {"GET"}
    assert hub.repositories == {}
    listed = planned_files(picos.latents, "tester/m", pipeline=pipeline)
    assert notes == [f"added: {path}, {nbytes:,} bytes" for path, nbytes in listed]
    assert litconvert.push(picos.latents, "tester/m", pipeline=pipeline) == url == f"{hub.url}/tester/m"
    assert sorted(listed) == sorted((path, len(data)) for path, data in sent(hub, "tester/m").items())
    assert len(hub.repositories["tester/m"].verified) == (2 if pipeline else 1)
    assert snapshot(picos.latents) == before


def test_each_layout_holds_what_loads_it(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/plain")
    litconvert.push(picos.pixels, "tester/pipeline", pipeline=True)
    common = {"README.md", "modeling_lit.py", "recipe.yaml", "litconvert.json"}
    assert set(sent(hub, "tester/plain")) == common | {"config.json", WEIGHTS}
    assert set(sent(hub, "tester/pipeline")) == common | {
        "model_index.json",
        "pipeline_lit.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/modeling_lit.py",
        f"transformer/{WEIGHTS}",
    }


def test_no_local_path_and_no_token_goes_up(hub: HubServer, picos: Picos, tmp_path: Path) -> None:
    teacher = {"teacher": {"path": str(tmp_path / "big-teacher.pt")}, "steps": 7}
    model = edited(picos.latents, tmp_path, distillation=teacher)
    litconvert.push(model, "tester/plain")
    litconvert.push(model, "tester/pipeline", pipeline=True)
    for repo_id in ("tester/plain", "tester/pipeline"):
        for path, data in sent(hub, repo_id).items():
            for secret in (str(picos.folder), str(tmp_path), "private-place", "/tmp", str(Path.home()) + "/", TOKEN):
                assert secret.encode() not in data, f"{secret} is in {path}"
    assert json.loads(sent(hub, "tester/plain")["litconvert.json"])["source"]["path"] == "latents.safetensors"
    assert "big-teacher.pt" in card_of(hub, "tester/plain").text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/dit.pt", "dit.pt"),
        ("~/dit.pt", "dit.pt"),
        ("C:\\Users\\me\\dit.pt", "dit.pt"),
        ("file:///home/me/dit.pt", "dit.pt"),
        ("../mine/dit.pt", "dit.pt"),
        ("mine/dit.pt", "dit.pt"),
        ("asset:dit-digits", "asset:dit-digits"),
        ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-256"),
        ("facebook/DiT-XL-2-256@refs/pr/1", "facebook/DiT-XL-2-256@refs/pr/1"),
    ],
)
def test_local_paths_become_file_names_and_hub_ids_stay(value: str, expected: str) -> None:
    assert without_local_paths({"stages": [{"path": value}]}) == {"stages": [{"path": expected}]}


def test_private_reaches_the_hub_and_a_public_repository_is_not_filled_with_it(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/hidden", private=True)
    assert hub.repositories["tester/hidden"].private
    litconvert.push(picos.pixels, "tester/hidden", private=True)
    litconvert.push(picos.pixels, "tester/open")
    assert not hub.repositories["tester/open"].private
    before = hub.repositories["tester/open"].at("main").oid
    with pytest.raises(LitconvertError, match="exists and is public: make it private first"):
        litconvert.push(picos.latents, "tester/open", private=True)
    assert hub.repositories["tester/open"].at("main").oid == before


def test_a_wrong_token_is_one_sentence_and_nothing_is_created(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrong")
    with pytest.raises(LitconvertError, match="does not accept the token: run `hf auth login`") as caught:
        litconvert.push(picos.pixels, "tester/m")
    assert "\n" not in str(caught.value)
    assert "hf_wrong" not in "".join(traceback.format_exception(caught.value))
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    litconvert.push(picos.pixels, "tester/m")
    assert WEIGHTS in sent(hub, "tester/m")


def test_a_token_that_no_header_can_hold_is_never_quoted(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_half\x07half")
    with pytest.raises(LitconvertError, match="characters that no token has") as caught:
        litconvert.push(picos.pixels, "tester/m")
    assert "half" not in "".join(traceback.format_exception(caught.value))


def test_a_token_that_may_not_write_names_the_owner(hub: HubServer, picos: Picos) -> None:
    hub.fail_next("POST", "/api/repos/create", 403)
    with pytest.raises(LitconvertError, match="the token may not write to someone: use one with write access"):
        litconvert.push(picos.pixels, "someone/m")


def test_without_a_login_offline_and_without_a_network_each_name_the_way_out(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(LitconvertError, match="HF_HUB_OFFLINE is set"):
            litconvert.push(picos.pixels, "tester/m")
        litconvert.push(picos.pixels, "tester/m", dry_run=True)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(LitconvertError, match="not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"):
            litconvert.push(picos.pixels, "tester/m")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(LitconvertError, match="the Hub cannot be reached; check the network"):
            litconvert.push(picos.pixels, "tester/m")
    assert hub.requests == []


def test_a_card_that_the_hub_refuses_names_the_licence(hub: HubServer, picos: Picos) -> None:
    hub.fail_next("POST", "/api/validate-yaml", 400)
    with pytest.raises(LitconvertError, match=r"refuses the card .*: correct source.license"):
        litconvert.push(picos.pixels, "tester/m")


def test_an_upload_that_broke_is_completed_by_the_same_command(hub: HubServer, picos: Picos) -> None:
    hub.fail_next("POST", "/commit/", 400)
    with pytest.raises(LitconvertError, match="failure asked for by the test"):
        litconvert.push(picos.latents, "tester/m", pipeline=True)
    assert sent(hub, "tester/m") == {}
    uploads = [request for request in hub.requests if request[0] == "PUT"]
    litconvert.push(picos.latents, "tester/m", pipeline=True)
    assert sorted((path, len(data)) for path, data in sent(hub, "tester/m").items()) == planned_files(
        picos.latents, "tester/m", pipeline=True
    )
    assert [request for request in hub.requests if request[0] == "PUT"] == uploads, "weights were sent twice"


def test_storage_that_refuses_is_not_blamed_on_the_token(hub: HubServer, picos: Picos) -> None:
    hub.fail_next("PUT", "/lfs/", 403)
    with pytest.raises(LitconvertError) as caught:
        litconvert.push(picos.pixels, "tester/m")
    assert "token" not in str(caught.value)


def test_a_push_replaces_the_other_layout_and_leaves_foreign_files(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/m", pipeline=True)
    huggingface_hub.HfApi(endpoint=hub.url).upload_file(
        path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="tester/m"
    )
    litconvert.push(picos.pixels, "tester/m")
    assert set(sent(hub, "tester/m")) == {path for path, _ in planned_files(picos.pixels, "tester/m")} | {"notes.txt"}


def test_a_repository_that_litconvert_never_filled_loses_nothing(hub: HubServer, picos: Picos) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url)
    api.create_repo("tester/m")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="vae/config.json", repo_id="tester/m")
    litconvert.push(picos.pixels, "tester/m")
    assert sent(hub, "tester/m")["vae/config.json"] == b"{}"


def test_branches_and_pull_requests_leave_main_alone(hub: HubServer, picos: Picos) -> None:
    huggingface_hub.HfApi(endpoint=hub.url).create_repo("tester/m")
    url = litconvert.push(picos.pixels, "tester/m", create_pr=True)
    assert url == f"{hub.url}/tester/m/discussions/1"
    assert sent(hub, "tester/m") == {}
    assert WEIGHTS in sent(hub, "tester/m", "refs/pr/1")
    with pytest.raises(LitconvertError, match="create the branch"):
        litconvert.push(picos.pixels, "tester/m", revision="v1")
    with pytest.raises(UsageError, match="opens its own branch: leave revision out"):
        litconvert.push(picos.pixels, "tester/m", revision="v1", create_pr=True)


def test_the_card_of_a_solved_model_says_how_near_it_came(
    hub: HubServer, tmp_path: Path, pico_checkpoint: Path
) -> None:
    sizes = "solve={states: 12, held_out: 4, drawing_steps: 2, local_steps: 0}"
    sets = ["source.num_attention_heads=2", "student.num_attention_heads=2", "student.conv_size=3", sizes]
    student = litconvert.convert(pico_checkpoint, tmp_path / "solved", None, sets)
    litconvert.push(student, "tester/solved")
    card = card_of(hub, "tester/solved")
    output = json.loads((student / "litconvert.json").read_text())["solve"]["output"]
    assert "**This model was solved, and not trained.**" in card.text
    assert f"{output['after']:.1%} off the teacher's on held-out noise" in card.text
    assert "## How it was solved" in card.text
    assert "| solved | 0 | 4 |" in card.text


def test_the_card_of_a_converted_model_says_that_it_is_untrained(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/m")
    card = card_of(hub, "tester/m")
    assert "**This model is untrained.**" in card.text
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "license": "cc-by-nc-4.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["litconvert", "lit", "linear-attention", "diffusion", "class-conditional"],
    }
    record = json.loads((picos.pixels / "litconvert.json").read_text())
    for fate, count in record["plan"]["groups"].items():
        assert (
            f"| {fate} | {count['source_tensors']:,} | {count['student_tensors']:,} | {count['parameters']:,} |"
            in card.text
        )
    assert record["source"]["sha256"] in card.text
    assert "is not faster than softmax below about 1K pixels" in card.text
    assert 'AutoModel.from_pretrained("tester/m", trust_remote_code=True)' in card.text
    assert 'AutoModel.from_pretrained("tester/m", revision="<commit sha>", trust_remote_code=True)' in card.text


def test_the_card_says_untrained_of_nothing_that_has_its_weights(hub: HubServer, picos: Picos, tmp_path: Path) -> None:
    """A linear source keeps its attention, and a model that is trained from nothing has no source."""
    again = litconvert.convert(picos.pixels, tmp_path / "again", None, ["seed=5"])
    litconvert.push(again, "tester/again")
    text = card_of(hub, "tester/again").text
    assert "untrained" not in text
    assert "draws noise" not in text
    run = tmp_path / "trained"
    shutil.copytree(picos.pixels, run)
    record = json.loads((run / "litconvert.json").read_text())
    changes = {"training": {"steps": 4500, "stages": []}, "source": {**record["source"], "path": None}, "plan": None}
    (run / "litconvert.json").write_text(json.dumps({**record, **changes}))
    litconvert.push(run, "tester/trained")
    card = card_of(hub, "tester/trained")
    assert "with softmax attention, trained from nothing with litconvert." in card.text
    for word in ("unnamed checkpoint", "inherited from the source", "imitates its teacher", "untrained"):
        assert word not in card.text
    assert "| Licence | cc-by-nc-4.0 |" in card.text
    assert "linear-attention" not in card.data.tags


def test_the_card_of_a_distilled_run_shows_its_stages_scores_and_pictures(
    hub: HubServer, picos: Picos, tmp_path: Path
) -> None:
    spread = {"standard_deviation": 0.25, "seeds": [100, 101], "num_samples": 1000}
    record = json.loads((picos.pixels / "litconvert.json").read_text())
    run = tmp_path / "run"
    changes = {
        "source": {**record["source"], "path": "facebook/DiT-XL-2-256@main", "revision": "0" * 40},
        "distillation": {
            "steps": 1234,
            "stages": [{"objective": "hybrid", "steps": 1234}],
            "teacher": {"sha256": "abc"},
        },
        "metrics": {
            "frechet_distance": {"mean": 1.5, **spread},
            "teacher_frechet_distance": {"mean": 0.5, **spread},
            "class_accuracy": 0.875,
            "num_samples": 1000,
        },
    }
    model = edited(picos.pixels, tmp_path, **changes)
    (run / "samples").mkdir(parents=True)
    model.rename(run / "model")
    for name in (
        "curves",
        "comparison",
        *(f"samples/step-{step:08d}" for step in range(6)),
        "samples/before",
        "samples/after",
    ):
        Image.new("L", (4, 4)).save(run / f"{name}.png")
    litconvert.push(run, "tester/m")
    card = card_of(hub, "tester/m")
    assert "untrained" not in card.text
    assert "| 1 | hybrid | 1234 |" in card.text
    assert "| Fréchet distance | 1.5 | 0.25 | 1,000 | 100, 101 |" in card.text
    assert card.data.base_model == "facebook/DiT-XL-2-256"
    assert card.data.base_model_relation == "finetune"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results or []] == [
        ("frechet_distance", 1.5),
        ("class_accuracy", 0.875),
    ]
    pictures = sorted(path for path in sent(hub, "tester/m") if path.startswith("images/"))
    assert pictures == [
        "images/after.png",
        "images/before.png",
        "images/comparison.png",
        "images/curves.png",
        *(f"images/step-{step:08d}.png" for step in range(2, 6)),
    ]
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert sorted(shown) == pictures
    assert shown[0] == "images/comparison.png"


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/my model", "me/ü", "me/x--y", "/m", "me/", "me/x.git"])
def test_what_is_no_repository_is_refused_before_anything_is_read(repo_id: str) -> None:
    with pytest.raises(UsageError, match="is not the id of a Hub repository: write it as owner/name"):
        litconvert.push("nowhere", repo_id)


def test_names_that_the_hub_takes_are_taken() -> None:
    check_repo_id("My-Org_1/DiT.XL-2_lit")


def test_what_is_broken_does_not_go_up(hub: HubServer, picos: Picos, tmp_path: Path) -> None:
    def refused(directory: Path, sentence: str) -> None:
        with pytest.raises(LitconvertError, match=sentence):
            litconvert.push(directory, "tester/m", pipeline=True)

    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "not a model directory of litconvert")
    (tmp_path / "run.json").write_text("{}")
    refused(tmp_path, "the run has no model and no checkpoint yet; run the same command again")

    model = copied(picos.pixels, tmp_path)
    weights = load_file(model / WEIGHTS)
    name = next(iter(weights))
    (model / WEIGHTS).write_bytes((picos.pixels / WEIGHTS).read_bytes()[:-100])
    refused(model, "truncated")
    save_file({**weights, name: weights[name] * float("nan")}, model / WEIGHTS)
    refused(model, "NaN or infinite")
    save_file({key: value for key, value in weights.items() if key != name}, model / WEIGHTS)
    refused(model, f"{name} is missing")
    (model / WEIGHTS).unlink()
    refused(model, "the weights are missing or incomplete")
    (model / "modeling_lit.py").unlink()
    refused(model, "modeling_lit.py is missing")
    assert hub.requests == []


def test_a_pipeline_of_latents_needs_a_decoder_that_fits(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(picos.latents, tmp_path)
    recipe = (model / "recipe.yaml").read_text()
    (model / "recipe.yaml").write_text(re.sub(r"  vae:\n(    .*\n)+", "  vae: null\n", recipe))
    with pytest.raises(UsageError, match=r"its recipe names no decoder: set source\.vae\.path"):
        litconvert.push(model, "tester/m", pipeline=True)
    with pytest.raises(UsageError, match="decodes latents of 4 channels, the model makes 1"):
        litconvert.push(picos.pixels, "tester/m", pipeline=True, vae=str(picos.folder / "decoder"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LitconvertError, match="a dry run downloads nothing"):
        litconvert.push(model, "tester/m", pipeline=True, vae="someone/decoder", dry_run=True)
    assert hub.requests == []
    litconvert.push(model, "tester/m", pipeline=True, vae=str(picos.folder / "decoder"))
    assert json.loads(sent(hub, "tester/m")["vae/config.json"])["scaling_factor"] == 0.5


@pytest.mark.parametrize("pipeline", [False, True], ids=["plain", "pipeline"])
def test_litconvert_loads_what_it_pushed(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    litconvert.push(picos.pixels, "tester/m", pipeline=pipeline)
    expected = litconvert.load(picos.pixels).state_dict()
    loaded = litconvert.load("tester/m").state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_velocity_model_is_pushed_with_the_flow_scheduler_and_no_other(picos: Picos, tmp_path: Path) -> None:
    prepare(Publication(picos.flow, "tester/m", pipeline=True), tmp_path / "right")
    index = json.loads((tmp_path / "right" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    model = copied(picos.flow, tmp_path)
    recipe = (model / "recipe.yaml").read_text()
    (model / "recipe.yaml").write_text(recipe.replace("scheduler: flow-euler", "scheduler: ddim"))
    with pytest.raises(UsageError, match="predicts velocity, which DDIMScheduler does not take: use flow-euler"):
        prepare(Publication(model, "tester/m", pipeline=True), tmp_path / "wrong")


def test_a_text_encoder_goes_only_into_a_pipeline_of_captions(picos: Picos, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a text encoder goes into the pipeline of a model of captions"):
        prepare(Publication(picos.latents, "tester/m", pipeline=True, text_encoder=True), tmp_path / "wrong")
    prepare(Publication(picos.latents, "tester/m", pipeline=True), tmp_path / "right")


def test_a_decoder_of_the_hub_goes_along_and_a_later_dry_run_finds_it_in_the_cache(
    hub: HubServer, picos: Picos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    api = huggingface_hub.HfApi(endpoint=hub.url)
    api.create_repo("tester/decoder")
    api.upload_folder(repo_id="tester/decoder", folder_path=picos.folder / "decoder", path_in_repo="vae")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("license:", "vae: {path: tester/decoder, subfolder: vae}, license:"))
    model = litconvert.convert(picos.folder / "latents.safetensors", tmp_path / "model", str(recipe))
    litconvert.push(model, "tester/m", pipeline=True)
    assert "[tester/decoder](https://huggingface.co/tester/decoder)" in card_of(hub, "tester/m").text
    count = len(hub.requests)
    planned = planned_files(model, "tester/m", pipeline=True)
    assert len(hub.requests) == count  # of the decoder nothing is asked
    assert planned == sorted((path, len(data)) for path, data in sent(hub, "tester/m").items())
