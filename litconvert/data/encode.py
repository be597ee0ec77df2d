"""Images to training data: cropped to their bucket, encoded by the VAE, and captions by T5, each once."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.files import digest_of, read_json
from litconvert.conversion.plan import resolve_for
from litconvert.data.cropping import read_image
from litconvert.data.dataset import NULL_CAPTION, Condition
from litconvert.data.images import BrokenSample, ImageSample, ImageSource, open_images
from litconvert.data.shards import Assembly, is_finished, launched_group, shard_writer, written
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import open_source
from litconvert.model.shapes import is_pixel_space
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions, encode_to_store, load_text_encoder, read_embeddings, write_embeddings
from litconvert.sampling.pictures import load_vae

SKIPPED = "skipped.json"


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
            config = open_source(recipe.source, recipe.inherit.weights).reading.config
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


def encode_images(
    images: str | Path,
    out: str | Path,
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    source: str | Path | None = None,
    force: bool = False,
    skip_broken: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, remark: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Make a data set of images. Every launched process must call it; each encodes its share.

    Args:
        images: see `open_images`.
        out: the dataset folder. One made of the same inputs is left as it is; an interrupted one is continued.
        recipe, overrides: as for `plan`; the sections are `data.encode`, `source.vae` and `source.text_encoder`.
            Without a recipe it is the packaged one for what the source is, or else the defaults.
        source: the model that the data is for; None: the recipe's source, or the model of its `scratch` section.
        force: replace an `out` that was made of other inputs. Images are told apart by name and size: one that was
            replaced by another of the same size is not noticed, and needs this too.
        skip_broken: leave out images that cannot be read, and count them in the record; otherwise they are refused.
        on_progress: called in the first process, with the parts it has done, those it will have, and a remark.
        on_note: told in the first process what to know.

    Returns: the dataset folder.

    Raises UsageError for images and a model that do not fit, LitconvertError for a broken image.
    """
    resolved = resolve_for(recipe, overrides, source)
    return encode_resolved(str(images), Path(out), resolved, force, skip_broken, on_progress, on_note)


def encode_resolved(
    images: str,
    out: Path,
    resolved: ResolvedRecipe,
    force: bool = False,
    skip_broken: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, remark: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """`encode_images` for a recipe that is resolved already."""
    recipe = resolved.recipe
    settings, target = recipe.data.encode, Target.of(recipe)
    condition: Condition = "class"
    if target.caption_channels is not None:
        condition = "text" if settings.captions == "text" else "caption"
    if condition == "caption" and recipe.source.text_encoder is None:
        raise UsageError(
            "the model reads captions, and no text encoder is named: give one (--set source.text_encoder.path="
            "PixArt-alpha/PixArt-XL-2-1024-MS), or keep the captions as text (--set data.encode.captions=text)"
        )
    if recipe.source.vae is None and not is_pixel_space(target.in_channels):
        raise UsageError(
            f"the model sees latents of {target.in_channels} channels, and no VAE is named to encode images with: give "
            "one (--vae stabilityai/sd-vae-ft-ema)"
        )
    found = open_images(images, settings, captions=condition != "class")
    if condition == "class" and found.classes is not None and len(found.classes) > (target.num_classes or 0):
        raise UsageError(f"{images}: has {len(found.classes)} classes, the model has {target.num_classes}")
    inputs = encoding_inputs(recipe, target, found, condition, skip_broken)
    if is_finished(out, inputs, force=force, remake=force):
        return out
    assembly = Assembly(out, inputs, found.parts, launched_group(), on_note)
    with written(out):
        networks = Networks(recipe, target, condition, assembly.group.device)
    with written(out), assembly.begun():
        null = assembly.folder / NULL_CAPTION
        if condition == "caption":
            assembly.once(null, lambda: networks.write_null(null))
        mine, count = range(assembly.group.process, found.parts, assembly.group.processes), 0

        def show() -> None:
            if assembly.group.process == 0:
                on_progress(len(mine) - len(assembly.own), len(mine), f"{count:,} images")

        for part in assembly.own:
            show()

            def write(folder: Path, part: int = part) -> None:
                nonlocal count
                count += write_part(folder, found.read(part), networks, settings.batch_size, skip_broken)

            assembly.make(part, write)
        show()
        networks.drop()

        def extra(folder: Path) -> None:
            if condition == "caption":
                write_embeddings(read_embeddings(null), folder / NULL_CAPTION)

        classes: dict[str, Any] = {"num_classes": target.num_classes} if condition == "class" else {}
        if condition == "class" and found.classes is not None:
            classes["class_names"] = list(found.classes)
        return assembly.join(lambda shards: _facts(shards, recipe, condition) | classes, extra)


def encoding_inputs(
    recipe: Recipe, target: Target, source: ImageSource, condition: Condition, skip_broken: bool
) -> Inputs:
    """What determines the data; of the images their names and sizes. A batch size changes rounding alone."""
    vae = recipe.source.vae
    text_encoder = recipe.source.text_encoder if condition == "caption" else None
    values = {
        "images": digest_of(source.listing),
        "target": vars(target),
        "data": {
            "encode": given(recipe.data.encode, exclude={"batch_size"}),
            "flip": recipe.data.flip and vae is not None,
        },
        "source": {"vae": given(vae), "text_encoder": given(text_encoder)},
        "skip_broken": skip_broken,
    }
    first = {
        "images": source.listing,
        "encode": recipe.data.encode.model_dump(exclude={"batch_size"}),
        "target": vars(target),
        "vae": vae.model_dump() if vae else None,
        "flip": recipe.data.flip and vae is not None,
        "text_encoder": text_encoder.model_dump() if text_encoder else None,
        "skip_broken": skip_broken,
    }
    return Inputs(values, digest_of(first))


def _facts(shards: Sequence[Path], recipe: Recipe, condition: Condition) -> dict[str, Any]:
    """What the record says of the data."""
    skipped = sum(read_json(shard / SKIPPED)["count"] for shard in shards)
    facts: dict[str, Any] = {"kind": "latents", "condition": condition, "pixels": True, "skipped": skipped}
    if recipe.source.vae is not None:
        vae = recipe.source.vae
        facts |= {"kind": "moments", "pixels": False, "scaling_factor": vae.scaling_factor, "vae": vae.model_dump()}
    return facts


class Networks:
    """The VAE, and the T5 where captions are encoded.

    Raises UsageError for sizes or a VAE that do not fit the model.
    """

    def __init__(self, recipe: Recipe, target: Target, condition: Condition, device: torch.device) -> None:
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
        """Refuse a sample without a condition, with BrokenSample, and a class that the model does not have."""
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
        return read_image(sample, self.mode, self.sizes)

    def drop(self) -> None:
        """Let go of both."""
        self.vae = self._text = None


def write_part(
    folder: Path, samples: Iterator[ImageSample], networks: Networks, batch_size: int, skip_broken: bool
) -> int:
    """Encode the images of one part into a shard's folder, and return how many there were."""
    waiting: dict[tuple[int, ...], list[tuple[NDArray[np.uint8], int | str]]] = {}
    count, skipped = 0, []
    with shard_writer(folder, networks.condition, networks.dtype) as writer:

        def flush(shape: tuple[int, ...]) -> None:
            images, conditions = zip(*waiting.pop(shape), strict=True)
            writer.write(networks.columns(images, conditions))

        for sample, prepared in _ahead(samples, networks.prepare, 4 * batch_size):
            try:
                image = prepared.result()
            except BrokenSample:
                if not skip_broken:
                    raise
                skipped.append(sample.name)
                continue
            count += 1
            waiting.setdefault(image.shape, []).append((image, sample.condition))
            if len(waiting[image.shape]) == batch_size:
                flush(image.shape)
        for shape in list(waiting):
            flush(shape)
    (folder / SKIPPED).write_text(json.dumps({"count": len(skipped), "names": skipped}))
    return count


def _ahead(
    samples: Iterator[ImageSample], prepare: Callable[[ImageSample], NDArray[np.uint8]], ahead: int
) -> Iterator[tuple[ImageSample, "Future[NDArray[np.uint8]]"]]:
    """Samples in order, prepared by threads while the networks are at work: Pillow decodes without Python's lock."""
    pending: deque[tuple[ImageSample, Future[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for sample in samples:
                pending.append((sample, pool.submit(prepare, sample)))
                if len(pending) > ahead:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()
