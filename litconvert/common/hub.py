"""The Hugging Face Hub: what goes wrong with it in sentences, downloads, repository ids, the login."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litconvert.errors import LitconvertError, UsageError, system_cause

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")


def is_weights_name(name: str) -> bool:
    """Whether a file is called as files of weights are, in whatever case."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What goes wrong while reading from the Hub, as a sentence."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise LitconvertError(
            f"{repo_id}: access must be asked for on its Hub page, and you must be logged in"
        ) from error
    except RepositoryNotFoundError as error:
        raise LitconvertError(
            f"{repo_id}: no such Hub repository, or it is private: log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise LitconvertError(f"{repo_id}: no such revision on the Hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LitconvertError(
            f"{repo_id}: the Hub cannot be reached, and there is no local copy; check the network (and HF_HUB_OFFLINE)"
        ) from error
    except EntryNotFoundError as error:
        raise LitconvertError(f"{repo_id}: a file is missing on the Hub: {str(error).splitlines()[-1]}") from error
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: not a Hub id: {str(error).splitlines()[0]}") from error
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        if error.response.status_code == 401:
            reason = "the token is not accepted; run `hf auth login` again, or set HF_TOKEN to a valid token"
        raise LitconvertError(f"{repo_id}: the Hub refused: {reason}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise LitconvertError(f"{repo_id}: the Hub cannot be reached; check the network, then try again") from error
    except OSError as error:
        reason = system_cause(error) or str(error).splitlines()[0]
        raise LitconvertError(f"{repo_id}: {reason}") from error


@contextmanager
def no_hub_bars() -> Iterator[None]:
    """Without the bars that huggingface_hub draws."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def download(repo_id: str, filename: str, *, revision: str | None) -> Path:
    """One file of a Hub repository, through the Hub's cache."""
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, filename, revision=revision))


REPO_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def check_repo_id(repo_id: str) -> None:
    """Raises UsageError for what the Hub would not take as a repository's name."""
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UsageError(
            f"{repo_id!r} is not the id of a Hub repository: write it as owner/name, letters, digits, '-', '_' and '.' "
            "only (`hf auth whoami` tells your name)"
        )


def require_login(repo_id: str) -> None:
    """Refuse before the work what cannot end in a push."""
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise LitconvertError(
            f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or look with --dry-run"
        )
    if usable_token(repo_id) is None:
        raise LitconvertError(f"{repo_id}: not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def usable_token(repo_id: str) -> str | None:
    """The token of the environment or of the login; None: there is none.

    Raises LitconvertError for what no token can be.
    """
    from huggingface_hub import get_token

    token = get_token()
    # A header refused by the HTTP library would be quoted in its error, token and all.
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise LitconvertError(
            f"{repo_id}: the Hub token holds characters that no token has: set HF_TOKEN again, or run `hf auth login`"
        )
    return token


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def path_of(source: str) -> Path | None:
    """The file or folder that a source means, from its name alone; None: it is a Hub id, `owner/name[@revision]`.

    Raises UsageError for what is neither, and for an `asset:NAME` that does not ship with litconvert.
    """
    if source.startswith("asset:"):
        path = Path(__file__).parents[1] / "assets" / f"{source.removeprefix('asset:')}.safetensors"
        if not path.is_file():
            known = sorted(f"asset:{asset.stem}" for asset in path.parent.glob("*.json"))
            raise UsageError(f"{source}: no such asset; there are {', '.join(known)}")
        return path
    if os.path.exists(source):  # Path.exists raises for a name that is too long
        return Path(source)
    name = source.partition("@")[0]
    if HUB_ID.fullmatch(source) and not is_weights_name(name):
        return None
    raise UsageError(f"{source}: no such file or folder, and not a Hub id (owner/name)")


def split_revision(path: str) -> tuple[str, str | None]:
    """`owner/name@revision` as a Hub id and its revision; a path on this machine, or an id without one, as it is."""
    if os.path.exists(path) or not HUB_ID.fullmatch(path):
        return path, None
    name, _, revision = path.partition("@")
    return name, revision or None


def is_hub_id(source: str) -> bool:
    """Whether a recorded source is a repository of the Hub rather than a file."""
    path = Path(source)
    return HUB_ID.fullmatch(source) is not None and not is_weights_name(source) and not path.exists()
