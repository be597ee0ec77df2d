"""Checkpoints: read lazily from any form they come in, and written whole or not at all."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from litconvert.checkpoints import Checkpoint, TensorInfo, open_checkpoint, write_safetensors
from litconvert.errors import LitconvertError, UsageError
from litconvert.files import digest_of, read_json, require_space, whole_directory, write_whole
from tests.checkpoint_files import dit_shapes, write_hollow
from tests.hub_server import Blob, HubServer, Repository

STATE = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[3.0]], dtype=torch.bfloat16),
}


def as_zip(path: Path) -> Path:
    torch.save(STATE, path / "state.pt")
    return path / "state.pt"


def as_legacy(path: Path) -> Path:
    torch.save(STATE, path / "state.ckpt", _use_new_zipfile_serialization=False)
    return path / "state.ckpt"


def as_safetensors(path: Path) -> Path:
    save_file(STATE, path / "state.safetensors")
    return path / "state.safetensors"


def as_folder_of_one(path: Path) -> Path:
    (path / "folder").mkdir()
    as_safetensors(path / "folder")
    (path / "folder" / "notes.txt").write_text("not weights")
    return path / "folder"


def in_shards(path: Path, index: str = "a.safetensors") -> Path:
    """Two shards and an index, whose entry for `weight` is `index`."""
    folder = path / "shards"
    folder.mkdir()
    save_file({"weight": STATE["weight"]}, folder / "a.safetensors")
    save_file({name: STATE[name] for name in ("half", "brain")}, folder / "b.safetensors")
    names = f'{{"weight_map": {{"weight": "{index}", "half": "b.safetensors", "brain": "b.safetensors"}}}}'
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(names)
    return folder


Form = Callable[[Path], Path]


# Reading


@pytest.mark.parametrize("form", [as_zip, as_legacy, as_safetensors, as_folder_of_one, in_shards])
def test_headers_and_values_are_the_same_in_every_form(tmp_path: Path, form: Form) -> None:
    checkpoint = open_checkpoint(str(form(tmp_path)))
    assert dict(checkpoint.tensors) == {
        name: TensorInfo(tuple(value.shape), value.dtype) for name, value in STATE.items()
    }
    for name, value in STATE.items():
        assert torch.equal(checkpoint.read(name), value)
    assert (checkpoint.weights, checkpoint.sets, checkpoint.config) == (None, (), None)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in checkpoint.files))
    assert checkpoint.sha256() == digest.hexdigest()


def test_a_pickle_is_mapped_from_disk_not_read(tmp_path: Path) -> None:
    script = (
        "import sys, resource; from litconvert.checkpoints import open_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(checkpoint.tensors))\n"
    )
    torch.save({f"weight.{index}": torch.ones(1 << 22) for index in range(8)}, tmp_path / "state.pt")
    outcome = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "state.pt")], capture_output=True, text=True, check=True
    )
    megabytes, tensors = map(int, outcome.stdout.split())
    assert tensors == 8
    assert megabytes < 40  # of 128


def test_an_asset_is_found_by_its_name() -> None:
    checkpoint = open_checkpoint("asset:dit-digits")
    assert "blocks.0.attn.qkv.weight" in checkpoint.tensors
    with pytest.raises(UsageError, match=r"no such asset; there are .*asset:dit-digits"):
        open_checkpoint("asset:dit-digit")


def test_what_is_neither_a_path_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    for source in ("missing.pt", str(tmp_path / "missing"), "a/b/c", "folder/missing.safetensors"):
        with pytest.raises(UsageError, match="no such file or folder, and not a Hub id"):
            open_checkpoint(source)


def test_several_weight_files_ask_which(tmp_path: Path) -> None:
    as_safetensors(tmp_path)
    assert len(open_checkpoint(str(tmp_path)).tensors) == 3
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"other\.safetensors, state\.safetensors.*--set source\.file=NAME"):
        open_checkpoint(str(tmp_path))
    assert list(open_checkpoint(str(tmp_path), file="other.safetensors").tensors) == ["other"]
    with pytest.raises(UsageError, match=r"holds no file 'third\.safetensors'"):
        open_checkpoint(str(tmp_path), file="third.safetensors")
    one = str(tmp_path / "other.safetensors")
    assert list(open_checkpoint(one, file="other.safetensors").tensors) == ["other"]
    with pytest.raises(UsageError, match=r"is a file, so source\.file='state\.safetensors' cannot be chosen"):
        open_checkpoint(one, file="state.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no weights \(\.safetensors, \.pt"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("outside", ["../a.safetensors", "{folder}/elsewhere/a.safetensors", "sub/a.safetensors", ".."])
def test_an_index_may_name_only_files_beside_it(tmp_path: Path, outside: str) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert len(open_checkpoint(str(in_shards(tmp_path / "good"))).tensors) == 3
    for folder in (tmp_path, tmp_path / "elsewhere"):
        save_file({"weight": STATE["weight"]}, folder / "a.safetensors")
    folder = in_shards(tmp_path, index=outside.format(folder=tmp_path))
    (folder / "sub").mkdir()
    save_file({"weight": STATE["weight"]}, folder / "sub" / "a.safetensors")
    with pytest.raises(LitconvertError, match="outside its folder; refused"):
        open_checkpoint(str(folder))


def test_a_missing_shard_and_a_useless_index_are_refused(tmp_path: Path) -> None:
    folder = in_shards(tmp_path)
    (folder / "b.safetensors").unlink()
    with pytest.raises(LitconvertError, match=r"names the shard b\.safetensors, which is missing; download it again"):
        open_checkpoint(str(folder))
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        with pytest.raises(LitconvertError, match=r"index\.json"):
            open_checkpoint(str(folder))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = in_shards(tmp_path)
    save_file(STATE, folder / "b.safetensors")
    with pytest.raises(LitconvertError, match="'weight' is in two shards"):
        open_checkpoint(str(folder))
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    for name in ("a", "b"):
        torch.save({"weight": torch.zeros(1)}, pickles / f"{name}.bin")
    index = pickles / "diffusion_pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"weight": "a.bin"}}')
    assert list(open_checkpoint(str(pickles)).tensors) == ["weight"]
    index.write_text('{"weight_map": {"weight": "a.bin", "other": "b.bin"}}')
    with pytest.raises(LitconvertError, match="'weight' is in two shards"):
        open_checkpoint(str(pickles))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a Tensor, not a state dict"),
        ({}, "holds no tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"a": {"b": torch.zeros(1)}}, "'a' is a dict, not a tensor"),
        ({1: torch.zeros(1)}, "has the key 1, not a name"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse or quantised"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(LitconvertError, match=complaint):
        open_checkpoint(str(tmp_path / "state.pt"))


def test_shapes_without_values_can_be_planned_but_not_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.empty(2, 3, device="meta")}, tmp_path / "meta.pt")
    checkpoint = open_checkpoint(str(tmp_path / "meta.pt"))
    assert checkpoint.tensors["weight"].shape == (2, 3)
    with pytest.raises(LitconvertError, match="'weight' has a shape but no values"):
        checkpoint.read("weight")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/version", b"3\n")
    with pytest.raises(LitconvertError, match="a TorchScript program, not a state dict; refused and not run"):
        open_checkpoint(str(tmp_path / "script.pt"))


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub, which this process has downloaded nothing from."""
    with HubServer() as server:
        # huggingface_hub reads the environment when it is imported, which was long before.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def publish(hub: HubServer, repo_id: str, folder: Path) -> str:
    """Put a folder into a repository; returns the commit."""
    repository = hub.repositories.setdefault(repo_id, Repository(repo_id, private=False))
    files = {
        str(path.relative_to(folder)): Blob(path.read_bytes(), lfs=path.suffix == ".safetensors")
        for path in folder.rglob("*")
        if path.is_file()
    }
    return repository.add_commit("main", files, "files").oid


def downloaded(hub: HubServer) -> list[str]:
    return [
        path.rpartition("/resolve/")[2].split("/", 1)[1]
        for method, path, _ in hub.requests
        if method == "GET" and "/resolve/" in path
    ]


def test_a_hub_repository_is_read_by_its_id(tmp_path: Path, hub: HubServer) -> None:
    root = tmp_path / "pipeline"
    folder = root / "transformer"
    folder.mkdir(parents=True)
    (root / "vae").mkdir()
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    save_file(STATE, root / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"num_layers": 3}')
    (root / "model_index.json").write_text("{}")
    first = publish(hub, "tester/dit", root)
    checkpoint = open_checkpoint("tester/dit")
    assert torch.equal(checkpoint.read("weight"), STATE["weight"])
    assert (checkpoint.config, checkpoint.revision) == ({"num_layers": 3}, first)
    # The transformer alone.
    assert sorted(downloaded(hub)) == ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    save_file({"weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    second = publish(hub, "tester/dit", root)
    assert open_checkpoint("tester/dit").revision == second
    for source, revision in ((f"tester/dit@{first}", None), ("tester/dit", first)):
        assert torch.equal(open_checkpoint(source, revision=revision).read("weight"), STATE["weight"])


def test_a_hub_repository_of_plain_files(tmp_path: Path, hub: HubServer) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    torch.save(STATE, folder / "one.pt")
    (folder / "README.md").write_text("a card")
    publish(hub, "tester/plain", folder)
    assert torch.equal(open_checkpoint("tester/plain").read("weight"), STATE["weight"])
    torch.save({"other": torch.zeros(1)}, folder / "two.pt")
    publish(hub, "tester/plain", folder)
    with pytest.raises(
        UsageError, match=r"its weight files are one\.pt, two\.pt: choose one with --set source\.file=NAME"
    ):
        open_checkpoint("tester/plain")
    assert list(open_checkpoint("tester/plain", file="two.pt").tensors) == ["other"]
    with pytest.raises(UsageError, match=r"holds no file 'tow\.pt' \(did you mean 'two\.pt'\?\)"):
        open_checkpoint("tester/plain", file="tow.pt")


def test_without_a_network_the_cache_serves(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    commit = publish(hub, "tester/dit", folder)
    publish(hub, "tester/other", folder)
    open_checkpoint("tester/dit")

    def assert_cached() -> None:
        checkpoint = open_checkpoint("tester/dit")
        assert (checkpoint.revision, checkpoint.config) == (commit, {})
        assert torch.equal(checkpoint.read("weight"), STATE["weight"])
        with pytest.raises(LitconvertError, match="the Hub cannot be reached, and there is no local copy"):
            open_checkpoint("tester/other")

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_cached()
    hub.close()
    assert_cached()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("tester/missing", "no such Hub repository, or it is private: log in"),
        ("tester/dit@missing", "no such revision on the Hub"),
        ("tester/bad--name", "not a Hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(tmp_path: Path, hub: HubServer, source: str, complaint: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    publish(hub, "tester/dit", folder)
    assert len(open_checkpoint("tester/dit").tensors) == len(STATE)
    with pytest.raises(LitconvertError, match=complaint):
        open_checkpoint(source)


def test_a_wrong_token_is_refused_with_the_command_that_renews_it(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    publish(hub, "tester/dit", folder)
    open_checkpoint("tester/dit")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LitconvertError, match="the token is not accepted; run `hf auth login`") as caught:
        open_checkpoint("tester/dit")
    assert "hf_wrong" not in str(caught.value)


# Writing


def tensors_of(state: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    state = {
        **STATE,
        "double": torch.tensor([1e300], dtype=torch.float64),
        "integers": torch.tensor([[-1, 2]]),
        "small": torch.tensor([-1, 2], dtype=torch.int32),
        "bytes": torch.tensor([255], dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    path, seen = tmp_path / "out.safetensors", list[str]()
    write_safetensors(path, tensors_of(state), state.__getitem__, {"note": "ü"}, on_tensor=seen.append)
    assert seen == list(state)
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "ü"}


def test_values_are_cast_to_the_dtype_of_the_header(tmp_path: Path) -> None:
    infos = {"weight": TensorInfo((2, 3), torch.float16)}
    write_safetensors(tmp_path / "out.safetensors", infos, STATE.__getitem__, {})
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], STATE["weight"].half())


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_directory_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "parent" / "out"
    with whole_directory(out) as folder:
        (folder / "file").write_text("done")
        assert not out.exists()
    assert (out / "file").read_text() == "done"
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_directory_that_failed_leaves_nothing_and_what_was_there_stays(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    out = tmp_path / "out"

    def write(text: str, error: type[BaseException] | None) -> None:
        with whole_directory(out) as folder:
            (folder / "file").write_text(text)
            if error is not None:
                raise error

    with pytest.raises(failure):
        write("half", failure)
    assert siblings(out) == []
    write("old", None)
    with pytest.raises(failure):
        write("half", failure)
    assert (out / "file").read_text() == "old"
    assert siblings(out) == ["out"]
    write("new", None)
    assert (out / "file").read_text() == "new"


def test_what_a_killed_process_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    out = tmp_path / "out[1]"
    stale = tmp_path / f".{out.name}.partial-{dead.stdout.strip()}"
    living = tmp_path / f".{out.name}.partial-{os.getppid()}"
    for folder in (stale, living):
        folder.mkdir()
        (folder / "file").write_text("half")
    with whole_directory(out):
        pass
    assert siblings(out) == [living.name, out.name]


def test_a_swap_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with whole_directory(out) as folder:
        (folder / "file").write_text("old")
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if target == out and "-old" not in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(LitconvertError, match=r"cannot write .*permission denied"), whole_directory(out) as folder:
        (folder / "file").write_text("new")
    assert (out / "file").read_text() == "old"
    assert siblings(out) == ["out"]


def test_a_directory_beneath_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(LitconvertError, match="a file stands in the way"),
        whole_directory(tmp_path / "file" / "out"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "kept"


def test_a_text_file_is_written_whole_or_refused(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "one")
    write_whole(tmp_path / "text", "two")
    assert (tmp_path / "text").read_text() == "two"
    for path in (tmp_path / "text" / "beneath", tmp_path / "missing" / "text"):
        with pytest.raises(LitconvertError, match="cannot write"):
            write_whole(path, "three")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LitconvertError, match="cannot write"):
        write_whole(tmp_path / "folder", "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(LitconvertError, match=r"1,000,000,000,000\.0 MB are needed and .* MB are free"):
        require_space(tmp_path / "not" / "there" / "yet", 10**18)


def test_a_digest_is_of_the_content_whatever_the_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_json_is_an_object_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text in ("[1]", "{", "", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(LitconvertError, match=r"data\.json"):
            read_json(path)


def test_full_size_headers_are_a_file_of_holes(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "xl.safetensors", dit_shapes())
    checkpoint: Checkpoint = open_checkpoint(str(path))
    assert len(checkpoint.tensors) == 292
    assert sum(info.numel for info in checkpoint.tensors.values()) == 675_129_632
    assert path.stat().st_blocks * 512 < 1 << 20
