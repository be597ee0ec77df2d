"""A recipe's way in: found by name, path or Hub id, read, overridden, checked, and where each value came from."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from litconvert.common.files import printable
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.recipe.packaged import local_recipe, packaged_recipes
from litconvert.recipe.schema import FORMER_STAGES, NUMBER, STAGES, FlowMatchingStage, Recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, as editors read them: `no` and `12:30` are strings, `1e-3` is a number.

    Aliases are refused: a recipe may come from the Hub, and a few lines of them can expand to any size.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not read, write the value out"
            mark = cast(yaml.Mark, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """YAML as nodes, which know their lines, and as plain data."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and, for every key, where its value came from."""

    name: str
    recipe: Recipe
    origins: dict[str, str] = field(repr=False)

    def rows(self) -> list[tuple[str, Any, str]]:
        """(key, value, origin) of every resolved key, in order."""
        return [
            (key, value, self.origins.get(key, "default"))
            for key, value in flatten(self.recipe.model_dump(mode="json"))
        ]


def flatten(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves with dotted keys; lists of mappings are walked, other lists are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, tree


def find_recipe(name: str) -> Path:
    """A recipe's file, from a packaged name, a path or a Hub id.

    Raises UsageError when there is none, and says what is near.
    """
    path = local_recipe(name)
    if path is None:
        from litconvert.common.hub import download

        return download(name, "recipe.yaml", revision=None)
    return path


@dataclass
class _Tree:
    """A YAML file as plain data, with the line of every key."""

    data: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]


def _read_yaml(path: Path) -> _Tree:
    try:
        node, data = _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file, so not a recipe") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply to be a recipe") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, location: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, key.value)
                if here in lines:
                    raise UsageError(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice; remove one")
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*location, index)] = value.start_mark.line + 1
                walk(value, (*location, index))

    walk(node, ())
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1: a recipe is a mapping of sections, not a {type(data).__name__}")
    return _Tree(data, lines)


VAE_PATH = "source.vae.path"


def _override(data: dict[str, Any], assignment: str) -> tuple[str, Any]:
    """Set `a.b.0.c=value` in plain data; returns the key and the value."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment!r}: write it as key=value, for example --set student.conv_size=3")
    parts = tuple(key.strip().split("."))
    try:
        _, value = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = "is not valid YAML" if printable(text) == text else "is not UTF-8; rename the file or folder it names"
        raise UsageError(f"--set {assignment!r}: the value {reason}") from error
    target: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                known = f"0 to {len(target) - 1}" if target else "nothing"
                raise UsageError(f"--set {key}: {'.'.join(parts[:depth])} is a list that holds {known}, not {part!r}")
            if last:
                target[int(part)] = value
            else:
                target = target[int(part)]
        elif isinstance(target, dict):
            if last:
                target[part] = value
            else:
                if target.get(part) is None:
                    target[part] = {}
                target = target[part]
        else:
            raise UsageError(f"--set {key}: {'.'.join(parts[:depth])} is a value, not a section")
    return ".".join(parts), value


def check_sections(overrides: Sequence[str]) -> None:
    """Refuse overrides of which no recipe could make anything, before it is known of which recipe they are."""
    for assignment in overrides:
        key, _ = _override({}, assignment)
        section = key.partition(".")[0]
        if section not in Recipe.model_fields:
            raise UsageError(f"--set: {section}: unknown key{did_you_mean(section, Recipe.model_fields)}")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the section that holds `location`, for did-you-mean."""
    schema = Recipe.model_json_schema()

    def expand(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return expand(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        options = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
        return [deep for option in options for deep in expand(option)] or [node]

    nodes = [schema]
    for part in location[:-1]:
        children = []
        for node in nodes:
            child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
            children += expand(child) if child else []
        nodes = children or nodes  # a discriminator's tag is in pydantic's location, but is no level of the file
    return sorted({key for node in nodes for key in node.get("properties", ())})


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _problems(
    error: ValidationError, source: str, lines: dict[tuple[str | int, ...], int], sets: set[str]
) -> list[str]:
    problems = []
    for detail in error.errors():
        location = tuple(part for part in detail["loc"] if part not in STAGES)
        key = ".".join(str(part) for part in location)
        nearest = location
        while nearest and nearest not in lines:
            nearest = nearest[:-1]
        where = f"{source}:{lines[nearest]}" if nearest else source
        if any(f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.") for given in sets):
            where = "--set"
        if detail["type"] == "extra_forbidden":
            message = f"unknown key{did_you_mean(str(location[-1]), _known_keys(location))}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif detail["type"] == "union_tag_not_found":
            message = f"objective is missing; there are {_listed(STAGES)}"
        elif detail["type"] == "union_tag_invalid":
            tag = str(detail["ctx"]["tag"])
            unknown = f"unknown objective {tag!r}{did_you_mean(tag, STAGES)}; there are {_listed(STAGES)}"
            message = FORMER_STAGES.get(tag, unknown)
        else:
            message = detail["msg"].removeprefix("Value error, ")
            message = message.replace("a valid array", "a list").replace("an object", "a section of key: value")
            message = message[:1].lower() + message[1:]
            if not isinstance(detail["input"], dict):
                message += f", got {detail['input']!r}"
        problems.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
    return problems


def resolve(name: str | None, overrides: Sequence[str] = (), source: str | Path | None = None) -> ResolvedRecipe:
    """Read a recipe and apply `key=value` overrides: defaults < recipe < overrides.

    Args:
        name: of a packaged recipe, a path or a Hub id; None: there is no recipe, only the defaults.
        overrides: `key=value`.
        source: a positional source, in the place of the recipe's path; None: the recipe's.

    Raises UsageError that lists every problem at once, each with its file and line.
    """
    if not name:
        return _with_source(resolve_data({}, overrides, "command line"), source)
    path = find_recipe(name)
    tree = _read_yaml(path)
    label = name if name in packaged_recipes() else str(path)
    return _with_source(_resolve(tree.data, overrides, label=label, lines=tree.lines), source)


def resolve_data(data: dict[str, Any], overrides: Sequence[str], label: str) -> ResolvedRecipe:
    """The same for a recipe that is already plain data."""
    return _resolve(json.loads(json.dumps(data)), overrides, label=label, lines={})


def _resolve(
    data: dict[str, Any], overrides: Sequence[str], *, label: str, lines: dict[tuple[str | int, ...], int]
) -> ResolvedRecipe:
    origins = {}
    for location, line in lines.items():
        origins[".".join(str(part) for part in location)] = f"{label}:{line}"
    sets = set()
    for assignment in overrides:
        key, value = _override(data, assignment)
        sets.add(key)
        if key == VAE_PATH:  # another VAE brings its own folder, scaling and shift
            section = data["source"]["vae"]
            told = {name for name in section if f"source.vae.{name}" in sets}
            data["source"]["vae"] = {name: section[name] for name in section if name in told}
            origins = {old: origin for old, origin in origins.items() if not old.startswith("source.vae.")}
            origins |= {f"source.vae.{name}": "--set" for name in told}
        origins = {old: origin for old, origin in origins.items() if not old.startswith(f"{key}.")}
        origins |= {leaf: "--set" for leaf, _ in flatten(value, key)}
    try:
        # As JSON, in which a list may stand for a tuple: strict, so that nothing is coerced (yes is no integer).
        recipe = Recipe.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems = _problems(error, label, lines, sets)
        raise UsageError("\n".join(problems)) from error
    return ResolvedRecipe(name=label, recipe=recipe, origins=origins)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    # The class of a stage may not be called as the forward process is; editors know it by the name of its objective.
    text = json.dumps(Recipe.model_json_schema()).replace(FlowMatchingStage.__name__, "FlowMatching")
    schema: dict[str, Any] = json.loads(text)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "litconvert recipe"
    return schema


def read_recorded(path: Path) -> Recipe:
    """The resolved recipe of a model or run directory.

    Raises LitconvertError when it is missing or not ours.
    """
    if not path.is_file():
        raise LitconvertError(f"{path} is missing: {path.parent} was not written by litconvert, or is incomplete")
    return resolve(str(path)).recipe


def _with_source(resolved: ResolvedRecipe, source: str | Path | None) -> ResolvedRecipe:
    """The recipe with a positional source in the place of its path."""
    if source is None:
        return resolved
    path = str(source)
    recipe = resolved.recipe.model_copy(update={"source": resolved.recipe.source.model_copy(update={"path": path})})
    return ResolvedRecipe(resolved.name, recipe, {**resolved.origins, "source.path": "SRC"})
