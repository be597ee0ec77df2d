"""What is drawn to be measured: as a user asks for it, with which settings, for which classes or captions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.device import default_device
from litconvert.common.files import digest_of
from litconvert.common.launch import launched_processes
from litconvert.common.listener import Listener, Task
from litconvert.common.seeds import permutation
from litconvert.data.prompts import StoredPrompts, read_prompts, store_prompts
from litconvert.errors import UsageError
from litconvert.evaluation.image_sets import (
    NpzFile,
)
from litconvert.families.sources import OpenSource
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.inputs import given
from litconvert.recipe.schema import Guidance, Recipe
from litconvert.sampling.captions import Captions, read_embeddings
from litconvert.sampling.draw import SamplerSettings, draw
from litconvert.sampling.parts import Group
from litconvert.sampling.picture_set import PictureSet, digest_of_conditions, draw_npz, in_turn
from litconvert.sampling.pictures import load_vae, to_images
from litconvert.sampling.request import settings_of

# The settings of published protocols, over the recipe's and under the user's. DiT's (arXiv 2212.09748): 250 steps of
# DDPM, guidance 1.5 on three of the four latent channels, 50,000 samples.
PROTOCOLS = {
    "dit": (
        "evaluate.scheduler=ddpm",
        "evaluate.steps=250",
        "evaluate.guidance=1.5",
        "evaluate.guidance_channels=3",
        "evaluate.num_samples=50000",
        "evaluate.seeds=[0]",
        "sampling.mixed_precision=no",
    )
}
# Images of the teacher that agreement is measured on.
AGREEMENT_IMAGES = 32
# A range of samples to what each is drawn for: labels, or captions.
Conditions = Callable[[range], Tensor | Captions]


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be measured, and against what.

    Attributes:
        model: run, model directory, any checkpoint, or an NPZ file of samples that are drawn already.
        teacher: whose samples it is held against where no pictures are given, who is measured beside it, and with whom
            it is to agree.
        images, reference: a folder of pictures; an NPZ file of pictures or statistics.
        features: the network (`networks.open_network`); None: the protocol's, or the one for such pictures.
        protocol: a name in PROTOCOLS.
        recipe: whose `evaluate` section, VAE and T5 are used; None: the one recorded with the model, or else the
            packaged one for what it is.
        overrides: `key=value`, over recipe and protocol.
        prompts, embeddings: of a model of captions, a text file, or captions encoded earlier; None: the prompts that
            ship with litconvert.
        clip: a CLIP that is to say how well pictures fit their captions.
        num_attention_heads: a hint for both models.
        weights: of the model, where it is a training checkpoint.
        samples: a folder to keep the samples in, which several processes may draw; None: they are not kept.
        save_statistics: where to write the reference's statistics.
        force: replace a file that is there.
        agreement_only: draw no samples to be measured.
    """

    model: str
    teacher: str | None = None
    images: Path | None = None
    reference: Path | None = None
    features: str | None = None
    protocol: str | None = None
    recipe: str | None = None
    overrides: Sequence[str] = ()
    prompts: Path | None = None
    embeddings: Path | None = None
    clip: str | None = None
    num_attention_heads: int | None = None
    weights: str = "auto"
    samples: Path | None = None
    save_statistics: Path | None = None
    agreement_only: bool = False
    force: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether the model is a file of samples."""
        return self.model.endswith(".npz")

    def check(self) -> None:
        """Raises UsageError for what cannot be meant together."""
        pictures = self.images or self.reference
        if self.images and self.reference:
            raise UsageError("--images and --reference are two sets to be held against; give one of them")
        if not (self.teacher or pictures):
            raise UsageError("nothing to be held against: give --teacher, --images or --reference")
        if self.agreement_only and not self.teacher:
            raise UsageError("--agreement is agreement with the teacher: name it with --teacher")
        if self.agreement_only and (pictures or self.features or self.clip or self.save_statistics):
            raise UsageError("--agreement alone measures no pictures: leave the options for pictures out")
        if self.is_drawn and (self.teacher or self.clip or not pictures):
            raise UsageError(
                f"{self.model} holds samples: give --images or --reference, and neither --teacher nor --clip"
            )
        drawing: dict[str, object] = {
            "--set and --num-samples": self.overrides,
            "--recipe": self.recipe,
            "--prompts": self.prompts,
        }
        drawing |= {"--embeddings": self.embeddings, "--num-attention-heads": self.num_attention_heads}
        drawing |= {"--raw": self.weights != "auto"}
        if self.is_drawn and (told := next((name for name, value in drawing.items() if value), None)):
            raise UsageError(f"{self.model} holds samples, all of which are measured: leave {told} out")
        if self.prompts and self.embeddings:
            raise UsageError("--embeddings are captions encoded already: leave --prompts out")
        if self.clip and self.embeddings:
            raise UsageError("--clip reads captions as text, which --embeddings do not hold: give --prompts")
        if launched_processes() > 1 and self.samples is None:
            raise UsageError(
                "several processes draw samples into a folder that they share: name one with --samples DIR, or start "
                "without a launcher"
            )
        if self.samples and (self.is_drawn or self.agreement_only):
            raise UsageError("--samples keeps the samples that are drawn, and none are: leave it out")


def kept_file(folder: Path, name: str, seed: int) -> Path:
    """Where the samples of a model, called by its part in the measurement, and a seed are kept."""
    return folder / f"{name}-{seed}.npz"


@dataclass(frozen=True)
class Samples:
    """How a set of samples is drawn, whatever the model.

    Attributes:
        recipe: its `evaluate` section.
        conditions: what each is drawn for.
        told: tells these conditions from any others.
        prompts: the captions as text, cycled; none: of a model of classes.
        vae: decoder of latents.
        kept: where they are kept; None: nowhere.
    """

    recipe: Recipe
    conditions: Conditions
    told: str
    prompts: Sequence[str] = ()
    vae: Any | None = None
    kept: Path | None = None

    def sampler(self, seed: int, batch_size: int | None = None) -> SamplerSettings:
        """From this seed, so many at a time."""
        settings = self.recipe.evaluate
        return SamplerSettings.of(self.recipe, settings, seed=seed, batch_size=batch_size or settings.batch_size)

    def latents(
        self, model: LiTTransformer2DModel, seed: int, count: int, task: Task
    ) -> Iterator[tuple[range, Tensor]]:
        """Batch by batch, with the numbers of its samples."""
        size = self.recipe.evaluate.batch_size
        for start in range(0, count, size):
            some = range(start, min(start + size, count))
            (batch,) = draw(model, self.conditions(some), self.sampler(seed), first=start, task=task)
            yield some, batch

    def pictures(self, drawn: "Drawn", seed: int, task: Task) -> Iterator[tuple[range, NDArray[np.uint8]]]:
        """The same decoded, as many as the recipe says: those that are kept, or drawn now."""
        if self.kept is not None:
            start, channels = 0, 1 if drawn.model.config.in_channels == 1 else 3
            for images in NpzFile(self.file(drawn, seed)).pictures():
                yield range(start, start := start + len(images)), images[..., :channels]
                task.advance(len(images))
            return
        for some, batch in self.latents(drawn.model, seed, self.recipe.evaluate.num_samples, task):
            yield some, to_images(batch, self.vae)

    def file(self, drawn: "Drawn", seed: int) -> Path:
        """Where those of a model and a seed are kept."""
        assert self.kept is not None
        return kept_file(self.kept, drawn.name, seed)

    def files(self, models: Sequence["Drawn"]) -> list[Path]:
        """Where all that may be drawn are kept."""
        settings = self.recipe.evaluate
        seeds = (settings.reference_seed, *settings.seeds)
        return [self.file(drawn, seed) for drawn in models for seed in seeds]

    def keep(self, drawn: "Drawn", seed: int, group: Group, listener: Listener) -> None:
        """Draw the samples of a model and a seed into their file, unless they are there. Every process calls it."""
        recipe, count = self.recipe, self.recipe.evaluate.num_samples
        sampler = self.sampler(seed)
        pictures = PictureSet(drawn.model, self.conditions, count, sampler, self.vae, recipe.sampling.shard_size)
        digest = pictures.digest(drawn.source, self.told, recipe)
        draw_npz(pictures, self.file(drawn, seed), digest, group, listener, f"draw {drawn.name}, seed {seed}")

    def texts(self, some: range) -> list[str]:
        """The captions of some samples."""
        return [self.prompts[index % len(self.prompts)] for index in some]


@dataclass(frozen=True)
class Drawn:
    """A model that is measured.

    Attributes:
        name: `teacher`, `student`, or `model` where there is no teacher.
        source: its file.
    """

    name: str
    model: LiTTransformer2DModel
    source: OpenSource


def recipe_for(asked: EvaluationRequest) -> Recipe:
    """The recipe that settings are taken from, as the request describes it.

    Its `evaluate` section says how samples are drawn. What that leaves at its default is as in `sample`.
    """
    overrides = [*PROTOCOLS.get(asked.protocol or "", ()), *asked.overrides]
    recipe, _, _ = settings_of(asked.model, asked.recipe, overrides, asked.num_attention_heads, asked.weights)
    said = {one.partition("=")[0] for one in overrides}
    told = given(recipe.evaluate)
    sampler = {
        key: getattr(recipe.sample, key)
        for key in Guidance.model_fields
        if key not in told and not {"evaluate", f"evaluate.{key}"} & said
    }
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=sampler)})


def samples_of(
    asked: EvaluationRequest,
    recipe: Recipe,
    sources: Sequence[OpenSource],
    folder: Path,
    prompts: Sequence[str] | None = None,
) -> Samples:
    """How samples are drawn that all models can draw. T5 is freed before this returns; its features are in the folder.

    Args:
        asked: whose prompts or embeddings are drawn where no others are given.
        prompts: all of them are encoded.

    Raises UsageError for prompts of a model of classes, and where T5 or a decoder is missing.
    """
    config = sources[-1].config
    if recipe.source.vae is None and not config.is_pixel_space and not asked.agreement_only:
        to_images(torch.empty(1, config.in_channels, 1, 1), None)  # refuses, and says what to give
    vae = None
    if recipe.source.vae is not None and not asked.agreement_only:
        vae = load_vae(recipe.source.vae).to(default_device())
    if not config.reads_captions:
        if asked.prompts or asked.embeddings:
            raise UsageError(f"{asked.model} is a model of classes and reads no captions: leave them out")
        labels = permutation(0, "classes", config.classes)  # so that few samples are of classes of all kinds, too
        return Samples(recipe, in_turn(labels), digest_of_conditions(labels), vae=vae)
    if asked.embeddings is not None and prompts is None:
        captions = read_embeddings(asked.embeddings).padded(config.caption_tokens, config.caption_width)
        return Samples(recipe, in_turn(captions), digest_of_conditions(captions), vae=vae)
    if recipe.source.text_encoder is None:
        raise UsageError(
            "this model draws captions, and no text encoder is named: give one (--set "
            "source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS), or encoded captions (--embeddings FILE)"
        )
    if prompts is None:
        most = AGREEMENT_IMAGES if asked.agreement_only else recipe.evaluate.num_samples
        prompts = read_prompts(str(asked.prompts) if asked.prompts else None, "name one with --prompts")[:most]
    null = not all(source.config.null_caption for source in sources)
    store_prompts(folder / "prompts.safetensors", recipe, prompts, config.caption_tokens)
    stored = StoredPrompts(folder / "prompts.safetensors", prompts)
    told = digest_of([list(prompts), given(recipe.source.text_encoder), null])
    return Samples(recipe, lambda some: stored.captions(some, null=null), told, prompts, vae)
