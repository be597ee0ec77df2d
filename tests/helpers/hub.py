"""A stand-in for the Hub, and what was sent to it."""

from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from tests.helpers.hub_server import HubServer

TOKEN = "hf_secretSecretSecret"


def enter(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a Hub of this process's own."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # huggingface_hub reads the environment when it is imported, which was long before.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def sent(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """What is in a repository beyond what the Hub itself puts there."""
    return {path: data for path, data in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def card_of(hub: HubServer, repo_id: str) -> Any:
    return ModelCard(hub.files(repo_id)["README.md"].decode())
