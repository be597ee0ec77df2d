"""Models to publish, and a Hub to publish them on."""

from collections.abc import Iterator

import pytest

from tests.helpers.hub import TOKEN, Picos, enter, make_picos
from tests.helpers.hub_server import HubServer


@pytest.fixture(scope="session")
def picos(tmp_path_factory: pytest.TempPathFactory) -> Picos:
    return make_picos(tmp_path_factory.mktemp("private-place"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for one test, which this process is logged in to."""
    with HubServer(TOKEN) as server:
        enter(server, monkeypatch)
        yield server
