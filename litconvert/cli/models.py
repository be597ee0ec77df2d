"""`litconvert probe`, `sample`, `evaluate`, `push`: what is done with a model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DataOption,
    DeviceOption,
    ForceOption,
    HeadsOption,
    JsonOption,
    QuietOption,
    RawOption,
    RecordedRecipeOption,
    ReplaceOption,
    SeedOption,
    SetOption,
    a_file,
    a_folder,
    a_new_file,
    a_new_folder,
    a_picture,
    a_run,
    a_run_or_id,
    a_source,
    assignments,
    check_overrides,
    is_first,
    overrides_of,
    recorded_recipe,
    use_device,
)
from litconvert.common.files import free_name, refuse_existing
from litconvert.common.hub import check_repo_id
from litconvert.errors import UsageError
from litconvert.runs.directory import model_of

# What `sample` writes unless it is told.
SHEET = Path("samples.png")

if TYPE_CHECKING:
    from litconvert.evaluation.drawing import EvaluationRequest
    from litconvert.recipe.schema import Recipe


def probe(
    student: Annotated[Path, typer.Argument(help="Model directory, or run directory of `distill`.", callback=a_folder)],
    data: DataOption = None,
    recipe: RecordedRecipeOption = None,
    sets: SetOption = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0, help="Multiply-accumulates allowed, times those of all linear layers."),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            "--budget-ms", min=0, help="Milliseconds allowed for all self-attentions of an image, measured here."
        ),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option("--at", metavar="IMAGE_SIZE", min=1, help="Pixels that costs are for. Default: the model's."),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "-n", min=1, help="Samples the errors are means over.")
    ] = 64,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", help="Write the recipe with the suggested student.softmax_layers.", callback=a_new_file
        ),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what each linear layer alone does to the teacher's output, and suggest which to keep in softmax.

    Asked of a student that was solved or trained: without either its linear attention is random.

    Example: litconvert probe runs/lit-xl --data latents/ --budget 1.05 --at 1024 --write hybrid.yaml
    """
    overrides = overrides_of(sets, seed=seed)
    check_overrides(recipe, overrides)
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_probe
    from litconvert.evaluation.probe import ProbeRequest
    from litconvert.evaluation.probe import probe as measure

    console.be_quiet(quiet)
    use_device(device)
    asked = ProbeRequest(
        student,
        data,
        recipe,
        overrides,
        num_samples=num_samples,
        image_size=at,
        budget=budget,
        budget_ms=budget_ms,
        write=write,
        force=force,
    )
    result = measure(asked, screen())
    for text in result.notes:
        console.note(f"note: {text}")
    if as_json:
        console.data(result.to_json())
    else:
        show_probe(result)
    if write is not None:
        console.note(f"written: {write}")


def sample(
    model: Annotated[
        str,
        typer.Argument(
            help="Run (RUN, RUN@STEP), model directory, Hub id, or any checkpoint litconvert reads.", callback=a_source
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Sheet to write: .png, .jpg or .webp. Default: samples.png, samples-2.png, ..., the first free one.",
            callback=a_picture,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Draw this one too, on the same noise, above.", callback=a_source),
    ] = None,
    recipe: RecordedRecipeOption = None,
    sets: SetOption = None,
    num: Annotated[int | None, typer.Option("--num", "-n", min=1, help="How many images (sample.num_images).")] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Labels, such as 0,3,7; cycled. Default: all.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Caption to draw (sample.prompts). May be repeated.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="Caption to lead away from (sample.negative_prompt).")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            help="Encoded captions (safetensors: features, mask) instead of prompts; no T5.",
            callback=a_file,
        ),
    ] = None,
    save_embeddings: Annotated[
        Path | None,
        typer.Option("--save-embeddings", help="Write the encoded captions for --embeddings.", callback=a_new_file),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="ddpm, ddim or dpm-solver++; flow-euler for velocity (SiT)."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of the scheduler.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance scale.")] = None,
    guidance_channels: Annotated[
        int | None,
        typer.Option("--guidance-channels", min=1, help="Guide the first so many channels (DiT's protocol: 3)."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise (sample.seed).")] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Write the images for the ADM evaluator too.", callback=a_new_file)
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents", help="Write undecoded latents (safetensors) instead of a picture.", callback=a_new_file
        ),
    ] = None,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    raw: RawOption = False,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw samples. Of a run that is not finished, its latest checkpoint draws, or that of RUN@STEP.

    Example: litconvert sample runs/digits/distilled --teacher asset:dit-digits -o side-by-side.png

    Example: litconvert sample runs/lit-xl@20000
    """
    named = {
        "sample.num_images": num,
        "sample.scheduler": scheduler,
        "sample.steps": steps,
        "sample.guidance": guidance,
        "sample.guidance_channels": guidance_channels,
        "sample.seed": seed,
    }
    overrides = [*(sets or []), *assignments(named)]
    check_overrides(recipe or recorded_recipe(model_of(model)), overrides, model)
    # Before torch is imported; what else the request refuses comes after that. Beside an NPZ file it knows which files
    # an interrupted command left.
    if npz is None:
        refuse_existing(None if latents else out, latents, save_embeddings, force=force)
    from litconvert.cli.live import screen
    from litconvert.sampling.request import SampleRequest, begun_sheet, sample_to_files

    sheet = out or begun_sheet(npz) or (SHEET if force else free_name(SHEET))
    console.be_quiet(quiet or not is_first())
    use_device(device)
    request = SampleRequest(
        model,
        sheet,
        teacher=teacher,
        recipe=recipe,
        overrides=overrides,
        classes=classes,
        prompts=prompts or (),
        negative_prompt=negative_prompt,
        embeddings=embeddings,
        save_embeddings=save_embeddings,
        npz=npz,
        latents=latents,
        force=force,
        num_attention_heads=num_attention_heads,
        weights="model" if raw else "auto",
    )
    written = [str(path) for path in sample_to_files(request, screen())]
    if not is_first():
        return
    if as_json:
        console.data({"written": written})
        return
    for path in written:
        console.line(path)


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


def push(
    directory: Annotated[Path, typer.Argument(help="Model or run directory, or RUN@STEP for a checkpoint of it.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.")],
    pipeline: Annotated[bool, typer.Option("--pipeline", help="Lay out a full diffusers pipeline.")] = False,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="Put the recipe's T5 into the pipeline (19 GB for PixArt's).")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    raw: RawOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be added, changed, deleted and kept; send nothing.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Overwrite or delete what others put there and loaders would take instead."),
    ] = False,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Overwrite a README.md that is not litconvert's.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to commit to, or refs/pr/N. Default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a model with its card, in one commit. The token comes from HF_TOKEN or `hf auth login`.

    Example: litconvert push runs/digits/distilled me/lit-digits --pipeline
    """
    _check_push(directory, repo_id)
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_changes
    from litconvert.publishing.publication import Destination, Publication
    from litconvert.publishing.push import planned_changes
    from litconvert.publishing.push import push as publish

    console.be_quiet(quiet)
    weights = "model" if raw else "auto"
    if dry_run:
        asked = Publication(directory, repo_id, pipeline, text_encoder=text_encoder, weights=weights, offline=True)
        changes = planned_changes(asked, Destination(revision, create_pr, private, replace, replace_card, message))
        console.data(changes.to_json()) if as_json else show_changes(changes)
        if changes.repository is None:
            console.note(f"the Hub cannot be reached: what {repo_id} holds is unknown, and nothing is compared")
        changes.refuse()
        return
    url = publish(
        directory,
        repo_id,
        pipeline=pipeline,
        text_encoder=text_encoder,
        private=private,
        weights=weights,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        replace=replace,
        replace_card=replace_card,
        listener=screen(),
    )
    console.data({"url": url}) if as_json else console.line(url)


def _check_push(directory: Path, repo_id: str) -> None:
    """A model on disk, and a name that the Hub would take, in this order."""
    if not directory.exists() and os.path.isdir(repo_id):
        raise UsageError(f"the folder comes first: litconvert push {repo_id} {directory}")
    a_run(directory)
    check_repo_id(repo_id)
