"""Reading from the Hub: which files of a repository are wanted, and what goes wrong, in sentences."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from litconvert.checkpoints import (
    WEIGHT_SUFFIXES,
    Checkpoint,
    Stored,
    TensorInfo,
    choose_set,
    info_of_header,
    load_pickle,
    open_checkpoint,
    refuse_choice,
    wrapper_prefix,
)
from litconvert.errors import LitconvertError, UsageError, did_you_mean, system_cause
from litconvert.files import read_json

# A zip's directory and the pickle in it are read in pieces of this size.
REMOTE_BLOCK_BYTES = 1 << 16


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


def open_hub_checkpoint(
    source: str, repo_id: str, revision: str | None, file: str | None, weights: str
) -> Checkpoint:
    """The transformer of a Hub repository: headers now, the files it needs when the first value is read.

    Where the Hub cannot be reached, what an earlier download left in the cache is used.

    Args:
        source: what the user named.
        repo_id, revision, file, weights: as for `open_checkpoint`.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    def opened(root: str) -> Checkpoint:
        local = open_checkpoint(str(_cached_weights(Path(root), file)), weights=weights)
        return replace(local, source=source, revision=Path(root).name)

    with hub_errors(repo_id):
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # No file has this name: nothing is asked for but the folder.
            return opened(
                snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns="no such file")
            )
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        patterns = _wanted_files(repo_id, set(sizes), file)
        wanted = [name for name in sizes if any(fnmatch(name, pattern) for pattern in patterns)]
        holders = [name for name in wanted if Path(name).suffix in WEIGHT_SUFFIXES]
        missing = [
            name for name in holders if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)
        ]

        def fetch() -> Checkpoint:
            # By the name asked for, not by the commit: so the cache knows it by that name when there is no network.
            return opened(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

        headers = _remote_headers(source, repo_id, str(info.sha), holders, weights) if missing else None
        if headers is None:
            return fetch()
        tensors, chosen, sets = headers
        small = [Path(download(repo_id, name, revision=revision)) for name in wanted if name not in holders]
        config = next((read_json(path) for path in small if path.name == "config.json"), None)

    @cache
    def stored() -> Stored:
        with hub_errors(repo_id):
            local = fetch()
        if dict(local.tensors) != tensors:
            raise LitconvertError(f"{source}: changed on the Hub meanwhile; run the command again")
        return local.stored()

    size = sum(sizes[name] for name in missing)
    return Checkpoint(source, config, tensors, chosen, sets, info.sha, size, stored)


def _remote_headers(
    source: str, repo_id: str, commit: str, names: Sequence[str], weights: str
) -> tuple[dict[str, TensorInfo], str | None, tuple[str, ...]] | None:
    """Shape and dtype of every tensor of these files, without their values; the set that is chosen, and all there are.

    None for a pickle in the old form, which has no directory and must be read whole.
    """
    from huggingface_hub import HfApi, HfFileSystem

    tensors: dict[str, TensorInfo] = {}
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    if all(name.endswith(".safetensors") for name in names):
        refuse_choice(source, weights)
    for name in names:
        place = f"{repo_id}/{name}"
        found: dict[str, Any]
        if name.endswith(".safetensors"):
            header = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=commit)
            found = {key: info_of_header(place, key, info.dtype, info.shape) for key, info in header.tensors.items()}
        else:
            files = HfFileSystem()
            with files.open(f"{repo_id}@{commit}/{name}", "rb", block_size=REMOTE_BLOCK_BYTES) as file:
                if file.read(4) != b"PK\x03\x04":
                    return None
                state, chosen, sets = choose_set(source, place, load_pickle(place, file, map_location="meta"), weights)
            found = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in state.items()}
        for key, value in found.items():
            if key in tensors:
                raise LitconvertError(f"{place}: {key!r} is in two shards; the repository is damaged")
            tensors[key] = value
    if not tensors:
        raise LitconvertError(f"{source}: holds no tensors")
    prefix = wrapper_prefix(tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}, chosen, sets


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
