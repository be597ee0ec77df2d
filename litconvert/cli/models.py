"""`litconvert probe`, `sample`, `push`: what is done with a model."""

import os
from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DataOption,
    DeviceOption,
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
    a_picture,
    a_run,
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
