"""The processes of a run: launching, wrapping a module for them, and checkpoints that any number of them can resume.

accelerate launches, forms the group, chooses device and precision, and reduces. Data parallelism is its DDP. Sharded
states (`accelerate launch --use_fsdp --fsdp_version 2`) are PyTorch's `fully_shard`, called here directly: accelerate
ignores FSDP on a CPU, and so the code that runs there is the code that runs on GPUs.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from litconvert.device import has_gpu
from litconvert.errors import LitconvertError, UsageError
from litconvert.files import read_json

SCALARS = "scalars.json"


def bf16_in_hardware() -> bool:
    """Whether bf16 autocast is faster than float32 here: a GPU with bf16, or a CPU with AVX512-BF16 or AMX."""
    if has_gpu():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def uses_bf16(mixed_precision: str) -> bool:
    """What a recipe's distill.mixed_precision comes to on this device."""
    return mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())


def launched_processes() -> int:
    """How many processes a launcher started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding_asked() -> bool:
    """Whether `accelerate launch --use_fsdp`, or who launches without it, asks for split states."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def refuse_ungrouped(processes: int) -> None:
    """Raise UsageError when this process was launched as one of several but its group is not of so many."""
    if launched_processes() != processes:
        raise UsageError(
            f"this is one of {launched_processes()} launched processes, but they are in no process group, so each "
            "would do all of the work and overwrite the others; launch with `accelerate launch -m litconvert ...`"
        )


def make_accelerator(mixed_precision: str, trackers: tuple[str, ...] = (), folder: Path | None = None) -> Accelerator:
    """accelerate's own engine.

    Raises UsageError when this process was launched as one of several but is in no group, for DeepSpeed, and when this
    Python process has used accelerate in another precision.
    """
    precision = "bf16" if uses_bf16(mixed_precision) else "no"
    try:
        accelerator = Accelerator(
            cpu=not has_gpu(),
            mixed_precision=precision,
            # The main process draws samples and scores while the others wait: longer than the ten minutes NCCL allows.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise UsageError(
            f"accelerate was set up for another precision or device in this Python process, and keeps it for life; "
            f"start a new one for distill.mixed_precision={mixed_precision}"
        ) from error
    refuse_ungrouped(accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UsageError(
            "DeepSpeed keeps its states in a format of its own, which no other number of processes could resume; "
            "shard them with `accelerate launch --use_fsdp --fsdp_version 2` instead"
        )
    return accelerator


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Without torch's warning that there is no process group: a run of one process has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _own_failures() -> Iterator[None]:
    """What went wrong in a process, in the place of torch's summary of it, which no `except Exception` catches."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, whole; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Engine:
    """A group of processes that train one module.

    Attributes:
        accelerator: accelerate's.
        sharded: weights, gradients, optimiser states and EMA are split over the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sharded = sharding_asked() and accelerator.num_processes > 1

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.accelerator.device)

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def process(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def wait(self) -> None:
        """Until every process is here."""
        with self.group_failures():
            self.accelerator.wait_for_everyone()

    def describe(self) -> str:
        """Device, precision and processes, for people."""
        precision = "float32" if self.accelerator.mixed_precision == "no" else "bf16 autocast"
        split = "" if self.processes == 1 else ", states sharded" if self.sharded else ", data parallel"
        return f"device {self.device.type}, {precision}, {self.processes} process(es){split}"

    def shard(self, module: nn.Module, parts: Iterator[nn.Module]) -> None:
        """Split a module's weights over the processes; each of `parts` is gathered by itself when it is needed.

        With bf16 autocast they are gathered as bf16, half the bytes: autocast would otherwise keep a bf16 copy of every
        gathered weight until the forward pass ends. Gradients are still summed in float32. Inputs are left as they are:
        timesteps would lose their digits.
        """
        mesh = init_device_mesh(self.device.type, (self.processes,))
        policy = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in parts:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)

    def wrap(self, module: nn.Module, parts: Callable[[], Iterator[nn.Module]]) -> nn.Module:
        """The module as the processes train it together. Its parameters are to be asked for after this."""
        self.accelerator.free_memory()  # it keeps what it wrapped for an earlier stage, with its gradients' buffers
        if self.sharded:
            self.shard(module, parts())
            return module
        if self.processes > 1:
            return cast(nn.Module, self.accelerator.prepare_model(module))
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a part of a step: gradients are exchanged in the last one only."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else cast(AbstractContextManager[Any], self.accelerator.no_sync(module))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        return cast(Tensor, self.accelerator.reduce(values, "mean"))

    @contextmanager
    def group_failures(self) -> Iterator[None]:
        """Say it in a sentence when another process went away in the middle of a step."""
        try:
            yield
        except RuntimeError as error:
            lost = (
                "connection closed",
                "connection reset",
                "broken pipe",
                "connection refused",
                "timed out",
                "timeout",
            )
            if self.processes > 1 and (
                isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in lost)
            ):
                raise LitconvertError(
                    f"process {self.process} of {self.processes} lost another one in the middle of a step; look for "
                    "that one's message, then run the same command to go on from the last checkpoint"
                ) from error
            raise

    def save(self, folder: Path, state: Mapping[str, Tensor | int | float]) -> None:
        """Write a state into a folder, each process its own part. Every process must call it.

        A tensor that is whole on every process is written once, a sharded one in parts: either is read back as either.
        """
        tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        self.wait()
        with _alone_on_purpose(), _own_failures():
            save(tensors, checkpoint_id=str(folder), no_dist=self.processes == 1)
        if self.is_main:
            (folder / SCALARS).write_text(json.dumps(scalars) + "\n")
        self.wait()

    def load(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Read a state into tensors that are whole or sharded, whatever they were when it was written."""
        tensors = {name: value.detach() for name, value in state.items()}
        try:
            with _alone_on_purpose(), _own_failures():
                load(tensors, checkpoint_id=str(folder), no_dist=self.processes == 1)
        except Exception as error:  # torch reports a damaged file in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LitconvertError(
                f"{folder}: the checkpoint cannot be read ({reason}); remove it to go on from the one before"
            ) from error

    def stored(self, folder: Path) -> tuple[dict[str, TensorStorageMetadata], dict[str, int | float]]:
        """Shapes and dtypes of a saved state's tensors, and its numbers."""
        found = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)}
        return tensors, read_json(folder / SCALARS)
