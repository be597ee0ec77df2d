"""The model card: where a published model comes from, what was inherited and measured, its limits, how to load it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litconvert.common.hub import is_hub_id, split_revision
from litconvert.conversion.plan import FATES
from litconvert.conversion.provenance import Provenance
from litconvert.model.config import ModelConfig
from litconvert.publishing.publication import Publication

# Whose T5 the card names when the recipe's is nowhere that others can reach.
TEXT_ENCODER = {"path": "PixArt-alpha/PixArt-XL-2-1024-MS", "subfolder": "text_encoder", "tokenizer": "tokenizer"}


def _task(config: ModelConfig) -> str:
    """The Hub's name for what the model does."""
    return "text-to-image" if config.reads_captions else "unconditional-image-generation"


def model_card(
    provenance: Provenance,
    recipe: Mapping[str, Any],
    config: ModelConfig,
    asked: Publication,
    pictures: Sequence[str] = (),
) -> str:
    """README.md: where the model comes from, what was inherited, what was measured, its limits, and how to load it.

    Args:
        provenance: litconvert.json, without local paths; every part beyond `source` may be missing.
        recipe: recipe.yaml, without local paths.
        config: the model's.
        asked: where and how it is pushed, for the lines that load it.
        pictures: paths in the repository.
    """
    from huggingface_hub import ModelCardData

    name = asked.repo_id.split("/")[1]
    terms, base = provenance.license, provenance.source.get("path") or ""
    front_matter: dict[str, Any] = {
        "license": terms.get("id") or "unknown",
        "license_name": terms.get("name"),
        "license_link": terms.get("link"),
        "library_name": "diffusers",
        "pipeline_tag": _task(config),
        "tags": ["litconvert", *([] if _from_nothing(provenance) else ["lit", "linear-attention"]), "diffusion"]
        + ([] if config.reads_captions else ["class-conditional"]),
    }
    if is_hub_id(base):
        front_matter |= {"base_model": base.partition("@")[0], "base_model_relation": "finetune"}
    scores = _scores(provenance.metrics)
    if results := _eval_results(scores, _task(config)):
        front_matter |= {"model_name": name, "eval_results": results}
    sections = [
        f"# {name}",
        _introduction(provenance, config),
        _samples_section(pictures),
        _lineage(provenance),
        _counts(provenance.plan or {}),
        _solved(provenance.solve),
        _measured(scores),
        _loading(recipe, config, asked),
        _limits(provenance, config, recipe["source"], asked),
    ]
    text = "\n\n".join(section for section in sections if section)
    return _signed(f"---\n{ModelCardData(**front_matter).to_yaml()}\n---\n\n{text}\n")


def _signed(text: str) -> str:
    """A card with a last line that no reader sees, by which `is_own_card` knows it."""
    return f"{text}\n<!-- litconvert {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_own_card(card: str) -> bool:
    """Whether a README.md is a card of ours that nobody has edited since."""
    text, _, _ = card.replace("\r\n", "\n").rpartition("\n<!-- litconvert ")
    return bool(text) and _signed(text) == card.replace("\r\n", "\n")


def _scores(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by name, each with a finite "mean" and, where known, "standard_deviation", "seeds" and "num_samples"."""
    # A bare float is a score; a bare integer (samples, steps, a seed) says how scores were made.
    scores = {name: {"mean": value} if isinstance(value, float) else value for name, value in metrics.items()}
    return {
        name: score
        for name, score in scores.items()
        if isinstance(score, dict) and isinstance(score.get("mean"), int | float) and math.isfinite(score["mean"])
    }


def _eval_results(scores: Mapping[str, Mapping[str, Any]], task: str) -> list[Any]:
    """The model's own scores for the model-index; the teacher's are only on the card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type="teacher-samples",
            dataset_name="Samples of the teacher",
            metric_type=name,
            metric_name=_words(name),
            metric_value=score["mean"],
        )
        for name, score in scores.items()
        if not name.startswith("teacher_")
    ]


def _short(count: float) -> str:
    """A count with three digits and K, M, G or T."""
    for unit in ("", "K", "M", "G"):
        if count < 999.5:  # 1000 would be written 1e+03
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}T"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("frechet", "Fréchet").capitalize()


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], numbers_from: int = 1) -> str:
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def _introduction(provenance: Provenance, config: ModelConfig) -> str:
    kinds = config.attention
    linear = kinds.count("linear")
    what = "A text-to-image" if config.reads_captions else "A class-conditional"
    if _from_nothing(provenance):
        return f"{what} diffusion transformer with softmax attention, trained from nothing with litconvert."
    text = (
        f"{what} diffusion transformer with linear attention in {linear} of its {len(kinds)} layers "
        "([LiT](https://arxiv.org/abs/2501.12976)), made from "
        f"{_source_name(provenance.source.get('path'))} with litconvert."
    )
    if not provenance.trained and provenance.solve:
        text += (
            "\n\n> **This model was solved, and not trained.** Its linear attention was found layer by layer on states "
            "of its teacher, before any training; its output is "
            f"{provenance.solve['output']['after']:.1%} off the teacher's on held-out noise, by squared error. "
            "`litconvert distill` brings it nearer."
        )
    elif not provenance.trained and not _is_inherited(provenance):
        text += (
            "\n\n> **This model is untrained.** It was converted and not distilled: its new layers hold their initial "
            "values, and it draws noise, not pictures. It is a starting point for `litconvert distill`."
        )
    return text


def _from_nothing(provenance: Provenance) -> bool:
    """Whether `litconvert train` made it: it has no source."""
    return provenance.training is not None and not provenance.source.get("path")


def _is_inherited(provenance: Provenance) -> bool:
    """Whether all of its weights are its source's, whose attention was linear already."""
    groups = (provenance.plan or {}).get("groups", {})
    return bool(groups) and not groups.get("fresh", {}).get("student_tensors", 0)


def _source_name(path: str | None) -> str:
    if not path:
        return "an unnamed checkpoint"
    if is_hub_id(path):
        return f"[{path}](https://huggingface.co/{path.partition('@')[0]})"
    return f"`{path.removeprefix('asset:')}`"


def _samples_section(pictures: Sequence[str]) -> str:
    shown = [f"{Path(picture).stem.replace('-', ' ')}:\n\n![{Path(picture).stem}]({picture})" for picture in pictures]
    return "\n\n".join(["## Pictures", *shown]) if shown else ""


def _steps(distillation: Mapping[str, Any], weights: str | None) -> str | None:
    """`8 steps`; of a checkpoint in the middle of a run what it is, too."""
    steps, planned = distillation.get("steps"), distillation.get("planned_steps")
    if not steps:
        return None
    kind = ", raw weights" if weights == "model" else ""
    if planned in (None, steps):
        return f"{steps:,} steps{kind}"
    return f"{steps:,} of {planned:,} steps: a checkpoint in the middle of a run{kind or ', its moving average'}"


def _start(start: Mapping[str, Any] | None) -> str | None:
    """The run whose weights this one started from, and those before it."""
    if not start:
        return None
    name = f"`{str(start['path']).rpartition('@')[0] or start['path']}`"
    text = f"run {name} at step {start['step']:,} (SHA-256 {start['sha256'][:12]})"
    before = _start(start.get("lineage", {}).get("start"))
    return f"{text}, which started from {before}" if before else text


def _lineage(provenance: Provenance) -> str:
    source, distillation = provenance.source, provenance.distillation or {}
    teacher = distillation.get("teacher") or {}
    terms, teacher_terms = provenance.license, teacher.get("license") or {}
    facts = {
        "Source": None if _from_nothing(provenance) else _source_name(source.get("path")),
        "Revision": source.get("revision"),
        "Family and layout": " / ".join(filter(None, (source.get("family"), source.get("layout")))),
        "Weights set": source.get("weights"),
        "SHA-256 of the source": source.get("sha256"),
        "Licence" if _from_nothing(provenance) else "Licence, inherited from the source": (
            terms.get("name") or terms.get("id")
        ),
        "Teacher": _source_name(teacher.get("path") or source.get("path")) if distillation else None,
        "SHA-256 of the teacher": teacher.get("sha256"),
        "Licence of the teacher": teacher_terms.get("name") or teacher_terms.get("id"),
        "Distilled for": _steps(distillation, provenance.set),
        "Trained for": _steps(provenance.training or {}, provenance.set),
        "Started from": _start(distillation.get("start")),
        "Seed": provenance.seed,
        "Made with": ", ".join(f"{package} {number}" for package, number in provenance.versions.items()),
    }
    rows = [(fact, value) for fact, value in facts.items() if value not in (None, "")]
    parts = ["## Lineage", _table(("", ""), rows, numbers_from=2)]
    columns = ("objective", "steps", "batch_size", "learning_rate", "schedule", "ema_decay")
    if stages := distillation.get("stages"):
        header = ("stage", *(column.replace("_", " ") for column in columns))
        numbered = [(index, *(stage.get(column, "") for column in columns)) for index, stage in enumerate(stages, 1)]
        parts += ["Stages of the distillation:", _table(header, numbered)]
    return "\n\n".join([*parts, "The full recipe is in `recipe.yaml`, the full record in `litconvert.json`."])


def _counts(plan: Mapping[str, Any]) -> str:
    parts = []
    if groups := plan.get("groups"):
        columns = ("source_tensors", "student_tensors", "parameters")
        rows = [(fate, *(f"{groups[fate][column]:,}" for column in columns)) for fate in FATES if fate in groups]
        parts += [_table(("fate", "tensors of the source", "tensors of this model", "parameters"), rows)]
    if totals := plan.get("totals"):
        rows = [
            (label, f"{totals[key]:,}", f"{totals[f'{key}_with_pos_embed']:,}")
            for label, key in (("source", "source_parameters"), ("this model", "student_parameters"))
        ]
        parts += [_table(("parameters", "without the fixed position embedding", "with it"), rows)]
    if macs := plan.get("macs"):
        rows = [
            (
                f"{row['image_size']:,} x {row['image_size']:,}",
                f"{row['tokens']:,}",
                _short(row["source_macs"]),
                _short(row["student_macs"]),
                f"{row['ratio']:.2f}",
            )
            for row in macs
        ]
        header = ("pixels", "tokens", "source", "this model", "ratio")
        parts += [
            "Multiply-accumulates of one forward pass:",
            _table(header, rows),
            "These are counts, not times. Linear attention is not faster than softmax below about 1K pixels of a "
            "latent model (4,096 tokens): there the rest of the network dominates, and softmax kernels are good.",
        ]
    return "\n\n".join(["## What was inherited", *parts]) if parts else ""


def _solved(solve: Mapping[str, Any] | None) -> str:
    """How the attention was solved, and how near that came."""
    if not solve:
        return ""
    output = solve["output"]
    steps = f", with {solve['local_steps']:,} gradient steps on each layer alone" if solve["local_steps"] else ""
    rows = [(one["layer"], f"{one['before']:.2e}", f"{one['after']:.2e}") for one in solve["layers"]]
    text = (
        f"The linear attention of {len(solve['solved_layers'])} layers was found before any training, layer by layer, "
        f"such that each layer repairs what those before it left: by least squares on {solve['states']:,} noisy images"
        f"{steps}. On images held out the output was {output['before']:.1%} off the teacher's before and "
        f"{output['after']:.1%} after it, as ||student - teacher||^2 / ||teacher||^2; the residual stream after each "
        "layer likewise:"
    )
    return "\n\n".join(["## How it was solved", text, _table(("layer", "unsolved", "solved"), rows, numbers_from=1)])


def _measured(scores: Mapping[str, Mapping[str, Any]]) -> str:
    if not scores:
        return "## Metrics\n\nNone were measured."
    rows = []
    for name, score in scores.items():
        deviation, seeds, samples = score.get("standard_deviation"), score.get("seeds"), score.get("num_samples")
        rows.append(
            (
                _words(name),
                f"{score['mean']:.4g}",
                f"{deviation:.2g}" if deviation is not None else "",
                f"{samples:,}" if samples is not None else "",
                ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds if seeds is not None else "",
            )
        )
    header = ("metric", "mean over seeds", "standard deviation", "samples a seed", "seeds")
    note = "Measured against the teacher's own samples, not against photographs, so they are no FID of the literature."
    return "\n\n".join(["## Metrics", _table(header, rows), note])


def _loading(recipe: Mapping[str, Any], config: ModelConfig, asked: Publication) -> str:
    sample, captions = recipe["sample"], config.reads_captions
    repo_id, pipeline = asked.repo_id, asked.pipeline
    settings = f"num_inference_steps={sample['steps']}, guidance_scale={sample['guidance']}"
    if sample["guidance_channels"] is not None and not captions:
        settings += f", guidance_channels={sample['guidance_channels']}"
    # Of a pipeline of captions that comes without its T5.
    given = (
        "text_encoder=text_encoder, tokenizer=tokenizer, " if pipeline and captions and not asked.text_encoder else ""
    )

    def call(loader: str, pin: str = "", more: str = "") -> str:
        return f'{loader}.from_pretrained("{repo_id}", {more}{pin}trust_remote_code=True)'

    loader, pin = "DiffusionPipeline" if pipeline else "AutoModel", 'revision="<commit sha>", '
    name = "pipeline" if pipeline else "model"
    lines = [f"from diffusers import {loader}", "", f"{name} = {call(loader, more=given)}"]
    parts = ["## How to load it", "In diffusers, without litconvert:"]
    if given:
        parts += ["The text encoder is not in this repository; it is PixArt's T5, 19 GB, and is loaded from its own."]
        lines[1:2] = ["from transformers import T5EncoderModel, T5Tokenizer", "", *_t5_lines(recipe["source"])]
    if pipeline:
        subject = json.dumps(sample["prompts"][0], ensure_ascii=False) if captions else "class_labels=[0]"
        lines += [f"image = pipeline({subject}, {settings}).images[0]"]
        model_call = call("AutoModel", more='subfolder="transformer", ')
        model_lines = ["from diffusers import AutoModel", "", f"model = {model_call}"]
        parts += [_python(*lines), "The transformer alone:", _python(*model_lines)]
    else:
        parts += [_python(*lines)]
    return "\n\n".join(
        [
            *parts,
            "`trust_remote_code=True` runs the Python files of this repository. Read them, and pin the commit that you "
            "have read:",
            _python(f"{name} = {call(loader, pin, given)}"),
            "The sha is under *Files and versions*, *History*, and "
            f'`huggingface_hub.model_info("{repo_id}").sha` is the newest one.',
            "Where remote code is not wanted, with `pip install litconvert`:",
            _python("import litconvert", "", f'model = litconvert.load("{repo_id}")'),
        ]
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _t5_lines(source: Mapping[str, Any]) -> list[str]:
    """Python that loads the text encoder and its tokenizer."""
    named = source.get("text_encoder")
    where = named if named and is_hub_id(named["path"]) else TEXT_ENCODER

    path, revision = split_revision(where["path"])

    def load(loader: str, subfolder: str | None) -> str:
        inside = f', subfolder="{subfolder}"' if subfolder else ""
        inside += f', revision="{revision}"' if revision else ""
        return f'{loader}.from_pretrained("{path}"{inside})'

    return [
        f"text_encoder = {load('T5EncoderModel', where['subfolder'])}",
        f"tokenizer = {load('T5Tokenizer', where['tokenizer'])}",
    ]


def _limits(provenance: Provenance, config: ModelConfig, source: Mapping[str, Any], asked: Publication) -> str:
    side = config.sample_size * (1 if config.is_pixel_space else 8)
    if config.reads_captions:
        reads = f"captions of up to {config.caption_tokens} tokens: longer ones are cut off;"
    else:
        reads = f"{config.num_classes:,} classes;"
    points = [
        f"Made for {side} x {side} pixels and {reads} other sizes run, and are not tested.",
        "It has the biases and the failures of its training set."
        if _from_nothing(provenance)
        else "It imitates its teacher: it inherits the biases and the failures of the source, and adds its own.",
        "Nothing filters what it draws.",
    ]
    terms = provenance.license
    if (terms.get("id") or "unknown") == "unknown":
        points += ["The licence of the source was not recorded: find it out before you use the weights."]
    if asked.pipeline and source["vae"] is not None:
        points += [f"The decoder in `vae/` is {_source_name(source['vae']['path'])}, under its own licence."]
    if asked.text_encoder:
        name = _source_name(source["text_encoder"]["path"])
        points += [f"The text encoder in `text_encoder/` is {name}, under its own licence."]
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])
