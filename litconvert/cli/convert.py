"""`litconvert inspect`, `plan`, `convert`: from a checkpoint to a student."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DeviceOption,
    EmbeddingsOption,
    ForceOption,
    HeadsOption,
    InheritOption,
    JsonOption,
    NamedSource,
    NoSolveOption,
    OwnRecipeOption,
    QuietOption,
    SeedOption,
    SetOption,
    SizeOption,
    SolveDataOption,
    SourceArgument,
    a_new_folder,
    a_recipe,
    check_overrides,
    complete_recipe,
    is_first,
    overrides_of,
    solve_overrides,
    use_device,
)
from litconvert.errors import LitconvertError, UsageError
from litconvert.runs.directory import model_of

if TYPE_CHECKING:
    from litconvert.estimates.stage import StageEstimate
    from litconvert.recipe.schema import Recipe


def inspect(
    source: NamedSource,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read every value and check it, not the headers alone.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe whose source section has hints.",
            callback=a_recipe,
            autocompletion=complete_recipe,
        ),
    ] = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is, and why.

    Example: litconvert inspect DiT-XL-2-256x256.pt
    """
    from litconvert.recipe.resolve import resolve

    given = overrides_of(sets, num_attention_heads, sample_size)
    check_overrides(recipe, given, source)
    from litconvert.cli.reports import show_source
    from litconvert.families.companions import companions_of
    from litconvert.families.sources import describe, examine, open_source_of

    opened = open_source_of(resolve(recipe, given, source).recipe)
    beside = companions_of(model_of(source))
    if weights:
        console.note(f"reading every value of {source}")
    findings = examine(opened) if weights else None
    if as_json:
        console.data({**describe(opened, findings), "beside": beside.to_json()})
    else:
        show_source(opened, beside, findings)
    if findings and findings.broken:
        raise LitconvertError(f"{source}: cannot be used: {'; '.join(findings.broken)}")


def plan(
    source: SourceArgument = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    inherit: InheritOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    no_solve: NoSolveOption = False,
    data: SolveDataOption = None,
    embeddings: EmbeddingsOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Memory and time of a training stage instead: its number, or all.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="With --stage: how many share a batch.")] = 1,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", min=1, help="With --stage: samples at a time. Default: as the recipe says."),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what would become of every tensor, or what a stage of training would take. Reads headers, writes nothing.

    Example: litconvert plan DiT-XL-2-256x256.pt --inherit q,k,v

    Example: litconvert plan DiT-XL-2-256x256.pt --recipe dit-xl-2-256 --stage all --processes 8
    """
    given = overrides_of(sets, num_attention_heads, sample_size, inherit=inherit)
    given += solve_overrides(no_solve, data, embeddings)
    check_overrides(recipe, given, source)
    _check_stage(stage, recipe)
    from litconvert.cli.reports import show_estimates, show_plan

    use_device(device)
    if stage is not None and recipe is not None:
        estimates = _plan_stages(source, recipe, given, stage, processes, micro_batch)
        if as_json:
            console.data([estimate.to_json() for estimate in estimates])
        else:
            show_estimates(estimates)
        return
    from litconvert.conversion.plan import plan as make_plan

    made = make_plan(source, recipe, given)
    if as_json:
        console.data(made.to_json())
    else:
        show_plan(made, tensors=tensors)


def _check_stage(stage: str | None, recipe: str | None) -> None:
    """Refuse a --stage that is none, and one of no recipe."""
    if stage is None:
        return
    if stage != "all" and not stage.isdecimal():
        raise UsageError(f"--stage {stage}: give the number of a stage, counted from 0, or all")
    if recipe is None:
        raise UsageError("--stage is of a recipe's stages; name it: --recipe (`litconvert recipes ls` lists them)")


def _plan_stages(
    source: str | None,
    recipe: str,
    overrides: list[str],
    stage: str,
    processes: int,
    micro_batch: int | None,
) -> "list[StageEstimate]":
    """`plan --stage`."""
    from litconvert.estimates.plan_stages import plan_stages

    index = None if stage == "all" else int(stage)
    return plan_stages(source, recipe, overrides, stage=index, processes=processes, micro_batch=micro_batch)


def convert(
    source: NamedSource,
    out: Annotated[Path, typer.Argument(help="The model directory to write; with --to original a file.")],
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    inherit: InheritOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    seed: SeedOption = None,
    no_solve: NoSolveOption = False,
    data: SolveDataOption = None,
    embeddings: EmbeddingsOption = None,
    device: DeviceOption = None,
    to: Annotated[
        Literal["original", "diffusers"] | None,
        typer.Option("--to", help="original or diffusers: write the same weights in that layout; nothing is replaced."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Replace softmax attention by linear attention, solved layer by layer; inherit the rest. Rerun to resume.

    Example: litconvert convert DiT-XL-2-256x256.pt lit-xl --inherit q,k,v

    Example: litconvert convert DiT-XL-2-256x256.pt lit-xl --no-solve --set student.conv_size=3

    Example: litconvert convert PixArt-Sigma-XL-2-1024-MS.pth sigma --to diffusers
    """
    given = overrides_of(sets, num_attention_heads, sample_size, seed, inherit)
    given += solve_overrides(no_solve, data, embeddings)
    check_overrides(recipe, given, source)
    if to is None:
        a_new_folder(out)
    elif seed is not None or inherit is not None:
        option = "--inherit" if seed is None else "--seed"
        raise UsageError(f"--to writes the source's own weights: {option} means nothing there, leave it out")
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_plan, show_solved
    from litconvert.conversion.plan import plan as plan_of
    from litconvert.conversion.provenance import Provenance
    from litconvert.recipe.resolve import resolve
    from litconvert.solving.convert import as_begun, convert_planned

    console.be_quiet(quiet or not is_first())
    use_device(device)
    if to is not None:
        _rewrite(resolve(recipe, given, source).recipe, out, to, dry_run=dry_run, force=force, as_json=as_json)
        return
    made = plan_of(source, recipe, given)
    solved = None
    if not dry_run:
        if made.unsolved_because is not None:
            console.note(f"not solved: {made.unsolved_because}")
        made = as_begun(made, out)
        convert_planned(made, out, force=force, listener=screen())
        solved = Provenance.read(out).solve if is_first() else None
    if not is_first():
        return
    if as_json:
        console.data({"out": None if dry_run else str(out), **made.to_json(), **({"solved": solved} if solved else {})})
    else:
        show_solved(made, solved)
        show_plan(made, costs=dry_run)
    if dry_run:
        console.note(f"nothing written (--dry-run); would write {out}")
    else:
        place = out.resolve()
        # Of a student in the current folder the run goes beside that.
        runs = Path("../runs" if Path.cwd().is_relative_to(place) else "runs")
        console.next_step("distill", out, runs / (out.name or place.name))


def _rewrite(settings: "Recipe", out: Path, to: str, *, dry_run: bool, force: bool, as_json: bool) -> None:
    """`convert --to`: the source's own weights in another layout."""
    from litconvert.cli.live import screen
    from litconvert.conversion.relayout import plan_layout
    from litconvert.families.sources import open_source_of

    if settings.student.dtype is not None:
        raise UsageError("--to writes weights exactly as they are; leave student.dtype out")
    opened = open_source_of(settings)
    made = plan_layout(opened, out, to, force=force)
    if not dry_run:
        made.write(max_shard_bytes=settings.student.max_shard_bytes, listener=screen())
    total = len(made.infos)
    for text in opened.reading.unsure:
        console.note(f"assumed: {text}")
    for text in opened.checkpoint.set_aside:
        console.note(f"set aside: {text}")
    for text in made.notes:
        console.note(f"note: {text}")
    console.note(f"nothing written (--dry-run); would write {total} tensors" if dry_run else f"{total} tensors")
    if as_json:
        console.data({"out": None if dry_run else str(out), "layout": to, "tensors": total, "notes": made.notes})
    else:
        console.line(str(out))
