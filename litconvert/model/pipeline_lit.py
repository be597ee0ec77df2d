"""LiTPipeline: class-conditional sampling with a LiTTransformer2DModel, in latent or pixel space; the sampling loop.

Shipped beside published weights: it needs torch and diffusers only.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Scheduler: TypeAlias = DDIMScheduler | DDPMScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler
# What a sample is drawn for, as arguments of the transformer: class_labels, or encoder_hidden_states and its mask.
Condition: TypeAlias = Mapping[str, Tensor]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Side of a pixel image over that of its latent.
VAE_FACTOR = 8


def set_timesteps(scheduler: Scheduler, steps: int) -> None:
    """Space the timesteps; DDPM as the original DiT does (first and last included), which diffusers has no name for.

    Flow matching takes steps of equal length from noise level 1 to 0; diffusers would make the last one tiny.
    """
    if isinstance(scheduler, DDPMScheduler):
        last = scheduler.config.num_train_timesteps - 1
        spaced = [round(index * last / max(steps - 1, 1)) for index in range(steps)]
        scheduler.set_timesteps(timesteps=spaced[::-1])
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def predict(
    transformer: Any,
    latents: Tensor,
    timestep: Tensor,
    condition: Condition,
    null: Condition,
    guidance_scale: float,
    guidance_channels: int | None,
    **common: Any,
) -> Tensor:
    """The model's output (N, out_channels, H, W), float32, with classifier-free guidance on the first channels.

    Guided channels are uncond + scale (cond - uncond); the others, variance included, are the conditional ones. DiT's
    own protocol guides the first three. Ho & Salimans, arXiv 2207.12598. `null` is not looked at when the scale is 1,
    and `common` are arguments of the transformer that the condition does not change.
    """
    if guidance_scale == 1.0:
        output: Tensor = transformer(latents, timestep, **condition, **common).sample
        return output.float()
    conditions = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
    # Guidance multiplies a difference, so it is not to be rounded as the model's own precision would.
    both = transformer(torch.cat([latents, latents]), timestep, **conditions, **common).sample.float()
    conditional, unconditional = both.chunk(2)
    count = latents.shape[1] if guidance_channels is None else guidance_channels
    guided = unconditional[:, :count] + guidance_scale * (conditional[:, :count] - unconditional[:, :count])
    return torch.cat([guided, conditional[:, count:]], dim=1)


def denoise(
    transformer: Any,
    scheduler: Scheduler,
    latents: Tensor,
    condition: Condition,
    null: Condition,
    *,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run a scheduler whose timesteps are set, from noise (N, C, H, W) to a clean latent of the same shape.

    The scheduler's arithmetic is float32 whatever the model's dtype. The flow scheduler integrates noise - data over
    the noise level: a model whose data is at t = 1 is asked at 1 - level, and its velocity turned round.
    """
    channels = latents.shape[1]
    config, dtype = transformer.config, transformer.dtype
    latents = latents.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    # DPM-Solver++ and DDIM are deterministic here, and refuse an argument they do not know.
    extra = {} if isinstance(scheduler, DPMSolverMultistepScheduler) else {"generator": generator}
    # A step takes the noise, or noise and variance where the scheduler knows what to do with it.
    learned_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    backwards = flow and config.data_timestep == 1
    common: dict[str, Any] = {}
    # A model file that was written before there were captions and velocities knows neither key.
    if getattr(config, "micro_conditions", False):
        height, width = (side * VAE_FACTOR for side in latents.shape[-2:])
        common["added_cond_kwargs"] = {
            "resolution": latents.new_tensor([[height, width]]),
            "aspect_ratio": latents.new_tensor([[height / width]]),
        }
    for timestep in scheduler.timesteps:
        time = timestep / scheduler.config.num_train_timesteps if flow else timestep
        scaled = latents if flow else scheduler.scale_model_input(latents, timestep)
        output = predict(
            transformer,
            scaled.to(dtype),
            (1 - time if backwards else time).to(latents.device),
            condition,
            null,
            guidance_scale,
            guidance_channels,
            **common,
        )
        if not learned_variance:
            output = output[:, :channels]
        latents = scheduler.step(-output if backwards else output, timestep, latents, **extra).prev_sample
        on_step()
    return latents


def unfit_scheduler(prediction: str, scheduler: Scheduler) -> str | None:
    """Why a model of this prediction cannot be sampled with a scheduler, or None when it can."""
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if flow == (prediction == "velocity"):
        return None
    wanted = "flow-euler (FlowMatchEulerDiscreteScheduler)" if not flow else "ddim, dpm-solver++ or ddpm"
    return f"this model predicts {prediction}, which {type(scheduler).__name__} does not take: use {wanted}"


class LiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draw images of given classes.

    Args:
        transformer: LiTTransformer2DModel.
        scheduler: DDIM, DDPM or DPM-Solver++; FlowMatchEuler for a model that predicts velocity.
        vae: decoder of a latent-space model; None for pixel space.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ("vae",)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Without auto_map, which is there for AutoModel, and of which diffusers would warn."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)

    def __init__(self, transformer: Any, scheduler: Scheduler, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | int,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        Args:
            class_labels: classes, 0 to `transformer.config.num_classes - 1`.
            num_inference_steps: of the scheduler.
            guidance_scale: classifier-free guidance; 1 is none.
            guidance_channels: guide the first so many channels only (DiT's protocol: 3); None: all.
            generator: of the starting noise and of DDPM's steps.
            latents: starting noise (N, C, H, W), instead of drawing it.
            output_type: `pil`, `np`, `pt` (values in [0, 1]) or `latent` (the model's own space, not decoded).
            return_dict: an ImagePipelineOutput, or a tuple of one.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        config = self.transformer.config
        wrong = [label for label in labels if not 0 <= label < config.num_classes]
        if wrong:
            raise ValueError(f"class_labels must be 0 to {config.num_classes - 1}, got {wrong[0]}")
        if guidance_scale != 1.0 and not config.null_class:
            raise ValueError(
                "this model was trained without a null class, so it cannot be guided: use guidance_scale=1"
            )
        if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
            raise ValueError(f"guidance_channels must be 1 to {config.in_channels}, got {guidance_channels}")
        if (problem := unfit_scheduler(getattr(config, "prediction", "noise"), self.scheduler)) is not None:
            raise ValueError(problem)
        total = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps must be 1 to {total}, got {num_inference_steps}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        device = self._execution_device
        if latents is None:
            shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.dim() != 4 or latents.shape[:2] != (len(labels), config.in_channels):
            raise ValueError(f"latents must be ({len(labels)}, {config.in_channels}, H, W), got {tuple(latents.shape)}")
        set_timesteps(self.scheduler, num_inference_steps)
        classes = torch.tensor(labels, device=device)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            latents = denoise(
                self.transformer,
                self.scheduler,
                latents.to(device),
                {"class_labels": classes},
                {"class_labels": torch.full_like(classes, config.num_classes)},
                guidance_scale=guidance_scale,
                guidance_channels=guidance_channels,
                generator=generator,
                on_step=progress.update,
            )
        images: Any = latents if output_type == "latent" else self.decode(latents)
        if output_type in ("pil", "np"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (N, C, H, W) in [0, 1]."""
        if self.vae is not None:
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            latents = self.vae.decode(scaled + (getattr(self.vae.config, "shift_factor", None) or 0.0)).sample
        return (latents / 2 + 0.5).clamp(0, 1)
