"""Which device the work is on, and what it computes fast.

A GPU of NVIDIA is used where there is one. A Mac's GPU is used when it is asked for: nothing was measured on one yet.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from litconvert.errors import UsageError

DEVICES = ("cuda", "mps", "cpu")
DEVICE_VARIABLE = "LITCONVERT_DEVICE"
BF16_VARIABLE = "LITCONVERT_BF16"


def choose_device(name: str | None) -> None:
    """`--device`: what this process and those it starts work on from now on; None: as before.

    Raises UsageError for an unknown name, and for a device that is not there.
    """
    if name is not None:
        os.environ[DEVICE_VARIABLE] = name
        chosen_device()


def chosen_device() -> str | None:
    """The device that LITCONVERT_DEVICE (`--device`) names, or `accelerate launch --cpu`; None: nobody chose.

    Raises UsageError for an unknown name, and for a device that is not there.
    """
    name = os.environ.get(DEVICE_VARIABLE, "").lower()
    if name in ("", "auto"):
        return "cpu" if is_set("ACCELERATE_USE_CPU") else None
    if name not in DEVICES:
        raise UsageError(f"--device {name} ({DEVICE_VARIABLE}): there are {', '.join(DEVICES)} and auto")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not has_mac_gpu()):
        raise UsageError(
            f"--device {name} ({DEVICE_VARIABLE}): this machine has none that PyTorch {torch.__version__} can use; "
            "leave it out, or choose cpu"
        )
    return name


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes, as launchers write it."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU to use, and nobody chose another device."""
    return chosen_device() in (None, "cuda") and torch.cuda.is_available()


def has_mac_gpu() -> bool:
    """Whether this is a Mac whose GPU PyTorch can use."""
    return torch.backends.mps.is_available()


def default_device() -> torch.device:
    """The chosen device; where none was chosen a GPU if there is one to use, or else the CPU."""
    return torch.device(chosen_device() or ("cuda" if has_gpu() else "cpu"))


def describe_devices() -> str:
    """The devices that are here, and which one is used."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if has_mac_gpu():
        names.append("a Mac's GPU (mps)" if chosen_device() == "mps" else "a Mac's GPU, used with --device mps alone")
    return ", ".join([*names, "cpu"])


def overrides() -> dict[str, str]:
    """The environment variables that choose a device or its precision, those that are set."""
    return {name: os.environ[name] for name in (DEVICE_VARIABLE, BF16_VARIABLE) if os.environ.get(name)}


def settings_of_libraries() -> dict[str, str]:
    """The environment variables that change what PyTorch and the Hub do, those that are set; no tokens."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE", "HF_ENDPOINT")
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def bf16_in_hardware() -> bool:
    """Whether bf16 autocast is faster than float32 here: a GPU with bf16, or a CPU with AVX512-BF16 or AMX.

    LITCONVERT_BF16=0 or 1 overrides what the device says of itself.

    Raises UsageError for another value.
    """
    told = os.environ.get(BF16_VARIABLE, "")
    if told not in ("", "0", "1"):
        raise UsageError(f"{BF16_VARIABLE}={told}: set 1 (bf16 is fast here) or 0 (it is not), or leave it out")
    return told == "1" if told else _says_bf16()


def _says_bf16() -> bool:
    """What the device says of itself."""
    device = default_device().type
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def uses_bf16(mixed_precision: str) -> bool:
    """What a recipe's distill.mixed_precision comes to on this device."""
    return mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 are that on an NVIDIA GPU, too, which rounds them to TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
