"""Drawing samples, decoding them, and writing them as a PNG grid or as the ADM evaluator's npz."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from litconvert.checkpoints import _hub_errors
from litconvert.errors import LitconvertError, UsageError
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.objectives import linear_betas
from litconvert.pipeline_lit import Scheduler, denoise
from litconvert.recipe import Guidance, Vae


def make_scheduler(name: str, num_timesteps: int = 1000) -> Scheduler:
    """A scheduler of diffusers, set as the original DiT samples: linear betas, no clipping.

    Args:
        name: `ddpm` (learned range variance), `ddim` (eta 0) or `dpm-solver++` (second order).
    """
    betas = linear_betas(num_timesteps).numpy()
    common = {"num_train_timesteps": num_timesteps, "trained_betas": betas}
    if name == "ddim":
        return DDIMScheduler(
            **common, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
        )
    if name == "ddpm":
        return DDPMScheduler(**common, clip_sample=False, variance_type="learned_range")
    if name == "dpm-solver++":
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", timestep_spacing="linspace")
    raise UsageError(f"unknown scheduler {name!r}; there are ddpm, ddim and dpm-solver++")


def set_timesteps(scheduler: Scheduler, steps: int) -> None:
    """Space the timesteps; DDPM as the original does (first and last included), which diffusers has no name for."""
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be 1 to {total}, got {steps}")
    if isinstance(scheduler, DDPMScheduler):
        spaced = np.round(np.linspace(0, total - 1, steps)).astype(int)[::-1]
        scheduler.set_timesteps(timesteps=spaced.tolist())
    else:
        scheduler.set_timesteps(steps)


@torch.inference_mode()
def sample(
    model: LiTTransformer2DModel,
    *,
    noise: Tensor,
    class_labels: Tensor,
    scheduler: str = "ddim",
    steps: int = 25,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    seed: int = 0,
    num_timesteps: int = 1000,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw samples from noise.

    Args:
        model: teacher or student.
        noise: (N, C, H, W).
        class_labels: (N,) int64.
        scheduler: `ddim`, `ddpm` or `dpm-solver++`.
        steps: of the scheduler.
        guidance: classifier-free guidance scale, 1 for none.
        guidance_channels: guide the first so many channels only; None: all.
        seed: of the noise that DDPM adds at each step.
        num_timesteps: of the forward process the model was trained with.
        on_step: called after each step.

    Returns: latents or pixels (N, C, H, W), float32.
    """
    config = model.config
    if noise.dim() != 4 or noise.shape[1] != config.in_channels:
        raise UsageError(f"noise must be (N, {config.in_channels}, H, W), got {tuple(noise.shape)}")
    if class_labels.shape != noise.shape[:1]:
        raise UsageError(
            f"class_labels must be ({noise.shape[0]},), one for each noise, got {tuple(class_labels.shape)}"
        )
    if guidance != 1.0 and not config.null_class:
        raise UsageError("this model was trained without a null class, so it cannot be guided; use guidance 1")
    if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
        raise UsageError(f"guidance_channels must be 1 to {config.in_channels}, got {guidance_channels}")
    if scheduler == "ddpm" and config.out_channels != 2 * config.in_channels:
        raise UsageError(
            "the DDPM sampler needs a learned variance, which this model has not; use ddim or dpm-solver++"
        )
    instance = make_scheduler(scheduler, num_timesteps)
    set_timesteps(instance, steps)
    return denoise(
        model,
        instance,
        noise.to(model.device),
        class_labels.to(model.device),
        guidance_scale=guidance,
        guidance_channels=guidance_channels,
        generator=torch.Generator(model.device).manual_seed(seed),
        on_step=on_step,
    )


def noise_of(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise of one sample, a function of (seed, index) whatever the batch size."""
    from litconvert.draws import generator_of

    return torch.randn(shape, generator=generator_of(seed, "noise", index))


def draw(
    model: LiTTransformer2DModel,
    guidance: Guidance,
    labels: Tensor,
    *,
    seed: int,
    batch_size: int,
    num_timesteps: int,
    first: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Samples for the labels, batch by batch, each from the noise of (seed, first + its index)."""
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    for start in range(0, len(labels), batch_size):
        some = labels[start : start + batch_size]
        noise = torch.stack([noise_of(seed, first + start + i, shape) for i in range(len(some))])
        yield sample(
            model,
            noise=noise,
            class_labels=some,
            scheduler=guidance.scheduler,
            steps=guidance.steps,
            guidance=guidance.guidance,
            guidance_channels=guidance.guidance_channels,
            # DDPM's own noise must differ from batch to batch.
            seed=seed * 1_000_003 + first + start,
            num_timesteps=num_timesteps,
            on_step=on_step,
        ).cpu()


def load_vae(vae: Vae) -> Any:
    """The image decoder of a recipe, in eval mode."""
    from diffusers import AutoencoderKL

    try:
        with _hub_errors(vae.path):
            model = AutoencoderKL.from_pretrained(vae.path, subfolder=vae.subfolder)
    except (ValueError, KeyError) as error:
        raise LitconvertError(f"{vae.path}: not a diffusers AutoencoderKL ({error}); set source.vae.path") from error
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def to_images(latents: Tensor, vae: Any | None, scaling_factor: float = 1.0) -> NDArray[np.uint8]:
    """Latents or pixels (N, C, H, W) in [-1, 1] to images (N, H, W, C), uint8; C is 1 or 3."""
    if vae is not None:
        latents = torch.cat([vae.decode(one.to(vae.dtype) / scaling_factor).sample for one in latents.split(8)])
    if latents.shape[1] not in (1, 3):
        raise UsageError(
            f"these are latents of {latents.shape[1]} channels, and no decoder is named: "
            "give one (--set source.vae.path=stabilityai/sd-vae-ft-ema), or write them undecoded (--latents FILE)"
        )
    scaled = (latents.float().cpu() * 127.5 + 128).clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_grid(images: NDArray[np.uint8], path: Path, *, columns: int = 10, gap: int = 2, scale: int = 1) -> None:
    """Write images (N, H, W, C) as one PNG, row by row."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top = gap + (index // columns) * (height * scale + gap)
        left = gap + (index % columns) * (width * scale + gap)
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale] = large
    save_image(canvas, path)


def save_image(image: NDArray[np.uint8], path: Path) -> None:
    """Write one image (H, W, C) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")


def save_npz(images: NDArray[np.uint8], labels: Tensor, path: Path) -> None:
    """Write images in the ADM evaluator's layout: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels."""
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels.numpy())
