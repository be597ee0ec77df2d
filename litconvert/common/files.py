"""Files that appear whole or not at all, and the digests that say what they were made from."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from litconvert.common.listener import SILENT, Listener
from litconvert.errors import LitconvertError, UsageError, system_cause

LOCK = ".lock"
# The number of a process, as names of temporary files end in it.
PROCESS = r"[0-9]{1,9}"
HANDOVER_SECONDS = 15.0
OUTPUT_SECONDS = 1.0
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def picture_format(path: Path) -> str:
    """Pillow's name of a picture's format, by its ending. Raises UsageError for another ending."""
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{path}: a picture is written as {', '.join(PICTURES)}: give it one of these endings")
    return PICTURES[path.suffix.lower()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a LitconvertError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise LitconvertError(f"{path}: not valid JSON ({error}); download or write it again") from error
    if not isinstance(data, dict):
        raise LitconvertError(f"{path}: not a JSON object")
    return data


def digest_of(inputs: Any) -> str:
    """sha256 of resolved inputs (plain data), to tell whether an output is that of these inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse before the work where a full disk can be foreseen. `folder`, or a file, need not be there yet."""
    folder = Path(os.path.realpath(folder))
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise LitconvertError(
            f"{folder}: {nbytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
            "free some space, or write elsewhere"
        )


def take_room(descriptor: int, nbytes: int) -> None:
    """Take the room of a whole file, which is open: a full disk shows here, before anything is written."""
    with suppress(AttributeError):  # not on every system
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def refuse_source(out: Path, sources: Iterable[Path]) -> None:
    """Raise UsageError where writing `out` would overwrite a file that is read, or the folder it is in."""
    place = out.resolve()
    if any(place in (file.resolve(), *file.resolve().parents) for file in sources):
        raise UsageError(f"{out} is the source itself, or holds it; choose another path")


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def require_file_name(path: Path) -> None:
    """Raise UsageError where no file can be written under a name: that of a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise UsageError(f"{path} is {what}, and a file is written: name a file")


def require_writable(path: Path) -> None:
    """Raise before the work where a file cannot be written; nothing is left behind. Its folder need not be there yet.

    Raises UsageError for the name of a folder, LitconvertError for a place that takes no file.
    """
    require_file_name(path)
    folder = Path(os.path.realpath(path)).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LitconvertError(f"cannot write {path}: {system_cause(error) or error.strerror or error}") from error


def refuse_existing(*paths: Path | None, force: bool) -> None:
    """Raise LitconvertError for files that are there already, unless they may be replaced."""
    there = [str(path) for path in dict.fromkeys(paths) if path is not None and path.exists()]
    if there and not force:
        verb, them = ("exists", "it") if len(there) == 1 else ("exist", "them")
        raise LitconvertError(f"{' and '.join(there)} {verb}; choose another name, or replace {them} with --force")


def refuse_same(*paths: Path | None) -> None:
    """Raise UsageError for files to be written that are one and the same: the second would replace the first."""
    places: dict[str, Path] = {}
    for path in paths:
        if path is not None and (other := places.setdefault(os.path.realpath(path), path)) is not path:
            named = str(path) if str(path) == str(other) else f"{other} and {path}"
            raise UsageError(
                f"{named}: one file for two outputs, of which the second would replace the first; name two"
            )


def printable(text: str) -> str:
    """Text as UTF-8 can hold it: bytes of a name that are none are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def require_utf8(path: Path) -> None:
    """Raise UsageError for a path whose name is not UTF-8, which safetensors, PyTorch and Arrow cannot open."""
    if printable(str(path)) != str(path):
        raise UsageError(
            f"{printable(str(path))}: a name in this path is not UTF-8, and the libraries that read weights and data "
            "cannot open it; rename the file or folder (`convmv` does many)"
        )


def free_name(path: Path) -> Path:
    """The path where nothing is there, or else NAME-2, NAME-3, ..., the first that is free."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A temporary sibling file that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed process left behind is removed on the next try. An existing `out` is replaced; of a link, what it
    points to.
    """
    require_file_name(out)
    out = Path(os.path.realpath(out))
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            pid = stale.name.rsplit("-", 1)[1]
            # Anything else is a lock, or a user's.
            if re.fullmatch(PROCESS, pid) and not is_alive(int(pid)):
                stale.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
        _sync(out.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and not isinstance(error, LitconvertError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot write {out}: {cause}") from error
        raise


def _sync(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it is not forgotten."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a file system that has no locks answers: not there, no locks left or reachable (NFS without its daemon), or not
# possible for this kind of file.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(folder: Path, listener: Listener = SILENT, lock: Path | None = None) -> Iterator[None]:
    """Keep a folder to this process while the block runs; the system lets go of it however the process ends.

    A file system without locks lets everyone in, and a note says so.

    Args:
        lock: a file that is removed in the end. None: one in the folder, which stays; a predecessor that is ending has
            a few seconds then.

    Raises LitconvertError when another process keeps it.
    """
    from filelock import FileLock, Timeout

    # The fallback for file systems without locks is a file's being there: it would outlive a killed process.
    patience = HANDOVER_SECONDS if lock is None else OUTPUT_SECONDS
    holder = FileLock(lock or folder / LOCK, timeout=patience, fallback_to_soft=False)
    try:
        holder.acquire()
    except Timeout as error:
        raise LitconvertError(
            f"another process is at work in {folder}; wait for it or end it, then run the same command again"
        ) from error
    except (NotImplementedError, OSError) as error:
        # Where there is no place for a lock, whoever writes next says what is wrong with it.
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            listener.note(
                f"{folder} is on a file system without locks: nothing keeps a second command from working in it at the "
                "same time, so start only one"
            )
            if lock is not None:
                with suppress(OSError):
                    lock.unlink()
    try:
        yield
    finally:
        if lock is not None and holder.is_locked:
            # Before it is let go of: whoever waits for it sees that it is gone, and makes another.
            with suppress(OSError):
                lock.unlink()
        holder.release()


def write_whole(path: Path, text: str) -> None:
    """Write a small text file whole or not at all; of a link, what it points to."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise LitconvertError(f"cannot write {path}: {system_cause(error) or error}") from error
