"""Checkpoints: read lazily from any form they come in, and written whole or not at all."""

import argparse
import errno
import hashlib
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers.utils.hub_utils import _get_checkpoint_shard_files
from huggingface_hub import constants, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from litconvert.checkpoints import writing
from litconvert.checkpoints.checkpoint import Checkpoint, Extent
from litconvert.checkpoints.opening import open_checkpoint
from litconvert.checkpoints.writing import LazyTensors, write_safetensors, write_weights
from litconvert.common.files import digest_of, read_json, require_space, write_whole
from litconvert.common.outputs import whole_directory
from litconvert.common.tensors import TensorInfo
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.checkpoint_files import dit_shapes, write_hollow
from tests.helpers.damage import flipped, rewritten_header, rewritten_zip, sound_forms, truncated
from tests.helpers.hub_server import Blob, HubServer, Repository
from tests.helpers.listener import Advances

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


@pytest.mark.slow
def test_a_pickle_is_mapped_from_disk_not_read(tmp_path: Path) -> None:
    script = (
        "import sys, resource; from litconvert.checkpoints.opening import open_checkpoint\n"
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
    with pytest.raises(UsageError, match=r"holds no weights \(\.safetensors, \.sft, \.pt"):
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
        ({"epoch": 3}, "holds no tensors"),
        ({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, "holds 'a.b' twice"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is sparse or quantised"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(LitconvertError, match=complaint):
        open_checkpoint(str(tmp_path / "state.pt"))


def test_a_view_of_more_values_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"few": torch.ones(1).expand(64)}, tmp_path / "few.pt")
    assert torch.equal(open_checkpoint(str(tmp_path / "few.pt")).read("few"), torch.ones(64))
    for legacy in (False, True):
        path = tmp_path / f"many-{legacy}.pt"
        torch.save({"many": torch.ones(1).expand(1 << 40)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(LitconvertError, match="a view of more values than the file holds"):
            open_checkpoint(str(path))


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


# Where the bytes are


def as_stored(value: Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def bytes_at(extent: Extent) -> bytes:
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def assert_read(checkpoint: Checkpoint, expected: Mapping[str, Tensor], *, in_place: Sequence[str]) -> None:
    """The values are those expected, and the tensors that lie in the file as one run are these, byte for byte."""
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        assert torch.equal(found, value), name
        extent = checkpoint.extent(name)
        assert (extent is not None) == (name in in_place), name
        assert extent is None or bytes_at(extent) == as_stored(value), name


BASE = torch.arange(24.0).reshape(6, 4)
# Everything that torch.save keeps as a view of a storage.
VIEWS = {
    **STATE,
    "base": BASE,
    "shared": BASE,
    "rows": BASE[2:5],
    "one row": BASE[3],
    "transposed": BASE.T,
    "columns": BASE[:, 1:3],
    "expanded": torch.tensor([2.0]).expand(3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "empty rows": BASE[6:],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "integers": torch.tensor([[-1, 2]]),
    "flags": torch.tensor([True, False]),
}
IN_PLACE = [name for name in VIEWS if name not in ("transposed", "columns", "expanded")]


def test_an_extent_points_at_the_bytes_in_a_pickle(tmp_path: Path) -> None:
    torch.save(VIEWS, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_read(open_checkpoint(str(tmp_path / "state.pt")), loaded, in_place=IN_PLACE)


def test_an_extent_points_at_the_bytes_in_safetensors_and_its_shards(tmp_path: Path) -> None:
    state = {name: value.detach().clone().contiguous() for name, value in VIEWS.items()}
    save_file(state, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert_read(open_checkpoint(str(tmp_path / "state.safetensors")), loaded, in_place=list(VIEWS))
    assert_read(open_checkpoint(str(in_shards(tmp_path))), STATE, in_place=list(STATE))


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model."])
def test_an_extent_is_found_behind_a_wrapper_s_prefix(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + name: value for name, value in VIEWS.items()}, tmp_path / "state.pt")
    assert_read(open_checkpoint(str(tmp_path / "state.pt")), VIEWS, in_place=IN_PLACE)


@pytest.mark.parametrize(
    ("raw", "ema"), [("model", "ema"), ("state_dict", "state_dict_ema")], ids=["as DiT", "as PixArt"]
)
def test_an_extent_is_that_of_the_chosen_set(tmp_path: Path, raw: str, ema: str) -> None:
    path = tmp_path / "training.pt"
    averaged = {name: value + 1 for name, value in STATE.items()}
    torch.save({raw: STATE, ema: averaged, "args": argparse.Namespace(model="DiT"), "epoch": 3}, path)
    for weights, expected in (("auto", averaged), ("ema", averaged), ("model", STATE)):
        checkpoint = open_checkpoint(str(path), weights=weights)
        assert (checkpoint.sets, checkpoint.weights) == (("ema", "model"), weights.replace("auto", "ema"))
        assert_read(checkpoint, expected, in_place=list(STATE))


def test_a_legacy_pickle_has_values_but_no_extents(tmp_path: Path) -> None:
    torch.save(VIEWS, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert_read(open_checkpoint(str(tmp_path / "legacy.pt")), VIEWS, in_place=[])


def repack(path: Path, out: Path, *, reverse: bool = True, compression: int = zipfile.ZIP_STORED) -> Path:
    """The same zip, written by another program: no padding, another order."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in sorted(old.namelist(), reverse=reverse):
            new.writestr(name, old.read(name))
    return out


@pytest.mark.parametrize("reverse", [True, False])
def test_a_zip_that_another_program_packed_is_read(tmp_path: Path, reverse: bool) -> None:
    torch.save(VIEWS, tmp_path / "state.pt")
    checkpoint = open_checkpoint(str(repack(tmp_path / "state.pt", tmp_path / "repacked.pt", reverse=reverse)))
    for name, value in VIEWS.items():
        assert torch.equal(checkpoint.read(name), value), name
        extent = checkpoint.extent(name)
        assert extent is None or bytes_at(extent) == as_stored(value), name


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    packed = repack(tmp_path / "state.pt", tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    assert len(open_checkpoint(str(tmp_path / "state.pt")).tensors) == len(STATE)
    with pytest.raises(LitconvertError, match=r"a compressed zip, which torch\.save does not write"):
        open_checkpoint(str(packed))


def test_values_that_are_stored_negated_are_not_copied_as_they_lie(tmp_path: Path) -> None:
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag  # a lazy minus, which torch.save keeps lazy
    assert negated.is_neg()
    torch.save({"negated": negated, "plain": torch.ones(2)}, tmp_path / "state.pt")
    checkpoint = open_checkpoint(str(tmp_path / "state.pt"))
    assert checkpoint.read("negated").tolist() == [-2, 4]
    assert checkpoint.extent("negated") is None


# The Hub


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
    assert set(downloaded(hub)) == {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
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
        UsageError, match=r"several weight files \(one\.pt, two\.pt\); choose one with --set source\.file=NAME"
    ):
        open_checkpoint("tester/plain")
    assert list(open_checkpoint("tester/plain", file="two.pt").tensors) == ["other"]
    with pytest.raises(UsageError, match=r"holds no file 'tow\.pt' \(did you mean 'two\.pt'\?\)"):
        open_checkpoint("tester/plain", file="tow.pt")


LARGE = {f"blocks.{index}.weight": torch.randn(256, 1024) for index in range(4)}
LARGE_BYTES = sum(value.nbytes for value in LARGE.values())


def large_safetensors(folder: Path) -> None:
    save_file(LARGE, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"num_layers": 4}')
    # Another precision beside it, which diffusers takes only when asked for it.
    half = {name: value.half() for name, value in LARGE.items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")


def large_shards(folder: Path) -> None:
    write_weights(
        folder,
        "diffusion_pytorch_model",
        LazyTensors.of(LARGE),
        {"format": "pt"},
        max_shard_bytes=LARGE_BYTES // 2,
    )
    (folder / "config.json").write_text('{"num_layers": 4}')
    # Of an earlier upload, and in no index.
    save_file(LARGE, folder / "diffusion_pytorch_model-00001-of-00001.safetensors")


def large_pickle(folder: Path) -> None:
    ema = {f"module.{name}": value for name, value in LARGE.items()}
    raw = {name: value + 1 for name, value in ema.items()}
    torch.save({"model": raw, "ema": ema, "args": argparse.Namespace(model="DiT")}, folder / "training.pt")


@pytest.mark.parametrize("write", [large_safetensors, large_shards, large_pickle])
def test_opening_a_hub_source_transfers_its_headers_and_reading_it_the_weights(
    tmp_path: Path, hub: HubServer, write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    write(folder)
    commit = publish(hub, "tester/large", folder)
    checkpoint = open_checkpoint("tester/large")
    assert hub.bytes_served < LARGE_BYTES / 10
    assert checkpoint.tensors == tensors_of(LARGE)
    assert checkpoint.config == (None if write is large_pickle else {"num_layers": 4})
    assert checkpoint.sets == (("ema", "model") if write is large_pickle else ())
    size = checkpoint.download_bytes
    before = hub.bytes_served
    for name, value in LARGE.items():
        assert torch.equal(checkpoint.read(name), value)
    assert sum(path.stat().st_size for path in checkpoint.files) == size
    # What was promised, and the little that goes with every request; nothing twice.
    assert size <= hub.bytes_served - before < size + 20_000
    before = hub.bytes_served
    again = open_checkpoint("tester/large")
    assert torch.equal(again.read("blocks.3.weight"), LARGE["blocks.3.weight"])
    assert (again.revision, again.download_bytes) == (commit, 0)
    assert hub.bytes_served - before < 20_000


def test_a_legacy_pickle_on_the_hub_is_downloaded_whole(tmp_path: Path, hub: HubServer) -> None:
    folder = tmp_path / "legacy"
    folder.mkdir()
    as_legacy(folder)
    publish(hub, "tester/legacy", folder)
    checkpoint = open_checkpoint("tester/legacy")
    assert checkpoint.download_bytes == 0
    assert_read(checkpoint, STATE, in_place=[])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"weight_map": {"weight": "../a.safetensors"}}', "outside its folder; refused"),
        ('{"weight_map": {"weight": "c.safetensors"}}', r"names c\.safetensors, which is not on the Hub"),
        ('{"weight_map": []}', "has no weight_map"),
    ],
)
def test_an_index_on_the_hub_may_name_only_files_beside_it(
    tmp_path: Path, hub: HubServer, text: str, complaint: str
) -> None:
    folder = in_shards(tmp_path)
    publish(hub, "tester/shards", folder)
    assert open_checkpoint("tester/shards").tensors == tensors_of(STATE)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    publish(hub, "tester/shards", folder)
    with pytest.raises(LitconvertError, match=complaint):
        open_checkpoint("tester/shards")


def test_a_damaged_file_on_the_hub_is_refused_from_its_header(tmp_path: Path, hub: HubServer) -> None:
    for number, form in enumerate((as_zip, as_safetensors)):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = form(folder)
        publish(hub, "tester/damaged", folder)
        assert open_checkpoint("tester/damaged", file=file.name).tensors == tensors_of(STATE)
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 4], whole[:4] + b"\xff" * (len(whole) - 4)):
            file.write_bytes(damaged)
            publish(hub, "tester/damaged", folder)
            with pytest.raises(LitconvertError, match=r"download it again|not a safetensors file"):
                open_checkpoint("tester/damaged", file=file.name).read("weight")


@pytest.mark.slow
def test_the_hub_is_as_safe_as_the_disk(tmp_path: Path, hub: HubServer) -> None:
    """A sample of the damage that whole/test_fuzz.py does to files on disk: read as there, or refused in a sentence."""
    forms, draw = sound_forms(tmp_path / "sound"), random.Random(3)
    cases = []
    for form, rewritten in (
        (forms["safetensors"], rewritten_header(forms["safetensors"])),
        (forms["zip"], rewritten_zip(forms["zip"], draw)),
    ):
        cases += [*rewritten, *truncated(form), *flipped(form, draw, 60)][::7]
    place, read, refusals = tmp_path / "files", 0, list[str]()
    place.mkdir()
    for name, form in cases:
        file = place / form.damaged
        file.write_bytes(form.content)
        publish(hub, "tester/damaged", place)
        try:
            checkpoint = open_checkpoint("tester/damaged", file=file.name)
            values = {each: checkpoint.read(each) for each in checkpoint.tensors}
        except LitconvertError as error:
            refusals.append(str(error))
            continue
        read += 1
        local = open_checkpoint(str(file))
        assert local.tensors == checkpoint.tensors, name
        for each, value in values.items():
            # A view may repeat one value a trillion times: it is read, but not laid out.
            assert value.nbytes > 1 << 20 or as_stored(local.read(each)) == as_stored(value), name
    assert len(refusals) > 50
    assert read > 10
    assert max(map(len, refusals)) <= 1500


def test_what_changes_on_the_hub_after_it_was_opened_is_refused(tmp_path: Path, hub: HubServer) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    as_safetensors(folder)
    publish(hub, "tester/dit", folder)
    checkpoint = open_checkpoint("tester/dit")
    save_file({name: value * 2 for name, value in STATE.items()}, folder / "state.safetensors")
    publish(hub, "tester/dit", folder)
    with pytest.raises(LitconvertError, match="changed on the Hub meanwhile; run the command again"):
        checkpoint.read("weight")
    assert torch.equal(open_checkpoint("tester/dit").read("weight"), STATE["weight"] * 2)


def test_without_a_network_the_cache_serves(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    commit = publish(hub, "tester/dit", folder)
    publish(hub, "tester/other", folder)
    publish(hub, "tester/opened", folder)
    publish(hub, "tester/shards", in_shards(tmp_path))
    open_checkpoint("tester/dit").read("weight")
    open_checkpoint("tester/dit", file="diffusion_pytorch_model.safetensors").read("weight")
    for source in ("tester/opened", "tester/shards"):  # Headers alone leave no weights behind.
        assert open_checkpoint(source).tensors.keys() == STATE.keys()

    def assert_cached() -> None:
        checkpoint = open_checkpoint("tester/dit")
        assert (checkpoint.revision, checkpoint.config, checkpoint.download_bytes) == (commit, {}, 0)
        assert torch.equal(checkpoint.read("weight"), STATE["weight"])
        named = open_checkpoint("tester/dit", file="diffusion_pytorch_model.safetensors")
        assert torch.equal(named.read("weight"), STATE["weight"])
        for source, file in (
            ("tester/other", None),
            ("tester/opened", None),
            ("tester/shards", None),
            ("tester/dit", "other.safetensors"),
        ):
            with pytest.raises(LitconvertError, match="the Hub cannot be reached, and there is no local copy"):
                open_checkpoint(source, file=file)

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
    path, asked, done = tmp_path / "out.safetensors", list[str](), list[int]()

    def produce(name: str) -> Tensor:
        assert len(done) == len(asked)  # what was asked for before is written
        asked.append(name)
        return state[name]

    task = Advances(len(state), lambda now, total: done.append(now))
    write_safetensors(path, LazyTensors(tensors_of(state), produce), {"note": "ü"}, task=task)
    assert asked == list(state)
    assert done == list(range(1, len(state) + 1))
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "ü"}


def test_values_are_cast_to_the_dtype_of_the_header(tmp_path: Path) -> None:
    infos = {"weight": TensorInfo((2, 3), torch.float16)}
    write_safetensors(tmp_path / "out.safetensors", LazyTensors(infos, STATE.__getitem__), {})
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], STATE["weight"].half())


def cannot_copy_in_kernel(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    patch.setattr(os, "copy_file_range", refuse, raising=False)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_bytes_copied_from_file_to_file_are_those_of_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    state = {**VIEWS, "long": torch.randn(3, 1 << 20), "last": torch.ones(3, dtype=torch.uint8)}
    torch.save(state, tmp_path / "state.pt")
    checkpoint = open_checkpoint(str(tmp_path / "state.pt"))
    written = [tmp_path / f"{how}.safetensors" for how in ("values", "extents")]
    write_safetensors(written[0], LazyTensors(checkpoint.tensors, checkpoint.read), {"format": "pt"})
    if not in_kernel:
        cannot_copy_in_kernel(monkeypatch)
    in_place = LazyTensors(checkpoint.tensors, lambda name: checkpoint.extent(name) or checkpoint.read(name))
    write_safetensors(written[1], in_place, {"format": "pt"})
    # The headers may be padded differently: extents are kept in step with the pages of their source.
    contents = [path.read_bytes() for path in written]
    lengths = [struct.unpack("<Q", content[:8])[0] for content in contents]
    assert contents[0][8 + lengths[0] :] == contents[1][8 + lengths[1] :]
    loaded = load_file(written[1])
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


def test_neighbours_are_copied_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: torch.randn(5, 7) for name in "abcdef"}
    save_file(state, tmp_path / "source.safetensors")
    source = open_checkpoint(str(tmp_path / "source.safetensors"))
    copied: list[int] = []
    copy = writing._copy

    def counted(extent: Extent, descriptor: int, position: int) -> None:
        copied.append(extent.nbytes)
        copy(extent, descriptor, position)

    monkeypatch.setattr(writing, "_copy", counted)
    names = [*"abc", "new", *"ef"]
    infos = {name: TensorInfo((5, 7), torch.float32) for name in names}
    new = torch.ones(5, 7)
    tensors = LazyTensors(infos, lambda name: new if name == "new" else source.extent(name) or new)
    write_safetensors(tmp_path / "out.safetensors", tensors, {})
    assert copied == [3 * 140, 2 * 140]
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], {**state, "new": new}[name]) for name in names)


def test_metadata_may_come_after_the_last_tensor(tmp_path: Path) -> None:
    written: list[str] = []
    path = tmp_path / "out.safetensors"

    def produce(name: str) -> Tensor:
        written.append(name)
        return STATE[name]

    def metadata() -> dict[str, str]:
        return {"format": "pt", "tensors": " ".join(written), "note": "ü"}

    write_safetensors(path, LazyTensors(tensors_of(STATE), produce), metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "tensors": " ".join(STATE), "note": "ü"}
    assert_read(open_checkpoint(str(path)), STATE, in_place=list(STATE))


def test_weights_are_one_file_or_shards_with_their_index(tmp_path: Path) -> None:
    state = {f"layer.{index}": torch.randn(10) for index in range(5)} | {"large": torch.randn(100)}
    stem = "diffusion_pytorch_model"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, limit, names in (
        (whole, 1000, [f"{stem}.safetensors"]),
        # Two tensors of 40 bytes in each, and one that is above the limit alone.
        (cut, 100, [f"{stem}-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]),
    ):
        folder.mkdir()
        asked: list[str] = []
        done: list[int] = []

        def produce(name: str, asked: list[str] = asked) -> Tensor:
            asked.append(name)
            return state[name]

        task = Advances(len(state), lambda now, total, done=done: done.append(now))  # type: ignore[misc]
        tensors = LazyTensors(tensors_of(state), produce)
        paths = write_weights(folder, stem, tensors, lambda: {"format": "pt"}, max_shard_bytes=limit, task=task)
        assert [path.name for path in paths] == names
        assert asked == list(state)
        assert done == list(range(1, len(state) + 1))
        assert_read(open_checkpoint(str(folder)), state, in_place=list(state))
    assert sorted(path.name for path in whole.iterdir()) == [f"{stem}.safetensors"]
    # As huggingface_hub itself names them (it moves the large one forward), and as diffusers finds them.
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=100)
    index = read_json(cut / f"{stem}.safetensors.index.json")
    assert sorted(set(index["weight_map"].values())) == sorted(split.filename_to_tensors)
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    files, _ = _get_checkpoint_shard_files(str(cut), str(cut / f"{stem}.safetensors.index.json"))
    read = {name: value for file in files for name, value in load_file(file).items()}
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_becomes_shorter_while_it_is_copied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    state = {name: torch.randn(1 << 16) for name in ("first", "second")}
    if not in_kernel:
        cannot_copy_in_kernel(monkeypatch)

    def copy(cut: Callable[[], None]) -> None:
        torch.save(state, tmp_path / "state.pt")
        checkpoint = open_checkpoint(str(tmp_path / "state.pt"))
        extents = {name: checkpoint.extent(name) for name in state}
        assert None not in extents.values()
        tensors = LazyTensors(checkpoint.tensors, lambda name: extents[name] or checkpoint.read(name))
        task = Advances(len(state), lambda done, total: cut())
        write_safetensors(tmp_path / "out.safetensors", tensors, {}, task=task)

    copy(lambda: None)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["second"], state["second"])
    with pytest.raises(LitconvertError, match="became shorter while it was read; restore it and try again"):
        copy(lambda: os.truncate(tmp_path / "state.pt", 300_000))


def test_a_source_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path) -> None:
    torch.save({name: torch.randn(1 << 16) for name in ("first", "second")}, tmp_path / "state.pt")
    checkpoint = open_checkpoint(str(tmp_path / "state.pt"))
    assert checkpoint.read("second").isfinite().all()
    os.truncate(tmp_path / "state.pt", 300_000)
    with pytest.raises(LitconvertError, match=r"cannot read 'second': .*became shorter"):
        checkpoint.read("second")


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
