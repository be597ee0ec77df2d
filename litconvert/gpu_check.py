"""`litconvert env --check`, also `python -m litconvert.gpu_check`: whether what litconvert does works on this machine.

The checks are in `litconvert.checks`, and run in another process. What is said of them is made to be sent to us: it
holds no user's name, nor a path with one.
"""

import getpass
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from litconvert import console
from litconvert.cli import DeviceOption, JsonOption, MinutesOption, ReportOption
from litconvert.errors import GateError, UsageError

if TYPE_CHECKING:
    from litconvert.checks.check import Check, Outcome

MINUTES = 5.0
# What chooses devices, precision and processes: launchers', PyTorch's and ours.
VARIABLES = ("LITCONVERT_", "ACCELERATE_", "FSDP_", "CUDA_", "NCCL_", "OMP_", "MKL_", "PYTORCH_", "TORCH", "TRITON_")
RANKS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


def check_machine(
    device: DeviceOption = None, minutes: MinutesOption = None, as_json: JsonOption = False, out: ReportOption = None
) -> None:
    """Try on this machine's device what litconvert does: numerics, torch.compile, training, processes, estimates.

    Exits with 3 when a check failed.

    Example: python -m litconvert.gpu_check --out check.json
    """
    from litconvert.checks.runner import run_checks
    from litconvert.device import choose_device, chosen_device, default_device
    from litconvert.files import write_whole
    from litconvert.launch import launched_processes

    seconds = 60 * (MINUTES if minutes is None else minutes)
    if seconds <= 0:
        raise UsageError("--minutes is how long to go on, and more than 0")
    if launched_processes() > 1:
        raise UsageError(
            "the check launches its own processes: start it alone, without torchrun or `accelerate launch`"
        )
    choose_device(device)
    choose_device(chosen_device())  # what a launcher chose, by a variable that checks do not see
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="litconvert-check-", ignore_cleanup_errors=True) as folder:
        outcomes = run_checks(all_checks(), default_device().type, Path(folder), seconds, announce)
        report = without_people(report_of(outcomes, time.monotonic() - began), folder)
    if out is not None:
        write_whole(out, json.dumps(report, indent=2) + "\n")
    console.data(report) if as_json else show(report)
    failed = [one["name"] for one in report["checks"] if one["status"] == "failed"]
    if failed:
        raise GateError(f"failed: {'; '.join(failed)} (--json says more, for a bug report)")


def announce(name: str) -> None:
    """That a check begins, on stderr."""
    console.note(f"checking: {name}")


def all_checks() -> list["Check"]:
    """In their order: what is quick and basic first, the largest model last."""
    from litconvert.checks.check import Check

    rooms = "litconvert.checks"
    half = {"bf16": {"dtype": "bfloat16"}, "fp16": {"dtype": "float16"}}
    sizes = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2", "PixArt-Sigma 512")
    return [
        Check("devices", f"{rooms}.devices:check_devices"),
        *(Check(f"linear attention, {name}", f"{rooms}.numerics:check_core", half[name]) for name in half),
        *(Check(f"linear layer, {name}", f"{rooms}.numerics:check_layer", half[name]) for name in half),
        Check("softmax block", f"{rooms}.numerics:check_softmax_block"),
        Check("teacher", f"{rooms}.training:check_teacher"),
        Check("run digits", f"{rooms}.training:check_digits_line"),
        Check("two processes", f"{rooms}.processes:check_processes"),
        Check("offloaded teacher", f"{rooms}.training:check_offload"),
        Check("compiled blocks", f"{rooms}.compiled:check_compiled"),
        *(Check(f"step, {name}", f"{rooms}.steps:check_step", {"size": name}, alone=True) for name in sizes),
        Check("compiled step, DiT-XL/2", f"{rooms}.steps:check_compiled_step", {"size": "DiT-XL/2"}, alone=True),
    ]


def report_of(outcomes: Sequence["Outcome"], seconds: float) -> dict[str, Any]:
    """Verdict, versions, what the environment says, and every check, as plain data."""
    from litconvert.model_directory import versions

    counts = {status: sum(one.status == status for one in outcomes) for status in ("passed", "failed", "skipped")}
    facts = next((one.figures for one in outcomes if one.name == "devices" and "name" in one.figures), None)
    name = f"{facts['name']} ({facts['device']})" if facts else "a device that does not say what it is"
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return {
        "verdict": f"{told} on {name}, {spoken(seconds)}",
        **counts,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "variables": variables(),
        "checks": [one.to_json() for one in outcomes],
    }


def variables() -> dict[str, str]:
    """Environment variables that choose devices, precision and processes; nothing that could be a secret."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(VARIABLES) or name in RANKS) and not re.search("TOKEN|KEY|SECRET|PASS", name)
    }


def without_people(value: Any, folder: str = "") -> Any:
    """Plain data as it may be sent: no folder of a user, user's or computer's name in a text, no NaN in a number.

    Args:
        folder: a temporary one, which is named as such.
    """
    if isinstance(value, dict):
        return {str(key): without_people(one, folder) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_people(one, folder) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        return value
    known = {folder: "TEMPORARY", str(Path(__file__).parents[1]): "HERE", sys.prefix: "PYTHON", str(Path.home()): "~"}
    for path in sorted(filter(lambda path: len(path) > 1, known), key=len, reverse=True):
        value = value.replace(path, known[path])
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # there is none in some containers
        user = ""
    for name, word in ((user, "USER"), (platform.node(), "HOST")):
        value = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", word, value) if name else value
    return value


def spoken(seconds: float) -> str:
    """`4 min 10 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show(report: Mapping[str, Any]) -> None:
    """The verdict first, then each check with what was found or why not."""
    console.line(report["verdict"])
    console.line("")
    rows = [
        (one["name"], one["status"], f"{one['seconds']:.0f} s", one.get("summary") or one.get("reason"))
        for one in report["checks"]
    ]
    console.table(("check", "", "time", "found"), rows, numbers=(2,))


def main() -> None:
    """`python -m litconvert.gpu_check`; exits as `litconvert` does."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
    app.command()(check_machine)
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(console.fail(error))


if __name__ == "__main__":
    main()
