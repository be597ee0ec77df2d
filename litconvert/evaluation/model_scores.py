"""How good any model is: its samples against pictures, stored statistics or its teacher's own, and its agreement."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import digest_of, refuse_existing, refuse_source, require_writable
from litconvert.common.launch import launched_processes
from litconvert.common.listener import SILENT, UNSEEN, Listener, Task
from litconvert.common.quantities import span
from litconvert.common.seeds import permutation
from litconvert.conversion.solve_plan import rate_of
from litconvert.data.prompts import StoredPrompts, read_prompts, store_prompts
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.agreement import AgreementImages, agreement
from litconvert.evaluation.image_sets import (
    ImageSet,
    NpzFile,
    check_reference,
    folder_of_pictures,
    read_npz,
    read_pictures,
    seen,
    write_statistics,
)
from litconvert.evaluation.metrics import (
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from litconvert.evaluation.networks import DEFAULT, ClipScore, FeatureNetwork, Outputs, open_network
from litconvert.evaluation.scores import Score, to_json
from litconvert.families.companions import companions_of
from litconvert.families.sources import OpenSource, read_model
from litconvert.model.compilation import compile_for
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.model.shapes import count_macs
from litconvert.recipe.inputs import given
from litconvert.recipe.packaged import asset_of, recipe_of
from litconvert.recipe.schema import Guidance, Recipe
from litconvert.runs.directory import model_of
from litconvert.sampling.captions import Captions, read_embeddings
from litconvert.sampling.draw import SamplerSettings, draw, make_scheduler
from litconvert.sampling.parts import Group, launched_group
from litconvert.sampling.picture_set import PictureSet, digest_of_conditions, draw_npz, in_turn
from litconvert.sampling.pictures import load_vae, to_images
from litconvert.sampling.request import open_models

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
# Pictures that the ADM evaluator takes an Inception score of at a time.
ADM_SPLIT = 5000
# Images of the teacher that agreement is measured on.
AGREEMENT_IMAGES = 32
# Inputs at a time: two models' residual streams behind all blocks are held.
AGREEMENT_BATCH = 16
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
        return self.kept / f"{drawn.name}-{seed}.npz"

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


def evaluate_model(asked: EvaluationRequest, listener: Listener = SILENT) -> dict[str, Any]:
    """Measure a model: distances of its samples to pictures, and its agreement with its teacher.

    Samples are drawn as `sampling.mixed_precision` says and are a function of the seed and their number. Features and
    agreement are float32, convolutions on a GPU too.

    Returns: {"model", "teacher", "reference": {"name", "count"}, "features": {"name", "kind"}, "settings", "models":
    {name: {metric: {"mean", "standard_deviation", "values"}}}, "agreement"}; what was not asked for is None.

    Raises UsageError for what cannot be meant, before anything is drawn.
    """
    asked.check()
    _check_saved(asked)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), TemporaryDirectory() as folder:
        if asked.is_drawn:
            return _evaluate_file(asked, listener)
        recipe = recipe_for(asked)
        sources = open_models(
            asked.model, asked.teacher, recipe, asked.overrides, asked.num_attention_heads, asked.weights
        )
        if asked.save_statistics is not None:
            refuse_source(asked.save_statistics, [file for source in sources for file in source.checkpoint.files])
        for source in sources:  # refuses before the work
            make_scheduler(recipe.evaluate.scheduler, recipe.diffusion.num_timesteps, source.config.prediction)
        if asked.clip and not sources[-1].config.reads_captions:
            raise UsageError(f"--clip says how well pictures fit their captions, and {asked.model} draws classes")
        network = None if asked.agreement_only else open_network(_features(asked, sources[-1]))
        reference = None if network is None else _given_reference(asked, network, sources[-1], listener)
        _check_counts(recipe, network, reference)
        listener.note(_cost(asked, recipe, sources))
        samples = replace(samples_of(asked, recipe, sources, Path(folder)), kept=asked.samples)
        listener.note(f"reading {' and '.join(source.checkpoint.source for source in sources)}")
        names = ["model"] if asked.teacher is None else ["teacher", "student"]
        group = launched_group() if asked.samples else None
        device = default_device() if group is None else group.device
        models = [
            Drawn(name, read_model(source, torch.float32).to(device), source)
            for name, source in zip(names, sources, strict=True)
        ]
        _compile(asked, samples, models, 1 if group is None else group.processes)
        if group is not None:
            if asked.save_statistics is not None:
                refuse_source(asked.save_statistics, samples.files(models))
            _keep_all(samples, models, group, listener, reference=reference is None)
            if group.process:
                return {}
        report: dict[str, Any] = {
            **_facts(asked, recipe),
            **({} if network is None else _measure(asked, samples, models, (network, reference), listener)),
            "agreement": _agree(samples, models, listener) if asked.teacher else None,
        }
        return report


def _check_saved(asked: EvaluationRequest) -> None:
    """Refuse before the work to write statistics over what is there, over what is read, and where nothing can be."""
    if asked.save_statistics is None:
        return
    given = [path for path in (asked.reference, asked.prompts, asked.embeddings) if path is not None]
    pictures = folder_of_pictures(asked.images) if asked.images is not None else []
    refuse_source(asked.save_statistics, [*given, *pictures, *([Path(asked.model)] if asked.is_drawn else [])])
    refuse_existing(asked.save_statistics, force=asked.force)
    require_writable(asked.save_statistics)


def _check_counts(recipe: Recipe, network: FeatureNetwork | None, reference: ImageSet | None) -> None:
    """Refuse before the work to draw fewer samples than can be measured against pictures."""
    pictures = reference is None or reference.outputs is not None
    if network is not None and recipe.evaluate.num_samples < (least := NEIGHBOURS + 1 if pictures else 2):
        raise UsageError(
            f"{recipe.evaluate.num_samples} samples are too few to be measured: draw {least} at least (--num-samples)"
        )


def _compile(asked: EvaluationRequest, samples: Samples, models: Sequence[Drawn], processes: int) -> None:
    """Compile the models that are to draw so much that it is repaid, or as the recipe says."""
    settings, sampler = samples.recipe.evaluate, samples.sampler(0)
    for drawn in models:
        seeds = [] if asked.agreement_only else list(settings.seeds)
        draws_reference = drawn.name == "teacher" and asked.images is None and asked.reference is None
        if draws_reference and not asked.agreement_only:
            seeds.append(settings.reference_seed)
        sets = sum(samples.kept is None or not samples.file(drawn, seed).exists() for seed in seeds)
        passes = sets * sampler.passes_of(settings.num_samples) // processes
        if drawn.name == "teacher":
            passes += sampler.passes_of(AGREEMENT_IMAGES)
        compile_for(passes, [drawn.model], samples.recipe.sampling.compile)


def _keep_all(samples: Samples, models: Sequence[Drawn], group: Group, listener: Listener, *, reference: bool) -> None:
    """Every process draws its share of all sets: each model's of each seed and, where it is asked for, the teacher's
    that they are held against."""
    settings = samples.recipe.evaluate
    wanted = [(drawn, seed) for drawn in models for seed in settings.seeds]
    if reference:
        wanted.insert(0, (models[0], settings.reference_seed))
    for drawn, seed in wanted:
        samples.keep(drawn, seed, group, listener)


def recipe_for(asked: EvaluationRequest) -> Recipe:
    """The recipe that settings are taken from, as the request describes it.

    Its `evaluate` section says how samples are drawn. What that leaves at its default is as in `sample`.
    """
    path = model_of(asked.model, raw=asked.weights == "model")
    overrides = [*PROTOCOLS.get(asked.protocol or "", ()), *asked.overrides]
    name, beside = asked.recipe or asset_of(asked.model).recipe, companions_of(path)
    recipe = beside.resolve(name, overrides).recipe
    if name is None and beside.recipe is None:
        source = open_models(path, None, recipe, asked.overrides, asked.num_attention_heads, asked.weights)[0]
        if (packaged := recipe_of(source.reading.family, source.config.values)) is not None:
            recipe = beside.resolve(packaged, overrides).recipe
    said = {one.partition("=")[0] for one in overrides}
    told = given(recipe.evaluate)
    sampler = {
        key: getattr(recipe.sample, key)
        for key in Guidance.model_fields
        if key not in told and not {"evaluate", f"evaluate.{key}"} & said
    }
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=sampler)})


def _features(asked: EvaluationRequest, source: OpenSource) -> str:
    """The network: the one asked for, or the one for such pictures."""
    if asked.features is not None:
        return asked.features
    if asked.protocol is not None:
        return "inception"
    config = source.config
    return "digits" if (config.in_channels, config.sample_size, config.num_classes) == (1, 16, 10) else DEFAULT


def _cost(asked: EvaluationRequest, recipe: Recipe, sources: Sequence[OpenSource]) -> str:
    """What drawing takes here, in a sentence; a product of matrices is timed for it."""
    settings, guided = recipe.evaluate, 2 if recipe.evaluate.guidance != 1 else 1
    sets = len(sources) * len(settings.seeds) + (asked.images is None and asked.reference is None)
    count = 0 if asked.agreement_only else sets * settings.num_samples
    count += AGREEMENT_IMAGES if asked.teacher else 0
    macs = max(count_macs(source.config, source.config.sample_size) for source in sources)
    dtype = torch.bfloat16 if uses_bf16(recipe.sampling.mixed_precision) else torch.float32
    seconds = count * settings.steps * guided * macs / rate_of(str(default_device()), dtype)
    return f"{count:,} samples are drawn in {settings.steps} steps: about {span(seconds)}"


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


def _facts(asked: EvaluationRequest, recipe: Recipe) -> dict[str, Any]:
    """What was measured, and how samples were drawn."""
    settings = recipe.evaluate.model_dump(mode="json", exclude={"features"})
    precision = "bf16" if uses_bf16(recipe.sampling.mixed_precision) else "float32"
    return {
        "model": asked.model,
        "teacher": asked.teacher,
        "reference": None,
        "features": None,
        "settings": {**settings, "protocol": asked.protocol, "precision": precision},
        "models": None,
    }


def _measure(
    asked: EvaluationRequest,
    samples: Samples,
    models: Sequence[Drawn],
    against: tuple[FeatureNetwork, ImageSet | None],
    listener: Listener,
) -> dict[str, Any]:
    """The distances of each model's samples, a set from each seed, to a reference; None: the teacher draws it."""
    network, reference = against
    settings = samples.recipe.evaluate
    clip = ClipScore(asked.clip) if asked.clip else None
    sets = len(models) * len(settings.seeds) + (reference is None)
    each = samples.sampler(0).steps_of(settings.num_samples) if samples.kept is None else settings.num_samples
    with listener.task("draw and measure" if samples.kept is None else "measure", sets * each) as task:
        if reference is None:
            outputs, _ = _drawn(models[0], samples, settings.reference_seed, network, None, task)
            reference = ImageSet.of("the teacher's own samples", outputs)
        if asked.save_statistics is not None:
            write_statistics(reference, network, asked.save_statistics)
        split = ADM_SPLIT if asked.protocol == "dit" else None
        scores: dict[str, Any] = {}
        for drawn in models:
            found: list[dict[str, float]] = []
            for seed in settings.seeds:
                outputs, fits = _drawn(drawn, samples, seed, network, clip, task)
                task.advance(0, "distances")
                found.append({**compare(ImageSet.of(drawn.name, outputs), reference, split), **fits})
            scores[drawn.name] = {key: to_json(Score(tuple(one[key] for one in found))) for key in found[0]}
    return {**_against(reference, network), "models": scores}


def _against(reference: ImageSet, network: FeatureNetwork) -> dict[str, Any]:
    return {
        "reference": {"name": reference.name, "count": reference.count},
        "features": {"name": network.name, "kind": network.kind},
    }


def _given_reference(
    asked: EvaluationRequest, network: FeatureNetwork, source: OpenSource, listener: Listener
) -> ImageSet | None:
    """The pictures or statistics that were given; None: the teacher draws them.

    Raises UsageError for what samples cannot be held against.
    """
    config = source.config
    side = config.sample_size * (1 if config.is_pixel_space else VAE_FACTOR)
    channels = 1 if config.in_channels == 1 else 3
    if asked.reference is not None:
        listener.note(f"reading {asked.reference}")
        reference = read_npz(asked.reference, network)
    elif asked.images is not None:
        reference = _folder(asked.images, side, "L" if channels == 1 else "RGB", network, listener)
    else:
        return None
    check_reference(reference, network, (side, side, channels))
    return reference


def _folder(folder: Path, side: int, mode: str, network: FeatureNetwork, listener: Listener) -> ImageSet:
    paths = folder_of_pictures(folder)
    with listener.task("look at the pictures", len(paths)) as task:
        return ImageSet.of(str(folder), seen(read_pictures(paths, side, mode), network, task))


def _drawn(
    drawn: Drawn,
    samples: Samples,
    seed: int,
    network: FeatureNetwork,
    clip: ClipScore | None,
    task: Task = UNSEEN,
) -> tuple[Outputs, dict[str, float]]:
    """What the network makes of a set of samples, and how well it fits its captions."""
    parts, fits = [], []
    for some, batch in samples.pictures(drawn, seed, task):
        parts.append(network(batch))
        if clip is not None:
            fits.append(clip(batch, samples.texts(some)))
    return Outputs.joined(parts), {"clip_score": float(torch.cat(fits).mean())} if fits else {}


def compare(samples: ImageSet, reference: ImageSet, split: int | None = None) -> dict[str, float]:
    """Every distance that the two sets allow, by name.

    `frechet_distance` always; `kernel_distance`, `precision` and `recall` where the reference has pictures;
    `spatial_frechet_distance` (sFID) in Inception's features; `inception_score`, of so many at a time (`split`), where
    the network knows classes.

    Raises LitconvertError where one is no finite number.
    """
    assert samples.outputs is not None
    found = {"frechet_distance": frechet_distance(reference.pooled, samples.pooled)}
    if samples.spatial is not None and reference.spatial is not None:
        found["spatial_frechet_distance"] = frechet_distance(reference.spatial, samples.spatial)
    if reference.outputs is not None:
        theirs, mine = reference.outputs.features, samples.outputs.features
        found["kernel_distance"] = kernel_distance(theirs, mine)
        found["precision"], found["recall"] = precision_recall(theirs, mine)
    if samples.outputs.logits is not None:
        found["inception_score"] = inception_score(samples.outputs.logits, split)
    for name, value in found.items():
        if not math.isfinite(value):
            raise LitconvertError(
                f"the {name.replace('_', ' ')} of {samples.name} to {reference.name} is {value}: features or "
                "statistics are too large to be measured; get the reference again, or use another network (--features)"
            )
    return found


def _agree(samples: Samples, models: Sequence[Drawn], listener: Listener) -> dict[str, Any]:
    """The student's agreement with the teacher, on images that the teacher draws."""
    settings, (teacher, student) = samples.recipe.evaluate, (drawn.model for drawn in models)
    count = AGREEMENT_IMAGES
    with listener.task("draw for agreement", samples.sampler(0).steps_of(count)) as task:
        batches = list(samples.latents(teacher, settings.reference_seed, count, task))
    images = AgreementImages(
        torch.cat([batch for _, batch in batches]),
        samples.conditions(range(count)),
        samples.recipe.diffusion.num_timesteps,
        settings.reference_seed,
        min(settings.batch_size, AGREEMENT_BATCH),
    )
    with listener.task("agreement", images.passes()) as task:
        return agreement(teacher, student, images, task)


def _evaluate_file(asked: EvaluationRequest, listener: Listener) -> dict[str, Any]:
    """Samples that are drawn already, against pictures."""
    network = open_network(asked.features or ("inception" if asked.protocol else DEFAULT))
    file = NpzFile(Path(asked.model))
    listener.note(f"reading {asked.model}")
    _, *sides = next(file.pictures()).shape
    shape = (sides[0], sides[1], sides[2])
    samples = ImageSet.of(asked.model, seen(file.pictures(), network))
    if asked.reference is not None:
        reference = read_npz(asked.reference, network)
    else:
        assert asked.images is not None
        reference = _folder(asked.images, shape[0], "RGB", network, listener)
    check_reference(reference, network, shape)
    if asked.save_statistics is not None:
        write_statistics(reference, network, asked.save_statistics)
    found = compare(samples, reference, ADM_SPLIT if asked.protocol == "dit" else None)
    return {
        "model": asked.model,
        "teacher": None,
        **_against(reference, network),
        "settings": {"num_samples": samples.count, "protocol": asked.protocol},
        "models": {"model": {key: to_json(Score((value,))) for key, value in found.items()}},
        "agreement": None,
    }
