"""Agreement of a student with its teacher on the same inputs, which needs no data; and what counts as nothing.

Beside the student stands the teacher itself in a lower precision: what that changes is no difference worth a step.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litconvert.common.listener import UNSEEN, Task
from litconvert.common.seeds import generator_of
from litconvert.errors import LitconvertError
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import make_diffusion
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.sampling.captions import Captions
from litconvert.sampling.draw import condition_of

TENTHS = 10
# Of the bootstrap, and the share of them that an interval holds.
RESAMPLES, CONFIDENCE = 1000, 0.95
# What the teacher is compared with itself in. It rounds alike whether the device has it in hardware or not, and unlike
# float16 it cannot overflow.
LOW_PRECISION = torch.bfloat16

# Output (N, C or 2C, H, W), and the residual stream (N, T, D) behind each block.
Pass = Callable[[Tensor, Tensor, Mapping[str, Any]], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class AgreementImages:
    """Clean images that the teacher drew, and what each was drawn for.

    Attributes:
        clean: (K, C, H, W), in the model's own space.
        conditions: K labels or captions.
        num_timesteps: of the forward process that the models were trained with.
        seed: of the noise.
        batch_size: inputs at a time; it changes rounding alone.
    """

    clean: Tensor
    conditions: Tensor | Captions
    num_timesteps: int
    seed: int
    batch_size: int

    def passes(self, models: int = 3) -> int:
        """How many passes of that many models a comparison takes, which a task of it is as long as."""
        return TENTHS * models * -(-len(self.clean) // self.batch_size)

    def noise(self, tenth: int, images: range) -> Tensor:
        """A function of the seed, the image and the tenth."""
        shape = self.clean.shape[1:]
        return torch.stack(
            [torch.randn(shape, generator=generator_of(self.seed, "agreement", i, tenth)) for i in images]
        )


@torch.inference_mode()
def agreement(
    teacher: LiTTransformer2DModel,
    student: LiTTransformer2DModel,
    images: AgreementImages,
    task: Task = UNSEEN,
) -> dict[str, Any]:
    """Relative squared errors ||student - teacher||^2 / ||teacher||^2 on the same inputs, with intervals.

    Each image is noised in every tenth of the timesteps. An error is a quotient of sums over inputs; its interval holds
    95 % of the errors of sets of as many images drawn from these, each with all of its inputs (the bootstrap).

    Args:
        teacher, student: on one device, in float32 and eval mode.
        images: what they see.
        task: advances with each pass of a model.

    Returns: {"images", "inputs", "student": errors, "precision": {"dtype", **errors}}, where errors are {"quantities":
    {name: {"error", "interval", "by_timestep": [{"low", "high", "error", "interval", "largest"}]}}, "layers":
    [{"layer", "error", "interval"}]}. Quantities are `noise` and, where both learned it, the raw `variance`, or the
    `velocity`; and `clean`, the x_0 that these mean. `largest` is the error of the worst single value, over the root
    mean square of the teacher's. A layer's is that of the residual stream behind its block.

    Raises LitconvertError where an output is no number.
    """
    config = ModelConfig.of(teacher.config)
    others = {"student": _pass_of(student), "precision": _pass_of(teacher, LOW_PRECISION)}
    sums = {name: _InputErrors(len(images.clean)) for name in others}
    original = _pass_of(teacher)
    diffusion = make_diffusion(config, images.num_timesteps)
    for tenth in range(TENTHS):
        for start in range(0, len(images.clean), images.batch_size):
            some = range(start, min(start + images.batch_size, len(images.clean)))
            timestep = _timesteps(tenth, some, len(images.clean), config, images.num_timesteps).to(teacher.device)
            noisy = diffusion.add_noise(
                images.clean[some.start : some.stop].to(teacher.device),
                images.noise(tenth, some).to(teacher.device),
                timestep,
            )
            condition = _condition(teacher, images.conditions[some.start : some.stop], len(some), noisy)
            expected, streams = original(noisy, timestep, condition)
            task.advance()
            theirs = _quantities(expected, noisy, timestep, diffusion.clean, config)
            for name, other in others.items():
                output, found = other(noisy, timestep, condition)
                mine = _quantities(output, noisy, timestep, diffusion.clean, config)
                sums[name].add(tenth, some, mine, theirs)
                if len(found) == len(streams):
                    sums[name].add(tenth, some, _numbered(found), _numbered(streams))
                task.advance()
    end = 1.0 if config.predicts_velocity else float(images.num_timesteps)
    return {
        "images": len(images.clean),
        "inputs": TENTHS * len(images.clean),
        "student": sums["student"].errors(end, images.seed),
        "precision": {"dtype": str(LOW_PRECISION).removeprefix("torch."), **sums["precision"].errors(end, images.seed)},
    }


def _pass_of(model: LiTTransformer2DModel, dtype: torch.dtype | None = None) -> Pass:
    """A pass in float32, or in autocast of a lower precision, in which the streams stay what they become."""

    def run(noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        streams: list[Tensor] = []

        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            streams.append(output)

        handles = [block.register_forward_hook(record) for block in model.blocks]
        try:
            with nullcontext() if dtype is None else torch.autocast(model.device.type, dtype):
                output: Tensor = model(noisy, timestep, **condition, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        return output.float(), streams

    return run


def _timesteps(tenth: int, images: range, count: int, config: ModelConfig, num_timesteps: int) -> Tensor:
    """Of some images in a tenth of the range, spread evenly over all of them, (N,)."""
    spread = (tenth + (torch.tensor(images, dtype=torch.float64) + 0.5) / count) / TENTHS
    return spread.float() if config.predicts_velocity else (spread * num_timesteps).long()


def _condition(
    model: LiTTransformer2DModel, conditions: Tensor | Captions, count: int, noisy: Tensor
) -> dict[str, Any]:
    """The model's arguments for these labels or captions."""
    labels, captions = (None, conditions) if isinstance(conditions, Captions) else (conditions, None)
    condition: dict[str, Any] = dict(condition_of(model, labels, captions, count, guided=False)[0])
    if model.config.micro_conditions:
        height, width = (float(side * VAE_FACTOR) for side in noisy.shape[-2:])
        condition["added_cond_kwargs"] = {
            "resolution": noisy.new_tensor([[height, width]]).repeat(count, 1),
            "aspect_ratio": noisy.new_tensor([[height / width]]).repeat(count, 1),
        }
    return condition


def _quantities(
    output: Tensor, noisy: Tensor, timestep: Tensor, clean: Callable[..., Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """What an output says, by name, (N, C, H, W) each."""
    channels = config.in_channels
    predicted = output[:, :channels]
    found = {"velocity" if config.predicts_velocity else "noise": predicted}
    if output.shape[1] == 2 * channels and not config.predicts_velocity:
        found["variance"] = output[:, channels:]
    return {**found, "clean": clean(noisy, predicted, timestep)}


def _numbered(streams: list[Tensor]) -> dict[str, Tensor]:
    return {str(layer): stream for layer, stream in enumerate(streams)}


class _InputErrors:
    """Mean squared errors, mean squares and largest squared errors of each input, by what they are of: (TENTHS, K)
    float64 on the CPU."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.inputs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, tenth: int, images: range, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        some = slice(images.start, images.stop)
        for name, value in ((name, value) for name, value in theirs.items() if name in mine):
            empty = torch.zeros(3, TENTHS, self.images, dtype=torch.float64)
            wrong, whole, largest = self.inputs.setdefault(name, tuple(empty))
            squares = (mine[name].float() - value.float()).square().flatten(1)
            wrong[tenth, some] = squares.mean(1).cpu().double()
            whole[tenth, some] = value.float().square().flatten(1).mean(1).cpu().double()
            largest[tenth, some] = squares.amax(1).cpu().double()

    def errors(self, end: float, seed: int) -> dict[str, Any]:
        """As `agreement` returns them."""
        # One set of images for all of them, so that their intervals are of the same chance.
        generator = generator_of(seed, "bootstrap")
        chosen = torch.randint(self.images, (RESAMPLES, self.images), generator=generator)
        quantities: dict[str, Any] = {}
        layers = []
        for name, (wrong, whole, largest) in self.inputs.items():
            if not (wrong.isfinite().all() and (whole > 0).all()):
                raise LitconvertError(
                    "an output of the teacher or the student is NaN, infinite or all zero; look at the checkpoints "
                    "with `litconvert inspect --weights`"
                )
            total = _estimate(wrong.sum(0), whole.sum(0), chosen)
            if name.isdecimal():
                layers.append({"layer": int(name), **total})
                continue
            extremes = (largest.amax(1) / whole.mean(1)).sqrt().tolist()
            parts = [
                {
                    "low": end * tenth / TENTHS,
                    "high": end * (tenth + 1) / TENTHS,
                    **_estimate(wrong[tenth], whole[tenth], chosen),
                    "largest": extremes[tenth],
                }
                for tenth in range(TENTHS)
            ]
            quantities[name] = {**total, "by_timestep": parts}
        return {"quantities": quantities, "layers": layers}


def _estimate(wrong: Tensor, whole: Tensor, chosen: Tensor) -> dict[str, Any]:
    """The quotient of the means' sums (K,), and the interval of those of the chosen images (RESAMPLES, K)."""
    resampled = wrong[chosen].sum(1) / whole[chosen].sum(1)
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    return {"error": float(wrong.sum() / whole.sum()), "interval": resampled.quantile(ends).tolist()}
