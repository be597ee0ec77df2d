"""Pictures in GenEval's folders (Ghosh et al., arXiv 2310.11513), whose own tool then finds the objects in them."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.files import held, read_json, write_whole
from litconvert.common.launch import launched_processes
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import LOCK, contents, whole_directory, work_path
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.drawing import EvaluationRequest, recipe_for, samples_of
from litconvert.families.sources import OpenSource, read_model
from litconvert.model.compilation import compile_for
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions
from litconvert.sampling.draw import draw
from litconvert.sampling.pictures import to_images, vae_inputs
from litconvert.sampling.request import open_models

PER_PROMPT = 4
RECORD = "drawn.json"


@dataclass(frozen=True)
class Prompt:
    """An entry of evaluation_metadata.jsonl: its line as it is, and the prompt in it."""

    line: str
    text: str


def read_metadata(path: Path) -> list[Prompt]:
    """GenEval's prompts. Raises UsageError for a file that is none of them."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a text file ({error}); give GenEval's evaluation_metadata.jsonl") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompts.append(Prompt(line.strip(), str(entry["prompt"])))
            known = "tag" in entry and "include" in entry
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UsageError(
                f"{path}:{number}: not an entry of GenEval's evaluation_metadata.jsonl (tag, include, prompt)"
            )
    if not prompts:
        raise UsageError(f"{path}: holds no prompt; give GenEval's evaluation_metadata.jsonl")
    return prompts


def geneval_commands(out: Path) -> list[str]:
    """What measures the folder, to be run in GenEval's own repository."""
    results = shlex.quote(str(out / "results.jsonl"))
    return [
        f"python evaluation/evaluate_images.py {shlex.quote(str(out))} --outfile {results} --model-path DETECTOR",
        f"python evaluation/summary_scores.py {results}",
    ]


def draw_geneval(asked: EvaluationRequest, metadata: Path, out: Path, listener: Listener = SILENT) -> int:
    """Draw four pictures of each prompt into OUT/00000/samples and so on; what is there is not drawn again.

    Args:
        asked: the model, and the recipe whose `evaluate` section says how it is drawn, from the first of its seeds.
        metadata: GenEval's evaluation_metadata.jsonl.
        out: the folder; it holds the settings, too.

    Returns: how many prompts there are.

    Raises UsageError for a model of classes and where several processes were launched, LitconvertError for a folder
    that holds other pictures.
    """
    if launched_processes() > 1:
        raise UsageError("--geneval draws in one process, and several were launched: start it without a launcher")
    prompts = read_metadata(metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out, listener, work_path(out, LOCK)):
        return _draw(asked, prompts, out, listener)


def _draw(asked: EvaluationRequest, prompts: Sequence[Prompt], out: Path, listener: Listener) -> int:
    """The same, once no other command is at work there."""
    recipe = recipe_for(asked)
    (source,) = sources = open_models(
        asked.model, None, recipe, asked.overrides, asked.num_attention_heads, asked.weights
    )
    if not source.config.reads_captions:
        raise UsageError(f"GenEval's prompts are captions, and {asked.model} draws classes")
    settings = recipe.evaluate
    _begin(out, _inputs(recipe, source, prompts))
    missing = [index for index in range(len(prompts)) if not _folder(out, index).is_dir()]
    if not missing:
        listener.note(f"already done: {out}")
        return len(prompts)
    with TemporaryDirectory() as folder:
        samples = samples_of(asked, recipe, sources, Path(folder), [one.text for one in prompts])
        listener.note(f"reading {source.checkpoint.source}")
        model = read_model(source, torch.float32).to(default_device())
        passes = samples.sampler(settings.seeds[0]).passes_of(PER_PROMPT * len(missing))
        compile_for(passes, [model], recipe.sampling.compile)
        together = max(1, settings.batch_size // PER_PROMPT)
        with listener.task("draw for GenEval", len(missing)) as task:
            for start in range(0, len(prompts), together):
                some = range(start, min(start + together, len(prompts)))
                if not any(index in missing for index in some):
                    continue
                captions = samples.conditions(some)
                assert isinstance(captions, Captions)
                repeated = captions[torch.arange(len(some)).repeat_interleave(PER_PROMPT)]
                (latents,) = draw(
                    model, repeated, samples.sampler(settings.seeds[0], len(repeated)), first=start * PER_PROMPT
                )
                images = to_images(latents, samples.vae)
                for place, index in enumerate(some):
                    if index in missing:
                        _write(_folder(out, index), prompts[index], images[PER_PROMPT * place :][:PER_PROMPT])
                        task.advance()
    return len(prompts)


def _inputs(recipe: Recipe, source: OpenSource, prompts: Sequence[Prompt]) -> Inputs:
    """What determines the pictures. The size of a batch changes rounding alone."""
    checkpoint = source.checkpoint
    return Inputs(
        {
            "file": {"sha256": checkpoint.sha256(), "weights": checkpoint.weights, "config": source.config.given},
            "evaluate": given(recipe.evaluate, exclude={"batch_size", "num_samples"}),
            "diffusion": given(recipe.diffusion, include={"num_timesteps"}),
            # As it is on this device.
            "sampling": {"mixed_precision": "bf16" if uses_bf16(recipe.sampling.mixed_precision) else "no"},
            "source": {**given(recipe.source), **({"vae": vae_inputs(vae)} if (vae := recipe.source.vae) else {})},
            "prompts": [one.line for one in prompts],
        }
    )


def _folder(out: Path, index: int) -> Path:
    return out / f"{index:05d}"


def _begin(out: Path, inputs: Inputs) -> None:
    """The folder with its record. Raises LitconvertError for one of other pictures, or of something else."""
    record = out / RECORD
    if record.is_file():
        found = read_json(record)
        if not inputs.made(found):
            raise LitconvertError(f"{out} was made from other inputs ({inputs.changes(found)}); choose another folder")
    elif out.exists() and contents(out):
        raise LitconvertError(f"{out} exists and holds something else; choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(inputs.record, indent=2) + "\n")


def _write(folder: Path, prompt: Prompt, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> None:
    """A prompt's pictures, whole or not at all."""
    with whole_directory(folder) as partial:
        (partial / "samples").mkdir()
        (partial / "metadata.jsonl").write_text(prompt.line + "\n", encoding="utf-8")
        for number, image in enumerate(images):
            Image.fromarray(image).save(partial / "samples" / f"{number:04d}.png")
