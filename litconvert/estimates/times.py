"""How long a training step takes here: one block of teacher and student is timed, and the rest follows from that."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from litconvert.estimates.activations import Step, random_inputs
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import Condition, LiTTransformer2DModel
from litconvert.model.shapes import count_macs
from litconvert.training.optimization import MovingAverage

# Of the timed forward pass: a tenth of a second or so on a processor's core, a few milliseconds on a GPU.
TIMED_MACS = {"cpu": 4e9, "mps": 1e11, "cuda": 1e12}
TIMED_TOKENS = 1024
TIMED_SECONDS = 0.5


class BlockTimer:
    """Times blocks of a width, on real tokens of a device.

    A block of each kind of attention is made once, with the grid of the model's own size, at most 32 x 32: what a
    larger one takes is in proportion to its multiply-accumulates. So is what the embedders and the last layer take.

    Args:
        config: a whole model's.
        micro_batch: samples that are computed at a time; fewer are timed where so many take long.
        bf16: autocast.
    """

    def __init__(self, config: ModelConfig, micro_batch: int, device: torch.device, bf16: bool) -> None:
        self.config, self.micro_batch, self.device, self.bf16 = config, micro_batch, device, bf16
        patch, size = config.patch_size, config.sample_size
        self.side = min(size // patch, int(TIMED_TOKENS**0.5))
        self.timed_size = self.side * patch

    def macs(self, kind: str, size: int) -> int:
        """Multiply-accumulates of one block for one sample."""
        one, none = (count_macs(replace(self.config, num_layers=n, attention=(kind,) * n), size) for n in (1, 0))
        return one - none

    def rest_macs(self) -> int:
        """Multiply-accumulates of what is no block, for one sample."""
        return count_macs(replace(self.config, num_layers=0, attention=()), self.config.sample_size)

    def pass_seconds(self, *, trained: bool) -> float:
        """A pass of the whole model over a micro-batch: forward, and with `trained` backward too."""
        kinds = self.config.attention
        blocks = sum(kinds.count(kind) * self._block_seconds(kind, trained) for kind in sorted(set(kinds)))
        return blocks * (1 + self.rest_macs() / sum(self.macs(kind, self.config.sample_size) for kind in kinds))

    def update_seconds(self, trained: int) -> float:
        """The optimiser's step and that of the EMA, for so many weights; AdamW's, whichever optimiser it is."""
        model, _ = self._model(self.config.attention[0])
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
        average = MovingAverage(parameters, 0.99)

        def update() -> None:
            optimizer.step()
            average.update(1)

        here = sum(value.numel() for value in parameters.values())
        share: float = trained / here
        return self._median(update) * share

    def _model(self, kind: str) -> tuple[LiTTransformer2DModel, int]:
        """A model of one block, and how many samples of it to time."""
        config = replace(self.config, num_layers=1, attention=(kind,), sample_size=self.timed_size)
        count = int(TIMED_MACS[self.device.type] // self.macs(kind, self.timed_size))
        with self.device:
            return LiTTransformer2DModel(**config.values), max(1, min(self.micro_batch, count))

    def _block_seconds(self, kind: str, trained: bool) -> float:
        """One block of a kind over a micro-batch."""
        model, count = self._model(kind)
        model.requires_grad_(trained)
        tokens = torch.randn(count, self.side**2, self.config.hidden_size, device=self.device)
        x = tokens.requires_grad_(trained)
        with self.device, torch.no_grad():
            inputs = random_inputs(ModelConfig.of(model.config), count)
            condition: Condition = model.conditioning(inputs.timestep, **inputs.condition)
        seconds = self._median(lambda: model.blocks[0](x, condition, (self.side, self.side)), trained=trained)
        # From what was timed to a micro-batch of the model's own size.
        more: float = self.macs(kind, self.config.sample_size) / self.macs(kind, self.timed_size)
        return seconds * more * (self.micro_batch / count)

    def _median(self, run: Callable[[], Tensor | None], *, trained: bool | None = None) -> float:
        """Seconds of a run, and of its backward pass with `trained`: the median, after one to warm up."""
        times: list[float] = []
        while len(times) < 2 or (sum(times) < TIMED_SECONDS and len(times) < 10):
            began = time.perf_counter()
            with torch.set_grad_enabled(bool(trained)):
                with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                    out = run()
                if out is not None and trained:
                    out.backward(torch.ones_like(out))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def step_seconds(step: Step, trained: int) -> float:
    """Seconds that a step of a stage takes on this device, by blocks that are timed now.

    Left out: reading data, T5 where captions are encoded on the fly, checkpoints and pictures, the exchange between
    processes, what torch.compile gains, outputs of the teacher that are kept on disk (`distill.noise_set`), frozen
    tensors, and the steps of optimisers other than AdamW, which counts in their place.

    Args:
        step: on a device that is there.
        trained: parameters that the stage trains.
    """
    timer = BlockTimer(step.student, step.micro_batch, step.device, step.bf16)
    part = 0.0
    if step.teacher is not None:
        teacher = BlockTimer(step.teacher, step.micro_batch, step.device, step.bf16)
        part = teacher.pass_seconds(trained=False)
    # A block whose activations are computed again goes forward twice; backward is two of its three thirds.
    part += timer.pass_seconds(trained=True) * (1 + step.settings.gradient_checkpointing / 3)
    return step.settings.gradient_accumulation_steps * part + timer.update_seconds(trained)
