"""Sources on the Hub: what is asked of it before a value is read, and what happens when its answers are wrong."""

import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import save

from litconvert.checkpoints.opening import open_checkpoint
from litconvert.common.tensors import TensorInfo
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command
from tests.helpers.hub_server import Blob, HubServer, Repository

STATE = {f"module.blocks.{index}.weight": torch.randn(100, 100) for index in range(60)}
HEADERS = {name.removeprefix("module."): TensorInfo((100, 100), torch.float32) for name in STATE}


def publish_file(server: HubServer, name: str, content: bytes) -> None:
    """Make a file the one file of tester/model."""
    repository = server.repositories.setdefault("tester/model", Repository("tester/model", private=False))
    repository.add_commit("main", {name: Blob(content, lfs=True)}, name)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def without_format(content: bytes) -> bytes:
    """The zip as torch wrote it before 2.6: only the header before an entry tells where its values begin."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if not name.endswith(("/.format_version", "/.storage_alignment")):
                new.writestr(name, old.read(name))
    return file.getvalue()


def fetched(server: HubServer, since: int) -> list[int]:
    """The status of every answer that carried a part of a file."""
    return [status for method, path, status in server.requests[since:] if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_s_headers_take_a_few_requests_however_many_tensors_it_has(hub: HubServer, old: bool) -> None:
    content = saved({"model": STATE, "ema": STATE, "opt": {0: torch.randn(1000, 1000)}})
    publish_file(hub, "training.pt", without_format(content) if old else content)
    checkpoint = open_checkpoint("tester/model")
    assert checkpoint.tensors == HEADERS
    assert (checkpoint.weights, checkpoint.sets) == ("ema", ("ema", "model"))
    assert len(fetched(hub, 0)) <= 3
    assert set(fetched(hub, 0)) == {206}
    with pytest.raises(UsageError, match=r"has no 'raw' weights, only ema, model"):
        open_checkpoint("tester/model", weights="raw")
    assert hub.bytes_served < len(content) / 10
    assert torch.equal(checkpoint.read("blocks.7.weight"), STATE["module.blocks.7.weight"])
    assert fetched(hub, 0).count(200) == 1


def test_a_pickle_of_code_on_the_hub_is_refused_before_it_is_downloaded(hub: HubServer) -> None:
    publish_file(hub, "model.pt", saved(torch.nn.Linear(2, 2)))
    with pytest.raises(LitconvertError, match=r"torch\.nn\.modules\.linear\.Linear.*refused and not run"):
        open_checkpoint("tester/model")
    assert 200 not in fetched(hub, 0)
    publish_file(hub, "model.pt", saved(torch.nn.Linear(2, 2).state_dict()))
    assert set(open_checkpoint("tester/model").tensors) == {"weight", "bias"}


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_refusal_while_headers_are_fetched_is_a_sentence(hub: HubServer, name: str) -> None:
    publish_file(hub, name, save(STATE) if name.endswith(".safetensors") else saved(STATE))
    hub.fail_next("GET", f"/{name}", 403)
    with pytest.raises(LitconvertError, match="tester/model: the Hub refused: "):
        open_checkpoint("tester/model")
    assert open_checkpoint("tester/model").tensors == HEADERS


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_inspect_of_a_hub_id_reads_headers_alone(hub: HubServer, name: str) -> None:
    state = dit_state(width=192)
    content = save(state) if name.endswith(".safetensors") else saved({"ema": state, "model": state})
    publish_file(hub, name, content)
    facts = json.loads(command("inspect", "tester/model", "--num-attention-heads", 2, "--json").out)
    assert (facts["family"], facts["download_bytes"]) == ("dit", len(content))
    assert hub.bytes_served < len(content) / 10
    assert 200 not in fetched(hub, 0)
