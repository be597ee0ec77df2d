"""A stand-in for the Hub, what is pushed to it in tests, and what was sent."""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

import litconvert
from litconvert.publishing.layout import prepare
from litconvert.publishing.publication import Publication
from litconvert.publishing.repository import outgoing_in
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.hub_server import Blob, HubServer, Repository

TOKEN = "hf_secretSecretSecret"


def enter(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a Hub of this process's own."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # huggingface_hub reads the environment when it is imported, which was long before.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    if (transformers := sys.modules.get("transformers.utils.hub")) is not None:
        monkeypatch.setattr(transformers, "_hf_api", None)  # it remembers the Hub of the test before
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def sent(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """What is in a repository beyond what the Hub itself puts there."""
    return {path: data for path, data in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def card_of(hub: HubServer, repo_id: str) -> Any:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def put(hub: HubServer, repo_id: str, files: dict[str, bytes], *, delete: tuple[str, ...] = ()) -> str:
    """Commit files to a repository, which is made where it is not there, as somebody else would; returns the commit."""
    repository = hub.repositories.setdefault(repo_id, Repository(repo_id, private=False))
    before = {path: blob for path, blob in repository.at("main").files.items() if path not in delete}
    added = {path: Blob(data, lfs=path.endswith((".safetensors", ".bin"))) for path, data in files.items()}
    return repository.add_commit("main", before | added, "somebody else's").oid


def planned_files(directory: Path, repo_id: str, **options: Any) -> list[tuple[str, int]]:
    """Path and bytes of every file that a push sends to an empty repository."""
    with TemporaryDirectory() as temporary:
        prepare(Publication(Path(directory), repo_id, offline=True, **options), temporary)
        return [
            (one.path, one.nbytes) for one in sorted(outgoing_in(Path(temporary)).values(), key=lambda one: one.path)
        ]


RECIPE = """
solve: null
source: {num_attention_heads: 2, license: {id: cc-by-nc-4.0}}
student: {num_attention_heads: 2}
sample: {scheduler: ddim, steps: 3, guidance: 2.0}
"""


@dataclass(frozen=True)
class Picos:
    """Converted models on disk: of pixels, and of latents with the decoder that their recipes name."""

    folder: Path
    pixels: Path
    latents: Path
    flow: Path
    """A SiT, which predicts velocity."""


def make_picos(folder: Path) -> Picos:
    """Make them in an empty folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    decoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    decoder.register_to_config(scaling_factor=0.5)
    decoder.save_pretrained(folder / "decoder")
    (folder / "pixels.yaml").write_text(RECIPE)
    vae = f"vae: {{path: {folder / 'decoder'}}}"
    (folder / "latents.yaml").write_text(RECIPE.replace("license:", f"{vae}, license:"))
    flow = (folder / "latents.yaml").read_text().replace("scheduler: ddim", "scheduler: flow-euler")
    (folder / "flow.yaml").write_text(flow.replace("source: {", "source: {family: sit, "))
    for name, channels in (("pixels", 1), ("latents", 4), ("flow", 4)):
        save_file(dit_state(width=16, channels=channels), folder / f"{name}.safetensors")
        litconvert.convert(folder / f"{name}.safetensors", folder / name, str(folder / f"{name}.yaml"))
    return Picos(folder, folder / "pixels", folder / "latents", folder / "flow")
