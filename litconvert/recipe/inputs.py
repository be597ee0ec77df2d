"""What an output was made from: a digest that tells whether it is that of these inputs, and the names of what changed.

A digest covers the keys of a recipe that differ from their defaults, and the number of the table of defaults: a later
version that adds a key finds its outputs again, and one that changes a default does not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from litconvert.common.files import digest_of
from litconvert.recipe.resolve import flatten
from litconvert.recipe.schema import DEFAULTS, Section

# Inputs that are no keys of a recipe, as they are called in a sentence.
NAMES = {
    "file.sha256": "the source's file",
    "file.weights": "the set of weights taken from the source",
    "file.config": "what the source was read as",
    "student.sha256": "the student's weights",
    "teacher.sha256": "the teacher's file",
    "teacher.weights": "the set of weights taken from the teacher",
    "teacher.config": "what the teacher was read as",
    "start.sha256": "the weights to start from",
    "data.digest": "the data set",
    "images": "the images",
    "prompts": "the prompts",
    "target": "the model that the data is for",
}
NAMED_AT_MOST = 6


def given(section: Section | None, **options: Any) -> Any:
    """The keys of a recipe's section that differ from their defaults, as plain data; None where there is no section.

    Args:
        options: `include` and `exclude`, as of pydantic's model_dump.
    """
    return None if section is None else section.model_dump(mode="json", exclude_defaults=True, **options)


@dataclass(frozen=True)
class Inputs:
    """What determines an output.

    Attributes:
        values: plain data; of a recipe what `given` gives, under its own keys.
        first_digest: what litconvert wrote down for these inputs before it kept them (outputs of format 1).
    """

    values: Mapping[str, Any]
    first_digest: str | None = None

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The values as JSON has them, lists and all."""
        plain: dict[str, Any] = json.loads(json.dumps(self.values, default=str))
        return plain

    @cached_property
    def digest(self) -> str:
        """sha256 of the values and the number of the table of defaults."""
        return digest_of({"defaults": DEFAULTS, **self.values})

    @property
    def record(self) -> dict[str, Any]:
        """What is kept with the output."""
        return {"digest": self.digest, "defaults": DEFAULTS, "inputs": self.plain}

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether the output that carries this record was made from these inputs."""
        return record.get("digest") is not None and record["digest"] in (self.digest, self.first_digest)

    def changes(self, record: Mapping[str, Any]) -> str:
        """What differs from the inputs of an output, as a sentence's part: `seed was 0 and is 1`."""
        before = record.get("inputs")
        if before is None:
            return "other inputs, whose names were not kept then"
        return differences(before, self.plain, record.get("defaults"))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: int | None = DEFAULTS) -> str:
    """What differs between two sets of inputs, as a sentence's part.

    Args:
        defaults: the number of the table of defaults that `before` was resolved with.
    """
    old, new = ({key: value for key, value in flatten(tree) if value != {}} for tree in (before, now))
    changed: list[str] = []
    if defaults != DEFAULTS:
        changed.append(f"the defaults (table {defaults} then, {DEFAULTS} in this litconvert)")
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) == new.get(key):
            continue
        named = next((name for start, name in NAMES.items() if key == start or key.startswith(f"{start}.")), None)
        text = named or f"{key} was {_value(old, key)} and is {_value(new, key)}"
        if text not in changed:
            changed.append(text)
    more = len(changed) - NAMED_AT_MOST
    shown = [*changed[:NAMED_AT_MOST], *([f"{more} more"] if more > 0 else [])]
    return "; ".join(shown)


def _value(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "the default"
