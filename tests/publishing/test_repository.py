"""A push into a repository that holds something already: what is named, kept, replaced, and read back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

import litconvert
from litconvert.conversion.provenance import Provenance
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.command import command
from tests.helpers.hub import Picos, card_of, planned_files, put, sent
from tests.helpers.hub_server import Blob, HubServer
from tests.helpers.listener import Hearing

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
# Runs in a process of its own, in which litconvert cannot be imported.
STRANGER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "litconvert":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import save_file
repo_id, options, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if options.pop("pipeline", False):
    model = DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True, **options).transformer
else:
    model = AutoModel.from_pretrained(repo_id, trust_remote_code=True, **options)
save_file(model.state_dict(), out)
"""


def loaded_by_a_stranger(hub: HubServer, repo_id: str, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    """The weights that stock diffusers loads of a repository, in a fresh process with nothing in its cache."""
    folder = tmp_path / f"stranger-{len(hub.requests)}"
    folder.mkdir()
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", STRANGER, repo_id, json.dumps(options), str(folder / "out.safetensors")]
    process = subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return load_file(folder / "out.safetensors")


def foreign_shards(model: Path, *, variant: str = "", folder: str = "") -> dict[str, bytes]:
    """Weights of the same names, all zero, as two shards with their index."""
    weights = {name: torch.zeros_like(value) for name, value in load_file(model / WEIGHTS).items()}
    names = sorted(weights)
    shards = [f"{STEM}{variant and f'.{variant}'}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    index = f"{STEM}.safetensors.index{variant and f'.{variant}'}.json"
    where = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    files = {shard: save({name: weights[name] for name in part}) for shard, part in zip(shards, parts, strict=True)}
    files[index] = json.dumps({"metadata": {"total_size": 1}, "weight_map": where}).encode()
    return {f"{folder}{name}": data for name, data in files.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "variant"), [(False, ""), (False, "fp16"), (True, "")], ids=["default", "fp16", "pipeline"]
)
def test_foreign_shards_are_refused_and_after_replace_stock_diffusers_loads_what_was_pushed(
    hub: HubServer, picos: Picos, tmp_path: Path, pipeline: bool, variant: str
) -> None:
    shards = foreign_shards(picos.pixels, variant=variant, folder="transformer/" if pipeline else "")
    options: dict[str, Any] = {"pipeline": True} if pipeline else {}
    expected = dict(litconvert.load(picos.pixels).state_dict())

    # What would come of it: the pushed repository, with these shards put in afterwards.
    litconvert.push(picos.pixels, "tester/mixed", pipeline=pipeline)
    put(hub, "tester/mixed", shards)
    asked = {**options, **({"variant": variant} if variant else {})}
    assert not equal(loaded_by_a_stranger(hub, "tester/mixed", tmp_path, **asked), expected)

    put(hub, "tester/m", {**shards, "LICENSE": b"mine", "README.md": b"# mine\n"})
    before = hub.repositories["tester/m"].at("main").oid
    with pytest.raises(LitconvertError, match="in the way") as caught:
        litconvert.push(picos.pixels, "tester/m", pipeline=pipeline)
    assert all(path in str(caught.value) for path in shards)
    assert hub.repositories["tester/m"].at("main").oid == before

    litconvert.push(picos.pixels, "tester/m", pipeline=pipeline, replace=True)
    held = sent(hub, "tester/m")
    assert not set(held) & set(shards)
    assert held["LICENSE"] == b"mine"
    assert held["README.md"] == b"# mine\n"
    assert equal(loaded_by_a_stranger(hub, "tester/m", tmp_path, **options), expected)
    assert len(hub.repositories["tester/m"].commits) == 3, "one commit deletes and adds"


OTHERS = {
    "a config of something else": {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"their weights"},
    "weights of the same name": {"config.json": b'{"_class_name": "DiTTransformer2DModel"}', WEIGHTS: b"their weights"},
    "a pickle": {f"{STEM}.bin": b"their weights"},
    "another pipeline": {
        "model_index.json": b'{"_class_name": "PixArtAlphaPipeline"}',
        "transformer/config.json": b"{}",
    },
    "a variant": {f"{STEM}.fp16.safetensors": b"their weights"},
    "code of the same name": {"modeling_lit.py": b"print('theirs')"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_in_the_way_is_named_and_nothing_is_sent(hub: HubServer, picos: Picos, kind: str) -> None:
    before = put(hub, "tester/m", {**OTHERS[kind], "notes.txt": b"mine"})
    with pytest.raises(LitconvertError, match="--replace") as caught:
        litconvert.push(picos.pixels, "tester/m")
    assert all(path in str(caught.value) for path in OTHERS[kind])
    assert "notes.txt" not in str(caught.value)
    assert hub.repositories["tester/m"].at("main").oid == before
    assert not [request for request in hub.requests if request[0] == "PUT" or "/commit/" in request[1]]
    litconvert.push(picos.pixels, "tester/m", replace=True)
    assert set(sent(hub, "tester/m")) == {path for path, _ in planned_files(picos.pixels, "tester/m")} | {"notes.txt"}


def test_what_others_add_to_a_repository_of_ours_is_theirs_too(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/m")
    put(hub, "tester/m", {f"{STEM}.fp16.safetensors": b"theirs", "vae/config.json": b"{}", "images/mine.png": b"mine"})
    with pytest.raises(LitconvertError, match=f"{STEM}.fp16.safetensors: weights that variant='fp16' loads"):
        litconvert.push(picos.pixels, "tester/m")
    litconvert.push(picos.pixels, "tester/m", replace=True)
    assert {"vae/config.json", "images/mine.png"} <= set(sent(hub, "tester/m"))
    assert f"{STEM}.fp16.safetensors" not in sent(hub, "tester/m")


@pytest.mark.parametrize("kind", ["shards", "a config", "weights"])
def test_what_others_put_over_a_push_of_ours_is_not_taken_for_ours(hub: HubServer, picos: Picos, kind: str) -> None:
    litconvert.push(picos.pixels, "tester/m")
    theirs = {
        "shards": foreign_shards(picos.pixels),
        "a config": {"config.json": b'{"_class_name": "DiTTransformer2DModel"}'},
        "weights": {WEIGHTS: b"their weights"},
    }[kind]
    put(hub, "tester/m", theirs)
    with pytest.raises(LitconvertError, match="in the way") as caught:
        litconvert.push(picos.pixels, "tester/m", pipeline=True)
    assert all(path in str(caught.value) for path in theirs)
    litconvert.push(picos.pixels, "tester/m", replace=True)
    held = sent(hub, "tester/m")
    assert set(held) == {path for path, _ in planned_files(picos.pixels, "tester/m")}
    assert held[WEIGHTS] == (picos.pixels / WEIGHTS).read_bytes()


def test_the_record_of_a_push_stays_in_its_repository(hub: HubServer, picos: Picos, tmp_path: Path) -> None:
    litconvert.push(picos.pixels, "tester/m")
    record = json.loads(sent(hub, "tester/m")["litconvert.json"])
    assert set(record["pushed"]) == set(sent(hub, "tester/m")) - {"README.md", "litconvert.json"}
    for path, data in sent(hub, "tester/m").items():
        (tmp_path / path).write_bytes(data)
    litconvert.push(tmp_path, "tester/other")
    assert json.loads(sent(hub, "tester/other")["litconvert.json"])["pushed"] == record["pushed"]
    assert Provenance.read(tmp_path).others == {}
    # A record that is somebody else's, or none, makes nothing ours.
    for content in (b"[]", b"{", b'{"pushed": ["config.json"]}', b'{"pushed": {"config.json": [null, null]}}'):
        put(hub, "tester/wrong", {"litconvert.json": content, "config.json": b"theirs"})
        with pytest.raises(LitconvertError, match=r"config\.json"):
            litconvert.push(picos.pixels, "tester/wrong")


def test_a_push_of_shards_replaces_the_single_file_of_an_earlier_push(
    hub: HubServer, picos: Picos, tmp_path: Path
) -> None:
    litconvert.push(picos.pixels, "tester/m")
    sets = ["student.max_shard_bytes=20000"]
    source, recipe = picos.folder / "pixels.safetensors", str(picos.folder / "pixels.yaml")
    sharded = litconvert.convert(source, tmp_path / "sharded", recipe, sets)
    litconvert.push(sharded, "tester/m")
    names = {path for path in sent(hub, "tester/m") if path.startswith(STEM)}
    assert WEIGHTS not in names
    assert f"{WEIGHTS}.index.json" in names
    litconvert.push(picos.pixels, "tester/m")
    assert {path for path in sent(hub, "tester/m") if path.startswith(STEM)} == {WEIGHTS}


def test_a_card_of_somebody_s_stays_unless_its_own_option_is_given(hub: HubServer, picos: Picos) -> None:
    put(hub, "tester/m", {"README.md": b"# my card\n"})
    notes: list[str] = []
    litconvert.push(picos.pixels, "tester/m", listener=Hearing(note=notes.append))
    assert hub.files("tester/m")["README.md"] == b"# my card\n"
    assert "kept: README.md, 10 bytes (not litconvert's; --replace-card overwrites it)" in notes
    litconvert.push(picos.pixels, "tester/m", replace=True)
    assert hub.files("tester/m")["README.md"] == b"# my card\n"
    litconvert.push(picos.pixels, "tester/m", replace_card=True)
    assert "litconvert" in card_of(hub, "tester/m").data.tags


def test_a_card_of_ours_follows_the_model_and_one_that_was_edited_stays(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/m")
    litconvert.push(picos.pixels, "tester/m", pipeline=True)
    card = hub.files("tester/m")["README.md"]
    assert b"DiffusionPipeline" in card
    edited = card.replace(b"# m\n", b"# m\n\nWhat I found out about it.\n")
    assert edited != card
    put(hub, "tester/m", {"README.md": edited})
    notes: list[str] = []
    litconvert.push(picos.pixels, "tester/m", listener=Hearing(note=notes.append))
    assert hub.files("tester/m")["README.md"] == edited
    assert any("edited since litconvert wrote it; --replace-card" in note for note in notes)


def test_the_dry_run_shows_what_changes(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.latents, "tester/m", pipeline=True)
    put(hub, "tester/m", {"README.md": b"# mine\n", "notes.txt": b"mine"})
    before = hub.repositories["tester/m"].at("main").oid

    def shown(*options: str) -> dict[str, str]:
        ended = command("push", picos.latents, "tester/m", "--dry-run", "--json", *options)
        assert ended.code == 0, ended.err
        return {row["path"]: row["change"] for row in json.loads(ended.out)}

    same = shown("--pipeline")
    assert {path for path, change in same.items() if change != "unchanged"} == {
        ".gitattributes",
        "README.md",
        "notes.txt",
    }
    assert same["README.md"] == same["notes.txt"] == same[".gitattributes"] == "kept"
    plain = shown()
    assert plain["config.json"] == plain[WEIGHTS] == "added"
    assert plain["model_index.json"] == plain[f"vae/{WEIGHTS}"] == plain[f"transformer/{WEIGHTS}"] == "deleted"
    assert plain["recipe.yaml"] == "unchanged"
    assert shown("--replace-card")["README.md"] == "changed"
    assert hub.repositories["tester/m"].at("main").oid == before

    table = command("push", picos.latents, "tester/m", "--dry-run")
    assert "deleted" in table.out
    assert "of an earlier push" in table.out

    put(hub, "tester/other", {f"{STEM}.bin": b"theirs"})
    refused = command("push", picos.latents, "tester/other", "--dry-run", "--json")
    assert refused.code == 1
    assert {
        "path": f"{STEM}.bin",
        "bytes": 6,
        "change": "in the way",
        "why": "other weights (use_safetensors=False)",
    } in (json.loads(refused.out))
    assert "--replace" in refused.err
    replaced = command("push", picos.latents, "tester/other", "--dry-run", "--json", "--replace")
    assert {row["path"]: row["change"] for row in json.loads(replaced.out)}[f"{STEM}.bin"] == "deleted"


def test_without_a_network_a_dry_run_lists_what_would_go_up(picos: Picos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ended = command("push", picos.pixels, "tester/m", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    assert [(row["path"], row["bytes"]) for row in rows] == planned_files(picos.pixels, "tester/m")
    assert {row["change"] for row in rows} == {"not compared"}
    assert "the Hub cannot be reached" in ended.err


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Let something happen after the repository was looked at and before the commit."""
    original = huggingface_hub.HfApi.create_commit

    def create_commit(self: Any, *arguments: Any, **options: Any) -> Any:
        act()
        return original(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)


def test_a_repository_that_changed_meanwhile_is_not_committed_to(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {f"{WEIGHTS}.index.json": b'{"weight_map": {}}'}
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: put(hub, "tester/m", index))
        with pytest.raises(
            LitconvertError, match="it changed on the Hub while this was prepared; run the same command"
        ):
            litconvert.push(picos.pixels, "tester/m")
    assert set(sent(hub, "tester/m")) == set(index)
    with pytest.raises(LitconvertError, match="diffusers loads its shards first"):
        litconvert.push(picos.pixels, "tester/m")
    litconvert.push(picos.pixels, "tester/m", replace=True)
    assert WEIGHTS in sent(hub, "tester/m")


def test_a_branch_that_changed_meanwhile_is_not_committed_to(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url)
    api.create_repo("tester/m")
    api.create_branch("tester/m", branch="v1")
    repository = hub.repositories["tester/m"]
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: repository.add_commit("v1", dict(repository.at("v1").files), "meanwhile"))
        with pytest.raises(LitconvertError, match="it changed on the Hub while this was prepared"):
            litconvert.push(picos.pixels, "tester/m", revision="v1")
    litconvert.push(picos.pixels, "tester/m", revision="v1")
    assert WEIGHTS in sent(hub, "tester/m", "v1")
    assert sent(hub, "tester/m") == {}


def test_a_pull_request_is_made_from_what_was_looked_at(
    hub: HubServer, picos: Picos, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = put(hub, "tester/m", {"notes.txt": b"mine"})
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: put(hub, "tester/m", {f"{WEIGHTS}.index.json": b"{}"}))
        url = litconvert.push(picos.pixels, "tester/m", create_pr=True)
    assert url == f"{hub.url}/tester/m/discussions/1"
    request = sent(hub, "tester/m", "refs/pr/1")
    assert set(request) == {path for path, _ in planned_files(picos.pixels, "tester/m")} | {"notes.txt"}
    assert hub.repositories["tester/m"].commits[looked_at].files["notes.txt"].data == b"mine"
    # It is gone on with by its own name.
    litconvert.push(picos.pixels, "tester/m", pipeline=True, revision="refs/pr/1")
    assert "model_index.json" in sent(hub, "tester/m", "refs/pr/1")
    assert set(sent(hub, "tester/m")) == {"notes.txt", f"{WEIGHTS}.index.json"}


@pytest.mark.parametrize("kind", ["other values", "another header", "a small file", "cut short"])
def test_what_the_hub_did_not_store_as_it_was_sent_is_found(hub: HubServer, picos: Picos, kind: str) -> None:
    content = (picos.pixels / WEIGHTS).read_bytes()
    path, data = {
        "other values": (WEIGHTS, content[:-4] + bytes(4)),
        "another header": (WEIGHTS, content[:8] + content[8:].replace(b'"F32"', b'"I32"', 1)),
        "a small file": ("config.json", b"{}"),
        "cut short": (WEIGHTS, content[:-100]),
    }[kind]
    hub.damage_next(path, data)
    with pytest.raises(LitconvertError, match=f"does not hold what was sent: {path} differs; do not use this commit"):
        litconvert.push(picos.pixels, "tester/m")
    litconvert.push(picos.pixels, "tester/m", replace=True)
    assert sent(hub, "tester/m")[path] != data


def test_a_header_that_is_served_otherwise_is_found(hub: HubServer, picos: Picos) -> None:
    """The list of files may be right and what is downloaded wrong."""
    litconvert.push(picos.pixels, "tester/m")
    repository = hub.repositories["tester/m"]
    blob = repository.at("main").files[WEIGHTS]
    wrong = Blob(b"\x08" + blob.data[1:], lfs=True)
    wrong.__dict__["sha256"] = blob.sha256  # as the listing says
    repository.at("main").files[WEIGHTS] = wrong
    with pytest.raises(LitconvertError, match=f"does not hold what was sent: {WEIGHTS} differs"):
        litconvert.push(picos.pixels, "tester/m")


def test_what_the_repository_holds_already_is_not_sent_again(hub: HubServer, picos: Picos) -> None:
    litconvert.push(picos.pixels, "tester/m", commit_message="the first")
    first = hub.repositories["tester/m"].at("main")
    assert first.message == "the first"
    notes: list[str] = []
    litconvert.push(picos.pixels, "tester/m", listener=Hearing(note=notes.append))
    assert hub.repositories["tester/m"].at("main").oid == first.oid
    assert notes[-1] == "tester/m holds all of it already: nothing to send"


def test_the_command_has_the_options(hub: HubServer, picos: Picos) -> None:
    put(hub, "tester/m", {f"{STEM}.bin": b"theirs"})
    assert command("push", picos.pixels, "tester/m").code == 1
    ended = command("push", picos.pixels, "tester/m", "--replace", "--create-pr", "--message", "ours instead")
    assert ended.code == 0, ended.err
    assert ended.out.strip() == f"{hub.url}/tester/m/discussions/1"
    assert hub.repositories["tester/m"].at("refs/pr/1").message == "ours instead"
    ended = command("push", picos.pixels, "tester/m", "--revision", "refs/pr/1", "--pipeline")
    assert ended.code == 0, ended.err
    assert "model_index.json" in sent(hub, "tester/m", "refs/pr/1")
    assert set(sent(hub, "tester/m")) == {f"{STEM}.bin"}
    wrong = command("push", picos.pixels, "tester/m", "--revision", "main", "--create-pr")
    assert wrong.code == 2
    assert "opens its own branch" in wrong.err
    assert command("push", picos.pixels, "tester/m", "--message", " ").code == 2


def test_a_message_of_nothing_is_refused(hub: HubServer, picos: Picos) -> None:
    with pytest.raises(UsageError, match="message of a commit cannot be empty"):
        litconvert.push(picos.pixels, "tester/m", commit_message="")
    assert hub.requests == []
