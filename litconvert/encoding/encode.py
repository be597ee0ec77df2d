"""Images to training data: cropped to their bucket, encoded by the VAE, and captions by T5, each once."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litconvert.common.files import digest_of, read_json, refuse_source
from litconvert.common.listener import SILENT, Listener
from litconvert.common.quantities import size
from litconvert.data.dataset import NULL_CAPTION, ConditionKind
from litconvert.data.shards import Assembly, is_finished, shard_writer
from litconvert.encoding.encoders import Encoders, Target
from litconvert.encoding.image_sources import ImageSource, open_images
from litconvert.encoding.images import BrokenSample, ImageSample, pillow_unbounded
from litconvert.errors import UsageError
from litconvert.model.config import is_pixel_space
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import read_embeddings, write_embeddings
from litconvert.sampling.parts import launched_group, written
from litconvert.sampling.pictures import scaling_of

SKIPPED = "skipped.json"
# Keys of `data.encode` that the first data sets had not, and so had not in their digests.
SINCE_FORMAT_1 = ("class_order", "max_pixels")


def encode_images(
    images: str | Path,
    out: str | Path,
    resolved: ResolvedRecipe,
    *,
    force: bool = False,
    skip_broken: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Make a data set of images. Every launched process must call it; each encodes its share.

    Args:
        images: see `open_images`.
        out: the dataset folder. One made of the same inputs is left as it is; an interrupted one is continued.
        resolved: the recipe, see `resolve_for`; the sections are `data.encode`, `source.vae` and `source.text_encoder`.
            The data is for its source, or for the model of its `scratch` section.
        force: replace an `out` that was made of other inputs. Images are told apart by name and size: one that was
            replaced by another of the same size is not noticed, and needs this too.
        skip_broken: leave out images that cannot be read, and count them in the record; otherwise they are refused.
        listener: hears in the first process what to know, and of the parts that it encodes.

    Returns: the dataset folder.

    Raises UsageError for images and a model that do not fit, LitconvertError for a broken image.
    """
    out, recipe = Path(out), resolved.recipe
    refuse_source(out, [Path(images)])
    encoding = Encoding.of(str(images), recipe, skip_broken=skip_broken, out=out)
    inputs = encoding.inputs()
    if is_finished(out, inputs, force=force, remake=force):
        if launched_group().process == 0:
            listener.note(f"already done: {out}")
        return out
    assembly = Assembly(out, inputs, encoding.images.parts, launched_group(), listener, force=force)
    if assembly.group.process == 0:
        for remark in encoding.images.remarks:
            listener.note(remark)
        if listener.wants_estimates:
            listener.note(encoding.cost())
    with written(out):
        encoders = Encoders(recipe, encoding.target, encoding.condition, assembly.group.device)
    with written(out), assembly.begun(), pillow_unbounded():
        null = assembly.folder / NULL_CAPTION
        if encoding.condition == "caption":
            assembly.once(null, lambda: encoders.write_null(null))
        _encode_parts(assembly, encoding, encoders)
        scaling = None if encoders.vae is None else scaling_of(encoders.vae)
        encoders.drop()

        def extra(folder: Path) -> None:
            if encoding.condition == "caption":
                write_embeddings(read_embeddings(null), folder / NULL_CAPTION)

        return assembly.join(partial(encoding.facts, scaling), extra)


@dataclass(frozen=True)
class Encoding:
    """Images, and what is made of them: all that determines the data.

    Attributes:
        target: the model that it is for.
        condition: what samples are conditioned on.
        skip_broken: images that cannot be read are left out.
    """

    recipe: Recipe
    target: Target
    images: ImageSource
    condition: ConditionKind
    skip_broken: bool

    @classmethod
    def of(cls, images: str, recipe: Recipe, *, skip_broken: bool, out: Path | None = None) -> "Encoding":
        """Of images that `open_images` finds. Raises UsageError where they, the recipe and the model do not fit."""
        target = Target.of(recipe)
        condition = _condition(recipe, target)
        if recipe.source.vae is None and not is_pixel_space(target.in_channels):
            raise UsageError(
                f"the model sees latents of {target.in_channels} channels, and no VAE is named to encode images with: "
                "give one (--vae stabilityai/sd-vae-ft-ema)"
            )
        found = open_images(images, recipe.data.encode, captions=condition != "class", out=out)
        if condition == "class" and found.classes is not None and len(found.classes) > (target.num_classes or 0):
            raise UsageError(f"{images}: has {len(found.classes)} classes, the model has {target.num_classes}")
        return cls(recipe, target, found, condition, skip_broken)

    def inputs(self) -> Inputs:
        """What determines the data; of the images their names and sizes. A batch size changes rounding alone."""
        recipe, vae = self.recipe, self.recipe.source.vae
        text_encoder = recipe.source.text_encoder if self.condition == "caption" else None
        values = {
            "images": digest_of(self.images.listing),
            "target": vars(self.target),
            "data": {
                "encode": given(recipe.data.encode, exclude={"batch_size"}),
                "flip": recipe.data.flip and vae is not None,
            },
            "source": {"vae": given(vae), "text_encoder": given(text_encoder)},
            "skip_broken": self.skip_broken,
        }
        if given(recipe.data.encode, include=set(SINCE_FORMAT_1)):
            return Inputs(values)  # the first data sets had no such key, and so are none of these
        first = {
            "images": self.images.listing,
            "encode": recipe.data.encode.model_dump(exclude={"batch_size", *SINCE_FORMAT_1}),
            "target": vars(self.target),
            "vae": vae.model_dump() if vae else None,
            "flip": recipe.data.flip and vae is not None,
            "text_encoder": text_encoder.model_dump() if text_encoder else None,
            "skip_broken": self.skip_broken,
        }
        return Inputs(values, digest_of(first))

    def cost(self) -> str:
        """What the data takes of the disk at most, in a sentence. Time shows once the first part is done."""
        settings, vae = self.recipe.data.encode, self.recipe.source.vae
        count = self.images.parts * settings.shard_size
        count = min(count, settings.num_samples or count)
        # A posterior has a mean and a deviation in float16 each, of the mirrored image too; a pixel is one byte.
        each = self.target.in_channels * self.target.sample_size**2
        each *= 4 * (1 + self.recipe.data.flip) if vae is not None else 1
        captions = ", and what T5 makes of the captions" if self.condition == "caption" else ""
        return f"at most {count:,} images, {size(count * each)} of disk at the model's own size{captions}"

    def facts(self, scaling: tuple[float, float] | None, shards: Sequence[Path]) -> dict[str, Any]:
        """What the record says of the data, given the VAE's scaling and shift, and the data's shards."""
        left_out = [read_json(shard / SKIPPED) for shard in shards]
        skipped = sum(one["count"] for one in left_out)
        if skipped and not any(file for shard in shards for file in shard.glob("*.arrow")):
            first = next(name for one in left_out for name in one["names"])
            raise UsageError(
                f"all {skipped:,} images were left out as broken, {first} the first of them; run it without "
                "--skip-broken to see why"
            )
        facts: dict[str, Any] = {"kind": "latents", "condition": self.condition, "pixels": True, "skipped": skipped}
        if (vae := self.recipe.source.vae) is not None:
            assert scaling is not None
            numbers = {"scaling_factor": scaling[0], "shift_factor": scaling[1]}
            facts |= {"kind": "moments", "pixels": False, **numbers, "vae": {**vae.model_dump(), **numbers}}
        if self.condition == "caption" and (encoder := self.recipe.source.text_encoder) is not None:
            facts["text_encoder"] = encoder.model_dump()
        if self.condition == "class":
            facts["num_classes"] = self.target.num_classes
            if self.images.classes is not None:
                facts["class_names"] = list(self.images.classes)
            if self.recipe.data.encode.class_order is not None:
                facts["class_order"] = self.recipe.data.encode.class_order
        return facts


def _condition(recipe: Recipe, target: Target) -> ConditionKind:
    """What the data is to be conditioned on. Raises UsageError for captions to be encoded where nothing does it."""
    if target.caption_channels is None:
        return "class"
    if recipe.data.encode.captions == "text":
        return "text"
    if recipe.source.text_encoder is None:
        raise UsageError(
            "the model reads captions, and no text encoder is named: give one (--set source.text_encoder.path="
            "PixArt-alpha/PixArt-XL-2-1024-MS), or keep the captions as text (--set data.encode.captions=text)"
        )
    return "caption"


def _encode_parts(assembly: Assembly, encoding: Encoding, encoders: Encoders) -> None:
    """Encode the parts of this process that are not there yet."""
    parts, count = len(range(assembly.group.process, assembly.count, assembly.group.processes)), 0
    with assembly.task("encode", parts) as task:
        own = assembly.own
        task.advance(parts - len(own), f"{count:,} images")
        for part in own:
            with assembly.make(part) as folder:
                count += write_part(folder, encoding, part, encoders)
            task.advance(1, f"{count:,} images")


def write_part(folder: Path, encoding: Encoding, part: int, encoders: Encoders) -> int:
    """Encode the images of one part into a shard's folder, and return how many there were."""
    batch_size = encoding.recipe.data.encode.batch_size
    waiting: dict[tuple[int, ...], list[tuple[NDArray[np.uint8], int | str]]] = {}
    count, skipped = 0, []
    with shard_writer(folder, encoders.condition, encoders.dtype) as writer:

        def flush(shape: tuple[int, ...]) -> None:
            images, conditions = zip(*waiting.pop(shape), strict=True)
            writer.write(encoders.columns(images, conditions))

        for sample, prepared in _ahead(encoding.images.read(part), encoders.prepare, 4 * batch_size):
            try:
                image = prepared.result()
            except BrokenSample:
                if not encoding.skip_broken:
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
