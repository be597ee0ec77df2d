"""The recipes that ship with litconvert. Apart from `schema`, so that listing them does not wait for the schema."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litconvert.common.files import printable
from litconvert.errors import UsageError, did_you_mean

# The recipe for a source: by family, width and side of the latent.
_RECIPES = {
    ("dit", 384, 32): "dit-s-2-256",
    ("dit", 768, 32): "dit-b-2-256",
    ("dit", 1024, 32): "dit-l-2-256",
    ("dit", 1152, 32): "dit-xl-2-256",
    ("dit", 1152, 64): "dit-xl-2-512",
    ("sit", 1152, 32): "sit-xl-2-256",
    # Its sibling trained on SAM's images (pixart-alpha-sam-256) has the same keys and shapes: who has that one says so.
    ("pixart-alpha", 1152, 32): "pixart-alpha-256",
    ("pixart-alpha", 1152, 64): "pixart-alpha-512",
    ("pixart-alpha", 1152, 128): "pixart-alpha-1024",
    ("pixart-sigma", 1152, 64): "pixart-sigma-512",
    ("pixart-sigma", 1152, 128): "pixart-sigma-1024",
    ("pixart-sigma", 1152, 256): "pixart-sigma-2k",
}


def recipe_of(family: str, config: Mapping[str, Any]) -> str | None:
    """The packaged recipe for a source of this family and config, None where there is none."""
    if (config["patch_size"], config["in_channels"]) != (2, 4):
        return None
    return _RECIPES.get((family, config["hidden_size"], config["sample_size"]))


@dataclass(frozen=True)
class Asset:
    """What the file of an asset does not tell of itself: assets/NAME.json.

    Attributes:
        recipe: the packaged one for it; None: none.
        hints: keys of a recipe's `source` section.
    """

    recipe: str | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)


def asset_of(source: str) -> Asset:
    """What is known of a source that ships with litconvert (`asset:NAME`); of any other nothing."""
    if not source.startswith("asset:"):
        return Asset()
    path = Path(__file__).parents[1] / "assets" / f"{source.removeprefix('asset:')}.json"
    return Asset(**json.loads(path.read_text())) if path.is_file() else Asset()


def recipes_directory() -> Path:
    """Where the packaged recipes are: inside the wheel, beside the package in a checkout."""
    packaged = Path(__file__).parents[1] / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name to file."""
    return {path.stem: path for path in sorted(recipes_directory().glob("*.yaml"))}


# The families of packaged recipes, by the beginning of their names.
_FAMILIES = {
    "dit": "DiT",
    "sit": "SiT",
    "pixart-alpha": "PixArt-alpha",
    "pixart-sigma": "PixArt-Sigma",
    "digits": "small models, to try it",
    "emoji": "small models, to try it",
}


@dataclass(frozen=True)
class ListedRecipe:
    """A packaged recipe, as it is listed.

    Attributes:
        family: of the models that it is for.
        default: taken by itself for a source of its kind.
        summary: a line.
    """

    name: str
    family: str
    default: bool
    summary: str


def list_recipes() -> list[ListedRecipe]:
    """The packaged recipes by family, and in each those that are taken by themselves first."""
    defaults = [*_RECIPES.values(), "digits"]
    places = {name: place for place, name in enumerate(defaults)}

    def listed(name: str, path: Path) -> ListedRecipe:
        family = next(known for start, known in _FAMILIES.items() if name.startswith(start))
        return ListedRecipe(name, family, name in places, summary(path))

    found = [listed(name, path) for name, path in packaged_recipes().items()]
    families = list(dict.fromkeys(_FAMILIES.values()))
    order = [(families.index(one.family), places.get(one.name, len(places)), one.name) for one in found]
    return [one for _, one in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def copied_text(path: Path, target: Path) -> str:
    """A packaged recipe's text as it stands in `target`: its first line names the command for that file."""
    first, rest = path.read_text().split("\n", 1)
    # The command comes after the comment for editors; of its words the one that is the recipe's name is meant.
    editors, command = first.split("litconvert ", 1)
    own = re.sub(rf"(?<![\w/-]){re.escape(path.stem)}(?![\w./-])", lambda _: printable(str(target)), command)
    return f"{editors}litconvert {own}\n{rest}"


def local_recipe(name: str) -> Path | None:
    """A recipe's file, from a packaged name or a path; None: the name is a Hub id.

    Raises UsageError when it is none of them, and says what is near.
    """
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists() and path.suffix not in (".yaml", ".yml"):
        return None
    raise UsageError(
        f"no recipe {name!r}: neither a packaged recipe nor a file{did_you_mean(name, packaged)}; "
        "`litconvert recipes ls` lists the packaged ones"
    )


def summary(path: Path) -> str:
    """A packaged recipe's second comment line."""
    lines = path.read_text().splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("#") else ""
