"""`litconvert evaluate`: a model against pictures or its teacher, and a run against its own."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DeviceOption,
    ForceOption,
    HeadsOption,
    JsonOption,
    QuietOption,
    RawOption,
    RecordedRecipeOption,
    SetOption,
    a_file,
    a_folder,
    a_new_file,
    a_new_folder,
    a_run_or_id,
    a_source,
    assignments,
    check_overrides,
    is_first,
    recorded_recipe,
    use_device,
)
from litconvert.errors import UsageError
from litconvert.runs.directory import model_of

if TYPE_CHECKING:
    from litconvert.evaluation.drawing import EvaluationRequest
    from litconvert.recipe.schema import Recipe


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run, RUN@STEP, or the Hub id of a pushed model; with --teacher, --images or --reference any model "
            "or an NPZ file.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Hold it against this model's samples.", callback=a_source)
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Hold it against the pictures in this folder.", callback=a_folder)
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Hold it against an NPZ file of pictures or statistics.", callback=a_file),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="NAME|PATH",
            help="digits, efficientnet-lite0, inception, dinov2, clip, or a file or folder with one's weights.",
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "-n", min=4, help="Of each model (evaluate.num_samples).")
    ] = None,
    protocol: Annotated[
        Literal["dit"] | None,
        typer.Option(
            "--protocol", help="Settings as published: dit (250 DDPM steps, guidance 1.5 on 3 channels, 50K)."
        ),
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Only compare predictions with the teacher's, which needs no samples.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Of a model of captions: a file, one a line.", callback=a_file)
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", help="Captions encoded earlier, instead.", callback=a_file)
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", metavar="NAME|PATH", help="Score pictures by their captions with this CLIP."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option("--samples", help="Keep the samples in this folder; launched processes share the work."),
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", help="Write those of the reference (NPZ).", callback=a_new_file),
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option("--geneval", help="Draw the prompts of GenEval's evaluation_metadata.jsonl.", callback=a_file),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for GenEval's pictures.", callback=a_new_folder)
    ] = None,
    recipe: RecordedRecipeOption = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    raw: RawOption = False,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model: a run as its recipe says, any model against its teacher, pictures or statistics.

    Example: litconvert evaluate runs/digits/distilled --set evaluate.num_samples=1000

    Example: litconvert evaluate runs/lit-xl --teacher DiT-XL-2-256x256.pt --reference VIRTUAL_imagenet256_labeled.npz
    """
    weights = "model" if raw else "auto"
    if (geneval is None) != (out is None):
        raise UsageError("--geneval FILE says which prompts are drawn and --out DIR where to: give both or neither")
    against = {"--teacher": teacher, "--images": images, "--reference": reference}
    measured = {"--features": features, "--num-samples": num_samples, "--agreement": agreement, "--prompts": prompts}
    measured |= {"--embeddings": embeddings, "--clip": clip, "--save-statistics": save_statistics, "--samples": samples}
    if geneval is not None:
        if told := next((name for name, value in {**against, **measured}.items() if value), None):
            raise UsageError(f"--geneval draws pictures for GenEval's own tool, and measures nothing: leave {told} out")
    elif not any(against.values()):
        measured |= {"--protocol": protocol, "--recipe": recipe, "--num-attention-heads": num_attention_heads}
        if told := next((name for name, value in measured.items() if value), None):
            raise UsageError(
                f"{told} says how a model is held against another: give --teacher, --images or --reference"
            )
        settings = _run_settings(model, sets, weights)
        console.be_quiet(quiet)
        use_device(device)
        return _evaluate_run(model, settings, weights, force=force, as_json=as_json)
    if force and save_statistics is None:
        raise UsageError(
            "--force measures a run again whose scores are kept, or replaces the file of --save-statistics: leave it "
            "out"
        )
    a_file(Path(model)) if model.endswith(".npz") else a_source(model)
    overrides = [*(sets or []), *assignments({"evaluate.num_samples": num_samples})]
    check_overrides(recipe or recorded_recipe(model_of(model)), overrides, model)
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_evaluation
    from litconvert.evaluation.drawing import EvaluationRequest
    from litconvert.evaluation.model_scores import evaluate_model

    console.be_quiet(quiet or not is_first())
    use_device(device)
    asked = EvaluationRequest(
        model,
        teacher=teacher,
        images=images,
        reference=reference,
        features=features,
        protocol=protocol,
        recipe=recipe,
        overrides=overrides,
        prompts=prompts,
        embeddings=embeddings,
        clip=clip,
        num_attention_heads=num_attention_heads,
        weights=weights,
        samples=samples,
        save_statistics=save_statistics,
        agreement_only=agreement,
        force=force,
    )
    if geneval is not None and out is not None:
        return _draw_geneval(asked, geneval, out, as_json=as_json)
    report = evaluate_model(asked, screen())
    if not is_first():
        return
    if as_json:
        console.data(report)
        return
    show_evaluation(report)
    if not asked.is_drawn:
        console.next_step("sample", model, *(("--teacher", teacher) if teacher else ()))


def _draw_geneval(asked: "EvaluationRequest", metadata: Path, out: Path, *, as_json: bool) -> None:
    """GenEval's folders, and what measures them."""
    from litconvert.cli.live import screen
    from litconvert.evaluation.geneval import PER_PROMPT, draw_geneval, geneval_commands

    prompts = draw_geneval(asked, metadata, out, screen())
    commands = geneval_commands(out.absolute())
    if as_json:
        console.data({"written": str(out), "prompts": prompts, "commands": commands})
        return
    console.line(f"{prompts * PER_PROMPT:,} pictures of {prompts:,} prompts in {out}, as GenEval reads them.")
    for text in commands:
        console.note(f"next, in GenEval's repository: {text}")


def _run_settings(run: str, sets: list[str] | None, weights: str) -> "Recipe":
    """The recipe of a run of ours, or of a pushed model, with what is set. Raises UsageError for any other model."""
    model = model_of(str(a_run_or_id(Path(run))), raw=weights == "model")
    other = (
        f"{run}: not a run of `litconvert distill`, nor a model that one wrote (no litconvert.json); any other model "
        "is measured with --teacher, --images or --reference"
    )
    if os.path.isdir(model) and not (Path(model) / "litconvert.json").is_file():
        raise UsageError(other)
    from litconvert.families.companions import companions_of

    beside = companions_of(model)
    if beside.recipe is None:
        raise UsageError(other)
    return beside.resolve(None, sets or []).recipe


def _evaluate_run(run: str, settings: "Recipe", weights: str, *, force: bool, as_json: bool) -> None:
    """A run of ours against its own teacher, kept beside it."""
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_scores
    from litconvert.evaluation.scores import score_run

    model = model_of(run, raw=weights == "model")
    scores = score_run(model, settings, weights=weights, force=force, listener=screen())
    if as_json:
        console.data(scores)
    else:
        show_scores(scores)
        if Path(model).is_dir():
            console.next_step("push", run, "OWNER/NAME", "--dry-run")
