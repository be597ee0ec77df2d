"""Reading from the Hub: which files of a repository are wanted, and what goes wrong, in sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litconvert.checkpoints import WEIGHT_SUFFIXES
from litconvert.errors import LitconvertError, UsageError, did_you_mean, system_cause


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


def download(repo_id: str, filename: str, *, revision: str | None) -> Path:
    """One file of a Hub repository, through the Hub's cache."""
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, filename, revision=revision))


def download_weights(repo_id: str, revision: str | None, file: str | None) -> tuple[Path, str]:
    """The transformer of a Hub repository: its folder (or the one file) in the cache, and the commit.

    Where the Hub cannot be reached, what an earlier download left in the cache is used.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    with hub_errors(repo_id):
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # No file has this name: nothing is asked for but the folder.
            root = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns="no such file")
            return _cached_weights(Path(root), file), Path(root).name
        patterns = _wanted_files(repo_id, {sibling.rfilename for sibling in info.siblings or ()}, file)
        # By the name asked for, not by the commit: so the cache knows it by that name when there is no network.
        root = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        return _cached_weights(Path(root), file), Path(root).name


def _cached_weights(root: Path, file: str | None) -> Path:
    """In a downloaded snapshot: the file asked for, or the folder of the transformer, or of the one file there is."""
    if file is not None:
        return root / file
    if (root / "transformer" / "config.json").is_file():
        return root / "transformer"
    found = [path for path in root.rglob("*") if path.suffix in WEIGHT_SUFFIXES]
    return found[0] if len(found) == 1 and found[0].parent != root else root


def _wanted_files(repo_id: str, names: set[str], file: str | None) -> list[str]:
    """Which files of a repository to download: the transformer's, or the one weights file."""
    if file is not None:
        if file not in names:
            raise UsageError(f"{repo_id}: holds no file {file!r}{did_you_mean(file, names)}")
        return [file]
    folder = "transformer/" if "transformer/config.json" in names else ""
    for suffix in ("safetensors", "bin"):
        stem = f"{folder}diffusion_pytorch_model"
        if {f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"} & names:
            weights = [f"{stem}*.{suffix}", f"{stem}.{suffix}.index.json"]
            return [*weights, f"{folder}config.json", f"{folder}litconvert.json"]
    found = sorted(name for name in names if Path(name).suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        raise UsageError(
            f"{repo_id}: not a diffusers model; its weight files are {', '.join(found) or 'none'}: "
            "choose one with --set source.file=NAME"
        )
    return found
