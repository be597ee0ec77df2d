"""The recipes that ship with litconvert. Apart from `recipe`, so that listing them does not wait for the schema."""

from pathlib import Path


def recipes_directory() -> Path:
    """Where the packaged recipes are: inside the wheel, beside the package in a checkout."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name to file."""
    return {path.stem: path for path in sorted(recipes_directory().glob("*.yaml"))}


def summary(path: Path) -> str:
    """A packaged recipe's second comment line."""
    lines = path.read_text().splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("#") else ""
