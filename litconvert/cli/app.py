"""The command line: which commands there are. Each imports what it needs when it runs, so that help answers at once."""

import sys
from typing import Annotated

import typer

from litconvert import __version__
from litconvert.cli import check, convert, evaluate, latents, models, recipes, terminal, train

INTERRUPTED = 130
app = typer.Typer(
    name="litconvert",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
latents_app = typer.Typer(
    help="Training data for distillation.\n\nExample: litconvert latents encode images/ latents/ --recipe dit-xl-2-256",
    no_args_is_help=True,
)
recipes_app = typer.Typer(
    help="List, show, copy and check recipes.\n\nExample: litconvert recipes show digits", no_args_is_help=True
)
app.add_typer(latents_app, name="latents")
app.add_typer(recipes_app, name="recipes")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"litconvert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a softmax diffusion transformer into a linear-attention one: convert, distil, sample, push.

    Example: litconvert demo

    Example: litconvert convert DiT-XL-2-256x256.pt lit-xl
    """


# In the order of the help, each with its line there.
for command, summary in (
    (convert.inspect, "Say what a checkpoint is, and why."),
    (convert.plan, "Show what conversion or training would do and take."),
    (convert.convert, "Replace softmax attention by linear attention."),
    (train.distill, "Train a student with its softmax teacher."),
    (models.probe, "Rank layers by what linear attention costs them."),
    (train.train, "Train a softmax model from nothing."),
    (models.sample, "Draw samples."),
    (evaluate.evaluate, "Measure a student against its teacher."),
    (models.push, "Publish a model to the Hugging Face Hub."),
    (train.run, "The whole line, from a checkpoint to a result."),
    (train.demo, "The whole line on a small model that is included."),
    (check.env, "Versions and devices, and whether all works here."),
):
    app.command(short_help=summary)(command)
latents_app.command("synthesize")(latents.latents_synthesize)
latents_app.command("encode")(latents.latents_encode)
latents_app.command("show")(latents.latents_show)
recipes_app.command("ls")(recipes.recipes_ls)
recipes_app.command("show")(recipes.recipes_show)
recipes_app.command("copy")(recipes.recipes_copy)
recipes_app.command("validate")(recipes.recipes_validate)
recipes_app.command("schema")(recipes.recipes_schema)


def main() -> None:
    """Run the command line; exits 0, 1 (known error), 2 (usage), 3 (a gate failed) or 130 (interrupted)."""
    terminal.hush_libraries()
    terminal.take_any_text()
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        sys.exit(terminal.fail(KeyboardInterrupt()))  # typer ends with no word
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(terminal.fail(error))
