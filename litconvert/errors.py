"""Errors a user can act on: one sentence that says what is wrong, where, and what fixes it."""

import difflib
import errno
from collections.abc import Iterable


class LitconvertError(Exception):
    """A known error. The console prints its message alone and exits with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        # A name or value out of a file may be of any length; what is wrong comes first, and what fixes it last.
        text = super().__str__()
        return text if len(text) <= 1500 else f"{text[:900]} [...] {text[-500:]}"


class UsageError(LitconvertError):
    """A command, recipe or hint that cannot be meant: exit code 2."""

    exit_code = 2


class GateError(LitconvertError):
    """A quality or equality gate failed: exit code 3."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# Rust (safetensors), C++ (torch, Arrow) and Python all report the operating system's error, each in its own words.
_SYSTEM_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space, or write elsewhere",
    errno.EFBIG: "the file-size limit is reached; raise it (ulimit -f), or write elsewhere",
    errno.EACCES: "permission denied; write to a place you own",
    errno.EPERM: "permission denied; write to a place you own",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a file stands in the way; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter path",
    errno.ENOENT: "a part of the path does not exist",
    errno.EISDIR: "the path is a folder, not a file",
    errno.EBUSY: "it is a mount point, or in use; choose another path",
    errno.ELOOP: "the path is a link that leads to itself; choose another path",
}


def system_cause(error: BaseException) -> str | None:
    """What an operating-system error means for the user, or None when it is something else."""
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        for code, cause in _SYSTEM_CAUSES.items():
            if number == code or f"os error {code})" in str(seen) or f"errno {code}," in str(seen):
                where = f"{seen.filename}: " if isinstance(seen, OSError) and seen.filename else ""
                return where + cause
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None
