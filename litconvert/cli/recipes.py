"""`litconvert recipes`: listed, shown, copied, checked."""

from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import ForceOption, JsonOption, SetOption
from litconvert.errors import LitconvertError, UsageError


def recipes_ls(as_json: JsonOption = False) -> None:
    """List the packaged recipes.

    Example: litconvert recipes ls
    """
    from litconvert.recipe.packaged import packaged_recipes, summary

    rows = [(name, summary(path)) for name, path in packaged_recipes().items()]
    if as_json:
        console.data([{"name": name, "summary": text} for name, text in rows])
    else:
        console.table(("recipe", ""), rows)


def recipes_show(
    name: Annotated[str, typer.Argument(help="Name, file or Hub id of a recipe.")],
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every resolved key with where it came from.

    Example: litconvert recipes show digits --set student.conv_size=3
    """
    from litconvert.recipe.resolve import resolve

    rows = resolve(name, sets or []).rows()
    if as_json:
        console.data([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
    else:
        console.table(("key", "value", "origin"), rows)


def recipes_copy(
    name: Annotated[str, typer.Argument(help="A packaged recipe.")],
    out: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml here.")] = None,
    force: ForceOption = False,
) -> None:
    """Copy a packaged recipe, comments and all, to edit it.

    Example: litconvert recipes copy digits my-digits.yaml
    """
    from litconvert.common.files import write_whole
    from litconvert.recipe.resolve import find_recipe

    path = find_recipe(name)
    target = out or Path(f"{path.stem}.yaml")
    if target.exists() and not force:
        raise LitconvertError(f"{target} exists; choose another name, or replace it with --force")
    write_whole(target, path.read_text())
    console.line(str(target))


def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Recipes to check.")],
    sets: SetOption = None,
) -> None:
    """Check recipes; every problem is listed with its file and line.

    Example: litconvert recipes validate my-digits.yaml
    """
    from litconvert.recipe.resolve import resolve

    problems = []
    for name in names:
        try:
            resolve(name, sets or [])
            console.line(f"{name}: valid")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))


def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Example: litconvert recipes schema > recipe.schema.json
    """
    from litconvert.recipe.resolve import json_schema

    console.data(json_schema())
