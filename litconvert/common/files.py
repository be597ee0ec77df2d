"""Files that appear whole or not at all, and the digests that say what they were made from."""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litconvert.common.listener import SILENT, Listener
from litconvert.errors import LitconvertError, UsageError, system_cause

LOCK = ".lock"
HANDOVER_SECONDS = 15.0
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
    """Refuse before the work where a full disk can be foreseen."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise LitconvertError(
            f"{folder}: {nbytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
            "free some space, or write elsewhere"
        )


def refuse_source(out: Path, sources: Iterable[Path]) -> None:
    """Raise UsageError where writing `out` would overwrite a file that is read, or the folder it is in."""
    place = out.resolve()
    if any(place in (file.resolve(), *file.resolve().parents) for file in sources):
        raise UsageError(f"{out} is the source itself, or holds it; choose another path")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed process left behind is removed on the next try. An existing `out` is replaced.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            pid = stale.name.rsplit("-", 1)[1]
            if not pid.isdigit() or not _alive(int(pid)):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    try:
        yield temporary
        _sync(temporary)
        if out.exists():
            retired = out.parent / f".{out.name}.partial-{os.getpid()}-old"
            out.rename(retired)
            try:
                temporary.rename(out)
            except OSError:
                retired.rename(out)
                raise
            shutil.rmtree(retired) if retired.is_dir() else retired.unlink()
        else:
            temporary.rename(out)
        _sync(out.parent, recurse=False)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, LitconvertError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot write {out}: {cause}") from error
        raise


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A temporary sibling file that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed process left behind is removed on the next try. An existing `out` is replaced.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder, and a file is to be written; name a file")
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            pid = stale.name.rsplit("-", 1)[1]
            if not pid.isdigit() or not _alive(int(pid)):
                stale.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
        _sync(out.parent, recurse=False)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and not isinstance(error, LitconvertError) and (cause := system_cause(error)):
            raise LitconvertError(f"cannot write {out}: {cause}") from error
        raise


def _sync(folder: Path, *, recurse: bool = True) -> None:
    """Flush a folder (and what is in it) to disk, so that a rename never precedes the bytes."""
    paths = [folder, *(folder.rglob("*") if recurse else ())]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# What a file system that has no locks answers: not there, no locks left or reachable (NFS without its daemon), or not
# possible for this kind of file.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(folder: Path, listener: Listener = SILENT) -> Iterator[None]:
    """Keep a folder to this process while the block runs; the system lets go of it however the process ends.

    A predecessor that is ending has a few seconds. A file system without locks lets everyone in, and a note says so.

    Raises LitconvertError when another process keeps it.
    """
    from filelock import FileLock, Timeout

    # The fallback for file systems without locks is a file's being there: it would outlive a killed process.
    lock = FileLock(folder / LOCK, timeout=HANDOVER_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
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
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise LitconvertError(f"cannot write {path}: {system_cause(error) or error}") from error
