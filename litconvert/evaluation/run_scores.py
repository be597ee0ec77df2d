"""The scores of a run's model, kept beside it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litconvert.common.files import digest_of, read_json, write_whole
from litconvert.common.listener import SILENT, Listener
from litconvert.conversion.provenance import Provenance
from litconvert.evaluation.scores import evaluate, evaluation_passes, reference_samples
from litconvert.families.companions import local_model
from litconvert.families.sources import open_student, open_teacher, read_model
from litconvert.model.compilation import compile_for
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.schema import Recipe
from litconvert.runs.directory import model_of
from litconvert.sampling.draw import SamplerSettings


def score_run(
    run: str | Path, recipe: Recipe, *, weights: str = "auto", force: bool = False, listener: Listener = SILENT
) -> dict[str, Any]:
    """Metrics of a run's model and of the teacher against itself, kept beside it and in the model's record.

    Args:
        run: RUN, for its finished model or else its latest checkpoint, RUN@STEP, the model directory itself, or the Hub
            id of one, of which the scores are kept nowhere.
        recipe: its `evaluate` section, its source and teacher.
        weights: of a checkpoint, `ema`, `model` (the raw weights, whose scores are no part of its record) or `auto`.
        force: measure again.
        listener: hears of the samples that are drawn.
    """
    raw, settings = weights == "model", recipe.evaluate
    named = model_of(str(run), raw=raw)
    folder = local_model(named, listener)
    provenance = Provenance.read(folder)
    inputs = Inputs(
        {"model": provenance.digest, "evaluate": given(settings), "weights": "model" if raw else "ema"},
        digest_of({"model": provenance.digest, "evaluate": settings.model_dump(mode="json")}),
    )
    place = folder.parent if folder.name == "model" else folder
    kept = place / ("evaluation-raw.json" if raw else "evaluation.json")
    is_here = Path(named).is_dir()
    if is_here and kept.is_file() and not force:
        found = read_json(kept)
        if inputs.made(found):
            listener.note(f"already done: {kept}")
            return found
    listener.note(f"reading {folder} and its teacher")
    student = read_model(open_student(folder, weights), torch.float32)
    teacher = read_model(open_teacher(recipe), torch.float32)
    sampler = SamplerSettings.of(recipe, settings, seed=0, batch_size=settings.batch_size)
    # The teacher draws the reference, too.
    for model, sets in ((student, len(settings.seeds)), (teacher, len(settings.seeds) + 1)):
        compile_for(sets * sampler.passes_of(settings.num_samples), [model], recipe.sampling.compile)
    models = {"student": student, "teacher against itself": teacher}
    with listener.task("evaluate", evaluation_passes(settings, len(models))) as task:
        reference = reference_samples(teacher, recipe, task)
        scores = {"digest": inputs.digest, **evaluate(models, reference, recipe, task)}
    if not is_here:
        listener.note(f"not kept: {named} is on the Hub")
        return scores
    write_whole(kept, json.dumps(scores, indent=2) + "\n")
    if not raw:
        measured = replace(provenance, metrics=_metrics(scores))
        # What is no part of a model's record stays: that the folder came from the Hub.
        record = {**read_json(folder / "litconvert.json"), **measured.record}
        write_whole(folder / "litconvert.json", json.dumps(record, indent=2) + "\n")
    return scores


def _metrics(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as a model's record has them."""
    protocol = {key: scores[key] for key in ("num_samples", "seeds", "scheduler", "steps")}
    mine, floor = scores["models"]["student"], scores["models"]["teacher against itself"]
    return {
        "frechet_distance": {**mine["frechet_distance"], **protocol},
        "class_accuracy": {**mine["class_accuracy"], **protocol},
        "teacher_frechet_distance": {**floor["frechet_distance"], **protocol},
        "teacher_class_accuracy": {**floor["class_accuracy"], **protocol},
    }
