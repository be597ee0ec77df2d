"""The layer probe: what each linear attention alone does to the teacher's output, and from it which layers to keep."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import refuse_existing, require_file_name, whole_file
from litconvert.common.listener import SILENT, Listener
from litconvert.conversion.directory import refuse_changed_source
from litconvert.conversion.provenance import Provenance
from litconvert.data.batches import NO_STAGE, MicroBatches
from litconvert.data.conditions import Conditioner, load_encode
from litconvert.data.dataset import LatentDataset, open_latents
from litconvert.distillation.distillation import Request, resolve_run
from litconvert.errors import UsageError
from litconvert.evaluation.layer_costs import Budget, LayerCosts, budget_of, choose_layers, milliseconds_by_kind
from litconvert.evaluation.layer_errors import ModelInputs, layer_errors, probed_layers
from litconvert.evaluation.probe_result import ProbeResult, notes_on_budget, notes_on_costs, notes_on_training, rows_of
from litconvert.families.sources import OpenSource, open_source_of, open_student, read_model
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM, make_diffusion
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.recipe.schema import Recipe, Solve
from litconvert.runs.directory import model_of
from litconvert.solving.alone import solve_alone
from litconvert.solving.calibration import StateMaker
from litconvert.solving.layer import LayerSolver
from litconvert.solving.streams import Passes
from litconvert.training.checks import check_data
from litconvert.training.same_encoders import check_same_encoders

# The number of its states' noise: no walk has it.
PROBE = 2_000_000
# The draws are a function of it, and so it is no setting: a seed gives the same errors on every machine.
BATCH_SIZE = 8


@dataclass(frozen=True)
class ProbeRequest:
    """What is to be probed, and what for.

    Attributes:
        student: model directory, or run directory of `distill`; the source it records is the teacher.
        data: dataset folder; None: the recipe's.
        recipe, overrides: as for `distill`; source, student and inherit are the recorded ones.
        num_samples: samples that errors are means over. Noise and timesteps are drawn as in training, a function of the
            recipe's seed; no condition is dropped and nothing mirrored.
        image_size: side in pixels that costs are for; None: the model's own.
        budget: the hybrid's multiply-accumulates may be so many times those of the fully linear student.
        budget_ms: its self-attentions may take so many milliseconds a forward pass of one image, measured here.
        write: a file for the recipe with the suggestion in student.softmax_layers.
        force: replace that file.
    """

    student: str | Path
    data: str | Path | None = None
    recipe: str | None = None
    overrides: Sequence[str] = ()
    num_samples: int = 64
    image_size: int | None = None
    budget: float | None = None
    budget_ms: float | None = None
    write: str | Path | None = None
    force: bool = False

    @property
    def folder(self) -> Path:
        """The student's model directory."""
        return Path(model_of(str(self.student)))

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises UsageError, LitconvertError for a file that is there.
        """
        if self.num_samples < 2:
            raise UsageError(f"--num-samples {self.num_samples}: the spread over samples needs two at least")
        if self.budget is not None and self.budget_ms is not None:
            raise UsageError("--budget and --budget-ms are two measures of one thing; give one of them")
        if self.write is None:
            return
        out = Path(self.write)
        if self.budget is None and self.budget_ms is None:
            raise UsageError("--write writes the layers suggested for a budget; give --budget or --budget-ms")
        require_file_name(out)
        refuse_existing(out, force=self.force)


def probe(asked: ProbeRequest, listener: Listener = SILENT) -> ProbeResult:
    """Measure each linear layer alone in the teacher, and suggest which layers to keep in softmax for a budget.

    Asked of a student whose linear attention was solved or trained; unsolved it is random, and the ranking means
    little. The attention modules alone are taken: whatever else was trained stays the teacher's here. Those that were
    solved and not trained are solved once more, each for itself: a walk's layers repair what others left, and in the
    teacher nothing is to be repaired.

    Args:
        listener: hears of the layers that are measured, over all batches.

    Raises UsageError for inputs that do not fit and for a budget that cannot be met, LitconvertError for a file that is
    not to be replaced.
    """
    folder = asked.folder
    asked.check()
    pair = _open_pair(folder, asked)
    if not pair.layers:
        raise UsageError(f"{folder} attends in every layer as its teacher does: there is nothing to probe")
    latent_size, image_size = _sizes(pair.config, asked.image_size)
    batches = _batches(folder, pair, asked)
    teacher, student = (read_model(one, torch.float32).to(default_device()) for one in (pair.teacher, pair.student))
    times = None
    if asked.budget_ms is not None:
        dtype = torch.bfloat16 if uses_bf16(pair.recipe.distill.mixed_precision) else torch.float32
        times = milliseconds_by_kind(teacher, student, latent_size, dtype)
    costs = LayerCosts(pair.config, pair.kinds, latent_size, times)
    budget = budget_of(costs, pair.layers, pair.kept, asked.budget, asked.budget_ms)
    if budget is not None:
        budget.require_possible()
    _solve_alone(teacher, student, pair, asked)
    with listener.task("probe", len(pair.layers) * len(batches)) as task:
        errors = layer_errors(teacher, student, batches, task)
    notes = [
        *notes_on_training(asked.student, pair.provenance),
        *notes_on_costs(costs, pair.layers, image_size),
    ]
    suggestion = recipe = None
    if budget is not None:
        notes += notes_on_budget(budget)
        suggestion = _suggestion(errors, budget, pair.kept)
        shape = pair.recipe.student.model_copy(update={"softmax_layers": suggestion})
        recipe = pair.recipe.model_copy(update={"student": shape})
        if asked.write is not None:
            made_for = f"{budget.option} {budget.limit / budget.unit:g} at {image_size} pixels"
            _write(recipe, Path(asked.write), made_for)
    return ProbeResult(
        rows=tuple(rows_of(errors, costs, pair.kept, suggestion or ())),
        kept=pair.kept,
        num_samples=asked.num_samples,
        image_size=image_size,
        tokens=(latent_size // pair.config.patch_size) ** 2,
        linear_macs=costs.macs(),
        linear_milliseconds=None if times is None else costs.milliseconds(),
        budget=asked.budget,
        budget_ms=asked.budget_ms,
        softmax_layers=suggestion,
        notes=tuple(notes),
        recipe=recipe,
    )


def _solve_alone(
    teacher: LiTTransformer2DModel, student: LiTTransformer2DModel, pair: "Pair", asked: ProbeRequest
) -> None:
    """Solve each probed layer of a student that was solved, and not trained after it, for itself.

    On as many states as the walk had.
    """
    solved = pair.provenance.solve
    if solved is None or pair.provenance.distillation is not None:
        return
    device, settings = default_device(), pair.recipe.solve or Solve()
    data = open_latents(_place(pair.recipe, asked))
    maker = StateMaker(teacher.requires_grad_(False), pair.recipe, device, settings.timestep_power)
    states, counts = maker.make(data, int(solved["states"]), PROBE)
    passes = Passes(device, settings.batch_size, uses_bf16(settings.mixed_precision))
    solver = LayerSolver(settings, passes, pair.recipe.seed, 0, 0.0, counts)
    solve_alone(teacher, student.requires_grad_(False), states, pair.layers, solver)


@dataclass(frozen=True)
class Pair:
    """A student and the source that it was converted from, which is its teacher here; headers only.

    Attributes:
        recipe: the student's, as it was asked for.
        provenance: its litconvert.json.
    """

    recipe: Recipe
    provenance: Provenance
    teacher: OpenSource
    student: OpenSource

    @property
    def config(self) -> ModelConfig:
        """The student's."""
        return self.student.config

    @property
    def kinds(self) -> Sequence[str]:
        """The teacher's attention, layer by layer."""
        return self.teacher.config.attention

    @property
    def layers(self) -> list[int]:
        """Those that are probed."""
        return probed_layers(self.config.attention, self.kinds)

    @property
    def kept(self) -> tuple[int, ...]:
        """Those that the student keeps already."""
        return tuple(layer for layer, kind in enumerate(self.config.attention) if kind != "linear")


def _open_pair(folder: Path, asked: ProbeRequest) -> Pair:
    """Raises UsageError for a student without a teacher, LitconvertError where the source has changed."""
    provenance = Provenance.read(folder)
    if provenance.source.get("path") is None:
        raise UsageError(f"{folder} was trained from nothing and has no teacher; probe a student that was converted")
    recipe = resolve_run(Request(folder, folder, asked.recipe, overrides=asked.overrides))[0].recipe
    source = open_source_of(recipe)
    refuse_changed_source(folder, provenance, recipe.source.path, source.checkpoint.sha256())
    return Pair(recipe, provenance, source, open_student(folder))


def _batches(folder: Path, pair: Pair, asked: ProbeRequest) -> list[ModelInputs]:
    """What both models see, made before they are read: the T5 of captions that are kept as text is gone by then."""
    data = open_latents(_place(pair.recipe, asked))
    check_data(pair.config, data, pair.recipe)
    check_same_encoders(data, pair.recipe)
    return probe_inputs(data, pair.config, pair.recipe, asked.num_samples, default_device())


def _place(recipe: Recipe, asked: ProbeRequest) -> str | Path:
    """The data set. Raises UsageError where none is named."""
    place = asked.data or recipe.data.path
    if place is None:
        raise UsageError(
            "no data set is named: give --data, or draw one with "
            f"`litconvert latents synthesize DATA --recipe {asked.folder / 'recipe.yaml'}`"
        )
    return place


def _suggestion(errors: Mapping[int, Tensor], budget: Budget, kept: Collection[int]) -> tuple[int, ...]:
    """The layers to keep for a budget, with those that are kept already."""
    means = {layer: float(error.mean()) for layer, error in errors.items()}
    return tuple(sorted({*kept, *choose_layers(means, budget.more, budget.limit - budget.spent)}))


def probe_inputs(
    data: LatentDataset, config: ModelConfig, recipe: Recipe, num_samples: int, device: torch.device
) -> list[ModelInputs]:
    """What the models see: samples of the data set with noise and timesteps as in training, no condition dropped.

    A function of the recipe's seed, the data and the number alone. A data set of fewer samples is gone through again,
    with other noise.
    """
    diffusion = make_diffusion(config, recipe.diffusion.num_timesteps)
    timesteps = recipe.diffusion.num_timesteps if isinstance(diffusion, DDPM) else None
    drawn = MicroBatches(data, seed=recipe.seed, stage=NO_STAGE, batch_size=BATCH_SIZE, num_timesteps=timesteps)
    encode = load_encode(recipe, config.caption_tokens, device) if data.condition == "text" else None
    conditioner = Conditioner(config, encode=encode, device=device)
    inputs: list[ModelInputs] = []
    for step, start in enumerate(range(0, num_samples, BATCH_SIZE)):
        batch = drawn.batch(step, range(min(BATCH_SIZE, num_samples - start)))
        clean, noise, timestep = (value.to(device) for value in (batch.samples.clean, batch.noise, batch.timestep))
        inputs.append((diffusion.add_noise(clean, noise, timestep), timestep, conditioner(batch)))
    return inputs


def _sizes(config: ModelConfig, image_size: int | None) -> tuple[int, int]:
    """Sides of the latent and of the image; the same in a pixel-space model. Raises UsageError for an odd one."""
    factor = 1 if config.is_pixel_space else VAE_FACTOR
    if image_size is None:
        image_size = factor * config.sample_size
    step = factor * config.patch_size
    if image_size < step or image_size % step:
        raise UsageError(f"--at {image_size}: this model's images have sides that are multiples of {step} pixels")
    return image_size // factor, image_size


def _write(recipe: Recipe, out: Path, made_for: str) -> None:
    """The recipe, whole or not at all, with the command that runs it."""
    header = f"# litconvert convert {recipe.source.path} STUDENT --recipe {out.name}\n"
    header += f"# student.softmax_layers as `litconvert probe` suggests them for {made_for}.\n"
    with whole_file(out) as partial:
        partial.write_text(header + recipe.to_yaml())
