"""Training a softmax model from nothing, with the same trainer: how a teacher comes about."""

from collections.abc import Sequence
from pathlib import Path

import torch

from litconvert.common.listener import SILENT, Listener
from litconvert.conversion.provenance import Provenance
from litconvert.data.conditions import check_captions
from litconvert.data.dataset import open_latents
from litconvert.distillation.teaching import Teacher
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import model_tensors
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe, Scratch, teacher_weights
from litconvert.runs.directory import RunDirectory
from litconvert.training.checks import check_data, check_model, check_packages
from litconvert.training.engine import Engine
from litconvert.training.fitting import begin, fit, refuse_inputs_in, trained_record
from litconvert.training.objective import TrainingRun
from litconvert.training.optimization import trained_names
from litconvert.training.run_inputs import RunInputs
from litconvert.training.same_encoders import check_same_encoders


def scratch_config(scratch: Scratch) -> ModelConfig:
    """The config of a model that is trained from nothing, softmax in every layer.

    Raises UsageError for sizes that do not fit each other.
    """
    settings = scratch.model_dump()
    return ModelConfig.of(
        {
            **settings,
            "out_channels": 2 * scratch.in_channels,  # noise and variance; a velocity has an unused half, as SiT's
            "null_class": scratch.num_classes is not None,
        }
    )


def train(
    out: str | Path,
    recipe: str,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Train a softmax model from nothing. Called again with the same inputs, it goes on where it was.

    Args:
        out: run directory, as of `distill`; out/model is a source for `convert`.
        recipe: name or path of a recipe with a `scratch` section.
        data: dataset folder; None: the recipe's.
        overrides: `key=value`, over the recipe.
        force: replace a run of other inputs.
        listener: hears notes and steps.

    Returns: the run directory.

    Raises UsageError for inputs that do not fit, LitconvertError when it had to stop, Interrupted after a signal.
    """
    out, settings = Path(out), resolve(recipe, overrides).recipe
    check_packages(settings)
    config = checked_config(settings)
    folder = data or settings.data.path
    if folder is None:
        raise UsageError(
            "training from nothing needs data: encode some with `litconvert latents encode`, and give it with --data"
        )
    refuse_inputs_in(out, folder)
    engine = Engine(settings.distill.mixed_precision)
    dataset = open_latents(folder)
    check_data(config, dataset, settings)
    check_captions(config, dataset, settings)
    check_same_encoders(dataset, settings)
    for index, stage in enumerate(settings.distill.stages):
        trained_names(list(model_tensors(config)), stage, f"distill.stages.{index}")
    run = RunDirectory(out)
    wanted = RunInputs({"scratch": config.values}, {}, dataset.digest, dataset.condition == "text", settings)
    if begin(engine, run, wanted, {}, force=force, listener=listener):
        return out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LiTTransformer2DModel(**config.values)
    names = [name for name, _ in model.named_parameters()]
    source = {"path": None, "sha256": None, "license": settings.source.license.model_dump()}
    provenance = Provenance(
        **wanted.inputs.record, source=source, training=trained_record(settings, dataset), seed=settings.seed
    )
    objective = Teacher(engine, None, [], settings.distill)
    training = TrainingRun(
        engine, settings, run, dataset, model, objective, fresh=frozenset(names), provenance=provenance
    )
    fit(training, listener)
    return out


def checked_config(recipe: Recipe) -> ModelConfig:
    """The config of the recipe's model, whose stages ask for no teacher. Raises UsageError."""
    if recipe.scratch is None:
        raise UsageError(
            "the recipe has no scratch section, which says what model to train; `litconvert recipes show "
            "digits-teacher` shows one, and `litconvert distill` trains a converted student"
        )
    if recipe.distill.start is not None:
        raise UsageError("distill.start is of distillation, and a model that is trained from nothing has no start")
    config = scratch_config(recipe.scratch)
    check_model(config, recipe)
    for index, stage in enumerate(recipe.distill.stages):
        if any(teacher_weights(stage)):
            raise UsageError(
                f"distill.stages.{index} asks for a teacher, and a model that is trained from nothing has none: set "
                "noise_weight, variance_weight, velocity_weight and feature_weight to 0"
            )
    return config
