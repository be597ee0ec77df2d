"""`litconvert recipes`: listed, shown, copied, checked."""

import json
from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import JsonOption, ReplaceOption, SetOption, complete_recipe
from litconvert.errors import UsageError

SCHEMA = "recipe.schema.json"


def recipes_ls(as_json: JsonOption = False) -> None:
    """List the packaged recipes, by family. Those marked * are taken by themselves for a source of their kind.

    Example: litconvert recipes ls

    Example: litconvert recipes ls --json
    """
    from litconvert.recipe.packaged import list_recipes

    found = list_recipes()
    if as_json:
        names = ("name", "family", "default", "summary")
        console.data([{name: getattr(one, name) for name in names} for one in found])
        return
    families = dict.fromkeys(one.family for one in found)
    rows: list[tuple[str, str, str]] = []
    for family in families:
        rows += [(family, "", "")] if not rows else [("", "", ""), (family, "", "")]
        rows += [(f"  {one.name}", "*" if one.default else "", one.summary) for one in found if one.family == family]
    console.table(("recipe", "", ""), rows)
    console.note("* taken by itself for a source of its kind; `litconvert recipes show NAME` lists every key")


def recipes_show(
    name: Annotated[str, typer.Argument(help="Name, file or Hub id of a recipe.", autocompletion=complete_recipe)],
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
        # As --set takes it: JSON is YAML, but for the quotes that few strings need.
        texts = [value if isinstance(value, str) else json.dumps(value) for _, value, _ in rows]
        console.table(
            ("key", "origin", "value"),
            [(key, origin, text) for (key, _, origin), text in zip(rows, texts, strict=True)],
        )


def recipes_copy(
    name: Annotated[str, typer.Argument(help="A packaged recipe.", autocompletion=complete_recipe)],
    out: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml here.")] = None,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a packaged recipe, comments and all, to edit it, and the schema that editors check it by.

    Example: litconvert recipes copy digits my-digits.yaml
    """
    from litconvert.common.files import refuse_existing, require_file_name, write_whole
    from litconvert.recipe.packaged import copied_text
    from litconvert.recipe.resolve import find_recipe, json_schema

    path = find_recipe(name)
    target = out or Path(f"{path.stem}.yaml")
    if target.is_dir():
        target /= f"{path.stem}.yaml"
    require_file_name(target)
    refuse_existing(target, force=force)
    write_whole(target, copied_text(path, target))
    schema = target.parent / SCHEMA
    if not schema.exists() or force:
        write_whole(schema, json.dumps(json_schema(), indent=2) + "\n")
        console.note(f"{schema}: what editors check it by")
    console.data({"recipe": str(target), "schema": str(schema)}) if as_json else console.line(str(target))


def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Recipes to check.")],
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check recipes; every problem is listed with its file and line.

    Example: litconvert recipes validate my-digits.yaml
    """
    from litconvert.recipe.resolve import resolve

    problems, valid = [], []
    for name in names:
        try:
            resolve(name, sets or [])
            valid.append(name)
        except UsageError as error:
            problems.append(str(error))
    if as_json:
        console.data({"valid": valid, "problems": problems})
    else:
        for name in valid:
            console.line(f"{name}: valid")
    if problems:
        raise UsageError("\n".join(problems))


def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Example: litconvert recipes schema > recipe.schema.json
    """
    from litconvert.recipe.resolve import json_schema

    console.data(json_schema())
