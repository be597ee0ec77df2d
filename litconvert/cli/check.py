"""`litconvert env --check`, also `python -m litconvert.gpu_check`: whether what litconvert does works on this machine.

The checks are in `litconvert.checks`, and run in another process. What is said of them is made to be sent to us: it
holds no user's name, nor a path with one.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import DeviceOption, JsonOption, MinutesOption, ReplaceOption, ReportOption, use_device
from litconvert.errors import GateError, UsageError


def check_machine(
    device: DeviceOption = None,
    minutes: MinutesOption = None,
    as_json: JsonOption = False,
    out: ReportOption = None,
    force: ReplaceOption = False,
) -> None:
    """Try on this machine's device what litconvert does: numerics, torch.compile, training, processes, estimates.

    Exits with 3 when a check failed.

    Example: python -m litconvert.gpu_check --out check.json
    """
    import json
    import tempfile
    import time

    from litconvert.checks.report import MINUTES, all_checks, report_of, without_people
    from litconvert.checks.runner import run_checks
    from litconvert.common.device import choose_device, chosen_device, default_device
    from litconvert.common.files import refuse_existing, write_whole
    from litconvert.common.launch import launched_processes

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
    refuse_existing(out, force=force)
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
    console.hush_libraries()
    console.take_any_text()
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
    app.command()(check_machine)
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(console.fail(error))


def env(
    as_json: JsonOption = False,
    device: DeviceOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try what litconvert does on this device too: some minutes.")
    ] = False,
    minutes: MinutesOption = None,
    out: ReportOption = None,
    force: ReplaceOption = False,
) -> None:
    """Versions and devices, for bug reports; with --check whether what litconvert does works on this machine.

    Example: litconvert env --check --out check.json
    """
    if check:
        check_machine(device, minutes, as_json, out, force)
        return
    if minutes is not None or out is not None:
        raise UsageError("--minutes and --out are of the check: add --check")
    from litconvert.common.device import (
        bf16_in_hardware,
        default_device,
        describe_devices,
        overrides,
        settings_of_libraries,
    )
    from litconvert.common.versions import machine, other_versions, versions

    use_device(device)
    facts = {
        **versions(),
        **other_versions(),
        **machine(),
        "devices": describe_devices(),
        "device used": default_device().type,
        "bf16 in hardware": bf16_in_hardware(),
        **overrides(),
        **settings_of_libraries(),
    }
    console.data(facts) if as_json else console.table(("", ""), list(facts.items()))
