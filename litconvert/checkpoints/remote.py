"""Checkpoints on the Hub: which files of a repository are wanted, and their headers before they are downloaded."""

import errno
import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from litconvert.checkpoints.checkpoint import Checkpoint, Stored, wrapper_prefix
from litconvert.checkpoints.local import open_local, shards_of_index
from litconvert.checkpoints.pickles import check_zip, choose_set, first_line, is_zip, load_pickle, refuse_choice
from litconvert.common.files import read_json
from litconvert.common.hub import WEIGHT_SUFFIXES, download, hub_errors
from litconvert.common.tensors import TensorInfo, info_of_header
from litconvert.errors import LitconvertError, UsageError, did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# A zip's directory and the pickle in it are fetched in pieces of this size.
BLOCK_BYTES = 1 << 16


def open_hub_checkpoint(source: str, repo_id: str, revision: str | None, file: str | None, weights: str) -> Checkpoint:
    """The transformer of a Hub repository: headers now, the files it needs when the first value is read.

    Where the Hub cannot be reached, what an earlier download left in the cache is used.

    Args:
        source: what the user named.
        repo_id, revision, file, weights: as for `open_checkpoint`.
    """
    from huggingface_hub import try_to_load_from_cache

    repository = _Repository(source, repo_id, revision, file, weights)
    with hub_errors(repo_id):
        info = repository.info()
        if info is None:
            return repository.cached()
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        wanted = repository.files_wanted(set(sizes))
        holders = [name for name in wanted if Path(name).suffix in WEIGHT_SUFFIXES]
        missing = [
            name for name in holders if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)
        ]
        headers = (
            _remote_headers(source, repo_id, str(info.sha), {name: sizes[name] for name in holders}, weights)
            if missing
            else None
        )
        if headers is None:
            return repository.fetched(wanted)
        tensors, chosen, sets = headers
        small = [Path(download(repo_id, name, revision=revision)) for name in wanted if name not in holders]
        config = next((read_json(path) for path in small if path.name == "config.json"), None)

    @cache
    def stored() -> Stored:
        with hub_errors(repo_id):
            local = repository.fetched(wanted)
        if local.revision != info.sha or dict(local.tensors) != tensors:
            raise LitconvertError(f"{source}: changed on the Hub meanwhile; run the command again")
        return local.stored()

    size = sum(sizes[name] for name in missing)
    return Checkpoint(source, config, tensors, chosen, sets, info.sha, size, stored)


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hub, and what of it is asked for. Attributes are the arguments of `open_hub_checkpoint`."""

    source: str
    repo_id: str
    revision: str | None
    file: str | None
    weights: str

    def info(self) -> "ModelInfo | None":
        """What the Hub says of it: its commit and its files; None where the Hub cannot be reached."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HfHubHTTPError,
            HTTPError,
            OfflineModeIsEnabled,
        )

        try:
            return HfApi().model_info(self.repo_id, revision=self.revision, files_metadata=True)
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            return None

    def files_wanted(self, names: set[str]) -> list[str]:
        """Which of the repository's files are needed, shards and all."""
        wanted = _wanted_files(self.repo_id, names, self.file)
        for name in [one for one in wanted if one.endswith(".index.json")]:
            folder = PurePosixPath(name).parent
            shards = shards_of_index(download(self.repo_id, name, revision=self.revision))
            wanted += [str(folder / shard) for shard in shards]
        if lost := next((name for name in wanted if name not in names), None):
            raise LitconvertError(
                f"{self.repo_id}: its index names {lost}, which is not on the Hub; choose another revision"
            )
        return wanted

    def fetched(self, names: Sequence[str]) -> Checkpoint:
        """The checkpoint in these files, which are downloaded where the cache lacks them."""
        from huggingface_hub import snapshot_download

        # By the name asked for, not by the commit: so the cache knows it by that name when there is no network.
        patterns = [escape(name) for name in names]
        return self._opened(snapshot_download(self.repo_id, revision=self.revision, allow_patterns=patterns))

    def cached(self) -> Checkpoint:
        """The checkpoint that an earlier download left in the cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        # No file has this name: nothing is asked for but the folder.
        nothing = "no such file"
        root = snapshot_download(self.repo_id, revision=self.revision, local_files_only=True, allow_patterns=nothing)
        if not _is_cached(Path(root), self.file):
            raise LocalEntryNotFoundError("opened before, but its weights were never downloaded")
        return self._opened(root)

    def _opened(self, root: str) -> Checkpoint:
        """The checkpoint in a snapshot on this machine."""
        place = _cached_weights(Path(root), self.file)
        local = open_local(str(place), place, weights=self.weights)
        return replace(local, source=self.source, revision=Path(root).name)


def _remote_headers(
    source: str, repo_id: str, commit: str, sizes: Mapping[str, int], weights: str
) -> tuple[dict[str, TensorInfo], str | None, tuple[str, ...]] | None:
    """Shape and dtype of every tensor of these files, without their values; the set that is chosen, and all there are.

    None for a pickle in the old form, which has no directory and must be read whole.
    """
    tensors: dict[str, TensorInfo] = {}
    chosen: str | None = None
    sets: tuple[str, ...] = ()
    if all(name.endswith(".safetensors") for name in sizes):
        refuse_choice(source, weights)
    for name, size in sizes.items():
        place = f"{repo_id}/{name}"
        if name.endswith(".safetensors"):
            found = _remote_safetensors(repo_id, name, commit)
        else:
            file: Any = _RemoteFile(repo_id, name, commit, size)
            if not is_zip(file):
                return None
            # The entries that hold values are not fetched, not even the headers before them.
            entries = {entry: "/data/" in entry.filename for entry in check_zip(place, file)}
            spans = {entry: (entry.header_offset, entry.header_offset + 30 + entry.file_size) for entry in entries}
            file.hollow = sorted(spans[entry] for entry, holds_values in entries.items() if holds_values)
            for entry, holds_values in entries.items():
                if not holds_values:
                    file.fetch(*spans[entry])
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


def _remote_safetensors(repo_id: str, name: str, commit: str) -> dict[str, TensorInfo]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    place = f"{repo_id}/{name}"
    try:
        header = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=commit)
        return {key: info_of_header(place, key, info.dtype, info.shape) for key, info in header.tensors.items()}
    except (SafetensorsParsingError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LitconvertError(
            f"{place}: not a safetensors file ({first_line(error)}); choose another file or revision"
        ) from error


class _RemoteFile(io.RawIOBase):
    """A file on the Hub, fetched in blocks, each once, when they are read.

    Attributes:
        hollow: sorted runs (start, stop) that are not fetched: a read within one gives zeros.
    """

    def __init__(self, repo_id: str, name: str, commit: str, size: int) -> None:
        from huggingface_hub import hf_hub_url

        self.repo_id, self.size = repo_id, size
        self.url = hf_hub_url(repo_id, name, revision=commit)
        self.hollow: list[tuple[int, int]] = []
        self._blocks: dict[int, bytes] = {}
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, "a position before the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start = self._position
        stop = max(start, min(start + len(view), self.size))
        run = bisect_right(self.hollow, (start, self.size)) - 1
        if run >= 0 and stop <= self.hollow[run][1]:
            view[: stop - start] = bytes(stop - start)
        else:
            self.fetch(start, stop)
            while start < stop:
                block, offset = divmod(start, BLOCK_BYTES)
                piece = self._blocks[block][offset : offset + stop - start]
                place = start - self._position
                view[place : place + len(piece)] = piece
                start += len(piece)
        count, self._position = stop - self._position, stop
        return max(count, 0)

    def fetch(self, start: int, stop: int) -> None:
        """Make sure of the blocks of these bytes, those that are missing with one request."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        wanted = range(start // BLOCK_BYTES, -(-min(stop, self.size) // BLOCK_BYTES))
        missing = [block for block in wanted if block not in self._blocks]
        if not missing:
            return
        begin, end = missing[0] * BLOCK_BYTES, min((missing[-1] + 1) * BLOCK_BYTES, self.size)
        with hub_errors(self.repo_id):
            headers = {**build_hf_headers(), "range": f"bytes={begin}-{end - 1}"}
            response = http_backoff("GET", self.url, headers=headers, timeout=30)
            hf_raise_for_status(response)
            # A server that knows no ranges sends everything.
            content = response.content if response.status_code == 206 else response.content[begin:end]
            if len(content) != end - begin:
                raise OSError(f"{self.url}: {end - begin} bytes were asked for, {len(content)} came")
        for block in range(missing[0], missing[-1] + 1):
            self._blocks[block] = content[block * BLOCK_BYTES - begin :][:BLOCK_BYTES]


def _cached_weights(root: Path, file: str | None) -> Path:
    """In a downloaded snapshot: the file asked for, or the folder of the transformer, or of the one file there is."""
    if file is not None:
        return root / file
    if (root / "transformer" / "config.json").is_file():
        return root / "transformer"
    found = [path for path in root.rglob("*") if path.suffix in WEIGHT_SUFFIXES]
    return found[0] if len(found) == 1 and found[0].parent != root else root


def _is_cached(root: Path, file: str | None) -> bool:
    """Whether a snapshot in the cache holds weights, and every shard that its index names."""
    place = _cached_weights(root, file)
    if not place.is_dir():
        return place.is_file()
    shards = [place / name for index in place.glob("*.index.json") for name in shards_of_index(index)]
    if shards:
        return all(path.is_file() for path in shards)
    return any(path.suffix in WEIGHT_SUFFIXES for path in place.iterdir())


def _wanted_files(repo_id: str, names: set[str], file: str | None) -> list[str]:
    """Which files of a repository to download: the transformer's, or the one weights file; shards by their index."""
    if file is not None:
        if file not in names:
            raise UsageError(f"{repo_id}: holds no file {file!r}{did_you_mean(file, names)}")
        beside = str(PurePosixPath(file).with_name("config.json"))
        return [file, beside] if beside in names else [file]
    folder = "transformer/" if "transformer/config.json" in names else ""
    for suffix in ("safetensors", "bin"):
        stem = f"{folder}diffusion_pytorch_model"
        for weights in (f"{stem}.{suffix}.index.json", f"{stem}.{suffix}"):
            if weights in names:
                others = (f"{folder}config.json", f"{folder}litconvert.json")
                return [weights, *(name for name in others if name in names)]
    found = sorted(name for name in names if Path(name).suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        raise UsageError(
            f"{repo_id}: not a diffusers model; its weight files are {', '.join(found) or 'none'}: "
            "choose one with --set source.file=NAME"
        )
    return found
