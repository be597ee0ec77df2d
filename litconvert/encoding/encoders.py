"""What images and captions are encoded by, for the model that the data is for: the VAE, and T5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.data.dataset import ConditionKind
from litconvert.encoding.images import BrokenSample, ImageSample, read_image
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import open_source_of
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions, encode_to_store, load_text_encoder, write_embeddings
from litconvert.sampling.pictures import load_vae


@dataclass(frozen=True)
class Target:
    """What the model that the data is for sees."""

    in_channels: int
    sample_size: int
    patch_size: int
    num_classes: int | None
    caption_channels: int | None
    caption_tokens: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Target":
        """Of the recipe's source, or of the model it trains from nothing."""
        config: Mapping[str, Any]
        if recipe.scratch is not None and recipe.source.path is None:
            config = recipe.scratch.model_dump()
        else:
            config = open_source_of(recipe).config.values
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class Encoders:
    """The VAE, and the T5 where captions are encoded.

    Raises UsageError for sizes or a VAE that do not fit the model.
    """

    def __init__(self, recipe: Recipe, target: Target, condition: ConditionKind, device: torch.device) -> None:
        self.recipe, self.target, self.condition, self.device = recipe, target, condition, device
        self.vae = load_vae(recipe.source.vae).to(device) if recipe.source.vae else None
        self.mode = "L" if self.vae is None and target.in_channels == 1 else "RGB"
        factor = 1
        if self.vae is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            if self.vae.config.latent_channels != target.in_channels:
                raise UsageError(
                    f"the VAE makes latents of {self.vae.config.latent_channels} channels, the model sees "
                    f"{target.in_channels}; name the one that it was trained with (--vae, or source.vae.path)"
                )
        side = target.sample_size * factor
        self.sizes = recipe.data.encode.sizes or ((side, side),)
        for size in self.sizes:
            if any(one % (factor * target.patch_size) for one in size):
                raise UsageError(
                    f"data.encode.sizes: {size[0]}x{size[1]} must be multiples of {factor * target.patch_size} pixels, "
                    "a patch of the model"
                )
        self._text: tuple[Any, Any] | None = None

    @property
    def dtype(self) -> str:
        """Of the stored arrays.

        Pixels are kept as the bytes they are. Posteriors are float16, half of float32: it rounds a mean below 8 by at
        most 0.002, which times the scaling factor is about a thirtieth of the least noise that diffusion adds (0.01).
        """
        return "uint8" if self.vae is None else "float16"

    def texts(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (L_i, C) of captions, float16."""
        if self._text is None:
            assert self.recipe.source.text_encoder is not None
            tokenizer, encoder = load_text_encoder(self.recipe.source.text_encoder)
            if encoder.config.d_model != self.target.caption_channels:
                raise UsageError(
                    f"{self.recipe.source.text_encoder.path}: makes features of width {encoder.config.d_model}, the "
                    f"model reads {self.target.caption_channels}; name the T5 that it was trained with"
                )
            self._text = tokenizer, encoder.to(self.device)
        return encode_to_store(*self._text, captions, self.target.caption_tokens)

    def write_null(self, path: Path) -> None:
        """Write the encoded empty caption."""
        (features,) = self.texts([""])
        write_embeddings(Captions(features[None], torch.ones((1, len(features)), dtype=torch.int64)), path)

    @torch.inference_mode()
    def moments(self, images: NDArray[np.uint8], *, flip: bool) -> NDArray[np.float16]:
        """Mean and log variance (N, 2C, H, W) of the VAE's posterior for images (N, 3, H, W)."""
        assert self.vae is not None
        pixels = torch.from_numpy(images).to(self.device, self.vae.dtype) / 127.5 - 1
        parameters = self.vae.encode(pixels.flip(-1) if flip else pixels).latent_dist.parameters.float()
        mean, log_variance = parameters.chunk(2, dim=1)
        # Bounded as diffusers bounds it before use.
        stored = torch.cat([mean, log_variance.clamp(-30, 20)], dim=1).half().cpu()
        if not stored.isfinite().all():
            raise LitconvertError(
                "the VAE gives NaN or values beyond float16; is it the one the model was trained with?"
            )
        return stored.numpy()

    def columns(self, images: Sequence[NDArray[np.uint8]], conditions: Sequence[int | str]) -> dict[str, Any]:
        """The columns of images of one size."""
        stacked = np.stack(images)
        columns: dict[str, Any] = {"latent": stacked}
        if self.vae is not None:
            columns["latent"] = self.moments(stacked, flip=False)
            if self.recipe.data.flip:
                columns["latent_flipped"] = self.moments(stacked, flip=True)
        if self.condition == "class":
            return columns | {"class_label": list(conditions)}
        columns["caption"] = list(conditions)
        if self.condition == "caption":
            features = self.texts([str(one) for one in conditions])
            columns["caption_features"] = [one.numpy().reshape(-1) for one in features]
            columns["caption_tokens"] = [len(one) for one in features]
        return columns

    def check(self, sample: ImageSample) -> None:
        """Refuse with BrokenSample what has a fault or no condition, with UsageError a class that the model has not."""
        if sample.fault is not None:
            raise BrokenSample(f"{sample.name}: {sample.fault}; repair it, or leave such out with --skip-broken")
        if isinstance(sample.condition, str):
            if not sample.condition.strip():
                raise BrokenSample(f"{sample.name}: has no caption; add it, or leave such out with --skip-broken")
        elif sample.condition < 0:
            raise BrokenSample(f"{sample.name}: has no class; add it, or leave such out with --skip-broken")
        elif sample.condition >= (classes := self.target.num_classes or 0):
            raise UsageError(f"{sample.name}: is of class {sample.condition}, the model's are 0 to {classes - 1}")

    def prepare(self, sample: ImageSample) -> NDArray[np.uint8]:
        """A sample's image, checked, read and cropped: (C, H, W)."""
        self.check(sample)
        return read_image(sample, self.mode, self.sizes, self.recipe.data.encode.max_pixels)

    def drop(self) -> None:
        """Let go of both."""
        self.vae = self._text = None
