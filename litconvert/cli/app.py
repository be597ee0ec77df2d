"""The command line: which commands there are. Each imports what it needs when it runs, so that help answers at once."""

import sys

import typer

from litconvert.cli import check, convert, latents, models, recipes, terminal, train

INTERRUPTED = 130
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

# In the order of the help.
for command in (
    convert.inspect,
    convert.plan,
    convert.convert,
    train.distill,
    models.probe,
    train.train,
    models.sample,
    models.evaluate,
    models.push,
    train.run,
    train.demo,
    check.env,
):
    app.command()(command)
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
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        sys.exit(terminal.fail(KeyboardInterrupt()))  # typer ends with no word
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(terminal.fail(error))
