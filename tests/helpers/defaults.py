"""The table of defaults that digests of inputs rest on; `python -m tests.helpers.defaults` writes it anew."""

import json
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from litconvert.model.config import CONFIG_DEFAULTS
from litconvert.recipe import schema as recipe

TABLE = Path(__file__).with_name("defaults.json")


def current_defaults() -> dict[str, Any]:
    """The default of every key: `Section.key` of a recipe's sections, `config.key` of the model's config."""
    found = {f"config.{key}": value for key, value in CONFIG_DEFAULTS.items()}
    for name, section in vars(recipe).items():
        if isinstance(section, type) and issubclass(section, recipe.Section):
            for key, field in section.model_fields.items():
                if field.default is not PydanticUndefined:
                    found[f"{name}.{key}"] = to_jsonable_python(field.default)
    return dict(sorted(found.items()))


def changed(kept: Any, now: Any) -> bool:
    """Whether a default is another one now; a section that has more keys is not."""
    if isinstance(kept, dict) and isinstance(now, dict):
        return any(key in now and changed(value, now[key]) for key, value in kept.items())
    return bool(kept != now)


if __name__ == "__main__":
    kept, now = json.loads(TABLE.read_text()), current_defaults()
    others = [key for key, value in kept["defaults"].items() if changed(value, now.get(key, value))]
    if others and kept["number"] == recipe.DEFAULTS:
        raise SystemExit(f"raise litconvert.recipe.schema.DEFAULTS first: other defaults for {', '.join(others)}")
    TABLE.write_text(json.dumps({"number": recipe.DEFAULTS, "defaults": now}, indent=1) + "\n")
