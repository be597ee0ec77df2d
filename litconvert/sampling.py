"""Drawing samples, decoding them, and writing them as a PNG grid or as the ADM evaluator's npz."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from litconvert.draws import generator_of
from litconvert.errors import LitconvertError, UsageError
from litconvert.hub import hub_errors
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.objectives import linear_betas
from litconvert.pipeline_lit import Scheduler, denoise, set_timesteps
from litconvert.recipe import Guidance, Recipe, Source, Vae, resolve, resolve_data


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
    first: int = 0,
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
        seed: of the noise that DDPM adds at each step, each sample's a function of (seed, first + its index).
        first: index of the first sample, so that a set can be drawn in batches of any size.
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
    rows = config.num_classes + config.null_class
    if len(class_labels) and not 0 <= int(class_labels.min()) <= int(class_labels.max()) < rows:
        raise UsageError(f"class_labels must be 0 to {rows - 1}, got {class_labels.min()} to {class_labels.max()}")
    if guidance != 1.0 and not config.null_class:
        raise UsageError("this model was trained without a null class, so it cannot be guided; use guidance 1")
    if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
        raise UsageError(f"guidance_channels must be 1 to {config.in_channels}, got {guidance_channels}")
    if scheduler == "ddpm" and config.out_channels != 2 * config.in_channels:
        raise UsageError(
            "the DDPM sampler needs a learned variance, which this model has not; use ddim or dpm-solver++"
        )
    if not 1 <= steps <= num_timesteps:
        raise UsageError(f"steps must be 1 to {num_timesteps}, got {steps}")
    instance = make_scheduler(scheduler, num_timesteps)
    set_timesteps(instance, steps)
    return denoise(
        model,
        instance,
        noise.to(model.device),
        class_labels.to(model.device),
        guidance_scale=guidance,
        guidance_channels=guidance_channels,
        generator=[generator_of(seed, "ddpm", first + index) for index in range(len(noise))],
        on_step=on_step,
    )


def noise_of(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise of one sample, a function of (seed, index) whatever the batch size."""
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
            seed=seed,
            first=first + start,
            num_timesteps=num_timesteps,
            on_step=on_step,
        ).cpu()


def load_vae(vae: Vae) -> Any:
    """The image decoder of a recipe, in eval mode.

    Raises LitconvertError when it is not an AutoencoderKL, whole.
    """
    from diffusers import AutoencoderKL

    try:
        with hub_errors(vae.path):
            model, loaded = AutoencoderKL.from_pretrained(vae.path, subfolder=vae.subfolder, output_loading_info=True)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LitconvertError(
            f"{vae.path}: not a diffusers AutoencoderKL ({reason}); set source.vae.path to one"
        ) from error
    # diffusers fills what is missing with random values, and says so in a log alone.
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]
    if wrong:
        raise LitconvertError(
            f"{vae.path}: not a complete AutoencoderKL ({wrong[0]}, and {len(wrong) - 1} more, do not fit); "
            "set source.vae.path to one"
        )
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


class SampleSheet:
    """Pictures of a run: the student's samples beside the teacher's, always on the same noise and labels.

    Args:
        recipe: its `sample` section and VAE.
        teacher: drawn once, when the first sheet is.
        folder: where the PNGs go.
    """

    def __init__(self, recipe: Recipe, teacher: LiTTransformer2DModel, folder: Path) -> None:
        self.recipe = recipe
        self.teacher = teacher
        self.folder = folder
        self.vae = load_vae(recipe.source.vae) if recipe.source.vae else None
        # Latents without a decoder have no picture.
        self.drawable = self.vae is not None or teacher.config.in_channels in (1, 3)

    def images(self, model: LiTTransformer2DModel) -> NDArray[np.uint8]:
        """The sheet's images (N, H, W, C)."""
        settings = self.recipe.sample
        labels = torch.arange(settings.num_images) % model.config.num_classes
        batches = draw(
            model,
            settings,
            labels,
            seed=settings.seed,
            batch_size=settings.batch_size,
            num_timesteps=self.recipe.diffusion.num_timesteps,
        )
        factor = self.recipe.source.vae.scaling_factor if self.recipe.source.vae else 1.0
        return to_images(torch.cat(list(batches)), self.vae, factor)

    def draw(self, model: LiTTransformer2DModel, name: str) -> None:
        """Write NAME.png, and teacher.png when it is not there yet."""
        if not self.drawable:
            return
        for label, drawn in (("teacher", self.teacher), (name, model)):
            path = self.folder / f"{label}.png"
            if label == name or not path.exists():
                images = self.images(drawn)
                save_grid(images, path, scale=max(1, 64 // images.shape[1]))


def parse_classes(text: str | None, count: int, num_classes: int) -> Tensor:
    """`0,3,7` cycled to `count` labels (count,) int64; None: every class in turn."""
    if text is None:
        return torch.arange(count) % num_classes
    try:
        labels = torch.tensor([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UsageError(f"--classes {text!r}: write labels as 0,3,7") from error
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"--classes {text!r}: the model's classes are 0 to {num_classes - 1}")
    return labels[torch.arange(count) % len(labels)]


def sample_to_files(
    model: str,
    *,
    out: Path,
    teacher: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    classes: str | None = None,
    npz: Path | None = None,
    latents: Path | None = None,
    num_attention_heads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw samples of a model, and of a teacher on the same noise, and write them.

    Args:
        model, teacher: run or model directory, or any checkpoint.
        out: PNG grid; the teacher's rows come first.
        recipe: whose `sample` section and VAE are used; None: the one recorded with the model, if any.
        classes: labels such as `0,3,7`.
        npz: the model's images for the ADM evaluator.
        latents: undecoded latents as safetensors, instead of pictures.

    Returns: the files written.
    """
    from litconvert.checkpoints import TensorInfo, write_safetensors
    from litconvert.sources import open_source, read_model

    path = str(Path(model) / "model") if (Path(model) / "model").is_dir() else model
    if recipe is None and (Path(path) / "recipe.yaml").is_file():
        recipe = path
    settings = (resolve(recipe, overrides) if recipe else resolve_data({}, overrides, "command line")).recipe

    def source_of(name: str) -> Source:
        # The recipe's hints describe its own source; any other checkpoint must tell for itself.
        if settings.source.path in (name, str(Path(name).resolve())):
            return settings.source
        return Source(path=name, num_attention_heads=num_attention_heads)

    sources = [open_source(source_of(name)) for name in ([teacher] if teacher else []) + [path]]
    models = [
        read_model(source, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu") for source in sources
    ]
    config = models[-1].config
    for other in models:
        for key in ("in_channels", "sample_size", "num_classes"):
            if other.config[key] != config[key]:
                raise UsageError(
                    f"{teacher} has {key}={other.config[key]}, {model} has {config[key]}: they cannot share noise"
                )
    if npz is not None and latents is not None:
        raise UsageError("--npz needs decoded images and --latents skips decoding; give one of them")
    chosen = settings.sample
    vae = load_vae(settings.source.vae) if settings.source.vae and latents is None else None
    if vae is None and latents is None and config.in_channels not in (1, 3):
        to_images(torch.empty(1, config.in_channels, 1, 1), None)  # refuses, and says what to give
    labels = parse_classes(classes, chosen.num_images, config.num_classes)
    total, done = len(models) * -(-len(labels) // chosen.batch_size) * chosen.steps, [0]

    def on_step() -> None:
        done[0] += 1
        on_progress(done[0], total)

    drawn = [
        torch.cat(
            list(
                draw(
                    one,
                    chosen,
                    labels,
                    seed=chosen.seed,
                    batch_size=chosen.batch_size,
                    num_timesteps=settings.diffusion.num_timesteps,
                    on_step=on_step,
                )
            )
        )
        for one in models
    ]
    for path_out in (latents, npz, None if latents else out):
        if path_out is not None:
            path_out.parent.mkdir(parents=True, exist_ok=True)
    if latents is not None:
        tensors = {"latents": drawn[-1], "class_labels": labels}
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
        write_safetensors(latents, infos, tensors.__getitem__, {"format": "pt"})
        return [latents]
    factor = settings.source.vae.scaling_factor if settings.source.vae else 1.0
    images = [to_images(one, vae, factor) for one in drawn]
    columns = min(10, len(labels))
    # Whole rows, so that the teacher's grid ends where the student's begins.
    padded = [np.concatenate([one, np.full((-len(one) % columns, *one.shape[1:]), 255, np.uint8)]) for one in images]
    save_grid(np.concatenate(padded), out, columns=columns, scale=max(1, 64 // config.sample_size))
    if npz is not None:
        save_npz(images[-1], labels, npz)
        return [out, npz]
    return [out]
