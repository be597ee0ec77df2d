"""Drawing samples, decoding them, and writing them as a PNG grid or as the ADM evaluator's npz."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from litconvert.captions import Captions, encode, read_embeddings, write_embeddings
from litconvert.device import default_device
from litconvert.draws import generator_of
from litconvert.errors import LitconvertError, UsageError
from litconvert.hub import hub_errors
from litconvert.modeling_lit import CaptionConditioning, LiTTransformer2DModel
from litconvert.objectives import linear_betas
from litconvert.pipeline_lit import Condition, Scheduler, denoise, set_timesteps, unfit_scheduler
from litconvert.recipe import Guidance, Recipe, Source, Vae
from litconvert.recipe_files import resolve, resolve_data
from litconvert.shapes import is_pixel_space

Conditions = TypeVar("Conditions", Tensor, Captions)

# Samples that are drawn of a model of classes when nobody says how many.
NUM_IMAGES = 40
# Of the samples in an NPZ file, those that are on the sheet beside it.
NPZ_SHEET = 100


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
    on_step: Callable[[], None] = lambda: None,
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
        on_step: called after each step.

    Returns: latents or pixels (N, C, H, W), float32.
    """
    config = model.config
    if noise.dim() != 4 or noise.shape[1] != config.in_channels:
        raise UsageError(f"noise must be (N, {config.in_channels}, H, W), got {tuple(noise.shape)}")
    if config.caption_channels is None:
        if class_labels is None or captions is not None:
            raise UsageError("this model is conditioned on classes: give class_labels, and no captions")
        condition, null = _class_condition(model, class_labels, len(noise), guided=guidance != 1.0)
    else:
        if captions is None or class_labels is not None:
            raise UsageError("this model is conditioned on captions: give captions, and no class_labels")
        condition, null = _caption_condition(model, captions, len(noise), guided=guidance != 1.0)
    if guidance_channels is not None and not 1 <= guidance_channels <= config.in_channels:
        raise UsageError(f"guidance_channels must be 1 to {config.in_channels}, got {guidance_channels}")
    if scheduler == "ddpm" and config.prediction == "noise" and config.out_channels != 2 * config.in_channels:
        raise UsageError(
            "the DDPM sampler needs a learned variance, which this model has not; use ddim or dpm-solver++"
        )
    if not 1 <= steps <= num_timesteps:
        raise UsageError(f"steps must be 1 to {num_timesteps}, got {steps}")
    instance = make_scheduler(scheduler, num_timesteps, config.prediction)
    set_timesteps(instance, steps)
    return denoise(
        model,
        instance,
        noise.to(model.device),
        condition,
        null,
        guidance_scale=guidance,
        guidance_channels=guidance_channels,
        generator=[generator_of(seed, "ddpm", first + index) for index in range(len(noise))],
        on_step=on_step,
    )


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


def draw(
    model: LiTTransformer2DModel,
    guidance: Guidance,
    conditions: Tensor | Captions,
    *,
    seed: int,
    batch_size: int,
    num_timesteps: int,
    first: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Samples for class labels (N,) or captions, batch by batch, each from the noise of (seed, first + its index)."""
    config = model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    for start in range(0, len(conditions), batch_size):
        some = conditions[start : start + batch_size]
        noise = torch.stack([noise_of(seed, first + start + i, shape) for i in range(len(some))])
        yield sample(
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
        latents = torch.cat(
            [vae.decode(one.to(vae.device, vae.dtype) / scaling_factor).sample for one in latents.split(8)]
        )
    if not is_pixel_space(latents.shape[1]):
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


def save_npz(images: NDArray[np.uint8], labels: Tensor | None, path: Path) -> None:
    """Write images in the ADM evaluator's layout: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels where there are any."""
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels.numpy()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def encode_prompts(
    recipe: Recipe, config: Mapping[str, Any], prompts: Sequence[str] = (), negative_prompt: str | None = None
) -> Captions:
    """Captions for a model of captions, from a recipe's T5, which is freed before this returns.

    Args:
        recipe: its `source.text_encoder` and, where nothing else is given, its prompts and its negative prompt.
        config: the model's.

    Raises UsageError when the recipe names no T5.
    """
    if recipe.source.text_encoder is None:
        raise UsageError(
            "this model draws captions, and no text encoder is named: give one "
            "(--set source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS), or precomputed captions "
            "(--embeddings FILE)"
        )
    negative = recipe.sample.negative_prompt if negative_prompt is None else negative_prompt
    if negative is None and not config["null_caption"]:
        negative = ""
    return encode(
        recipe.source.text_encoder, prompts or recipe.sample.prompts, negative, tokens=config["caption_tokens"]
    )


def cycled(conditions: Conditions, count: int) -> Conditions:
    """So many labels or captions, each as often as every other."""
    return conditions[torch.arange(count) % len(conditions)]


class SampleSheet:
    """Pictures of a run: every model's samples on the same noise and condition.

    Args:
        recipe: its `sample` section, VAE and, for captions, T5, which encodes the prompts at once and is freed.
        config: of the models that are drawn.
        folder: where the PNGs go.
    """

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        device = default_device()
        self.vae = load_vae(recipe.source.vae).to(device) if recipe.source.vae else None
        count = recipe.sample.num_images
        # Latents without a decoder have no picture, and captions without an encoder cannot be read.
        self.drawable = self.vae is not None or is_pixel_space(config["in_channels"])
        self.conditions: Tensor | Captions
        if config["caption_channels"] is None:
            self.conditions = torch.arange(count or NUM_IMAGES) % config["num_classes"]
        elif self.drawable and recipe.source.text_encoder is not None:
            captions = encode_prompts(recipe, config)
            self.conditions = cycled(captions, count or len(captions))
        else:
            self.drawable = False

    def images(self, model: LiTTransformer2DModel) -> NDArray[np.uint8]:
        """The sheet's images (N, H, W, C)."""
        settings = self.recipe.sample
        batches = draw(
            model,
            settings,
            self.conditions,
            seed=settings.seed,
            batch_size=settings.batch_size,
            num_timesteps=self.recipe.diffusion.num_timesteps,
        )
        factor = self.recipe.source.vae.scaling_factor if self.recipe.source.vae else 1.0
        return to_images(torch.cat(list(batches)), self.vae, factor)

    def draw(self, model: LiTTransformer2DModel, name: str) -> None:
        """Write NAME.png, where there is a picture to be drawn."""
        if self.drawable:
            images = self.images(model)
            save_grid(images, self.folder / f"{name}.png", scale=max(1, 64 // images.shape[1]))


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
    prompts: Sequence[str] = (),
    negative_prompt: str | None = None,
    embeddings: Path | None = None,
    save_embeddings: Path | None = None,
    npz: Path | None = None,
    latents: Path | None = None,
    num_attention_heads: int | None = None,
    weights: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Path]:
    """Draw samples of a model, and of a teacher on the same noise, and write them.

    Args:
        model, teacher: run (RUN, or RUN@STEP for one of its checkpoints) or model directory, or any checkpoint.
        out: PNG grid; the teacher's rows come first.
        recipe: whose `sample` section and VAE are used; None: the one recorded with the model, if any.
        classes: labels such as `0,3,7`.
        prompts, negative_prompt: of a model of captions; none: the recipe's. T5 is freed before the model is read.
        embeddings: captions encoded earlier, instead of prompts.
        save_embeddings: where to write the captions, as `embeddings` reads them.
        npz: the model's images for the ADM evaluator.
        latents: undecoded latents as safetensors, instead of pictures.
        weights: of the model, where it is a training checkpoint: `ema`, `model`, or `auto`, EMA if present.
        on_note: told which checkpoint a run that is not finished is drawn from.

    Returns: the files written.
    """
    from litconvert.checkpoints import TensorInfo
    from litconvert.run_directory import model_of
    from litconvert.sources import open_source, read_model
    from litconvert.writing import write_safetensors

    path = model_of(model, raw=weights == "model")
    if path != model and Path(path).name != "model":
        on_note(f"drawn from the checkpoint {path}")
    if recipe is None and (Path(path) / "recipe.yaml").is_file():
        recipe = path
    settings = (resolve(recipe, overrides) if recipe else resolve_data({}, overrides, "command line")).recipe
    given = resolve_data({}, [one for one in overrides if one.startswith("source.")], "command line").recipe.source

    def source_of(name: str) -> Source:
        # The recipe's hints describe its own source; any other checkpoint takes those given here, or tells for itself.
        told = settings.source if settings.source.path in (None, name, str(Path(name).resolve())) else given
        if (Path(name) / "litconvert.json").is_file():
            told = Source()  # its config.json says it all
        update = {"path": name, "num_attention_heads": num_attention_heads or told.num_attention_heads}
        return told.model_copy(update=update)

    if npz is not None and latents is not None:
        raise UsageError("--npz needs decoded images and --latents skips decoding; give one of them")
    sources = [open_source(source_of(model_of(teacher)))] if teacher else []
    sources.append(open_source(source_of(path), weights))
    configs = [source.reading.config for source in sources]
    config = configs[-1]
    for other in configs:
        for key in ("in_channels", "sample_size", "num_classes", "caption_channels", "caption_tokens"):
            if other[key] != config[key]:
                raise UsageError(
                    f"{teacher} has {key}={other[key]}, {model} has {config[key]}: they cannot share noise or condition"
                )
    chosen = settings.sample
    for one in configs:
        make_scheduler(chosen.scheduler, settings.diffusion.num_timesteps, one["prediction"])  # refuses before the work
    device = default_device()
    vae = load_vae(settings.source.vae).to(device) if settings.source.vae and latents is None else None
    if vae is None and latents is None and not is_pixel_space(config["in_channels"]):
        to_images(torch.empty(1, config["in_channels"], 1, 1), None)  # refuses, and says what to give
    conditions: Tensor | Captions
    if config["caption_channels"] is None:
        if prompts or negative_prompt is not None or embeddings or save_embeddings:
            raise UsageError(f"{model} is a model of classes and reads no captions: choose with --classes")
        conditions = parse_classes(classes, chosen.num_images or NUM_IMAGES, config["num_classes"])
    else:
        if classes is not None:
            raise UsageError(f"{model} is a model of captions and has no classes: choose with --prompt")
        if embeddings is not None:
            if prompts or negative_prompt is not None:
                raise UsageError("--embeddings are captions encoded already: leave --prompt and --negative-prompt out")
            captions = read_embeddings(embeddings)
        else:
            shared = {**config, "null_caption": all(other["null_caption"] for other in configs)}
            captions = encode_prompts(settings, shared, prompts, negative_prompt)
        captions = captions.padded(config["caption_tokens"], config["caption_channels"])
        if save_embeddings is not None:
            write_embeddings(captions, save_embeddings)
        conditions = cycled(captions, chosen.num_images or len(captions))
    # Undecoded, the model's alone are written.
    models = [read_model(source, torch.float32).to(device) for source in (sources[-1:] if latents else sources)]
    total, done = len(models) * -(-len(conditions) // chosen.batch_size) * chosen.steps, [0]

    def on_step() -> None:
        done[0] += 1
        on_progress(done[0], total)

    def drawn(one: LiTTransformer2DModel) -> Iterator[Tensor]:
        return draw(
            one,
            chosen,
            conditions,
            seed=chosen.seed,
            batch_size=chosen.batch_size,
            num_timesteps=settings.diffusion.num_timesteps,
            on_step=on_step,
        )

    for path_out in (latents, npz, None if latents else out):
        if path_out is not None:
            path_out.parent.mkdir(parents=True, exist_ok=True)
    if latents is not None:
        tensors = {"latents": torch.cat(list(drawn(models[-1])))}
        if not isinstance(conditions, Captions):
            tensors["class_labels"] = conditions
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
        write_safetensors(latents, infos, tensors.__getitem__, {"format": "pt"})
        return [latents]
    factor = settings.source.vae.scaling_factor if settings.source.vae else 1.0
    images = [np.concatenate([to_images(batch, vae, factor) for batch in drawn(one)]) for one in models]
    columns = min(10, len(conditions))
    # A sheet of 50,000 would be of no use to anybody.
    sheets = images if npz is None else [one[:NPZ_SHEET] for one in images]
    # Whole rows, so that the teacher's grid ends where the student's begins.
    padded = [np.concatenate([one, np.full((-len(one) % columns, *one.shape[1:]), 255, np.uint8)]) for one in sheets]
    save_grid(np.concatenate(padded), out, columns=columns, scale=max(1, 64 // config["sample_size"]))
    if npz is not None:
        save_npz(images[-1], None if isinstance(conditions, Captions) else conditions, npz)
        return [out, npz]
    return [out]
