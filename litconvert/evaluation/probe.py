"""The layer probe: what each linear attention alone does to the teacher's output, and from it which layers to keep."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import whole_file
from litconvert.conversion.directory import read_provenance, refuse_changed_source
from litconvert.data.batches import NO_STAGE, Draws
from litconvert.data.conditions import Conditioner, load_encode
from litconvert.data.dataset import LatentDataset, open_latents
from litconvert.distillation.distillation import resolve_run
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.layer_costs import LayerCosts, budget_of, choose_layers, milliseconds_by_kind
from litconvert.evaluation.layer_errors import ModelInputs, layer_errors, probed_layers
from litconvert.families.sources import OpenSource, open_source, read_model
from litconvert.model.diffusion import DDPM, make_diffusion
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.model.shapes import is_pixel_space
from litconvert.recipe.schema import Recipe, Source
from litconvert.runs.directory import model_of
from litconvert.training.checks import check_data

# The draws are a function of it, and so it is no setting: a seed gives the same errors on every machine.
BATCH_SIZE = 8


@dataclass(frozen=True)
class LayerError:
    """One linear layer.

    Attributes:
        layer: counted from 0.
        keeps: what the layer would be if it were kept, the teacher's kind of attention there.
        error: ||output - teacher's||^2 / ||teacher's||^2 with this layer alone linear, mean over samples.
        deviation: its standard deviation over samples.
        macs: multiply-accumulates more when it is kept; below 0, it is cheaper kept.
        macs_ratio: MACs with this layer and all those of larger error kept, over those of the fully linear student.
        milliseconds: more when it is kept, for one image; None: not measured.
        total_milliseconds: of all self-attentions, with this layer and all those of larger error kept.
        suggested: to be kept, for the budget.
    """

    layer: int
    keeps: str
    error: float
    deviation: float
    macs: int
    macs_ratio: float
    milliseconds: float | None
    total_milliseconds: float | None
    suggested: bool


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        rows: linear layers, largest error first.
        kept: layers that the student keeps already; they are not probed, and stay kept.
        num_samples: samples the errors are means over.
        image_size, tokens: what the costs are for.
        linear_macs: of a forward pass of the fully linear student.
        linear_milliseconds: of its self-attentions; None: not measured.
        budget, budget_ms: what was asked for.
        softmax_layers: the suggestion, with those kept already; None: no budget was given.
        recipe: the student's, with the suggestion in student.softmax_layers; None: no budget was given.
        notes: what to know before trusting it.
    """

    rows: tuple[LayerError, ...]
    kept: tuple[int, ...]
    num_samples: int
    image_size: int
    tokens: int
    linear_macs: int
    linear_milliseconds: float | None
    budget: float | None
    budget_ms: float | None
    softmax_layers: tuple[int, ...] | None
    notes: tuple[str, ...]
    recipe: Recipe | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the recipe."""
        return {key: value for key, value in asdict(self).items() if key != "recipe"}


def probe(
    student: str | Path,
    data: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    num_samples: int = 64,
    image_size: int | None = None,
    budget: float | None = None,
    budget_ms: float | None = None,
    write: str | Path | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ProbeResult:
    """Measure each linear layer alone in the teacher, and suggest which layers to keep in softmax for a budget.

    Best asked of a student after a stage of attention transfer. One that was merely converted has random attention,
    and the ranking then means little. The student's attention modules alone are taken: whatever else was trained in
    later stages stays the teacher's here.

    Args:
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
        on_progress: called with layers measured and to be measured, over all batches.

    Raises UsageError for inputs that do not fit and for a budget that cannot be met, LitconvertError for a file that is
    not to be replaced.
    """
    folder = Path(model_of(str(student)))
    out = None if write is None else Path(write)
    _check_request(num_samples, budget, budget_ms, out, force)
    settings, provenance, source, opened = _open(folder, recipe, overrides)
    mine, kinds = opened.reading.config, source.reading.config["attention"]
    layers = probed_layers(mine["attention"], kinds)
    if not layers:
        raise UsageError(f"{folder} attends in every layer as its teacher does: there is nothing to probe")
    latent_size, image_size = _sizes(mine, image_size)
    place = data or settings.data.path
    if place is None:
        raise UsageError(
            "no data set is named: give --data, or draw one with "
            f"`litconvert latents synthesize DATA --recipe {folder / 'recipe.yaml'}`"
        )
    device = default_device()
    dataset = open_latents(place)
    check_data(mine, dataset, settings)
    # Drawn before the models are read: the T5 of captions that are kept as text is gone by then.
    batches = draw_inputs(dataset, mine, settings, num_samples, device)
    teacher, linear = (read_model(one, torch.float32).to(device) for one in (source, opened))
    times = None
    if budget_ms is not None:
        dtype = torch.bfloat16 if uses_bf16(settings.distill.mixed_precision) else torch.float32
        times = milliseconds_by_kind(teacher, linear, latent_size, dtype)
    costs = LayerCosts(mine, kinds, latent_size, times)
    kept = tuple(layer for layer, kind in enumerate(mine["attention"]) if kind != "linear")
    limit = budget_of(costs, layers, kept, budget, budget_ms)
    if limit is not None:
        limit.require_possible()
    done, total = [0], len(layers) * len(batches)

    def on_layer() -> None:
        done[0] += 1
        on_progress(done[0], total)

    errors = layer_errors(teacher, linear, batches, on_layer)
    suggestion = wanted = None
    notes = [
        *_notes_on_training(student, provenance.get("distillation")),
        *_notes_on_costs(costs, layers, image_size),
    ]
    if limit is not None:
        means = {layer: float(error.mean()) for layer, error in errors.items()}
        chosen = choose_layers(means, limit.more, limit.limit - limit.spent)
        least = limit.spent + min(limit.more.values())
        if least > limit.limit:
            notes.append(f"no layer fits the budget: with one more kept it comes to {least / limit.unit:.3f}")
        suggestion = tuple(sorted({*kept, *chosen}))
        shape = settings.student.model_copy(update={"softmax_layers": suggestion})
        wanted = settings.model_copy(update={"student": shape})
        if out is not None:
            _write(wanted, out, f"{limit.option} {limit.limit / limit.unit:g} at {image_size} pixels")
    return ProbeResult(
        rows=tuple(_rows(errors, costs, kept, suggestion or ())),
        kept=kept,
        num_samples=num_samples,
        image_size=image_size,
        tokens=(latent_size // mine["patch_size"]) ** 2,
        linear_macs=costs.macs(),
        linear_milliseconds=None if times is None else costs.milliseconds(),
        budget=budget,
        budget_ms=budget_ms,
        softmax_layers=suggestion,
        notes=tuple(notes),
        recipe=wanted,
    )


def _open(
    folder: Path, recipe: str | None, overrides: Sequence[str]
) -> tuple[Recipe, dict[str, Any], OpenSource, OpenSource]:
    """The recipe and the record of a student, the source that it was converted from, and itself."""
    provenance = read_provenance(folder)
    if provenance["source"]["path"] is None:
        raise UsageError(f"{folder} was trained from nothing and has no teacher; probe a student that was converted")
    settings = resolve_run(folder, recipe, overrides, None)[0].recipe
    source = open_source(settings.source, settings.inherit.weights)
    refuse_changed_source(folder, provenance, settings.source.path, source.checkpoint.sha256())
    return settings, provenance, source, open_source(Source(path=str(folder)))


def draw_inputs(
    data: LatentDataset, config: Mapping[str, Any], recipe: Recipe, num_samples: int, device: torch.device
) -> list[ModelInputs]:
    """What the models see: samples of the data set with noise and timesteps as in training, no condition dropped.

    A function of the recipe's seed, the data and the number alone. A data set of fewer samples is gone through again,
    with other noise.
    """
    diffusion = make_diffusion(config, recipe.diffusion.num_timesteps)
    timesteps = recipe.diffusion.num_timesteps if isinstance(diffusion, DDPM) else None
    draws = Draws(data, seed=recipe.seed, stage=NO_STAGE, batch_size=BATCH_SIZE, num_timesteps=timesteps)
    encode = load_encode(recipe, config["caption_tokens"], device) if data.condition == "text" else None
    conditioner = Conditioner(config, encode=encode, device=device)
    inputs: list[ModelInputs] = []
    for step, start in enumerate(range(0, num_samples, BATCH_SIZE)):
        batch = draws.batch(step, range(min(BATCH_SIZE, num_samples - start)))
        clean, noise, timestep = (value.to(device) for value in (batch.samples.clean, batch.noise, batch.timestep))
        inputs.append((diffusion.add_noise(clean, noise, timestep), timestep, conditioner(batch)))
    return inputs


def _sizes(config: Mapping[str, Any], image_size: int | None) -> tuple[int, int]:
    """Sides of the latent and of the image; the same in a pixel-space model. Raises UsageError for an odd one."""
    factor = 1 if is_pixel_space(config["in_channels"]) else VAE_FACTOR
    if image_size is None:
        image_size = factor * config["sample_size"]
    step = factor * config["patch_size"]
    if image_size < step or image_size % step:
        raise UsageError(f"--at {image_size}: this model's images have sides that are multiples of {step} pixels")
    return image_size // factor, image_size


def _check_request(
    num_samples: int, budget: float | None, budget_ms: float | None, write: Path | None, force: bool
) -> None:
    """What can be refused before anything is read. Raises UsageError, LitconvertError for a file that is there."""
    if num_samples < 2:
        raise UsageError(f"--num-samples {num_samples}: the spread over samples needs two at least")
    if budget is not None and budget_ms is not None:
        raise UsageError("--budget and --budget-ms are two measures of one thing; give one of them")
    if write is None:
        return
    if budget is None and budget_ms is None:
        raise UsageError("--write writes the layers suggested for a budget; give --budget or --budget-ms")
    if write.is_dir():
        raise UsageError(f"{write} is a folder, and a recipe is to be written; name a file")
    if write.exists() and not force:
        raise LitconvertError(f"{write} exists; choose another name, or replace it with --force")


def _rows(
    errors: Mapping[int, Tensor], costs: LayerCosts, kept: Collection[int], suggested: Collection[int]
) -> Iterator[LayerError]:
    """The table, largest error first."""
    so_far = list(kept)
    for layer in sorted(errors, key=lambda layer: -float(errors[layer].mean())):
        so_far.append(layer)
        yield LayerError(
            layer=layer,
            keeps=costs.kinds[layer],
            error=float(errors[layer].mean()),
            deviation=float(errors[layer].std()),
            macs=costs.more_macs(layer),
            macs_ratio=costs.macs(so_far) / costs.macs(),
            milliseconds=None if costs.times is None else costs.more_milliseconds(layer),
            total_milliseconds=None if costs.times is None else costs.milliseconds(so_far),
            suggested=layer in suggested,
        )


def _notes_on_training(student: str | Path, distillation: Mapping[str, Any] | None) -> Iterator[str]:
    """What a student's history says about its ranking."""
    if distillation is None:
        yield (
            f"{student} was converted and not distilled: its linear attention is random, and the ranking means little; "
            "run a stage of attention_transfer first"
        )
    elif any(stage["objective"] != "attention_transfer" for stage in distillation["stages"]):
        yield (
            "the stages after attention transfer trained more than attention, and attention to go with it: here it is "
            "measured inside the teacher; the ranking right after attention transfer is the clearest"
        )


def _notes_on_costs(costs: LayerCosts, layers: Collection[int], image_size: int) -> Iterator[str]:
    """Where softmax is not the dearer one."""
    advice = "there; ask for the size that you will draw (--at)"
    if all(costs.more_macs(layer) <= 0 for layer in layers):
        yield (
            f"at {image_size} pixels softmax attention needs no more multiply-accumulates than linear attention: "
            f"keeping it costs nothing {advice}"
        )
    if costs.times is not None and all(costs.more_milliseconds(layer) <= 0 for layer in layers):
        yield f"at {image_size} pixels softmax attention is no slower here than linear: keeping it costs none {advice}"


def _write(recipe: Recipe, out: Path, made_for: str) -> None:
    """The recipe, whole or not at all, with the command that runs it."""
    header = f"# litconvert convert {recipe.source.path} STUDENT --recipe {out.name}\n"
    header += f"# student.softmax_layers as `litconvert probe` suggests them for {made_for}.\n"
    with whole_file(out) as partial:
        partial.write_text(header + recipe.to_yaml())
