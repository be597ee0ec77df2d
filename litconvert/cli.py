"""The command line. Heavy imports are inside the commands, so that help and `recipes ls` answer at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litconvert import console
from litconvert.errors import LitconvertError, UsageError

if TYPE_CHECKING:
    from litconvert.probe import ProbeResult

app = typer.Typer(
    name="litconvert",
    help="Turn a softmax diffusion transformer into a linear-attention one: convert, distil, sample, push.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
latents_app = typer.Typer(help="Training data for distillation.", no_args_is_help=True)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(latents_app, name="latents")
app.add_typer(recipes_app, name="recipes")

SourceArgument = Annotated[
    str | None,
    typer.Argument(metavar="SRC", help="File, folder, Hub id (owner/name) or asset:NAME. Default: the recipe's."),
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Name, file or Hub id of a recipe.")]
OwnRecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Default: the packaged one for what the source is.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key. May be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that was made from other inputs.")]
HeadsOption = Annotated[
    int | None, typer.Option("--num-attention-heads", help="Heads of the source, where its width does not tell.")
]
SizeOption = Annotated[
    int | None, typer.Option("--sample-size", help="Side of the latent, where the source does not tell.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cuda, mps (a Mac's GPU), cpu or auto (LITCONVERT_DEVICE).")
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Of a checkpoint of a run: its raw weights, not their moving average.")
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help="Checks begin for so long, the rest is skipped. Default: 5.")
]
ReportOption = Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON to this file too.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of fresh weights and of every draw (seed).")]


def _overrides(
    sets: list[str] | None,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    seed: int | None = None,
) -> list[str]:
    """--set and the options that stand for a key."""
    named = {
        "source.num_attention_heads": num_attention_heads,
        "source.sample_size": sample_size,
        "seed": seed,
    }
    return [*(sets or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]


def _use_device(name: str | None) -> None:
    """`--device`."""
    if name is not None:
        from litconvert.device import choose_device

        choose_device(name)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="File, folder, Hub id or asset:NAME.")],
    weights: Annotated[
        bool, typer.Option("--weights", help="Read every value and check it, not the headers alone.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A recipe whose source section has hints.")
    ] = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is, and why.

    Example: litconvert inspect DiT-XL-2-256x256.pt
    """
    from litconvert.conversion import with_source
    from litconvert.recipe_files import resolve, resolve_data
    from litconvert.sources import describe, examine, open_source

    given = _overrides(sets, num_attention_heads, sample_size)
    resolved = resolve(recipe, given) if recipe else resolve_data({}, given, "command line")
    settings = with_source(resolved, source).recipe
    opened = open_source(settings.source, settings.inherit.weights)
    findings = examine(opened) if weights else None
    if as_json:
        console.data(describe(opened, findings))
    else:
        console.show_source(opened, findings)
    if findings and findings.broken:
        raise LitconvertError(f"{source}: cannot be used: {'; '.join(findings.broken)}")


@app.command()
def plan(
    source: SourceArgument = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Memory and time of a training stage instead: its number, or all.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", help="With --stage: how many share a batch.")] = 1,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", help="With --stage: samples at a time. Default: as the recipe says.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what would become of every tensor, or what a stage of training would take. Reads headers, writes nothing.

    Example: litconvert plan DiT-XL-2-256x256.pt --recipe dit-xl-2-256

    Example: litconvert plan DiT-XL-2-256x256.pt --recipe dit-xl-2-256 --stage all --processes 8
    """
    if stage is not None:
        _use_device(device)
        _plan_stages(
            source, recipe, _overrides(sets, num_attention_heads, sample_size), stage, processes, micro_batch, as_json
        )
        return
    from litconvert.conversion import plan as make_plan

    made = make_plan(source, recipe, _overrides(sets, num_attention_heads, sample_size))
    if as_json:
        console.data(made.to_json())
    else:
        console.show_plan(made, tensors=tensors)


def _plan_stages(
    source: str | None,
    recipe: str | None,
    overrides: list[str],
    stage: str,
    processes: int,
    micro_batch: int | None,
    as_json: bool,
) -> None:
    """`plan --stage`."""
    if stage != "all" and not stage.isdecimal():
        raise UsageError(f"--stage {stage}: give the number of a stage, counted from 0, or all")
    if recipe is None:
        raise UsageError("--stage is of a recipe's stages; name it: --recipe (`litconvert recipes ls` lists them)")
    from litconvert.stage_plan import plan_stages

    index = None if stage == "all" else int(stage)
    made = plan_stages(source, recipe, overrides, stage=index, processes=processes, micro_batch=micro_batch)
    if as_json:
        console.data([estimate.to_json() for estimate in made])
    else:
        console.show_estimates(made)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="File, folder, Hub id or asset:NAME.")],
    out: Annotated[Path, typer.Argument(help="The model directory to write; with --to original a file.")],
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    seed: SeedOption = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="original or diffusers: write the same weights in that layout; nothing is replaced."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Replace softmax attention by fresh linear attention; inherit the rest.

    Example: litconvert convert DiT-XL-2-256x256.pt lit-xl --recipe dit-xl-2-256

    Example: litconvert convert PixArt-Sigma-XL-2-1024-MS.pth sigma --to diffusers
    """
    from litconvert import conversion

    console.be_quiet(quiet)
    given = _overrides(sets, num_attention_heads, sample_size, seed)
    if to is not None:
        if seed is not None:
            raise UsageError("--to writes the source's own weights: --seed means nothing there, leave it out")
        _rewrite(source, out, recipe, given, to, dry_run=dry_run, force=force, as_json=as_json)
        return
    made = conversion.plan(source, recipe, given)
    if not dry_run:
        with console.progress("convert") as show:
            total, done = made.totals["student_tensors_stored"], [0]

            def on_tensor(name: str) -> None:
                done[0] += 1
                show(done[0], total, "")

            conversion.carry_out(made, out, force=force, on_tensor=on_tensor)
    if as_json:
        console.data({"out": None if dry_run else str(out), **made.to_json()})
    else:
        console.show_plan(made)
    console.note(f"nothing written (--dry-run); would write {out}" if dry_run else f"written: {out}")


def _rewrite(
    source: str,
    out: Path,
    recipe: str | None,
    overrides: list[str],
    to: str,
    *,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """`convert --to`: the source's own weights in another layout."""
    from litconvert.conversion import with_source
    from litconvert.recipe_files import resolve, resolve_data
    from litconvert.relayout import TARGETS, write_layout
    from litconvert.sources import open_source

    if to not in TARGETS:
        raise UsageError(f"--to {to}: there are {' and '.join(TARGETS)}")
    resolved = resolve(recipe, overrides) if recipe else resolve_data({}, overrides, "command line")
    settings = with_source(resolved, source).recipe
    if settings.student.dtype is not None:
        raise UsageError("--to writes weights exactly as they are; leave student.dtype out")
    opened = open_source(settings.source, settings.inherit.weights)
    with console.progress("write") as show:
        notes, total = write_layout(
            opened,
            out,
            to,
            force=force,
            dry_run=dry_run,
            max_shard_bytes=settings.student.max_shard_bytes,
            on_tensor=lambda done, total: show(done, total, ""),
        )
    for text in opened.reading.unsure:
        console.note(f"assumed: {text}")
    for text in notes:
        console.note(f"note: {text}")
    console.note(f"nothing written (--dry-run); would write {total} tensors" if dry_run else f"{total} tensors")
    if as_json:
        console.data({"out": None if dry_run else str(out), "layout": to, "tensors": total, "notes": notes})
    else:
        console.line(str(out))


@latents_app.command("synthesize")
def latents_synthesize(
    out: Annotated[Path, typer.Argument(help="The dataset folder to write.")],
    source: Annotated[str | None, typer.Option("--source", help="The teacher. Default: the recipe's source.")] = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let the teacher draw the training set, for classes or prompts. Interrupted, the same command goes on.

    Several processes share the work: accelerate launch -m litconvert latents synthesize ...

    Example: litconvert latents synthesize latents/ --recipe digits
    """
    from litconvert.synthesis import synthesize

    console.be_quiet(quiet or not _is_first())
    _use_device(device)
    with console.progress("draw") as show:
        given = _overrides(sets, num_attention_heads)
        synthesize(
            source,
            out,
            recipe,
            given,
            force=force,
            on_progress=lambda done, total: show(done, total, ""),
            on_note=console.note,
        )
    if _is_first():
        console.line(str(out))


def _is_first() -> bool:
    """Whether this is the one of several launched processes that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


@latents_app.command("encode")
def latents_encode(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, webdataset shards (*.tar), parquet files, or images with a metadata.jsonl; "
            "or a Hub data set (owner/name)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The dataset folder to write.")],
    source: Annotated[
        str | None, typer.Option("--source", help="The model that the data is for. Default: the recipe's source.")
    ] = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="Folder or Hub id of an AutoencoderKL (source.vae.path).")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Store mirrored latents too (data.flip).")] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave images out that cannot be read, and count them.")
    ] = False,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make training data of images. Interrupted, the same command goes on.

    Several processes share the work: accelerate launch -m litconvert latents encode ...

    Example: litconvert latents encode imagenet/train latents/ --recipe dit-xl-2-256 --source DiT-XL-2-256x256.pt --flip
    """
    from litconvert.data_report import classes_remark
    from litconvert.encoding import encode_images
    from litconvert.files import read_json
    from litconvert.latents import RECORD

    console.be_quiet(quiet or not _is_first())
    _use_device(device)
    given = _overrides(sets, num_attention_heads)
    given += [f"source.vae.path={vae}"] if vae else []
    given += ["data.flip=true"] if flip else []
    with console.progress("encode") as show:
        encode_images(
            images,
            out,
            recipe,
            given,
            source=source,
            force=force,
            skip_broken=skip_broken,
            on_progress=show,
            on_note=console.note,
        )
    if remark := classes_remark(read_json(out / RECORD)):
        console.note(f"note: {remark}")
    if _is_first():
        console.line(str(out))


@latents_app.command("show")
def latents_show(
    data: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG sheet of samples to draw.")] = None,
    count: Annotated[int, typer.Option("--num", "-n", help="Samples on the sheet.")] = 32,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Whose VAE decodes. Default: the one recorded with DATA.")
    ] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a data set holds, and draw a sheet of it.

    Example: litconvert latents show latents/ --out sheet.png
    """
    from litconvert.data_report import describe_data, draw_sheet, rows_of
    from litconvert.recipe_files import resolve, resolve_data

    console.be_quiet(quiet)
    facts = describe_data(data)
    if out is not None:
        resolved = resolve(recipe, sets or []) if recipe else resolve_data({}, sets or [], "command line")
        draw_sheet(data, out, vae=resolved.recipe.source.vae, count=count)
        console.note(f"written: {out}")
    if as_json:
        console.data(facts)
    else:
        console.table(("", ""), rows_of(facts))


@app.command()
def distill(
    student: Annotated[Path, typer.Argument(help="Model directory that `convert` wrote.")],
    out: Annotated[Path, typer.Argument(help="Run directory to write, or to go on with.")],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Default: the one recorded in STUDENT.")] = None,
    sets: SetOption = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Another teacher for the hybrid stage.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Dataset folder. Default: the recipe's, or else the teacher draws it.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN[@STEP]", help="Start from another run's weights (distill.start.path)."),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Teach a student with its softmax teacher. Rerun to resume; with more steps (--set) to go on after the end.

    Example: litconvert distill lit-xl runs/lit-xl --recipe dit-xl-2-256 --data latents/

    Example: litconvert distill lit-xl runs/second --from runs/lit-xl@20000 --set distill.stages.0.learning_rate=5e-5
    """
    from litconvert.line import compare, distill_with_progress

    console.be_quiet(quiet or not _is_first())
    _use_device(device)
    run = distill_with_progress(student, out, recipe, teacher, data, _overrides(sets, seed=seed), force, start)
    if _is_first():
        compare(run)
        console.line(str(run / "model"))


@app.command()
def probe(
    student: Annotated[Path, typer.Argument(help="Model directory, or run directory of `distill`.")],
    data: Annotated[Path | None, typer.Option("--data", help="Dataset folder. Default: the recipe's.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Default: the one recorded in STUDENT.")] = None,
    sets: SetOption = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Multiply-accumulates allowed, times those of all linear layers.")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option("--budget-ms", help="Milliseconds allowed for all self-attentions of an image, measured here."),
    ] = None,
    at: Annotated[
        int | None, typer.Option("--at", metavar="IMAGE_SIZE", help="Pixels that costs are for. Default: the model's.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Samples the errors are means over.")] = 64,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write the recipe with the suggested student.softmax_layers.")
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --write.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what each linear layer alone does to the teacher's output, and suggest which to keep in softmax.

    Best asked after a stage of attention transfer: a student that was merely converted has random attention.

    Example: litconvert probe runs/lit-xl --data latents/ --budget 1.05 --at 1024 --write hybrid.yaml
    """
    from litconvert.probe import probe as measure

    console.be_quiet(quiet)
    _use_device(device)
    with console.progress("probe") as show:
        result = measure(
            student,
            data,
            recipe,
            _overrides(sets, seed=seed),
            num_samples=num_samples,
            image_size=at,
            budget=budget,
            budget_ms=budget_ms,
            write=write,
            force=force,
            on_progress=lambda done, total: show(done, total, ""),
        )
    for text in result.notes:
        console.note(f"note: {text}")
    if as_json:
        console.data(result.to_json())
    else:
        _show_probe(result)
    if write is not None:
        console.note(f"written: {write}")


def _show_probe(result: "ProbeResult") -> None:
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
    size = f"{result.image_size} pixels, {result.tokens} tokens"
    console.line(f"{result.num_samples} samples; costs of one image of {size}")
    console.table([*headers, "suggested"] if chosen else headers, rows, numbers=range(1, len(headers)))
    console.line("error: ||output - teacher's||^2 / ||teacher's||^2, this layer alone linear; spread over samples")
    console.line("+: more when the layer is kept; x MACs and ms: with those above it kept too, ms of self-attention")
    if result.kept:
        console.line(f"kept already, and not probed: {', '.join(map(str, result.kept))}")
    if result.softmax_layers is not None:
        console.line(f"--set 'student.softmax_layers=[{', '.join(map(str, result.softmax_layers))}]'")


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Run directory to write, or to go on with.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or file of a recipe with a scratch section.")],
    data: Annotated[Path | None, typer.Option("--data", help="Dataset folder. Default: the recipe's.")] = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a softmax model from nothing: a teacher of your own. Rerun to resume.

    Example: litconvert train runs/teacher --recipe digits-teacher --data latents/
    """
    from litconvert.live import training_display
    from litconvert.pretraining import train as train_model

    console.be_quiet(quiet or not _is_first())
    _use_device(device)
    with training_display("train") as show:
        run = train_model(
            out,
            recipe,
            data=data,
            overrides=_overrides(sets, seed=seed),
            force=force,
            on_step=show.step,
            on_note=console.note,
        )
    if _is_first():
        console.line(str(run / "model"))


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="Run (RUN, RUN@STEP) or model directory, or any checkpoint litconvert reads.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG grid to write.")] = Path("samples.png"),
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Draw this one too, on the same noise, above.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Default: the one recorded with MODEL.")] = None,
    sets: SetOption = None,
    num: Annotated[int | None, typer.Option("--num", "-n", help="How many images (sample.num_images).")] = None,
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
        typer.Option("--embeddings", help="Encoded captions (safetensors: features, mask) instead of prompts; no T5."),
    ] = None,
    save_embeddings: Annotated[
        Path | None, typer.Option("--save-embeddings", help="Write the encoded captions for --embeddings.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="ddpm, ddim or dpm-solver++; flow-euler for velocity (SiT).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the scheduler.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance scale.")] = None,
    guidance_channels: Annotated[
        int | None, typer.Option("--guidance-channels", help="Guide the first so many channels (DiT's protocol: 3).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise (sample.seed).")] = None,
    npz: Annotated[Path | None, typer.Option("--npz", help="Write the images for the ADM evaluator too.")] = None,
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Write undecoded latents (safetensors) instead of a picture.")
    ] = None,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    raw: RawOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw samples. Of a run that is not finished, its latest checkpoint draws, or that of RUN@STEP.

    Example: litconvert sample runs/digits/distilled --teacher asset:dit-digits -o side-by-side.png

    Example: litconvert sample runs/lit-xl@20000
    """
    from litconvert.sampling import sample_to_files

    console.be_quiet(quiet)
    _use_device(device)
    named: dict[str, Any] = {
        "sample.num_images": num,
        "sample.scheduler": scheduler,
        "sample.steps": steps,
        "sample.guidance": guidance,
        "sample.guidance_channels": guidance_channels,
        "sample.seed": seed,
    }
    given = [*_overrides(sets), *(f"{key}={value}" for key, value in named.items() if value is not None)]
    with console.progress("sample") as show:
        written = sample_to_files(
            model,
            out=out,
            teacher=teacher,
            recipe=recipe,
            overrides=given,
            classes=classes,
            prompts=prompts or (),
            negative_prompt=negative_prompt,
            embeddings=embeddings,
            save_embeddings=save_embeddings,
            npz=npz,
            latents=latents,
            num_attention_heads=num_attention_heads,
            weights="model" if raw else "auto",
            on_progress=lambda done, total: show(done, total, ""),
            on_note=console.note,
        )
    for path in written:
        console.line(str(path))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or RUN@STEP for a checkpoint of it.")],
    sets: SetOption = None,
    raw: RawOption = False,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a distilled student against its teacher, and record it with the model.

    Example: litconvert evaluate runs/digits/distilled --set evaluate.num_samples=1000
    """
    from litconvert.line import score_run
    from litconvert.recipe_files import resolve
    from litconvert.run_directory import model_of

    console.be_quiet(quiet)
    _use_device(device)
    model = model_of(str(run), raw=raw)
    if not (Path(model) / "litconvert.json").is_file():
        raise UsageError(f"{run}: not a run of `litconvert distill`, nor a model that one wrote (no litconvert.json)")
    weights = "model" if raw else "auto"
    scores = score_run(model, resolve(model, sets or []).recipe, weights=weights, force=force)
    if as_json:
        console.data(scores)
    else:
        console.show_scores(scores)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Model or run directory, or RUN@STEP for a checkpoint of it.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.")],
    pipeline: Annotated[bool, typer.Option("--pipeline", help="Lay out a full diffusers pipeline.")] = False,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="Put the recipe's T5 into the pipeline (19 GB for PixArt's).")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    raw: RawOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up; no network.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a model with its card. The token comes from HF_TOKEN or `hf auth login`.

    Example: litconvert push runs/digits/distilled me/lit-digits --pipeline
    """
    from litconvert import publishing

    console.be_quiet(quiet)
    weights = "model" if raw else "auto"
    if dry_run:
        files = publishing.planned_files(
            directory, repo_id, pipeline=pipeline, text_encoder=text_encoder, weights=weights
        )
        if as_json:
            console.data([{"path": path, "bytes": nbytes} for path, nbytes in files])
        else:
            console.table(("file", "bytes"), [(path, console.count(nbytes)) for path, nbytes in files], numbers=(1,))
        return
    url = publishing.push(
        directory, repo_id, pipeline=pipeline, text_encoder=text_encoder, private=private, weights=weights
    )
    console.data({"url": url}) if as_json else console.line(url)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name, file or Hub id of a recipe.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: runs/RECIPE.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="Default: the recipe's.")] = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """The whole line: convert, latents, distil, sample, evaluate, push. What is done is skipped.

    Example: litconvert run digits
    """
    from litconvert.line import run_line

    console.be_quiet(quiet)
    _use_device(device)
    place = out or Path("runs") / Path(recipe).stem
    console.show_result(run_line(recipe, place, source=source, overrides=_overrides(sets, seed=seed), force=force))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("runs/digits"),
    sets: SetOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """`run digits`: the whole line on a small trained DiT that ships with litconvert. No network, no GPU.

    Example: litconvert demo
    """
    run("digits", out=out, sets=sets, device=device, force=force, quiet=quiet)


@app.command()
def env(
    as_json: JsonOption = False,
    device: DeviceOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try what litconvert does on this device too: some minutes.")
    ] = False,
    minutes: MinutesOption = None,
    out: ReportOption = None,
) -> None:
    """Versions and devices, for bug reports; with --check whether what litconvert does works on this machine.

    Example: litconvert env --check --out check.json
    """
    if check:
        from litconvert.gpu_check import check_machine

        check_machine(device, minutes, as_json, out)
        return
    if minutes is not None or out is not None:
        raise UsageError("--minutes and --out are of the check: add --check")
    from litconvert.device import bf16_in_hardware, default_device, describe_devices, overrides
    from litconvert.model_directory import versions

    _use_device(device)
    facts = {
        **versions(),
        "devices": describe_devices(),
        "device used": default_device().type,
        "bf16 in hardware": bf16_in_hardware(),
        **overrides(),
    }
    console.data(facts) if as_json else console.table(("", ""), list(facts.items()))


@recipes_app.command("ls")
def recipes_ls(as_json: JsonOption = False) -> None:
    """List the packaged recipes.

    Example: litconvert recipes ls
    """
    from litconvert.packaged import packaged_recipes, summary

    rows = [(name, summary(path)) for name, path in packaged_recipes().items()]
    if as_json:
        console.data([{"name": name, "summary": text} for name, text in rows])
    else:
        console.table(("recipe", ""), rows)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name, file or Hub id of a recipe.")],
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every resolved key with where it came from.

    Example: litconvert recipes show digits --set student.conv_size=3
    """
    from litconvert.recipe_files import resolve

    rows = resolve(name, sets or []).rows()
    if as_json:
        console.data([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
    else:
        console.table(("key", "value", "origin"), rows)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A packaged recipe.")],
    out: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml here.")] = None,
    force: ForceOption = False,
) -> None:
    """Copy a packaged recipe, comments and all, to edit it.

    Example: litconvert recipes copy digits my-digits.yaml
    """
    from litconvert.files import write_whole
    from litconvert.recipe_files import find_recipe

    path = find_recipe(name)
    target = out or Path(f"{path.stem}.yaml")
    if target.exists() and not force:
        raise LitconvertError(f"{target} exists; choose another name, or replace it with --force")
    write_whole(target, path.read_text())
    console.line(str(target))


@recipes_app.command("validate")
def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Recipes to check.")],
    sets: SetOption = None,
) -> None:
    """Check recipes; every problem is listed with its file and line.

    Example: litconvert recipes validate my-digits.yaml
    """
    from litconvert.recipe_files import resolve

    problems = []
    for name in names:
        try:
            resolve(name, sets or [])
            console.line(f"{name}: valid")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Example: litconvert recipes schema > recipe.schema.json
    """
    from litconvert.recipe_files import json_schema

    console.data(json_schema())


def main() -> None:
    """Run the command line; exits 0, 1 (known error), 2 (usage), 3 (a gate failed) or 130 (interrupted)."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(console.fail(error))
