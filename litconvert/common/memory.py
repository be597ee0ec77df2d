"""Memory of this process and its device: what is free, what was taken, and whether it ran out."""

import sys
from pathlib import Path

import psutil
import torch

from litconvert.common.device import has_gpu


def available_memory(device: torch.device) -> int:
    """Bytes that can be had now, on a GPU or else of main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def resident_now() -> int:
    """Bytes of main memory that this process takes, with all libraries of a run."""
    import datasets  # noqa: F401

    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Measure the peak from here on. Linux and CUDA can; elsewhere the peak is that of the whole process."""
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def measured_peak() -> int:
    """The most memory so far: on a GPU in tensors, on a CPU resident in this process."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most  # bytes on macOS, KiB elsewhere
    # Not ru_maxrss, which keeps what the process was forked from.
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory ran out: on a GPU or in the computer's main memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        # The allocator of main memory has no exception of its own.
        text = str(seen)
        if isinstance(seen, RuntimeError) and ("DefaultCPUAllocator: " in text or "CUBLAS_STATUS_ALLOC_FAILED" in text):
            return True
        seen = seen.__cause__
    return False
