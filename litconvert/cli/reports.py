"""What commands print for people: a source, a plan, estimates, scores, results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litconvert.cli.terminal import line, table
from litconvert.common.quantities import count, size, span
from litconvert.runs.directory import RunDirectory

if TYPE_CHECKING:
    from litconvert.conversion.plan import ConversionPlan
    from litconvert.estimates.stage import StageEstimate
    from litconvert.evaluation.probe_result import ProbeResult
    from litconvert.families.companions import Companions
    from litconvert.families.sources import Findings, OpenSource
    from litconvert.publishing.repository import Changes
    from litconvert.workflow import LineResult


def show_source(source: "OpenSource", beside: "Companions", findings: "Findings | None" = None) -> None:
    """What a checkpoint is, what lies beside it and, with `findings`, what its values showed."""
    from litconvert.families.sources import describe

    facts = describe(source)
    config = facts["config"]
    weights = f"{facts['weights']} (of {', '.join(facts['sets'])})" if facts["weights"] else "the only set"
    side = config["sample_size"]
    rows = [
        ("recognised as", f"{facts['title']}, {facts['layout']} layout, because {facts['because']}"),
        ("weights", weights),
        ("tensors", f"{facts['tensors']}, {size(facts['bytes'])}, {facts['dtype']}"),
        ("parameters", count(facts["parameters"])),
        (
            "size",
            f"{config['num_layers']} layers, width {config['hidden_size']}, {config['num_attention_heads']} heads",
        ),
        ("attention", _attention(config)),
        (
            "latent",
            f"{config['in_channels']} x {side} x {side}, patch {config['patch_size']}, "
            f"{config['out_channels']} output channels",
        ),
        ("condition", _condition(config)),
        ("predicts", _prediction(config)),
        *(("assumed", text) for text in facts["unsure"]),
        *(("set aside", text) for text in facts["set_aside"]),
        *beside.facts,
        *((("to download", size(facts["download_bytes"])),) if facts["download_bytes"] else ()),
    ]
    if findings is not None:
        rows += [("values", text) for text in findings.facts]
        rows += [("looks wrong", text) for text in (*findings.odd, *findings.broken)]
    table(("", ""), rows, title=facts["path"])


def _condition(config: Mapping[str, Any]) -> str:
    if config["caption_channels"] is None:
        return f"{config['num_classes']} classes{' and a null class' if config['null_class'] else ''}"
    text = f"captions of up to {config['caption_tokens']} tokens, {config['caption_channels']} channels"
    text += ", null caption stored" if config["null_caption"] else ", no null caption stored"
    text += ", micro-conditions" if config["micro_conditions"] else ""
    return f"{text}, positions interpolated by {config['interpolation_scale']:g}"


def _attention(config: Mapping[str, Any]) -> str:
    kinds = config["attention"]
    text = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    if "linear" in kinds:
        conv_size = config["linear_conv_size"]
        text += f" ({config['linear_num_heads']} heads, {config['linear_kernel']}, eps {config['linear_eps']:g}, "
        text += f"convolution {conv_size} x {conv_size})" if conv_size else "no convolution)"
    return text


def _prediction(config: Mapping[str, Any]) -> str:
    if config["prediction"] == "velocity":
        return f"velocity, data at t = {config['data_timestep']}"
    return "noise and variance" if config["out_channels"] == 2 * config["in_channels"] else "noise"


def show_plan(plan: "ConversionPlan", *, tensors: bool = False, costs: bool = True) -> None:
    """The plan: what solving costs, what becomes of the tensors, parameters, multiply-accumulates.

    `tensors`: every tensor, too.
    """
    from litconvert.families.sources import describe

    facts = describe(plan.source)
    line(f"{facts['path']}: {facts['title']}, {facts['layout']} layout, because {facts['because']}")
    for text in facts["unsure"]:
        line(f"assumed: {text}")
    if facts["weights"] is not None:
        line(f"weights: {facts['weights']}")
    for text in facts["set_aside"]:
        line(f"set aside: {text}")
    line(f"recipe: {plan.recipe_name or 'none, the defaults'} (--recipe chooses another)")
    for word, text in plan.beside.used(plan.recipe):
        if word != "recipe":
            line(f"{word}: {text}")
    if facts["download_bytes"]:
        line(f"to be downloaded first: {size(facts['download_bytes'])}")
    if plan.solve is not None and costs:
        line(plan.solve.cost)
    if plan.unsolved_because is not None:
        line(f"not solved: {plan.unsolved_because}")
    line("")
    groups, totals = plan.groups, plan.totals
    rows: list[tuple[Any, ...]] = [
        (fate, g["source_tensors"] or "-", g["student_tensors"] or "-", count(g["parameters"]), size(g["bytes"]))
        for fate, g in groups.items()
    ]
    sides = ("total", totals["source_tensors"], totals["student_tensors"], "", "")
    table(("", "source", "student", "numbers", "bytes"), [*rows, sides], numbers=(1, 2, 3, 4), title="Tensors")
    line("")
    rows = [
        ("source", count(totals["source_parameters"]), count(totals["source_parameters_with_pos_embed"])),
        ("student", count(totals["student_parameters"]), count(totals["student_parameters_with_pos_embed"])),
    ]
    table(("", "parameters", "with the fixed pos_embed"), rows, numbers=(1, 2))
    line("")
    macs = [
        (row["image_size"], row["tokens"], f"{row['source_macs'] / 1e9:,.2f}", f"{row['student_macs'] / 1e9:,.2f}",
         f"{row['ratio']:.2f}")
        for row in plan.macs
    ]  # fmt: skip
    table(("image", "tokens", "GMACs before", "after", "ratio"), macs, numbers=(0, 1, 2, 3, 4))
    line("A ratio is arithmetic, not speed: linear attention saves nothing where images are small.")
    if tensors:
        line("")
        rows = [
            (entry.fate, entry.target or "-", _place(entry.source, entry.rows, len(entry.copies)), entry.shape)
            for entry in plan.entries
        ]
        table(("fate", "student", "source", "shape"), rows)


def show_solved(plan: "ConversionPlan", solved: Mapping[str, Any] | None) -> None:
    """How near the solved student is to its teacher: one number for the whole, then layer by layer."""
    if plan.unsolved_because is not None or (plan.recipe.solve is None and plan.groups["fresh"]["student_tensors"]):
        because = plan.unsolved_because or "--no-solve, or a recipe with solve: null"
        line(f"Not solved: {because}. The new attention is random: distil the student before you sample it.")
        line("")
    if solved is None:
        return
    output = solved["output"]
    line(
        f"The student's output is {output['after']:.2%} off the teacher's on held-out noise "
        f"({output['before']:.0%} before it was solved), by squared error. Solved in {span(solved['seconds'])}"
        + (f", the last time; {solved['resumed_at']} layers were solved before." if "resumed_at" in solved else ".")
    )
    line("")
    rows = [(one["layer"], f"{one['before']:.2e}", f"{one['after']:.2e}") for one in solved["layers"]]
    table(("layer", "unsolved", "solved"), rows, numbers=(0, 1, 2), title="Residual stream after a layer")
    line("")
    tenths = [
        (f"{10 * index} to {10 * index + 10} %", _error(before), _error(after))
        for index, (before, after) in enumerate(
            zip(output["before_by_tenth"], output["after_by_tenth"], strict=True)
        )
    ]  # fmt: skip
    table(("of the way to noise", "unsolved", "solved"), tenths, numbers=(1, 2), title="Output by timestep")
    line("||student - teacher||^2 / ||teacher||^2 on states that nothing was solved for")
    line("")


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _place(name: str | None, rows: tuple[int, int] | None, copies: int) -> str:
    if name is None:
        return "-"
    return name + (f"[{rows[0]}:{rows[1]}]" if rows else "") + (f" ({copies} copies)" if copies > 1 else "")


def show_changes(changes: "Changes") -> None:
    """What a push would make of its repository, file by file."""
    rows = [(row.change, row.path, count(row.nbytes), row.why) for row in changes.rows]
    table(("", "file", "bytes", ""), rows, numbers=(2,))


def show_data(facts: Mapping[str, Any]) -> None:
    """What `describe_data` says of a data set."""
    from litconvert.data.report import classes_remark

    shapes = ", ".join(f"{'x'.join(map(str, one['shape']))} ({one['samples']:,})" for one in facts["buckets"])
    kinds = {
        "pixels": "pixels",
        "latents": "latents",
        "moments": "VAE posteriors, drawn from at each visit",
    }
    mirrored = " (and of the mirrored images)" if facts["flipped"] else ""
    rows = [
        ("samples", f"{facts['samples']:,}" + (f", {facts['skipped']:,} left out" if facts["skipped"] else "")),
        ("shapes", shapes),
        ("kind", kinds[facts["kind"]] + mirrored),
    ]
    if "precision" in facts:
        rows.append(("drawn in", facts["precision"]))
    if "scaling_factor" in facts:
        rows.append(("scaling factor", f"{facts['scaling_factor']:g}"))
    if "classes" in facts:
        counts = sorted(facts["classes"].values())
        rows.append(("classes", f"{len(counts)}, labels {min(facts['classes'])} to {max(facts['classes'])}"))
        rows.append(("samples a class", f"{counts[0]:,} to {counts[-1]:,}, median {counts[len(counts) // 2]:,}"))
    if names := facts.get("class_names"):
        order = f", ordered by {facts['class_order']}" if "class_order" in facts else ""
        more = f", ... ({len(names):,} in all)" if names[5:] else ""
        rows.append(("class names", ", ".join(names[:5]) + more + order))
    if remark := classes_remark(facts):
        rows.append(("note", remark))
    for key, unit in (("caption_tokens", "tokens"), ("caption_characters", "characters, encoded on the fly")):
        if key in facts:
            spread = facts[key]
            rows.append(("captions", f"{spread['min']} to {spread['max']}, median {spread['median']:g} {unit}"))
    if "caption_channels" in facts:
        rows.append(("text features", f"{facts['caption_channels']} channels, float16"))
        rows.append(("null caption", "stored" if facts["null_caption"] else "none"))
    rows += [("size", size(facts["bytes"])), ("digest", facts["digest"][:12])]
    table(("", ""), rows)


def show_probe(result: "ProbeResult") -> None:
    """Layers by error, and the suggestion."""
    timed, chosen = result.linear_milliseconds is not None, result.softmax_layers is not None
    headers = ["layer", "error", "spread", "+ MMACs", "x MACs", *(("+ ms", "ms") if timed else ())]
    rows = []
    for row in result.rows:
        cells = [
            row.layer,
            f"{row.error:.2e}",
            f"{row.deviation:.1e}",
            f"{row.macs / 1e6:,.2f}",
            f"{row.macs_ratio:.3f}",
        ]
        cells += [f"{row.milliseconds:.3f}", f"{row.total_milliseconds:.2f}"] if timed else []
        rows.append([*cells, row.keeps if row.suggested else "linear"] if chosen else cells)
    line(f"{result.num_samples} samples; costs of one image of {result.image_size} pixels, {result.tokens} tokens")
    table([*headers, "suggested"] if chosen else headers, rows, numbers=range(1, len(headers)))
    line("error: ||output - teacher's||^2 / ||teacher's||^2, this layer alone linear; spread over samples")
    line("+: more when the layer is kept; x MACs and ms: with those above it kept too, ms of self-attention")
    if result.kept:
        line(f"kept already, and not probed: {', '.join(map(str, result.kept))}")
    if result.softmax_layers is not None:
        line(f"--set 'student.softmax_layers=[{', '.join(map(str, result.softmax_layers))}]'")


def show_scores(results: Mapping[str, Any]) -> None:
    """Metrics of each model: the student's in a sentence, then mean and spread over seeds."""
    models = results["models"]
    (student, mine), *others = models.items()
    floor = f" ({others[0][0]}: {_spread(others[0][1]['frechet_distance'], '{:.2f}')})" if others else ""
    line(
        f"Fréchet distance of the {student} to its teacher: {_spread(mine['frechet_distance'], '{:.2f}')}{floor}; "
        f"{mine['class_accuracy']['mean']:.1%} are read as the class asked for."
    )
    line("")
    rows = []
    for name, scores in results["models"].items():
        distance, accuracy = scores["frechet_distance"], scores["class_accuracy"]
        rows.append((name, _spread(distance, "{:.2f}"), _spread(accuracy, "{:.1%}")))
    title = f"{results['num_samples']} samples a seed, {len(results['seeds'])} seeds, "
    title += f"{results['scheduler']} in {results['steps']} steps"
    table(("", "Fréchet distance to the teacher", "read as the class asked for"), rows, numbers=(1, 2), title=title)


# A metric's column, and how it is written.
METRICS = {
    "frechet_distance": ("Fréchet distance", "{:.3f}"),
    "spatial_frechet_distance": ("sFID", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.3g}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "inception_score": ("Inception score", "{:.2f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
}


def show_evaluation(report: Mapping[str, Any]) -> None:
    """What a model was measured to be: the result in a sentence, distances, then agreement by timestep and layer."""
    models, agreement = report["models"], report["agreement"]
    if models:
        reference, settings = report["reference"], report["settings"]
        *others, (name, mine) = models.items()
        floor = f" (its teacher's: {_spread(others[0][1]['frechet_distance'], '{:.3f}')})" if others else ""
        line(
            f"Fréchet distance of the {name} to {reference['name']}: "
            f"{_spread(mine['frechet_distance'], '{:.3f}')}{floor}, in the features of {report['features']['name']}."
        )
    if agreement:
        _tell_agreement(agreement)
    line("")
    if models:
        keys = [key for key in METRICS if key in next(iter(models.values()))]
        rows = [(name, *(_spread(scores[key], METRICS[key][1]) for key in keys)) for name, scores in models.items()]
        title = f"{settings['num_samples']:,} samples"
        if "steps" in settings:
            title += f" a seed, {len(settings['seeds'])} seeds, {settings['scheduler']} in {settings['steps']} steps"
        if reference["count"] is not None:
            title += f", against {reference['count']:,}"
        table(("", *(METRICS[key][0] for key in keys)), rows, numbers=range(1, len(keys) + 1), title=title)
    if agreement:
        _show_agreement(agreement)


def _tell_agreement(agreement: Mapping[str, Any]) -> None:
    """How near the student is to its teacher, in one or two sentences."""
    (what, mine), *_ = agreement["student"]["quantities"].items()
    precision = agreement["precision"]
    nothing, dtype = precision["quantities"][what], precision["dtype"]
    line(
        f"The student's {what} differs from its teacher's by {_percent(mine['error'])} of its square "
        f"({_interval(mine)}); the teacher's own in {dtype} by {_percent(nothing['error'])}, which counts as nothing."
    )
    if what == "noise":
        # High timesteps are noise. A value that is far off there can become a speck in a sample; the mean hides it.
        noisier = (one["by_timestep"][len(one["by_timestep"]) // 2 :] for one in (mine, nothing))
        student, teacher = (max(part["largest"] for part in parts) for parts in noisier)
        line(
            f"In the noisier half of the timesteps no single value of it is off by more than {student:.2g} of the root "
            f"mean square of the teacher's ({dtype}: {teacher:.2g})."
        )


def _show_agreement(agreement: Mapping[str, Any]) -> None:
    """Errors by tenth of the timesteps and by layer, the precision's beside the student's."""
    student, precision = agreement["student"], agreement["precision"]
    names, dtype = list(student["quantities"]), precision["dtype"]
    predicted = precision["quantities"][names[0]]["by_timestep"]
    rows = []
    for tenth, nothing in enumerate(predicted):
        parts = [student["quantities"][name]["by_timestep"][tenth] for name in names]
        spans = [f"{_percent(part['error'])} ({_interval(part)})" for part in parts]
        rows.append((f"{nothing['low']:g} to {nothing['high']:g}", *spans, _percent(nothing["error"])))
    title = (
        f"\n||student - teacher||^2 / ||teacher||^2 on {agreement['inputs']:,} inputs of {agreement['images']} images"
    )
    headers = (
        "timestep",
        *(LABELS.get(name, name) for name in names),
        f"{LABELS.get(names[0], names[0])}, {dtype} alone",
    )
    table(headers, rows, numbers=range(1, len(headers)), title=title)
    layers = zip(student["layers"], precision["layers"], strict=False)
    lines = [
        (mine["layer"], f"{_percent(mine['error'])} ({_interval(mine)})", _percent(nothing["error"]))
        for mine, nothing in layers
    ]
    if lines:
        table(("layer", "what it gives on", f"{dtype} alone"), lines, numbers=(0, 1, 2), title="")


LABELS = {"clean": "x0"}


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"


def _interval(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return f"{100 * low:.3g} to {100 * high:.3g}"


def _spread(score: Mapping[str, Any], form: str) -> str:
    spread = score["standard_deviation"]
    return form.format(score["mean"]) + (f" ± {form.format(spread)}" if spread is not None else "")


def result_facts(result: "LineResult") -> dict[str, Any]:
    """What a whole line came to, as plain data."""
    return {
        "student": str(result.run.parent / "student"),
        **run_facts(result.run),
        "scores": result.scores,
        "pictures": [str(path) for path in _pictures(result.run).values()],
        "url": result.url,
        "plan": {"groups": result.plan.groups, "totals": result.plan.totals, "macs": result.plan.macs},
    }


def _pictures(run: Path) -> dict[str, Path]:
    """Those of a run that are there: latents without a decoder have no samples."""
    named = {"samples on the same noise": run / "comparison.png", "loss curves": run / "curves.png"}
    return {name: path for name, path in named.items() if path.is_file()}


def show_result(result: "LineResult") -> None:
    """One screen: how near it came, what became of the tensors, what was measured, and where everything is."""
    facts = run_facts(result.run)
    show_run(facts)
    line("")
    groups, totals = result.plan.groups, result.plan.totals
    counts = ", ".join(f"{g['student_tensors'] or g['source_tensors']} {fate}" for fate, g in groups.items())
    line(f"Tensors: {counts}")
    line(f"Parameters: {count(totals['source_parameters'])} before, {count(totals['student_parameters'])} after")
    ratios = ", ".join(f"{row['ratio']:.2f} at {row['image_size']}px" for row in result.plan.macs)
    line(f"Multiply-accumulates, before over after: {ratios}")
    if result.scores is not None:
        line("")
        show_scores(result.scores)
    line("")
    rows: list[tuple[str, Any]] = [
        *_pictures(result.run).items(),
        ("every step", result.run / "metrics.csv"),
    ]
    if result.url is not None:
        rows.append(("published", result.url))
    for name, path in rows:
        line(f"{name}: {path}")


def run_facts(run: Path) -> dict[str, Any]:
    """What a finished run came to, as plain data."""
    directory = RunDirectory(run)
    facts: dict[str, Any] = {"run": str(run), "model": str(directory.model), "steps": directory.finished_steps()}
    if (errors := directory.error_summary()) is not None:
        facts["error"] = {"before": errors[0], "after": errors[1]}
    return facts


def show_run(facts: Mapping[str, Any]) -> None:
    """How near a run brought its student to the teacher, and where it is."""
    steps = f"{count(facts['steps'])} steps"
    if errors := facts.get("error"):
        line(
            f"The student's output is {errors['after']:.2%} off its teacher's, {errors['before']:.2%} before these "
            f"{steps} (squared error on noisy training images, mean over the timesteps)."
        )
    else:
        line(f"Trained for {steps}.")
    line(f"model: {facts['model']}")


def show_estimates(estimates: Sequence["StageEstimate"]) -> None:
    """Memory and time of stages, side by side."""
    first = estimates[0]
    kinds = {kind: None for estimate in estimates for kind in estimate.memory}  # in order, each once
    rows: list[tuple[Any, ...]] = [
        ("parameters trained", *(count(estimate.parameters) for estimate in estimates)),
        ("samples at a time", *(estimate.micro_batch for estimate in estimates)),
        *((kind, *(size(estimate.memory.get(kind, 0)) for estimate in estimates)) for kind in kinds),
        ("memory at the peak", *(size(estimate.peak) for estimate in estimates)),
        ("time of a step", *(span(estimate.step_seconds) for estimate in estimates)),
        ("time of the stage", *(span(estimate.seconds) for estimate in estimates)),
    ]
    headers = ("", *(f"{estimate.stage}: {estimate.objective}" for estimate in estimates))
    precision = "bf16 autocast" if first.bf16 else "float32"
    split = f", one of {first.processes} processes" if first.processes > 1 else ""
    title = f"On this device: {first.device}, {precision}{split}"
    table(headers, rows, numbers=tuple(range(1, len(headers))), title=title)
    line(f"Memory free here: {size(first.available)}.")
    for estimate in estimates:
        if estimate.advice is not None:
            line(f"Stage {estimate.stage} does not fit: {estimate.advice}.")
    line("Activations are counted, blocks timed now. Left out: reading data, checkpoints, pictures, torch.compile.")
