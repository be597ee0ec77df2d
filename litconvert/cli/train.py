"""`litconvert distill`, `train`, `run`, `demo`: training."""

from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DeviceOption,
    ForceOption,
    QuietOption,
    SeedOption,
    SetOption,
    is_first,
    overrides_of,
    use_device,
)


def distill(
    student: Annotated[Path, typer.Argument(help="Model directory that `convert` wrote.")],
    out: Annotated[Path, typer.Argument(help="Run directory to write, or to go on with.")],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Default: the one recorded in STUDENT.")] = None,
    sets: SetOption = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Another teacher than the source.")] = None,
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
    from litconvert import workflow
    from litconvert.cli.live import screen
    from litconvert.runs.plots import compare

    console.be_quiet(quiet or not is_first())
    use_device(device)
    run = workflow.distill(
        student,
        out,
        recipe,
        teacher=teacher,
        data=data,
        start=start,
        overrides=overrides_of(sets, seed=seed),
        force=force,
        listener=screen(),
    )
    if is_first():
        compare(run)
        console.line(str(run / "model"))


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
    from litconvert.cli.live import screen
    from litconvert.distillation.pretraining import train as train_model

    console.be_quiet(quiet or not is_first())
    use_device(device)
    run = train_model(out, recipe, data=data, overrides=overrides_of(sets, seed=seed), force=force, listener=screen())
    if is_first():
        console.line(str(run / "model"))


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
    from litconvert.cli.live import screen
    from litconvert.cli.reports import show_result
    from litconvert.workflow import run_line

    console.be_quiet(quiet)
    use_device(device)
    place = out or Path("runs") / Path(recipe).stem
    overrides = overrides_of(sets, seed=seed)
    show_result(run_line(recipe, place, source=source, overrides=overrides, force=force, listener=screen()))


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
