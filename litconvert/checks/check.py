"""What a check is, what it is given, and what comes of it."""

import importlib
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from litconvert.errors import LitconvertError

NO_TIME = "no time left (--minutes)"
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Context:
    """What a check is given.

    Attributes:
        device: `cuda`, `mps` or `cpu`.
        folder: a temporary one, for all checks.
        seconds: that are left for this check and those after it.
    """

    device: str
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        summary: what matters of it, in a few words.
        figures: all of it, as plain data.
        wrong: what is not as it should be, as a sentence; empty: nothing.
    """

    summary: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    wrong: str = ""


class Skipped(Exception):
    """A check that this machine cannot run, and why."""


@dataclass(frozen=True)
class Check:
    """One thing to try, named rather than imported: what lists the checks need not wait for what they need.

    Attributes:
        call: `module:function`, called with a Context, gives a Finding or raises Skipped.
        given: its other arguments, plain data.
        alone: in a process of its own, whose memory holds nothing of the checks before.
    """

    name: str
    call: str
    given: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    def run(self, context: Context) -> Finding:
        """Import and call it."""
        module, _, function = self.call.partition(":")
        found: Finding = getattr(importlib.import_module(module), function)(context, **self.given)
        return found


@dataclass(frozen=True)
class Outcome:
    """How a check ended: with a summary, or the reason why it failed or was skipped."""

    name: str
    status: Status
    seconds: float
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    traceback: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        known: dict[str, Any] = {"name": self.name, "status": self.status, "seconds": round(self.seconds, 2)}
        known["summary" if self.status == "passed" else "reason"] = self.text
        known["figures"] = dict(self.figures)
        return known if self.traceback is None else {**known, "traceback": self.traceback}


def perform(check: Check, context: Context) -> Outcome:
    """Run a check here; whatever it raises is how it ended."""
    began = time.monotonic()

    def ended(status: Status, text: str, figures: Mapping[str, Any] | None = None, trace: str | None = None) -> Outcome:
        return Outcome(check.name, status, time.monotonic() - began, text, figures or {}, trace)

    try:
        found = check.run(context)
    except Skipped as reason:
        return ended("skipped", str(reason))
    except (Exception, SystemExit) as error:
        known = isinstance(error, LitconvertError)
        lines = str(error).strip().splitlines() or ["no message"]
        text = str(error) if known else f"{type(error).__name__}: {lines[0][:300]}"
        return ended("failed", text, trace=traceback.format_exc())
    return ended("failed" if found.wrong else "passed", found.wrong or found.summary, found.figures)


class Error(NamedTuple):
    """A measured error and what it may be."""

    what: str
    value: float
    limit: float

    @property
    def is_over(self) -> bool:
        return not self.value <= self.limit  # NaN is over any limit

    def __str__(self) -> str:
        return f"{self.what}: {self.value:.1e}, limit {self.limit:.1e}"


def judge(errors: Sequence[Error], figures: Mapping[str, Any]) -> Finding:
    """The finding of measured errors: how many are over their limits, and the one that is worst for its own.

    Raises ValueError where nothing was measured: that is no success.
    """
    if not errors:
        raise ValueError("no errors were measured")
    worst = max(errors, key=lambda error: math.inf if math.isnan(error.value) else error.value / error.limit)
    over = sum(error.is_over for error in errors)
    if over:
        return Finding("", figures, f"{over} of {len(errors)} errors over the limit; worst: {worst}")
    return Finding(f"worst: {worst}" if len(errors) > 1 else str(worst), figures)
