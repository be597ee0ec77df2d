"""From latents to images: decoders, files, and the sheets of a run."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.device import default_device, float32_convolutions
from litconvert.common.hub import hub_errors, split_revision
from litconvert.common.listener import SILENT, UNSEEN, Listener, Task
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.config import ModelConfig, is_pixel_space
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.inputs import given
from litconvert.recipe.schema import Guidance, Recipe, Vae
from litconvert.sampling.captions import Captions, encode_prompts
from litconvert.sampling.draw import SamplerSettings, cycled, draw
from litconvert.sampling.sheets import Part, save_sheet

# Samples that are drawn of a model of classes when nobody says how many.
NUM_IMAGES = 40


def load_vae(vae: Vae) -> Any:
    """The image decoder of a recipe, in eval mode; scaling and shift of its latents stand in its config.

    Raises LitconvertError when it is not an AutoencoderKL, whole, and UsageError where the recipe contradicts it.
    """
    from diffusers import AutoencoderKL

    path, revision = split_revision(vae.path)
    where = {"subfolder": vae.subfolder, "revision": revision}
    try:
        with hub_errors(vae.path):
            told = AutoencoderKL.load_config(path, **where)
            model, loaded = AutoencoderKL.from_pretrained(path, **where, output_loading_info=True)
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
    if any(told.get(key) is not None for key in ("latents_mean", "latents_std")):
        raise LitconvertError(
            f"{vae.path}: normalises each channel of its latents (latents_mean, latents_std), which litconvert does "
            "not; use the VAE that the model was trained with"
        )
    for key in ("scaling_factor", "shift_factor"):
        asked, own = getattr(vae, key), told.get(key)
        if asked is None:
            continue
        if own is not None and own != asked:
            raise UsageError(
                f"source.vae.{key} is {asked:g}, but the VAE {vae.path} says {own:g} itself: leave it out "
                f"(source.vae.{key}=null), or name the VAE that the model was trained with"
            )
        model.register_to_config(**{key: asked})
    return model.eval().requires_grad_(False)


def vae_inputs(vae: Vae) -> dict[str, Any]:
    """What determines a recipe's VAE: its keys and, of one in a folder, the digests of its files."""
    inputs: dict[str, Any] = dict(given(vae))
    folder = Path(vae.path) / (vae.subfolder or "")
    if folder.is_dir():
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        inputs["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return inputs


def scaling_of(vae: Any) -> tuple[float, float]:
    """What a VAE's latents are scaled by once they are shifted, and that shift: z = scaling * (sample - shift)."""
    return float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)


@torch.inference_mode()
def to_images(latents: Tensor, vae: Any | None) -> NDArray[np.uint8]:
    """Latents or pixels (N, C, H, W) in [-1, 1] to images (N, H, W, C), uint8; C is 1 or 3."""
    if vae is not None:
        scaling, shift = scaling_of(vae)
        with float32_convolutions():
            latents = torch.cat(
                [vae.decode(one.to(vae.device, vae.dtype) / scaling + shift).sample for one in latents.split(8)]
            )
    if not is_pixel_space(latents.shape[1]):
        raise UsageError(
            f"these are latents of {latents.shape[1]} channels, and no decoder is named: "
            "give one (--set source.vae.path=stabilityai/sd-vae-ft-ema), or write them undecoded (--latents FILE)"
        )
    scaled = (latents.float().cpu() * 127.5 + 128).clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).numpy()


class SampleSheet:
    """Pictures of a run: every model's samples on the same noise and condition.

    Args:
        recipe: its `sample` section, VAE and, for captions, T5, which encodes the prompts at once and is freed.
        config: of the models that are drawn.
        folder: where the PNGs go.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        device = default_device()
        self.vae = load_vae(recipe.source.vae).to(device) if recipe.source.vae else None
        count = recipe.sample.num_images
        self.labels: list[str] = []
        # Latents without a decoder have no picture, and captions without an encoder cannot be read.
        self.drawable = self.vae is not None or config.is_pixel_space
        self.conditions: Tensor | Captions
        if not config.reads_captions:
            self.conditions = torch.arange(count or NUM_IMAGES) % config.classes
            self.labels = [str(int(label)) for label in self.conditions]
        elif self.drawable and recipe.source.text_encoder is not None:
            captions = encode_prompts(recipe, config)
            self.conditions = cycled(captions, count or len(captions))
            prompts = recipe.sample.prompts
            self.labels = [prompts[index % len(prompts)] for index in range(len(self.conditions))]
        else:
            self.drawable = False

    def images(self, model: LiTTransformer2DModel, task: Task = UNSEEN) -> NDArray[np.uint8]:
        """The sheet's images (N, H, W, C); `task` is advanced after each step of each batch."""
        settings = self.recipe.sample
        sampler = SamplerSettings.of(self.recipe, settings, seed=settings.seed, batch_size=settings.batch_size)
        batches = draw(model, self.conditions, sampler, task=task)
        return to_images(torch.cat(list(batches)), self.vae)

    def draw(self, model: LiTTransformer2DModel, name: str, listener: Listener = SILENT) -> None:
        """Write NAME.png, where there is a picture to be drawn, under a title that says of whom it is."""
        if self.drawable:
            settings = self.recipe.sample
            batches = -(-len(self.conditions) // settings.batch_size)
            try:
                with listener.task(f"draw samples ({name})", batches * settings.steps) as task:
                    images = self.images(model, task)
            except LitconvertError as error:  # a picture is no reason to end a run
                listener.note(f"no {name}.png: {error}")
                return
            whose = "Student" if self.recipe.scratch is None else "Model"
            part = Part(f"{title_of(name, whose)}; {described(settings)}", images, self.labels)
            save_sheet(self.folder / f"{name}.png", [part], scale=max(1, 64 // images.shape[1]))


def title_of(name: str, whose: str = "Student") -> str:
    """What a run's sheet shows, by the name of its file and by who is trained."""
    known = {"teacher": "Teacher (softmax)", "before": f"{whose} before training", "after": f"{whose} after training"}
    return known.get(name) or f"{whose} after {int(name.removeprefix('step-')):,} steps"


def described(settings: Guidance) -> str:
    """How samples were drawn."""
    text = f"{settings.scheduler} in {settings.steps} steps"
    return text if settings.guidance == 1 else f"{text}, guidance {settings.guidance:g}"
