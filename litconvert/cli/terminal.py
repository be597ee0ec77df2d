"""What the user sees: data on stdout, everything else on stderr."""

import codecs
import io
import json
import logging
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from litconvert.common.files import printable
from litconvert.errors import LitconvertError, system_cause

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)
_settings = {"quiet": False}
# More than any table has: what is read by a program or kept in a file is never folded.
ENDLESS = 100_000


def hush_libraries() -> None:
    """Errors alone of what other libraries log and warn of, and none of their bars; before they are imported.

    A user's own settings stand. LITCONVERT_DEBUG=1 shows everything.
    """
    if os.environ.get("LITCONVERT_DEBUG") == "1":
        return
    for library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not is_live():  # a download of gigabytes is watched on a terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(logging.lastResort, logging.Handler):  # whoever has no handler of its own
        logging.lastResort.setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def take_any_text() -> None:
    """Print whatever a name holds: its bytes as they are where they are no UTF-8, and an escape for what the stream's
    encoding lacks."""

    def as_it_is(error: UnicodeError) -> tuple[str | bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end]
        kept = (bytes([ord(one) - 0xDC00]) if "\udc80" <= one <= "\udcff" else _escaped(one) for one in text)
        return b"".join(kept), error.end

    codecs.register_error("litconvert", as_it_is)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="litconvert")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


def _escaped(one: str) -> bytes:
    return one.encode("ascii", "backslashreplace")


def be_quiet(quiet: bool) -> None:
    """-q: errors alone on stderr."""
    _settings["quiet"] = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def is_quiet() -> bool:
    """Whether -q was given."""
    return _settings["quiet"]


def is_live() -> bool:
    """Whether stderr is a terminal that can draw over what it has drawn."""
    return err.is_terminal and err.is_interactive


def note(message: str) -> None:
    """A line on stderr."""
    if not _settings["quiet"]:
        err.print(message, markup=False, soft_wrap=True)


def next_step(*words: object) -> None:
    """The command that most people want next, ready to be pasted."""
    note(f"next: litconvert {' '.join(shlex.quote(str(word)) for word in words)}")


def data(value: Any) -> None:
    """JSON on stdout, which has no NaN and no infinities: null stands for them."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that are none."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(text: str) -> None:
    """A line of data on stdout, as it is."""
    sys.stdout.write(text + "\n")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = (), title: str = ""
) -> None:
    """A table on stdout; the columns in `numbers` are right-aligned. It folds on a terminal alone."""
    if title:
        line(title)
    made = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for index, header in enumerate(headers):
        made.add_column(header, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    if out.is_terminal:
        out.print(made)
        return
    whole = Console(file=io.StringIO(), width=ENDLESS, highlight=False, color_system=None)
    with whole.capture() as captured:
        whole.print(made)
    for text in captured.get().splitlines():
        line(text.rstrip())


def fail(error: BaseException) -> int:
    """Print an error as its message alone; returns the exit code. A traceback only with LITCONVERT_DEBUG=1."""
    if os.environ.get("LITCONVERT_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, LitconvertError):
        err.print(f"litconvert: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        text = "litconvert: interrupted; the same command goes on with what is finished, and begins the rest again"
        err.print(text, markup=False, soft_wrap=True)
        return 130
    cause = system_cause(error) or _name_cause(error)
    if isinstance(error, ModuleNotFoundError):
        cause = f"{error.name} is not installed, which litconvert needs: install litconvert again, or pip install it"
    if cause is None and _is_out_of_memory(error):
        cause = (
            "out of memory; lower the batch size of what was at work: solve.batch_size and solve.states, "
            "data.synthesize.batch_size, data.encode.batch_size, sample.batch_size or evaluate.batch_size"
        )
    message = cause or f"unexpected {type(error).__name__}: {error} (LITCONVERT_DEBUG=1 shows where; please report it)"
    err.print(f"litconvert: {message}", markup=False, soft_wrap=True)
    return 1


def _name_cause(error: BaseException) -> str | None:
    """Of a library that met a name that is not UTF-8: that sentence."""
    seen: BaseException | None = error
    while seen is not None and not (isinstance(seen, UnicodeEncodeError) and "surrogates" in seen.reason):
        seen = seen.__cause__ or seen.__context__
    if not isinstance(seen, UnicodeEncodeError):
        return None
    return f"{printable(seen.object[:500])}: a name that is not UTF-8; rename the file or folder"


def _is_out_of_memory(error: BaseException) -> bool:
    """`common.memory.is_out_of_memory`, where torch is loaded at all: nothing else takes so much."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from litconvert.common.memory import is_out_of_memory

    return is_out_of_memory(error)
