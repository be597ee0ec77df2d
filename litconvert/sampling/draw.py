"""Drawing samples from noise: for classes or captions, with a scheduler of diffusers, batch by batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from litconvert.common.device import float32_convolutions, uses_bf16
from litconvert.common.listener import UNSEEN, Task
from litconvert.common.seeds import generator_of
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.diffusion import linear_betas
from litconvert.model.modeling_lit import CaptionConditioning, LiTTransformer2DModel
from litconvert.model.pipeline_lit import Condition, Scheduler, denoise, set_timesteps, unfit_scheduler
from litconvert.recipe.schema import Guidance, Recipe
from litconvert.sampling.captions import Captions

LabelsOrCaptions = TypeVar("LabelsOrCaptions", bound=Tensor | Captions)


def make_scheduler(name: str, num_timesteps: int = 1000, prediction: str = "noise") -> Scheduler:
    """A scheduler of diffusers, set as the original DiT samples: linear betas, no clipping.

    Args:
        name: `ddpm` (learned range variance), `ddim` (eta 0), `dpm-solver++` (second order) or `flow-euler`.
        num_timesteps: of the forward process the model was trained with.
        prediction: the model's, `noise` or `velocity`.

    Raises UsageError for an unknown name, and for a scheduler that does not take the model's prediction.
    """
    scheduler = _make_scheduler(name, num_timesteps)
    if (problem := unfit_scheduler(prediction, scheduler)) is not None:
        raise UsageError(f"{problem} (--scheduler, or the recipe's scheduler keys)")
    return scheduler


def _make_scheduler(name: str, num_timesteps: int) -> Scheduler:
    """The scheduler of this name, whatever the model predicts."""
    if name == "flow-euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps)
    common = {"num_train_timesteps": num_timesteps, "trained_betas": linear_betas(num_timesteps).numpy()}
    if name == "ddim":
        return DDIMScheduler(
            **common, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
        )
    if name == "ddpm":
        return DDPMScheduler(**common, clip_sample=False, variance_type="learned_range")
    if name == "dpm-solver++":
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", timestep_spacing="linspace")
    raise UsageError(f"unknown scheduler {name!r}; there are ddpm, ddim, dpm-solver++ and flow-euler")


@torch.inference_mode()
def sample(
    model: LiTTransformer2DModel,
    *,
    noise: Tensor,
    class_labels: Tensor | None = None,
    captions: Captions | None = None,
    scheduler: str = "ddim",
    steps: int = 25,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    seed: int = 0,
    first: int = 0,
    num_timesteps: int = 1000,
    task: Task = UNSEEN,
) -> Tensor:
    """Draw samples from noise.

    Args:
        model: teacher or student.
        noise: (N, C, H, W).
        class_labels: (N,) int64, for a model of classes.
        captions: N of them, for a model of captions; guidance leads away from their null caption, or from the model's.
        scheduler: `ddim`, `ddpm` or `dpm-solver++`; `flow-euler` for a model that predicts velocity.
        steps: of the scheduler.
        guidance: classifier-free guidance scale, 1 for none.
        guidance_channels: guide the first so many channels only; None: all.
        seed: of the noise that DDPM adds at each step, each sample's a function of (seed, first + its index).
        first: index of the first sample, so that a set can be drawn in batches of any size.
        num_timesteps: of the forward process the model was trained with.
        task: advanced by one after each step.

    Returns: latents or pixels (N, C, H, W), float32.
    """
    config = model.config
    if noise.dim() != 4 or noise.shape[1] != config.in_channels:
        raise UsageError(f"noise must be (N, {config.in_channels}, H, W), got {tuple(noise.shape)}")
    condition, null = condition_of(model, class_labels, captions, len(noise), guided=guidance != 1.0)
    if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
        raise UsageError(f"guidance_channels must be 1 to {config.in_channels}, got {guidance_channels}")
    return denoise(
        model,
        _set_scheduler(model, scheduler, steps, num_timesteps),
        noise.to(model.device),
        condition,
        null,
        guidance_scale=guidance,
        guidance_channels=guidance_channels,
        generator=[generator_of(seed, "ddpm", first + index) for index in range(len(noise))],
        on_step=task.advance,
    )


def _set_scheduler(model: LiTTransformer2DModel, name: str, steps: int, num_timesteps: int) -> Scheduler:
    """The scheduler of this name, set to so many steps, for a model. Raises UsageError."""
    config = model.config
    if name == "ddpm" and config.prediction == "noise" and config.out_channels != 2 * config.in_channels:
        raise UsageError(
            "the DDPM sampler needs a learned variance, which this model has not; use ddim or dpm-solver++"
        )
    if not 1 <= steps <= num_timesteps:
        raise UsageError(f"steps must be 1 to {num_timesteps}, got {steps}")
    scheduler = make_scheduler(name, num_timesteps, config.prediction)
    set_timesteps(scheduler, steps)
    return scheduler


def condition_of(
    model: LiTTransformer2DModel, labels: Tensor | None, captions: Captions | None, count: int, *, guided: bool
) -> tuple[Condition, Condition]:
    """The transformer's arguments for what is drawn, and for what guidance leads away from."""
    if model.config.caption_channels is None:
        if labels is None or captions is not None:
            raise UsageError("this model is conditioned on classes: give class_labels, and no captions")
        return _class_condition(model, labels, count, guided=guided)
    if captions is None or labels is not None:
        raise UsageError("this model is conditioned on captions: give captions, and no class_labels")
    return _caption_condition(model, captions, count, guided=guided)


def _class_condition(
    model: LiTTransformer2DModel, labels: Tensor, count: int, *, guided: bool
) -> tuple[Condition, Condition]:
    """The transformer's arguments for the labels and for the null class."""
    config = model.config
    if labels.shape != (count,):
        raise UsageError(f"class_labels must be ({count},), one for each noise, got {tuple(labels.shape)}")
    rows = config.num_classes + config.null_class
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < rows:
        raise UsageError(f"class_labels must be 0 to {rows - 1}, got {labels.min()} to {labels.max()}")
    if guided and not config.null_class:
        raise UsageError("this model was trained without a null class, so it cannot be guided; use guidance 1")
    labels = labels.to(model.device)
    return {"class_labels": labels}, {"class_labels": torch.full_like(labels, config.num_classes)}


def _caption_condition(
    model: LiTTransformer2DModel, captions: Captions, count: int, *, guided: bool
) -> tuple[Condition, Condition]:
    """The transformer's arguments for the captions and for the null caption.

    The model's own null caption has no mask: as in PixArt's code, it stands behind the mask of the caption it replaces.
    """
    config = model.config
    if len(captions) != count:
        raise UsageError(f"captions must be {count}, one for each noise, got {len(captions)}")
    captions = captions.padded(config.caption_tokens, config.caption_channels)
    null_features, null_mask = captions.null_features, captions.null_mask
    if null_features is None and config.null_caption:
        null_features = cast(CaptionConditioning, model.conditioning).null_caption
        assert null_features is not None
        null_features = null_features.unsqueeze(0)
    if guided and null_features is None:
        raise UsageError(
            "this model keeps no null caption and the captions come without one, so it cannot be guided: give "
            "null_features and null_mask (those of the empty prompt), or use guidance 1"
        )

    def arguments(features: Tensor, mask: Tensor) -> Condition:
        return {
            "encoder_hidden_states": features.expand(count, -1, -1).to(model.device, model.dtype),
            "encoder_attention_mask": mask.expand(count, -1).to(model.device),
        }

    condition = arguments(captions.features, captions.mask)
    if null_features is None:
        return condition, condition  # not looked at
    return condition, arguments(null_features, captions.mask if null_mask is None else null_mask)


def noise_of(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise of one sample, a function of (seed, index) whatever the batch size."""
    return torch.randn(shape, generator=generator_of(seed, "noise", index))


@dataclass(frozen=True)
class SamplerSettings:
    """How a set of samples is drawn.

    Attributes:
        guidance: scheduler, steps and classifier-free guidance.
        num_timesteps: of the forward process the model was trained with.
        seed: of the noise.
        batch_size: samples at a time; it changes rounding alone.
        bf16: the model's forward passes are in bf16 autocast.
    """

    guidance: Guidance
    num_timesteps: int
    seed: int
    batch_size: int
    bf16: bool = False

    @classmethod
    def of(cls, recipe: Recipe, guidance: Guidance, *, seed: int, batch_size: int) -> "SamplerSettings":
        """As a recipe draws on this device."""
        bf16 = uses_bf16(recipe.sampling.mixed_precision)
        return cls(guidance, recipe.diffusion.num_timesteps, seed, batch_size, bf16)

    def passes_of(self, count: int) -> int:
        """How many forward passes of a batch so many samples take."""
        return self.steps_of(count) * (2 if self.guidance.guidance != 1 else 1)

    def steps_of(self, count: int) -> int:
        """How many steps so many samples take, batch by batch."""
        return -(-count // self.batch_size) * self.guidance.steps


def draw(
    model: LiTTransformer2DModel,
    conditions: Tensor | Captions,
    sampler: SamplerSettings,
    *,
    first: int = 0,
    task: Task = UNSEEN,
) -> Iterator[Tensor]:
    """Samples for class labels (N,) or captions, batch by batch, each from the noise of (seed, first + its index).

    `task` is advanced by one after each step of each batch. Raises LitconvertError for samples that are no numbers.
    """
    guidance, seed, batch_size = sampler.guidance, sampler.seed, sampler.batch_size
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    for start in range(0, len(conditions), batch_size):
        some = conditions[start : start + batch_size]
        noise = torch.stack([noise_of(seed, first + start + i, shape) for i in range(len(some))])
        autocast = torch.autocast(model.device.type, torch.bfloat16) if sampler.bf16 else nullcontext()
        with float32_convolutions(), autocast:
            drawn = sample(
                model,
                noise=noise,
                class_labels=None if isinstance(some, Captions) else some,
                captions=some if isinstance(some, Captions) else None,
                scheduler=guidance.scheduler,
                steps=guidance.steps,
                guidance=guidance.guidance,
                guidance_channels=guidance.guidance_channels,
                seed=seed,
                first=first + start,
                num_timesteps=sampler.num_timesteps,
                task=task,
            )
        # As pictures they would be black ones.
        if not drawn.isfinite().all():
            otherwise = "draw in float32 (--set sampling.mixed_precision=no), or " if sampler.bf16 else ""
            raise LitconvertError(
                f"the model drew NaN or infinite values in {'bf16' if sampler.bf16 else 'float32'}; {otherwise}check "
                "the checkpoint with `litconvert inspect --weights`"
            )
        yield drawn.cpu()


def cycled(conditions: LabelsOrCaptions, count: int) -> LabelsOrCaptions:
    """So many labels or captions, each as often as every other."""
    return cast(LabelsOrCaptions, conditions[torch.arange(count) % len(conditions)])
