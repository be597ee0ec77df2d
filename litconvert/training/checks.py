"""Whether a model, its teacher, its data and a recipe fit each other, before anything is computed."""

import os

from litconvert.common.launch import launched_processes, sharding_asked
from litconvert.data.dataset import LatentDataset
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.recipe.batch_split import micro_batch_of
from litconvert.recipe.schema import FlowMatchingStage, Hybrid, Recipe, teacher_weights
from litconvert.runs.trackers import tracker_packages
from litconvert.training.optimization import optimizer_package


def check_model(config: ModelConfig, recipe: Recipe) -> None:
    """Whether a model can be trained by the recipe's stages, on so many processes. Raises UsageError."""
    if recipe.publish.backup_every is not None and recipe.publish.repo_id is None:
        raise UsageError("publish.backup_every needs to know where to: set publish.repo_id=owner/name")
    if not recipe.distill.stages:
        raise UsageError("the recipe has no distill.stages; `litconvert recipes show digits` shows an example")
    velocity = config.predicts_velocity
    settings = recipe.distill
    if settings.noise_set is not None:
        if int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes())) != launched_processes():
            raise UsageError(
                "distill.noise_set keeps outputs in files that processes share, which works on one node alone; leave "
                "it out on several"
            )
        if settings.teacher_placement == "sharded":
            raise UsageError(
                "distill.noise_set keeps outputs process by process, and a sharded teacher answers all at once"
            )
        if len({stage.condition_dropout for stage in settings.stages}) > 1:
            raise UsageError("distill.noise_set draws dropped conditions once: give all stages one condition_dropout")
        if any(stage.stratified_timesteps for stage in settings.stages):
            raise UsageError(
                "distill.noise_set draws each sample's timesteps once, so that those of a batch cannot be stratified; "
                "set stratified_timesteps to false in all stages"
            )
    sharded = sharding_asked() and launched_processes() > 1
    for index, stage in enumerate(recipe.distill.stages):
        where = f"distill.stages.{index}"
        if sharded and stage.optimizer != "adamw":
            raise UsageError(
                f"{where}.optimizer={stage.optimizer} keeps its states whole, and they are to be split over the "
                "processes; set adamw, or launch without --use_fsdp"
            )
        micro_batch_of(recipe, index, launched_processes())  # refuses a batch that does not split
        if stage.condition_dropout and not config.reads_captions and not config.null_class:
            raise UsageError(
                f"{where}.condition_dropout needs a null class, which this model was trained without; set 0"
            )
        if isinstance(stage, FlowMatchingStage) != velocity:
            right = "flow_matching" if velocity else "hybrid"
            raise UsageError(
                f"{where}.objective={stage.objective}: this model predicts {config.prediction}, whose objective is "
                f"{right}"
            )
        if stage.feature_weight and "linear" not in config.attention:
            raise UsageError(f"{where}.feature_weight is of linear layers, and the student has none; set 0")


def stage_remarks(config: ModelConfig, recipe: Recipe) -> list[str]:
    """What of a recipe's stages does nothing for a model."""
    stages = [one for one in recipe.distill.stages if isinstance(one, Hybrid)]
    asks = any(one.variational_bound or one.variance_weight for one in stages)
    if config.predicts_velocity or config.learns_variance or not asks:
        return []
    return [
        "the model has no learned variance: it learns the noise alone, and variational_bound and variance_weight of "
        "the stages do nothing"
    ]


def check_packages(recipe: Recipe) -> None:
    """Whether what the recipe's trackers and stages need is installed. Raises UsageError."""
    tracker_packages(recipe.distill.trackers)
    for index, stage in enumerate(recipe.distill.stages):
        optimizer_package(stage, f"distill.stages.{index}")


def check_data(config: ModelConfig, data: LatentDataset, recipe: Recipe) -> None:
    """Whether a model can see the data. Raises UsageError."""
    patch = config.patch_size
    for bucket in data.buckets:
        if bucket.shape[0] != config.in_channels or any(side % patch for side in bucket.shape[1:]):
            raise UsageError(
                f"the data set's latents are {bucket.shape}, the student takes {config.in_channels} channels and "
                f"sides that are multiples of {patch}; draw or encode the data for this model"
            )
    classes = not config.reads_captions
    if classes != (data.condition == "class"):
        raise UsageError(
            f"the data set has {'classes' if data.condition == 'class' else 'captions'}, the model "
            f"{'classes' if classes else 'captions'}; draw or encode the data for this model"
        )
    if data.labels is not None and not 0 <= data.labels[0] <= data.labels[1] < config.classes:
        raise UsageError(
            f"the data set's class labels are {data.labels[0]} to {data.labels[1]}, the model's classes are 0 to "
            f"{config.classes - 1}; draw or label the data for this model"
        )
    if data.condition == "caption":
        if data.caption_channels != config.caption_channels:
            raise UsageError(
                f"the data set's captions have features of width {data.caption_channels}, the model reads "
                f"{config.caption_channels}: encode them with the T5 that the model was trained with"
            )
        if (data.caption_tokens or 0) > config.caption_tokens:
            raise UsageError(
                f"the data set's captions have up to {data.caption_tokens} tokens, the model reads "
                f"{config.caption_tokens}: encode the data for this model"
            )
    if recipe.data.flip and not data.pixels and not data.flipped:
        raise UsageError("data.flip needs mirrored latents, which the data set has not: encode it with data.flip=true")


def check_teacher(student: ModelConfig, teacher: ModelConfig, recipe: Recipe, *, is_source: bool) -> None:
    """Whether a teacher can teach this student, which was converted from it or from another. Raises UsageError."""
    keys = ("in_channels", "sample_size", "out_channels", "num_classes", "caption_channels", "caption_tokens")
    for key in (*keys, "prediction", "data_timestep", "micro_conditions"):
        mine, theirs = getattr(student, key), getattr(teacher, key)
        if mine != theirs:
            raise UsageError(
                f"the teacher's {key} is {theirs}, the student's is {mine}: they cannot see the same "
                "input; choose a teacher of the same latent and condition (--teacher, or distill.teacher.path)"
            )
    for index, stage in enumerate(recipe.distill.stages):
        if stage.feature_weight and not _same_layers(student, teacher):
            raise UsageError(
                f"distill.stages.{index}.feature_weight compares layer with layer, and the teacher has others than the "
                "student; set 0, or let the source teach"
            )
        if is_source and any(teacher_weights(stage)) and teacher.attention == student.attention:
            raise UsageError(
                "the source is linear already and has nothing to teach; name the softmax model that teaches "
                "(--teacher, or distill.teacher.path)"
            )


def _same_layers(student: ModelConfig, other: ModelConfig) -> bool:
    return all(
        getattr(student, key) == getattr(other, key)
        for key in ("hidden_size", "num_layers", "patch_size", "in_channels")
    )
