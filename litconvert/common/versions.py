"""What a result is made with: packages and their versions, and the machine."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from litconvert.common.quantities import size

OTHERS = (
    "accelerate",
    "bitsandbytes",
    "came-pytorch",
    "datasets",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "transformers",
    "triton",
)


def is_installed(module: str) -> bool:
    """Whether a module can be imported, which is not tried."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not there
        return False


def versions() -> dict[str, str]:
    """What the result was made with."""
    packages = {name: version(name) for name in ("litconvert", "torch", "diffusers", "safetensors")}
    return {"python": platform.python_version(), **packages}


def other_versions() -> dict[str, str]:
    """Of what a bug may also lie in; what is not installed says so."""
    found = {}
    for name in OTHERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    """The system, the processor and its memory, and what PyTorch was built for."""
    threads = f"{os.cpu_count()}, PyTorch uses {torch.get_num_threads()}"
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": threads,
        "memory": size(psutil.virtual_memory().total),
        "CUDA of PyTorch": torch.version.cuda or "none",
    }


def _processor() -> str:
    """Its name, which only Linux keeps in a file."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
