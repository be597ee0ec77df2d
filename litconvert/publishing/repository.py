"""A repository on the Hub: what it holds, what a push makes of that, and whether it came to be so."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litconvert.checkpoints.remote import RemoteFile
from litconvert.common.files import read_json
from litconvert.errors import LitconvertError
from litconvert.families.companions import PUSHED
from litconvert.publishing.card import is_own_card
from litconvert.publishing.loaders import in_the_way
from litconvert.publishing.publication import Destination

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, RECORD = "README.md", "litconvert.json"
# The Hub keeps larger files in its large file storage, and smaller ones in git or there, as it decides.
LARGE_BYTES = 10_000_000

Change = Literal["added", "changed", "unchanged", "deleted", "kept", "in the way", "not compared"]


@dataclass(frozen=True)
class Outgoing:
    """A file that goes up."""

    path: str
    file: Path

    @cached_property
    def nbytes(self) -> int:
        return self.file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str | None:
        """Git's name for the content; None of a file that is too large for git."""
        if self.nbytes > LARGE_BYTES:
            return None
        return hashlib.sha1(b"blob %d\0" % self.nbytes + self.file.read_bytes(), usedforsecurity=False).hexdigest()

    @cached_property
    def header(self) -> bytes:
        """Of safetensors: the names, dtypes, shapes and places of all tensors, with their length before them."""
        with self.file.open("rb") as file:
            length = file.read(8)
            return length + file.read(int.from_bytes(length, "little"))


def outgoing_in(folder: Path) -> dict[str, Outgoing]:
    """The files of a folder that is laid out, by their path in the repository.

    Their hashes are put into litconvert.json, by which the next push knows what it may replace.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    going = {name: Outgoing(name, path) for name, path in names.items()}
    pushed = {name: [one.sha256, one.blob] for name, one in going.items() if name not in (CARD, RECORD)}
    record = {**read_json(names[RECORD]), PUSHED: pushed}
    names[RECORD].write_text(json.dumps(record, indent=2) + "\n")
    return {**going, RECORD: Outgoing(RECORD, names[RECORD])}


@dataclass(frozen=True)
class Held:
    """A file that a repository holds.

    Attributes:
        sha256: of a file in the large file storage.
        blob: Git's name for what is committed: the content, or of a large file the pointer to it.
    """

    nbytes: int
    blob: str | None
    sha256: str | None = None

    def equals(self, other: Outgoing) -> bool:
        """Whether it is a file of ours, by its hash."""
        if self.nbytes != other.nbytes:
            return False
        return self.sha256 == other.sha256 if self.sha256 is not None else self.blob == other.blob


@dataclass(frozen=True)
class Repository:
    """What a revision of a repository holds.

    Attributes:
        commit: None: there is no such repository yet.
        card: text of README.md, where there is one.
        pushed: what the latest push put there: path to SHA-256 and Git's name.
    """

    repo_id: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, Held] = field(default_factory=dict)
    card: str | None = None
    pushed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, api: "HfApi", repo_id: str, revision: str | None) -> "Repository":
        """As the Hub says it is now; none of its files is read."""
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        files = {
            one.rfilename: Held(one.size or 0, one.blob_id, None if one.lfs is None else one.lfs.sha256)
            for one in info.siblings or ()
        }
        return cls(repo_id, info.sha, bool(info.private), files)

    def with_texts(self, api: "HfApi") -> "Repository":
        """The same with its card, and with what the latest push recorded."""

        def text_of(name: str) -> str | None:
            if name not in self.files:
                return None
            found = api.hf_hub_download(self.repo_id, name, revision=self.commit)
            return Path(found).read_text(encoding="utf-8", errors="replace")

        try:
            pushed = json.loads(text_of(RECORD) or "{}").get(PUSHED)
        except (ValueError, AttributeError):  # of somebody else
            pushed = None
        return replace(self, card=text_of(CARD), pushed=pushed if isinstance(pushed, dict) else {})

    def written_by_us(self, path: str) -> bool:
        """Whether a file is as the latest push left it."""
        if path == RECORD:
            return bool(self.pushed)
        sha256, blob = entry if isinstance(entry := self.pushed.get(path), list) and len(entry) == 2 else (None, None)
        held = self.files[path]
        return (held.blob == blob if held.sha256 is None else held.sha256 == sha256) and bool(sha256)


@dataclass(frozen=True)
class Row:
    """What becomes of a file. `why`: where that is not plain."""

    path: str
    nbytes: int
    change: Change
    why: str = ""


@dataclass(frozen=True)
class Changes:
    """What a push makes of a repository.

    Attributes:
        repository: as it is before; None: the Hub was not asked.
        rows: every file of before and after, by path.
    """

    repository: Repository | None
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, going: Mapping[str, Outgoing], repository: Repository | None, asked: Destination) -> "Changes":
        """What becomes of each file."""
        if repository is None:
            return cls(None, tuple(Row(one.path, one.nbytes, "not compared") for one in going.values()))
        rows = [_row_of(one, repository, asked) for one in going.values()]
        ours = [row.path for row in rows if row.change != "kept"]
        others = [path for path in repository.files if path not in going]
        stale = [path for path in others if repository.written_by_us(path)]
        rows += [Row(path, repository.files[path].nbytes, "deleted", "of an earlier push") for path in stale]
        rest = [path for path in others if path not in stale]
        conflicts = in_the_way(ours, rest)
        for path in rest:
            change: Change = "kept" if path not in conflicts else "deleted" if asked.replace else "in the way"
            rows.append(Row(path, repository.files[path].nbytes, change, conflicts.get(path, "")))
        return cls(repository, tuple(sorted(rows, key=lambda row: row.path)))

    def paths(self, *changes: Change) -> list[str]:
        """The files that meet these fates."""
        return [row.path for row in self.rows if row.change in changes]

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [
            {"path": row.path, "bytes": row.nbytes, "change": row.change, **({"why": row.why} if row.why else {})}
            for row in self.rows
        ]

    def refuse(self) -> None:
        """Raise LitconvertError where something is in the way, and name it."""
        blocked = [row for row in self.rows if row.change == "in the way"]
        if not blocked or self.repository is None:
            return
        reasons = dict.fromkeys(row.why for row in blocked)
        named = [f"{_listed([row.path for row in blocked if row.why == why])}: {why}" for why in reasons]
        raise LitconvertError(
            f"{self.repository.repo_id} holds files of others that are in the way: {'; '.join(named)}. "
            "Push with --replace, which overwrites or deletes them in the same commit, or to another repository"
        )


def _row_of(one: Outgoing, repository: Repository, asked: Destination) -> Row:
    """What becomes of a file that is to go up."""
    held = repository.files.get(one.path)
    if held is None:
        return Row(one.path, one.nbytes, "added")
    if held.equals(one):
        return Row(one.path, one.nbytes, "unchanged")
    if one.path == CARD:
        if asked.replace_card or is_own_card(repository.card or ""):
            return Row(one.path, one.nbytes, "changed")
        edited = "edited since litconvert wrote it" if repository.pushed else "not litconvert's"
        return Row(one.path, held.nbytes, "kept", f"{edited}; --replace-card overwrites it")
    if asked.replace or repository.written_by_us(one.path):
        return Row(one.path, one.nbytes, "changed")
    return Row(one.path, held.nbytes, "in the way", "it would be overwritten")


def _listed(paths: Sequence[str]) -> str:
    """The paths, of many the first few and how many more."""
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def check_commit(api: "HfApi", revision: str, going: Mapping[str, Outgoing], changes: Changes) -> None:
    """Read back what a commit made of a repository, and compare it with what was sent: the list of files, every hash,
    and the header of every safetensors file through the address that it is downloaded from.

    Raises LitconvertError for what differs.
    """
    assert changes.repository is not None
    repo_id = changes.repository.repo_id
    now = Repository.read(api, repo_id, revision)
    sent = [going[path] for path in changes.paths("added", "changed", "unchanged")]
    wrong = [one.path for one in sent if one.path not in now.files or not now.files[one.path].equals(one)]
    wrong += [path for path in changes.paths("deleted") if path in now.files]
    wrong += [one.path for one in sent if one.path not in wrong and not _same_header(repo_id, str(now.commit), one)]
    if wrong:
        raise LitconvertError(
            f"{repo_id} at {str(now.commit)[:7]} does not hold what was sent: {_listed(wrong)} differs; do not use "
            "this commit, and run the same command again with --replace"
        )


def _same_header(repo_id: str, commit: str, one: Outgoing) -> bool:
    """Whether the Hub serves the header that was sent, of safetensors; of other files nothing is read."""
    if not one.path.endswith(".safetensors"):
        return True
    served = RemoteFile(repo_id, one.path, commit, one.nbytes, token=True)
    return (served.read(len(one.header)) or b"") == one.header
