"""Which checks there are, and what is said of them: made to be sent to us, so without names of people."""

import getpass
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litconvert.checks.check import Check, Outcome


MINUTES = 5.0


# What chooses devices, precision and processes: launchers', PyTorch's and ours.
VARIABLES = ("LITCONVERT_", "ACCELERATE_", "FSDP_", "CUDA_", "NCCL_", "OMP_", "MKL_", "PYTORCH_", "TORCH", "TRITON_")


RANKS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


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
    from litconvert.common.versions import versions

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
    known = {folder: "TEMPORARY", str(Path(__file__).parents[2]): "HERE", sys.prefix: "PYTHON", str(Path.home()): "~"}
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
