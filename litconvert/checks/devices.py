"""What this machine is, what it says it can do, and whether a product on its device comes out right and how fast."""

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from litconvert.checks.check import Context, Finding
from litconvert.common.device import (
    BF16_VARIABLE,
    bf16_in_hardware,
    chosen_device,
    default_device,
    describe_devices,
    has_mac_gpu,
)
from litconvert.common.quantities import size
from litconvert.runs.throughput import peak_flops

# Sides of the square matrices that are multiplied, milliseconds each.
SIDES = {"cuda": 8192, "mps": 2048, "cpu": 1024}


def check_devices(context: Context) -> Finding:
    """Names, memory, versions and claims; whether the device multiplies right, and whether a GPU lies idle."""
    facts = device_facts()
    products = {
        str(kind).removeprefix("torch."): _product(context.device, kind) for kind in (torch.float32, torch.bfloat16)
    }
    facts["products"] = {
        kind: {"tflops": round(rate / 1e12, 3), "error": error} for kind, (rate, error) in products.items()
    }
    rates = " and ".join(f"{rate / 1e12:.3g} in {kind}" for kind, (rate, _) in products.items())
    summary = f"{facts['name']}, {_memory(facts)}; {rates} TFLOP/s"
    if facts["bf16_in_hardware"] and products["bfloat16"][0] < products["float32"][0]:
        summary += f"; bf16 is said to be fast and is slower than float32: {BF16_VARIABLE}=0 has it left out"
    summary += f"; {facts['idle_gpu']}" if facts["idle_gpu"] else ""
    broken = [f"{kind} ({error:.1e})" for kind, (_, error) in products.items() if not error < 1e-2]
    wrong = unusable_gpu()
    if broken:
        wrong = f"{facts['name']} multiplies matrices wrongly: {', '.join(broken)}; the device or its driver is broken"
    return Finding(summary, facts, wrong)


def device_facts() -> dict[str, Any]:
    """Devices, versions, and what is claimed of bf16 and TensorFloat-32, as plain data. Bytes of memory."""
    device = default_device()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if device.type == "cuda" else []
    return {
        "name": gpus[0]["name"] if gpus else _processor(),
        "device": device.type,
        "devices": describe_devices(),
        "gpus": gpus,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "memory_free": psutil.virtual_memory().available,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "driver": _nvidia("driver_version"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "nccl": _nccl() if gpus else None,
        "triton": _version("triton"),
        "bf16_in_hardware": bf16_in_hardware(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "idle_gpu": idle_mac_gpu(),
    }


def idle_mac_gpu() -> str:
    """On a Mac why its GPU is not used; empty elsewhere, and where it is."""
    if not has_mac_gpu() or default_device().type == "mps":
        return ""
    return "a Mac's GPU is here and is not used, since nothing was measured on one yet: --device mps uses it"


def unusable_gpu() -> str:
    """A sentence where there is an NVIDIA GPU that PyTorch cannot use, and nobody chose another device."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or chosen_device() or (name := _nvidia("name")) is None:
        return ""
    reason = (
        "it was built without CUDA"
        if torch.version.cuda is None
        else f"it needs a driver for CUDA {torch.version.cuda}"
    )
    return (
        f"there is a GPU ({name}) that PyTorch {torch.__version__} cannot use, since {reason}; install the "
        "PyTorch for it (pytorch.org), or choose --device cpu"
    )


def _product(device: str, kind: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of square matrices, and the relative error of a corner of it against float64."""
    side = SIDES[device]
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    exact = a[:64].cpu().double() @ b[:, :64].cpu().double()
    error = (((a @ b)[:64, :64].cpu().double() - exact).norm() / exact.norm()).item()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times), error


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    peak = peak_flops(found.name)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory": total,
        "memory_free": free,
        "multiprocessors": found.multi_processor_count,
        "bf16": bf16,
        "peak_bf16_tflops": None if peak is None else peak / 1e12,
    }


def _memory(facts: dict[str, Any]) -> str:
    """What is free of the device's memory."""
    where = facts["gpus"][0] if facts["device"] == "cuda" else facts
    return f"{size(where['memory_free'])} free of {size(where['memory'])}"


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _nvidia(field: str) -> str | None:
    """What NVIDIA's driver says of the first GPU; None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split("\n")
    return lines[0].strip() or None if answer.returncode == 0 else None


def _nccl() -> str | None:
    """Its version; None for a PyTorch without it."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
