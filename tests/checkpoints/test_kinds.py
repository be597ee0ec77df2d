"""A file is what its bytes say, whatever it is called."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from litconvert.checkpoints.opening import open_checkpoint
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.hub_server import Blob, HubServer, Repository

STATE = dit_state()
NAMES = ("a.pt", "a.ckpt", "a.sft", "A.SAFETENSORS", "a.bin", "a.safetensors", "0a1b2c3d", "weights.pth.tar")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "legacy"])
def test_the_bytes_tell_what_a_file_is(tmp_path: Path, kind: str, name: str) -> None:
    if kind == "safetensors":
        save_file(STATE, tmp_path / name)
    else:
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=kind == "pickle")
    checkpoint = open_checkpoint(str(tmp_path / name))
    assert torch.equal(checkpoint.read("pos_embed"), STATE["pos_embed"])
    assert (checkpoint.extent("pos_embed") is None) == (kind == "legacy")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "A.SAFETENSORS", "a.sft"])
def test_the_bytes_tell_it_on_the_hub_too(hub: HubServer, name: str) -> None:
    repository = hub.repositories.setdefault("tester/model", Repository("tester/model", private=False))
    repository.add_commit("main", {name: Blob(save(STATE), lfs=True)}, "safetensors")
    assert torch.equal(open_checkpoint("tester/model").read("pos_embed"), STATE["pos_embed"])


OTHERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n": "a Git LFS pointer.*git lfs pull",
    b"<!DOCTYPE html>\n<html><body>404</body></html>": "a web page that was saved.*/resolve/",
    b"\xef\xbb\xbf\n <HTML>": "a web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "a web page",
    b"GGUF\x03\x00\x00\x00": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x1f\x8b\x08\x00": "packed by gzip: unpack it",
    b'{"hidden_size": 3}': "a JSON file without a weight_map",
    b"": "an empty file; download it again",
}


@pytest.mark.parametrize("content", OTHERS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "blob"])
def test_what_is_mistaken_for_weights_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LitconvertError, match=OTHERS[content]):
        open_checkpoint(str(tmp_path / name))


def shards(folder: Path, stem: str, index: str, suffix: str = "safetensors") -> None:
    """The state in two shards and their index, named as asked."""
    folder.mkdir(parents=True)
    names = list(STATE)
    parts = {f"{stem}-0000{part + 1}-of-00002.{suffix}": names[part::2] for part in range(2)}
    for file, mine in parts.items():
        state = {name: STATE[name] for name in mine}
        save_file(state, folder / file) if suffix == "safetensors" else torch.save(state, folder / file)
    weight_map = ", ".join(f'"{name}": "{file}"' for file, mine in parts.items() for name in mine)
    (folder / index).write_text(f'{{"weight_map": {{{weight_map}}}}}')


@pytest.mark.parametrize(
    ("stem", "index", "suffix"),
    [
        ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json", "safetensors"),
        ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json", "safetensors"),
        ("model", "model.safetensors.index.json", "safetensors"),
        ("pytorch_model", "pytorch_model.bin.index.json", "bin"),
    ],
)
def test_shards_are_read_by_their_index_whichever_way_they_are_named(
    tmp_path: Path, hub: HubServer, stem: str, index: str, suffix: str
) -> None:
    folder = tmp_path / "repository" / "transformer"
    shards(folder, stem, index, suffix)
    (folder / "config.json").write_text("{}")
    repository = Repository("tester/shards", private=False)
    hub.repositories["tester/shards"] = repository
    repository.add_commit(
        "main", {f"transformer/{one.name}": Blob(one.read_bytes(), lfs=True) for one in folder.iterdir()}, ""
    )
    for source in (folder, folder.parent, folder / index, "tester/shards"):
        checkpoint = open_checkpoint(str(source))
        assert checkpoint.tensors.keys() == STATE.keys()
        assert torch.equal(checkpoint.read("pos_embed"), STATE["pos_embed"])
    with pytest.raises(UsageError, match="one of several shards; give their folder, or the index"):
        open_checkpoint(str(folder / f"{stem}-00001-of-00002.{suffix}"))
    (folder / index).unlink()
    with pytest.raises(UsageError, match=r"holds 2 shards \(.*\) without their index"):
        open_checkpoint(str(folder))


def test_a_choice_is_made_by_the_name_that_the_message_gives(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    shards(folder, "diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json")
    save_file(STATE, folder / "diffusion_pytorch_model.non_ema.safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="several weight files") as refused:
        open_checkpoint(str(tmp_path))
    listed = str(refused.value).partition("(")[2].partition(")")[0].split(", ")
    assert len(listed) == 2
    for name in listed:
        for given in (name, name.removeprefix("transformer/")):
            assert open_checkpoint(str(tmp_path), file=given).tensors.keys() == STATE.keys()
    with pytest.raises(UsageError, match=r"holds no file 'diffusion_pytorch_model.fp32.safetensors' \(did you mean"):
        open_checkpoint(str(tmp_path), file="diffusion_pytorch_model.fp32.safetensors")
    shutil.rmtree(folder)


def test_names_without_a_meaning_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UsageError, match=r"holds no weights|a folder or a device"):
        open_checkpoint(str(tmp_path))
