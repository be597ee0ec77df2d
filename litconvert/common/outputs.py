"""Folders that are written: whole or not at all, by one command at a time, and never over what is not ours.

An OUT that is not there, or an ordinary folder of ours, is made beside its place and renamed. A folder that has to stay
where it is (a link's, a mount, the current one) is filled: its files are made under a temporary name inside it, those
that make it loadable are moved into place last, and until then a mark in it has every reader refuse it.
"""

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from litconvert.common.files import PROCESS, held, is_alive, require_utf8
from litconvert.common.listener import SILENT, Listener
from litconvert.errors import LitconvertError, UsageError, system_cause

UNFINISHED = ".unfinished"
LOCK = "partial-lock"
# What is being made, beside an output (.NAME.partial-123) or in a folder that is filled (.partial-123), and locks. In
# the very forms that are written, since they are removed: a user's `.partial-notes` is the user's.
_PARTIAL = re.compile(rf"\.(?:.+\.)?partial-(?P<pid>{PROCESS})(?P<retired>-old)?", re.DOTALL)
_PASSING = re.compile(
    rf"\.lock|\.unfinished|{_PARTIAL.pattern}|\.(?:.+\.)?(?:partial-lock|(?:shards|solving)-[0-9a-f]{{12}})", re.DOTALL
)
# What file systems and file managers put into folders, which is nobody's: a folder with nothing else is empty. It stays
# where a folder is filled, and goes with one that is replaced by renaming.
_DROPPINGS = frozenset({"lost+found", ".DS_Store", "Thumbs.db", "desktop.ini", "__pycache__"})
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-?????-of-?????.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_BUCKET = ("dataset_info.json", "state.json", "data-*-of-*.arrow", "cache-*.arrow")
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Kind:
    """What a folder that we write is.

    Attributes:
        name: in a sentence.
        record: the file that tells it.
        files: patterns of what we write into it, relative to it; `*` is any part of a path.
        last: what makes it loadable, moved last and in this order where it is filled.
    """

    name: str
    record: str
    files: tuple[str, ...]
    last: tuple[str, ...] = ()


MODEL = Kind(
    "a model directory",
    "litconvert.json",
    (
        *_WEIGHTS,
        "config.json",
        "modeling_lit.py",
        "recipe.yaml",
        "litconvert.json",
        "evaluation.json",
        "evaluation-raw.json",
    ),
    ("litconvert.json", "config.json"),
)
DIFFUSERS_MODEL = Kind("a diffusers model", "config.json", (*_WEIGHTS, "config.json"), ("config.json",))
DATA_SET = Kind(
    "a data set",
    "litconvert-latents.json",
    (
        "litconvert-latents.json",
        "null-caption.safetensors",
        *_BUCKET,
        *(f"[0-9]*x[0-9]*/{name}" for name in _BUCKET),
    ),
    ("litconvert-latents.json", "dataset_info.json", "state.json"),
)
RUN = Kind(
    "a run",
    "run.json",
    (
        *("run.json", "recipe.yaml", "usage.json", "trackers.json", "evaluation.json", "evaluation-raw.json"),
        *("metrics.csv", "timestep_errors.csv", "curves.png", "timestep_errors.png", "comparison.png"),
        *("samples/teacher.png", "samples/before.png", "samples/after.png", "samples/step-*.png"),
        *("checkpoints/step-*", "checkpoints/.dropped-step-*", "checkpoints/.partial"),
        *("teacher-outputs/*.float32", "teacher-outputs/*.marks", "logs/*", "wandb/*", "latents"),
        *(f"model/{name}" for name in MODEL.files),
    ),
)


def place_of(out: Path) -> Path:
    """Where an output really is: absolute, and behind links."""
    return Path(os.path.realpath(out))


def is_filled(out: Path) -> bool:
    """Whether an output is a folder that has to stay where it is: a link's, a mount, the current one, one whose parent
    takes no other, or one that was begun so."""
    place = place_of(out)
    return place.is_dir() and (
        out.is_symlink()
        or _is_mount(place)
        or os.path.samefile(place, os.curdir)
        or (place / UNFINISHED).exists()
        or not os.access(place.parent, os.W_OK | os.X_OK)
    )


def _is_mount(place: Path) -> bool:
    """Whether something is mounted there; of a bind mount from the same file system only Linux's own list tells."""
    if os.path.ismount(place):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    found = {re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]) for line in lines}
    return os.fsencode(place) in found


def work_path(out: Path, what: str) -> Path:
    """Where something that is unfinished of an output is kept: in a folder that is filled, beside any other."""
    place = place_of(out)
    return place / f".{what}" if is_filled(out) else place.parent / f".{place.name}.{what}"


def work_paths(out: Path, what: str) -> list[Path]:
    """All of an output whose name begins so, as `work_path` names them; what only looks like them is a user's."""
    path = work_path(out, what)
    return sorted(one for one in path.parent.glob(f"{glob.escape(path.name)}*") if _PASSING.fullmatch(one.name))


def contents(folder: Path) -> list[Path]:
    """What a folder holds, but for what is being made in it, locks, and what no person put there."""
    return sorted(
        path for path in folder.iterdir() if path.name not in _DROPPINGS and not _PASSING.fullmatch(path.name)
    )


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is being filled, or was when the command that did it ended."""
    return (folder / UNFINISHED).exists()


def refuse_unfinished(folder: Path) -> None:
    """Raise LitconvertError for a folder that is not filled yet."""
    if is_unfinished(folder):
        raise LitconvertError(
            f"{folder} is unfinished: a command is filling it, or was stopped before it had; wait for it, or run the "
            "same command again"
        )


def refuse_foreign(out: Path, kind: Kind) -> None:
    """Raise LitconvertError for an output that is to be replaced and holds what we did not write, which it names."""
    if found := sorted(_foreign(place_of(out), kind, "")):
        raise LitconvertError(
            f"{out} holds what is no part of {kind.name}: {_named(found)}; move it away, or choose another path: not "
            "even --force deletes what is not ours"
        )


def refuse_stranger(out: Path, what: str) -> None:
    """Raise LitconvertError for a place that is taken by something that is not ours; `what` it would have to be."""
    held = f" (it holds {_named([path.name for path in contents(out)])})" if out.is_dir() else ""
    raise LitconvertError(
        f"{out} exists and is not {what} of litconvert{held}; remove it yourself, or choose another path"
    )


def _named(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"{', '.join(names[:NAMED_AT_MOST])}{more}"


def _foreign(folder: Path, kind: Kind, inside: str) -> Iterator[str]:
    for path in contents(folder):
        name = inside + path.name
        if any(fnmatchcase(name, pattern) for pattern in kind.files):
            continue
        if any(pattern.startswith(f"{name}/") or fnmatchcase(f"{name}/", _folder(pattern)) for pattern in kind.files):
            if path.is_dir() and not path.is_symlink():
                yield from _foreign(path, kind, f"{name}/")
            elif not path.is_dir():
                yield name
            continue
        yield f"{name}/" if path.is_dir() else name


def _folder(pattern: str) -> str:
    """A pattern's folder, with its slash; nothing of a file at the top."""
    return pattern[: pattern.rfind("/") + 1]


def refuse_place(out: Path, *, any_name: bool = False) -> None:
    """Raise UsageError for an output inside another one of ours, which would be replaced with all that is in it, and
    for one whose name no library could open."""
    if not any_name:
        require_utf8(out)
    for folder in place_of(out).parents:
        for kind in (MODEL, DATA_SET):
            if (folder / kind.record).is_file():
                raise UsageError(
                    f"{out} is inside {folder}, {kind.name}: what replaces that would take it away; write it beside "
                    "that folder, not in it"
                )


@contextmanager
def at_work(out: Path, listener: Listener = SILENT, *, any_name: bool = False) -> Iterator[None]:
    """Keep an output to this command while the block runs; the system lets go of it however the process ends.

    Args:
        any_name: it may be called what is not UTF-8.

    Raises LitconvertError when another command is writing it, UsageError for a place that `refuse_place` refuses.
    """
    refuse_place(out, any_name=any_name)
    place = place_of(out)
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    try:
        with held(out, listener, work_path(out, LOCK)), _begun(out):
            yield
    finally:
        for folder in missing:
            with suppress(OSError):  # something is in it now
                folder.rmdir()


@contextmanager
def _begun(out: Path) -> Iterator[None]:
    """An empty folder that is filled is marked as unfinished, until it is whole or empty again."""
    place = place_of(out)
    marked = is_filled(out) and not contents(place)
    try:
        if marked:
            (place / UNFINISHED).touch()
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    try:
        yield
    finally:
        if marked and all(path.name in (UNFINISHED, f".{LOCK}", *_DROPPINGS) for path in place.iterdir()):
            (place / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def whole_directory(out: Path, kind: Kind | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed process left behind is removed on the next try. An existing `out` is replaced.

    Args:
        kind: what `out` is. Raises LitconvertError where one that is to be replaced holds anything else.
    """
    place = place_of(out)
    try:
        if place.is_dir() and kind is not None:
            refuse_foreign(out, kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        for stale in work_paths(out, "partial-"):
            if (made := _PARTIAL.fullmatch(stale.name)) is None or not stale.is_dir():
                continue  # the lock, or a file's
            if made["retired"] or int(made["pid"]) == os.getpid() or not is_alive(int(made["pid"])):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = work_path(out, f"partial-{os.getpid()}")
        temporary.mkdir()
    except OSError as error:
        raise LitconvertError(f"cannot write {out}: {system_cause(error) or error}") from error
    with _begun(out):
        try:
            yield temporary
            if place.is_dir() and kind is not None:
                refuse_foreign(out, kind)  # it may have come meanwhile
            _sync(temporary)
            if temporary.parent == place:
                _fill(place, temporary, kind)
            else:
                _rename(temporary, place)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            known = not isinstance(error, Exception) or isinstance(error, LitconvertError)
            if not known and (cause := system_cause(error)):
                raise LitconvertError(f"cannot write {out}: {cause}") from error
            raise


def _rename(temporary: Path, place: Path) -> None:
    """Put a folder in its place, and remove the one that was there."""
    if place.exists():
        retired = temporary.with_name(f"{temporary.name}-old")
        place.rename(retired)
        try:
            temporary.rename(place)
        except OSError:
            retired.rename(place)
            raise
        remove(retired)
    else:
        temporary.rename(place)
    _sync(place.parent, recurse=False)


def _fill(place: Path, temporary: Path, kind: Kind | None) -> None:
    """Move files from a folder inside `place` into it. What was there goes first, and what made it loadable before
    the rest of that; what makes it loadable now comes last."""
    last = kind.last if kind is not None else ()

    def order(path: Path) -> int:
        return last.index(path.name) if path.name in last else -1

    mark = place / UNFINISHED
    mark.touch()
    _sync(place, recurse=False)
    for path in sorted(contents(place), key=order, reverse=True):
        remove(path)
    for path in sorted(temporary.iterdir(), key=order):
        path.rename(place / path.name)
        if path.name in last:
            _sync(place, recurse=False)
    # What interrupted commands kept here is of no more use.
    for path in (temporary, *work_paths(place, "shards-"), *work_paths(place, "solving-")):
        remove(path)
    _sync(place, recurse=False)
    mark.unlink()
    _sync(place, recurse=False)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link, of which what it points to stays."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sync(folder: Path, *, recurse: bool = True) -> None:
    """Flush a folder (and what is in it) to disk, so that a rename never precedes the bytes."""
    paths = [folder, *(folder.rglob("*") if recurse else ())]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
