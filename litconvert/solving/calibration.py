"""The calibration states: noisy images with a timestep and a condition, as the teacher met them in training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from litconvert.common.listener import Listener
from litconvert.common.seeds import generator_of, permutation
from litconvert.conversion.solve_plan import SolvePlan
from litconvert.data.batches import NO_STAGE, MicroBatches, Schedule
from litconvert.data.conditions import Conditioner, make_conditioner
from litconvert.data.dataset import Bucket, LatentDataset, open_latents, write_captioned
from litconvert.data.synthesize import synthesize_resolved
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM, make_diffusion
from litconvert.model.modeling_lit import CaptionConditioning, Condition, LiTTransformer2DModel
from litconvert.recipe.resolve import ResolvedRecipe
from litconvert.recipe.schema import Guidance, Recipe
from litconvert.sampling.captions import Captions, read_embeddings
from litconvert.sampling.draw import SamplerSettings, cycled, draw
from litconvert.solving.streams import Streams
from litconvert.training.checks import check_data
from litconvert.training.same_encoders import check_same_encoders

CONDITION_DROPOUT = 0.1
# States at a time, of one grid each; a number of its own, so that no setting changes what is drawn.
TOGETHER = 16


@dataclass(frozen=True)
class CalibrationImages:
    """Clean images and their conditions: most to solve on, the others to measure errors on."""

    solved_on: LatentDataset
    held_out: LatentDataset

    @classmethod
    def of(cls, data: LatentDataset, held_out: int) -> "CalibrationImages":
        """A data set divided: so many of its last images, at most a quarter of each size, are held out."""
        kept, others = [], []
        for bucket in data.buckets:
            share = min(-(-held_out * len(bucket) // len(data)), len(bucket) // 4)
            first = len(bucket) - share
            kept.append(Bucket(bucket.shape, bucket.data.select(range(first))))
            if share:
                others.append(Bucket(bucket.shape, bucket.data.select(range(first, len(bucket)))))
        return cls(replace(data, buckets=tuple(kept)), replace(data, buckets=tuple(others or kept)))


def open_images(plan: SolvePlan, config: ModelConfig, recipe: Recipe, drawn: Path) -> CalibrationImages:
    """The images of the recipe's data set, or those that were drawn into a folder.

    Raises UsageError for a data set that the model cannot see.
    """
    data = open_latents(plan.settings.data or drawn)
    check_data(config, data, recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": False})}))
    check_same_encoders(data, recipe)
    return CalibrationImages.of(data, -(-plan.held_out * plan.images // (plan.states + plan.held_out)))


def sampler_of(plan: SolvePlan, recipe: Recipe) -> Guidance:
    """How the teacher draws the images: in few steps, with the guidance that its training set would be drawn with."""
    guided = recipe.data.synthesize
    return Guidance(
        scheduler="flow-euler" if plan.source.predicts_velocity else "dpm-solver++",
        steps=plan.settings.drawing_steps,
        guidance=guided.guidance,
        guidance_channels=guided.guidance_channels,
    )


def draw_class_images(plan: SolvePlan, recipe: Recipe, out: Path, listener: Listener) -> None:
    """Let a teacher of classes draw the images into a folder; interrupted, it goes on."""
    guidance = sampler_of(plan, recipe)
    update = {**guidance.model_dump(), "num_samples": plan.images, "shard_size": 256}
    settings = recipe.data.synthesize.model_copy(update=update)
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"synthesize": settings})})
    synthesize_resolved(
        ResolvedRecipe("calibration", asked, {}), out, listener, name="teacher draws for calibration", estimate=False
    )


def draw_caption_images(
    plan: SolvePlan, recipe: Recipe, model: LiTTransformer2DModel, out: Path, listener: Listener
) -> None:
    """Let a teacher of captions draw the images of the captions at hand into a folder."""
    captions = _captions_at_hand(plan, model)
    guidance = sampler_of(plan, recipe)
    if captions.null_features is None and not model.config.null_caption:
        guidance = guidance.model_copy(update={"guidance": 1.0})
    sampler = SamplerSettings.of(recipe, guidance, seed=recipe.data.synthesize.seed, batch_size=8)
    some = cycled(captions, plan.images)
    with listener.task("teacher draws for calibration", sampler.steps_of(plan.images)) as task:
        latents = torch.cat(list(draw(model, some, sampler, task=task)))
    write_captioned(latents, some, out, "calibration")


def _captions_at_hand(plan: SolvePlan, model: LiTTransformer2DModel) -> Captions:
    """Those of the file, or the model's own null caption."""
    config = model.config
    if plan.settings.embeddings is not None:
        return read_embeddings(Path(plan.settings.embeddings)).padded(config.caption_tokens, config.caption_channels)
    conditioning = model.conditioning
    assert isinstance(conditioning, CaptionConditioning)
    assert conditioning.null_caption is not None
    null = conditioning.null_caption.detach()[None].float()
    return Captions(null, torch.ones(null.shape[:2], dtype=torch.int64))


@dataclass(frozen=True)
class StateMaker:
    """Makes states of clean images, each a function of the seed and its number alone.

    Attributes:
        model: the teacher, whose embedders the student shares.
        power: of the places between image and noise; 1 is as in training.
        process, processes: which of the states are this process's.
    """

    model: LiTTransformer2DModel
    recipe: Recipe
    device: torch.device
    power: float = 1.0
    process: int = 0
    processes: int = 1

    def make(self, data: LatentDataset, count: int, walk: int) -> tuple[list[Streams], list[int]]:
        """So many states, in front of the first block; those of each size of image together.

        Args:
            walk: which noise; every walk has its own.

        Returns: this process's states, and how many all processes have of each size.
        """
        config = ModelConfig.of(self.model.config)
        conditioner = make_conditioner(self.model, data, self._undropped, self.device)
        diffusion = make_diffusion(config, self.recipe.diffusion.num_timesteps)
        shares = self._noise_shares(count, walk)
        timesteps = self._timesteps(shares, diffusion.num_timesteps if isinstance(diffusion, DDPM) else None)
        batches = self._batches(data, conditioner, walk)
        schedule = Schedule([len(bucket) for bucket in data.buckets], TOGETHER, self.recipe.seed, batches.stage)
        counts = [0] * len(data.buckets)
        parts: list[list[Streams]] = [[] for _ in data.buckets]
        for step, first in enumerate(range(0, count, TOGETHER)):
            size = min(TOGETHER, count - first)
            bucket, _, _ = schedule.at(step, range(size))
            own = [i for i in range(size) if (counts[bucket] + i) % self.processes == self.process]
            counts[bucket] += size
            made = own or [0]  # one, of which nothing is kept: a grid's place is the same in every process
            batch = batches.batch(step, made)
            timestep = timesteps[[first + i for i in made]]
            noisy = diffusion.add_noise(batch.samples.clean, batch.noise, timestep).to(self.device)
            with torch.no_grad():
                x, condition, grid = self.model.embed(noisy, timestep.to(self.device), **conditioner(batch))
            whole = Streams(grid, condition, shares[[first + i for i in made]], x.float(), x.float())
            parts[bucket].append(_cut(whole, len(own)))
        found = [(_joined(part), count) for part, count in zip(parts, counts, strict=True) if part]
        return [one for one, _ in found], [count for _, count in found]

    @property
    def _undropped(self) -> Recipe:
        """Without stages: they would demand a null caption of data that has none."""
        return self.recipe.model_copy(update={"distill": self.recipe.distill.model_copy(update={"stages": ()})})

    def _batches(self, data: LatentDataset, conditioner: Conditioner, walk: int) -> MicroBatches:
        config = self.model.config
        can_drop = conditioner.null is not None if config.caption_channels is not None else bool(config.null_class)
        return MicroBatches(
            data,
            seed=self.recipe.seed,
            stage=NO_STAGE - 1 - walk,
            batch_size=TOGETHER,
            num_timesteps=None,
            condition_dropout=CONDITION_DROPOUT if can_drop else 0.0,
        )

    def _noise_shares(self, count: int, walk: int) -> Tensor:
        """Places from image (0) to noise (1), one in each of `count` parts that hold as many, (count,): so few states
        meet all of them."""
        within = torch.rand(count, generator=generator_of(self.recipe.seed, "calibration timesteps", walk))
        parts = permutation(self.recipe.seed, "calibration parts", count, walk)
        return ((parts + within) / count) ** self.power

    def _timesteps(self, shares: Tensor, num_timesteps: int | None) -> Tensor:
        """The model's timesteps at these places; None: continuous, of a velocity."""
        if num_timesteps is not None:
            return (shares * num_timesteps).long().clamp(max=num_timesteps - 1)
        return 1 - shares if self.model.config.data_timestep == 1 else shares


def _cut(streams: Streams, count: int) -> Streams:
    """The first so many states."""
    some = slice(0, count)
    kept = (streams.noise_share[some], streams.teacher[some], streams.student[some])
    return Streams(streams.grid, streams.condition_of(some), *kept)


def _joined(parts: Sequence[Streams]) -> Streams:
    """Batches of one grid as one."""
    blocks, final, *caption = zip(*(one.condition for one in parts), strict=True)
    captions = (None if column[0] is None else torch.cat(column) for column in caption)
    joined = Condition(torch.cat(blocks), torch.cat(final), *captions)
    x = torch.cat([one.teacher for one in parts])
    return Streams(parts[0].grid, joined, torch.cat([one.noise_share for one in parts]), x, x.clone())
