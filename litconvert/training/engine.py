"""The processes of a run: their precision, wrapping a module for them, checkpoints that any number of them can resume.

accelerate launches and forms the group (`launch`). Precision is the engine's own: accelerate keeps one for as long as
Python runs, and here any number of runs, in any precision, may follow one another. Data parallelism is PyTorch's DDP.
Sharded states (`accelerate launch --use_fsdp --fsdp_version 2`) are its `fully_shard`, called here directly: accelerate
ignores FSDP on a CPU, and so the code that runs there is the code that runs on GPUs.
"""

import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from litconvert.checkpoints.distributed import CheckpointReader, read_tensors, write_tensors
from litconvert.common.device import has_mac_gpu, uses_bf16
from litconvert.common.files import read_json
from litconvert.common.launch import device_of, join_group, refuse_launcher_settings, sharding_asked
from litconvert.errors import LitconvertError

SCALARS = "scalars.json"


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, whole; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_in_float32(device: torch.device) -> None:
    """On CUDA, have products of bf16 matrices add up in float32: by default parts of a sum may be rounded."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class Engine:
    """A group of processes that train one module, in one precision.

    Args:
        mixed_precision: of a recipe, `auto`, `no` or `bf16`.
        key: what the recipe calls it.

    Attributes:
        device: this process's.
        processes, process: how many there are, and which this is.
        bf16: the forward pass is in bf16 autocast.
        sharded: weights, gradients, optimiser states and EMA are split over the processes.

    Raises UsageError when this process was launched as one of several but is in no group, and for what the launcher was
    told and is not carried out.
    """

    def __init__(self, mixed_precision: str = "auto", key: str = "distill.mixed_precision") -> None:
        refuse_launcher_settings(mixed_precision, key)
        self._group = join_group()
        self.device = device_of(self._group)
        self.processes = int(self._group.num_processes)
        self.process = int(self._group.process_index)
        self.bf16 = uses_bf16(mixed_precision)
        self.sharded = sharding_asked() and self.processes > 1
        self._trained_units: list[FSDPModule] = []
        sum_in_float32(self.device)

    @property
    def is_main(self) -> bool:
        return self.process == 0

    def wait(self) -> None:
        """Until every process is here."""
        with self.group_failures():
            self._group.wait_for_everyone()

    def describe(self) -> str:
        """Device, precision and processes, for people."""
        precision = "bf16 autocast" if self.bf16 else "float32"
        split = "" if self.processes == 1 else ", states sharded" if self.sharded else ", data parallel"
        unused = " (a Mac's GPU is here, used with --device mps)" if self.device.type == "cpu" and has_mac_gpu() else ""
        return f"device {self.device.type}{unused}, {precision}, {self.processes} process(es){split}"

    def autocast(self) -> AbstractContextManager[Any]:
        """Around what is computed in the engine's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def shard(self, module: nn.Module, parts: Iterator[nn.Module]) -> list[FSDPModule]:
        """Split a module's weights over the processes; each of `parts` is gathered by itself when it is needed.

        With bf16 autocast they are gathered as bf16, half the bytes: autocast would otherwise keep a bf16 copy of every
        gathered weight until the forward pass ends. Gradients are still summed in float32. Inputs are left as they are:
        timesteps would lose their digits.

        Returns: the units that hold a weight that is trained.
        """
        mesh = init_device_mesh(self.device.type, (self.processes,))
        policy = MixedPrecisionPolicy()
        if self.bf16:
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Nothing here changes an output in place, which is what torch warns of in every unit that returns a view.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        trained, taken = [], set[nn.Parameter]()
        for unit in (*parts, module):
            own = set(unit.parameters()) - taken  # inner units come first
            fully_shard(unit, mesh=mesh, mp_policy=policy)
            if any(parameter.requires_grad for parameter in own):
                trained.append(cast(FSDPModule, unit))
            taken = set(unit.parameters()) | taken
        return trained

    def wrap(self, module: nn.Module, parts: Callable[[], Iterator[nn.Module]]) -> nn.Module:
        """The module as the processes train it together. Its parameters are to be asked for after this."""
        if self.sharded:
            self._trained_units = self.shard(module, parts())
            return module
        if self.processes > 1:
            gc.collect()  # an earlier stage's wrapper and its buffers of gradients hang in a cycle
            return DistributedDataParallel(module, [self.device] if self.device.type == "cuda" else None)
        return module

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a part of a step of what was wrapped last: gradients are exchanged in the last part only."""
        if isinstance(module, FSDPModule):
            # Trained units alone: without synchronisation torch looks at what a unit gathered, and one of frozen
            # weights may never be gathered at all.
            for unit in self._trained_units:
                unit.set_requires_gradient_sync(last, recurse=False)
            return nullcontext()
        if isinstance(module, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[Any], module.no_sync())
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values / self.processes

    def from_main(self, value: Any) -> Any:
        """What the main process has, plain data, on every process; each must ask."""
        if self.processes == 1:
            return value
        box = [value]
        with self.group_failures():
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """What each process has, plain data, in their order, on every process; each must ask."""
        if self.processes == 1:
            return [value]
        values = [None] * self.processes
        with self.group_failures():
            dist.all_gather_object(values, value)
        return values

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
                isinstance(error, dist.DistError) or any(word in str(error).lower() for word in lost)
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
        write_tensors(folder, tensors, alone=self.processes == 1)
        if self.is_main:
            (folder / SCALARS).write_text(json.dumps(scalars) + "\n")
        self.wait()

    def load(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Read a state into tensors that are whole or sharded, whatever they were when it was written."""
        tensors = {name: value.detach() for name, value in state.items()}
        read_tensors(CheckpointReader(folder), tensors, alone=self.processes == 1)

    def stored(self, folder: Path) -> tuple[dict[str, TensorStorageMetadata], dict[str, int | float]]:
        """Shapes and dtypes of a saved state's tensors, and its numbers."""
        return CheckpointReader(folder).tensors(), read_json(folder / SCALARS)
