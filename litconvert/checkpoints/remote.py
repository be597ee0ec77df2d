"""Checkpoints on the Hub: which files of a repository are wanted, and their headers before they are downloaded."""

import errno
import io
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from litconvert.checkpoints.checkpoint import Checkpoint, Stored
from litconvert.checkpoints.folders import is_index, shards_of_index, weights_among
from litconvert.checkpoints.kinds import BEGINNING, Kind, kind_of
from litconvert.checkpoints.local import open_local
from litconvert.checkpoints.pickles import check_zip, first_line, is_zip, load_pickle, tensors_of
from litconvert.checkpoints.sets import Chosen, Header, choose
from litconvert.common.files import read_json
from litconvert.common.hub import download, hub_errors, is_weights_name, no_hub_bars
from litconvert.common.tensors import TensorInfo, check_dtype, info_of_header
from litconvert.errors import LitconvertError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# A zip's directory and the pickle in it are fetched in pieces of this size.
BLOCK_BYTES = 1 << 16
# What belongs to a file of weights and lies beside it.
BESIDE = ("config.json", "litconvert.json")


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
        main, wanted = repository.files_wanted(set(sizes))
        small = [name for name in wanted if name.endswith(".json")]
        holders = [name for name in wanted if name not in small]
        missing = [
            name for name in holders if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)
        ]
        headers = (
            _remote_headers(source, repo_id, str(info.sha), {name: sizes[name] for name in holders}, weights)
            if missing
            else None
        )
        if headers is None:
            return repository.fetched(main, wanted)
        tensors, chosen = headers
        local = [Path(download(repo_id, name, revision=revision)) for name in small]
        config = next((read_json(path) for path in local if path.name == "config.json"), None)

    @cache
    def stored() -> Stored:
        with hub_errors(repo_id):
            local = repository.fetched(main, wanted)
        if local.revision != info.sha or dict(local.tensors) != tensors:
            raise LitconvertError(f"{source}: changed on the Hub meanwhile; run the command again")
        return local.stored()

    size = sum(sizes[name] for name in missing)
    return Checkpoint(source, config, tensors, chosen.weights, chosen.sets, chosen.left_out, info.sha, size, stored)


def fetch(repo_id: str, revision: str | None, names: Sequence[str]) -> Path:
    """Those of these files that a repository has, in a folder; out of the Hub's reach those that are in the cache.

    Raises LitconvertError where there is no such repository, or where nothing of it is in the cache.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id), no_hub_bars():
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[escape(name) for name in names]))


def fetch_model(repo_id: str, revision: str | None, beside: Sequence[str]) -> Path:
    """The weights and config of a repository's transformer, and the files `beside` them, in a folder.

    Raises LitconvertError where that cannot be had, UsageError where there are several files of weights.
    """
    repository = _Repository(repo_id, repo_id, revision, None, "auto")
    with hub_errors(repo_id):
        info = repository.info()
        if info is None:
            repository.cached()  # refuses where the weights are not all there
            return fetch(repo_id, revision, ())
        names = {sibling.rfilename for sibling in info.siblings or ()}
        _, wanted = repository.files_wanted(names)
    return fetch(repo_id, revision, [*wanted, *(name for name in beside if name in names)])


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

    def files_wanted(self, names: set[str]) -> tuple[str, list[str]]:
        """The file of weights or the index of their shards, and all files that are needed."""
        main = weights_among(self.repo_id, names, self.file)
        folder = PurePosixPath(main).parent
        wanted = [main, *(name for one in BESIDE if (name := str(folder / one)) in names)]
        if is_index(main):
            wanted += [
                str(folder / shard) for shard in shards_of_index(download(self.repo_id, main, revision=self.revision))
            ]
        if lost := next((name for name in wanted if name not in names), None):
            raise LitconvertError(
                f"{self.repo_id}: its index names {lost}, which is not on the Hub; choose another revision"
            )
        return main, wanted

    def fetched(self, main: str, names: Sequence[str]) -> Checkpoint:
        """The checkpoint in these files, which are downloaded where the cache lacks them."""
        from huggingface_hub import snapshot_download

        # By the name asked for, not by the commit: so the cache knows it by that name when there is no network.
        patterns = [escape(name) for name in names]
        return self._opened(snapshot_download(self.repo_id, revision=self.revision, allow_patterns=patterns), main)

    def cached(self) -> Checkpoint:
        """The checkpoint that an earlier download left in the cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        # No file has this name: nothing is asked for but the folder.
        nothing = "no such file"
        found = snapshot_download(self.repo_id, revision=self.revision, local_files_only=True, allow_patterns=nothing)
        root = Path(found)
        names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        inner = "transformer/" if "transformer/config.json" in names else ""
        there = any(is_weights_name(name) and name.startswith(inner) for name in names)
        if there and (self.file is None or {self.file, inner + self.file} & names):
            main = weights_among(self.repo_id, names, self.file)
            place = root / main
            if not is_index(main) or all(place.with_name(shard).is_file() for shard in shards_of_index(place)):
                return self._opened(found, main)
        raise LocalEntryNotFoundError("opened before, but its weights were never downloaded")

    def _opened(self, root: str, main: str) -> Checkpoint:
        """The checkpoint in a snapshot on this machine."""
        place = Path(root) / main
        local = open_local(str(place), place.parent, file=place.name, weights=self.weights)
        return replace(local, source=self.source, revision=Path(root).name)


def _remote_headers(
    source: str, repo_id: str, commit: str, sizes: Mapping[str, int], weights: str
) -> tuple[dict[str, TensorInfo], Chosen] | None:
    """Shape and dtype of every tensor of a set in these files, without their values; and which set that is.

    None for a pickle in the old form, which has no directory and must be read whole.
    """
    infos: dict[str, Callable[[], TensorInfo]] = {}
    headers: dict[str, Header] = {}
    for name, size in sizes.items():
        found = _headers_of(repo_id, name, commit, size)
        if found is None:
            return None
        for key, (info, header) in found.items():
            if key in infos:
                raise LitconvertError(f"{repo_id}/{name}: {key!r} is in two shards; the repository is damaged")
            infos[key], headers[key] = info, header
    chosen = choose(source, headers, weights)
    if not chosen.names:
        raise LitconvertError(f"{source}: holds no tensors")
    return {own: infos[name]() for own, name in chosen.names.items()}, chosen


def _headers_of(
    repo_id: str, name: str, commit: str, size: int
) -> dict[str, tuple[Callable[[], TensorInfo], Header]] | None:
    """Every tensor of one file, whatever its kind, its dtype looked at when it is used; None for an old pickle."""
    place, file = f"{repo_id}/{name}", RemoteFile(repo_id, name, commit, size)
    if name.endswith(".safetensors"):
        try:
            return _remote_safetensors(repo_id, name, commit)
        except LitconvertError:
            if _kind(place, file) == "safetensors":
                raise
    elif _kind(place, file) == "safetensors":
        return _remote_safetensors(repo_id, name, commit)
    content: Any = file
    if not is_zip(content):
        return None
    # The entries that hold values are not fetched, not even the headers before them.
    entries = {entry: "/data/" in entry.filename for entry in check_zip(place, content)}
    spans = {entry: (entry.header_offset, entry.header_offset + 30 + entry.file_size) for entry in entries}
    file.hollow = sorted(spans[entry] for entry, holds_values in entries.items() if holds_values)
    for entry, holds_values in entries.items():
        if not holds_values:
            file.fetch(*spans[entry])
    state, headers = tensors_of(place, load_pickle(place, content, map_location="meta"))

    def info(key: str) -> TensorInfo:
        check_dtype(place, key, state[key].dtype)
        return TensorInfo(tuple(state[key].shape), state[key].dtype)

    return {key: (partial(info, key), headers[key]) for key in state}


def _kind(place: str, file: "RemoteFile") -> Kind:
    """What a file is by its first bytes. Raises LitconvertError for what is known to be something else."""
    file.seek(0)
    beginning = file.read(BEGINNING) or b""
    file.seek(0)
    kind = kind_of(place, beginning, file.size)
    if kind == "index":
        raise LitconvertError(f"{place}: a JSON file, which holds no weights; choose another file")
    return kind


def _remote_safetensors(repo_id: str, name: str, commit: str) -> dict[str, tuple[Callable[[], TensorInfo], Header]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    place = f"{repo_id}/{name}"
    try:
        header = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=commit)
        return {
            key: (partial(info_of_header, place, key, one.dtype, one.shape), Header(tuple(one.shape)))
            for key, one in header.tensors.items()
        }
    except (SafetensorsParsingError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LitconvertError(
            f"{place}: not a safetensors file ({first_line(error)}); choose another file or revision"
        ) from error


class RemoteFile(io.RawIOBase):
    """A file on the Hub, fetched in blocks, each once, when they are read.

    Attributes:
        hollow: sorted runs (start, stop) that are not fetched: a read within one gives zeros.
        token: True: the stored one is sent even where HF_HUB_DISABLE_IMPLICIT_TOKEN keeps it out of reads.
    """

    def __init__(self, repo_id: str, name: str, commit: str, size: int, *, token: bool | None = None) -> None:
        from huggingface_hub import hf_hub_url

        self.token = token
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
            headers = {**build_hf_headers(token=self.token), "range": f"bytes={begin}-{end - 1}"}
            response = http_backoff("GET", self.url, headers=headers, timeout=30)
            hf_raise_for_status(response)
            # A server that knows no ranges sends everything.
            content = response.content if response.status_code == 206 else response.content[begin:end]
            if len(content) != end - begin:
                raise OSError(f"{self.url}: {end - begin} bytes were asked for, {len(content)} came")
        for block in range(missing[0], missing[-1] + 1):
            self._blocks[block] = content[block * BLOCK_BYTES - begin :][:BLOCK_BYTES]
