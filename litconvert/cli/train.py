"""`litconvert distill`, `train`, `run`, `demo`: training."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DataOption,
    DeviceOption,
    ForceOption,
    HeadsOption,
    InheritOption,
    JsonOption,
    OwnRecipeOption,
    QuietOption,
    RecordedRecipeOption,
    SeedOption,
    SetOption,
    SizeOption,
    a_data_set,
    a_new_folder,
    a_recipe,
    a_source,
    a_student,
    check_overrides,
    complete_recipe,
    is_first,
    overrides_of,
    recorded_recipe,
    use_device,
)
from litconvert.errors import UsageError, did_you_mean

RECIPE_SUFFIXES = (".yaml", ".yml")


def distill(
    student: Annotated[Path, typer.Argument(help="Model directory, or the Hub id of one.", callback=a_student)],
    out: Annotated[Path, typer.Argument(help="Run directory to write, or to go on with.", callback=a_new_folder)],
    recipe: RecordedRecipeOption = None,
    sets: SetOption = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Another teacher than the source.", callback=a_source)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Dataset folder. Default: the recipe's, or else the teacher draws it.", callback=a_data_set
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN[@STEP]", help="Start from another run's weights (distill.start.path)."),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Teach a student with its softmax teacher. Rerun to resume; with more steps (--set) to go on after the end.

    Example: litconvert distill lit-xl runs/lit-xl --recipe dit-xl-2-256 --data latents/

    Example: litconvert distill lit-xl runs/second --from runs/lit-xl@20000 --set distill.stages.0.learning_rate=5e-5
    """
    overrides = overrides_of(sets, seed=seed)
    check_overrides(recipe or recorded_recipe(student), overrides)
    from litconvert import workflow
    from litconvert.cli.live import screen
    from litconvert.cli.reports import run_facts, show_run

    console.be_quiet(quiet or not is_first())
    use_device(device)
    run = workflow.distill(
        student,
        out,
        recipe,
        teacher=teacher,
        data=data,
        start=start,
        overrides=overrides,
        force=force,
        listener=screen(),
    )
    if not is_first():
        return
    facts = run_facts(run)
    console.data(facts) if as_json else show_run(facts)
    console.next_step("push", out, "OWNER/NAME", "--dry-run")


def train(
    out: Annotated[Path, typer.Argument(help="Run directory to write, or to go on with.", callback=a_new_folder)],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="Name or file of a recipe with a scratch section.",
            callback=a_recipe,
            autocompletion=complete_recipe,
        ),
    ],
    data: DataOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a softmax model from nothing: a teacher of your own. Rerun to resume.

    Example: litconvert train runs/teacher --recipe digits-teacher --data latents/
    """
    overrides = overrides_of(sets, seed=seed)
    check_overrides(recipe, overrides)
    from litconvert.cli.live import screen
    from litconvert.cli.reports import run_facts, show_run
    from litconvert.distillation.pretraining import train as train_model

    console.be_quiet(quiet or not is_first())
    use_device(device)
    run = train_model(out, recipe, data=data, overrides=overrides, force=force, listener=screen())
    if is_first():
        facts = run_facts(run)
        console.data(facts) if as_json else show_run(facts)
        console.next_step("convert", run / "model", "STUDENT")


def run(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A source: file, folder, Hub id (owner/name) or asset:NAME. Or a recipe: a packaged one's name, or a "
            ".yaml file.",
            autocompletion=complete_recipe,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Default: runs/NAME, called after the source or the recipe.", callback=a_new_folder
        ),
    ] = None,
    recipe: OwnRecipeOption = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Of a recipe: another source. Default: the recipe's.")
    ] = None,
    sets: SetOption = None,
    inherit: InheritOption = None,
    num_attention_heads: HeadsOption = None,
    sample_size: SizeOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The whole line: convert, latents, distil, sample, evaluate, push. What is done is skipped.

    Of a source, by the packaged recipe for what it is or by the one of --recipe; or of a recipe, on its own source.

    Example: litconvert run DiT-XL-2-256x256.pt

    Example: litconvert run DiT-XL-2-256x256.pt --recipe dit-xl-2-256-paper --out runs/paper

    Example: litconvert run digits --inherit q,k,v
    """
    wanted, start = _recipe_and_source(what, recipe, source)
    overrides = overrides_of(sets, num_attention_heads, sample_size, seed, inherit)
    check_overrides(wanted, overrides, start)
    place = out or _folder_for(what)
    from litconvert.cli.live import screen
    from litconvert.cli.reports import result_facts, show_result
    from litconvert.workflow import run_line

    console.be_quiet(quiet)
    use_device(device)
    result = run_line(wanted, place, source=start, overrides=overrides, force=force, listener=screen())
    if as_json:
        console.data(result_facts(result))
    else:
        show_result(result)
        if result.url is None:
            console.next_step("push", result.run, "OWNER/NAME", "--dry-run")


def _recipe_and_source(what: str, recipe: str | None, source: str | None) -> tuple[str | None, str | None]:
    """What `run` was asked to do: a recipe, None for that of the source, and a source, None for that of the recipe.

    Raises UsageError for two sources, and for a name that is neither.
    """
    from litconvert.recipe.packaged import packaged_recipes

    known = packaged_recipes()
    if recipe is None and (what in known or Path(what).suffix in RECIPE_SUFFIXES):
        return what, a_source(source)
    if source is not None:
        raise UsageError(f"--source is of a recipe, and {what} is a source already: leave one of them out")
    if re.fullmatch(r"[\w-]+", what) and not os.path.exists(what):
        raise UsageError(
            f"{what}: neither a packaged recipe{did_you_mean(what, known)} nor a file or folder; `litconvert recipes "
            "ls` lists the recipes"
        )
    return recipe, a_source(what)


def _folder_for(what: str) -> Path:
    """Where `run` writes unless it is told: runs/NAME, called after the recipe or source. Raises UsageError where that
    is the place of the source itself."""
    from litconvert.common.hub import is_weights_name

    path = Path(os.path.abspath(what if os.path.exists(what) else what.removeprefix("asset:").partition("@")[0]))
    place = Path("runs") / (path.stem if is_weights_name(path.name) or path.suffix in RECIPE_SUFFIXES else path.name)
    if place.exists() and place.resolve() in (path.resolve(), *path.resolve().parents):
        raise UsageError(f"{what} is in {place} itself, where its outputs would go: name another folder (--out)")
    return place


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", callback=a_new_folder)] = Path("runs/digits"),
    sets: SetOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """`run digits`: the whole line on a small trained DiT that ships with litconvert. No network, no GPU.

    Example: litconvert demo
    """
    run("digits", out=out, sets=sets, device=device, force=force, as_json=as_json, quiet=quiet)
