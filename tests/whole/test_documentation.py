"""README.md and docs/, read together: every command, option, recipe, key, module, name and link in them is there."""

import ast
import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import litconvert
from litconvert.cli.app import app
from litconvert.errors import UsageError
from litconvert.recipe.packaged import packaged_recipes
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Encode, FlowMatchingStage, Hybrid, Recipe, Section, Solve, Synthesize

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {path: path.read_text() for path in (README, *sorted(DOCS.rglob("*.md")))}
TEXT = "\n".join(PAGES.values())
MOST_LINES = 170
HELP = {"-h", "--help"}


def commands(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command by its words, such as (latents, encode)."""
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    elif isinstance(command, TyperCommand):
        for parameter in command.params:
            parameter.callback = None  # of what is named here no file exists
        yield path, command


PROGRAM = cast(TyperGroup, get_command(app))
COMMANDS = dict(commands(PROGRAM))


def options_of(command: TyperCommand | TyperGroup) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("-")} | HELP


def split(words: list[str]) -> tuple[TyperCommand, list[str]]:
    """The command that some words name, and what they give it."""
    for length in (2, 1):
        if (found := COMMANDS.get(tuple(words[:length]))) is not None:
            return found, words[length:]
    raise AssertionError(f"no command {' '.join(words)}")


def lines() -> list[str]:
    """Every `litconvert ...` line of code, those that a launcher starts among them, without what the shell does."""
    code = "\n".join(re.findall(r"^ {4,}(\S.*)$", re.sub(r"\\\n\s*", "", TEXT), flags=re.MULTILINE))
    found = re.findall(r"^(?:(?:accelerate|torchrun) .* -m )?litconvert (.+)$", code, flags=re.MULTILINE)
    return [line.partition(" > ")[0] for line in found]


def spans() -> list[str]:
    """Every span of code in a sentence."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", TEXT)]


def test_every_line_is_one_that_the_command_line_takes() -> None:
    assert len(lines()) > 60
    for line in lines():
        command, arguments = split(shlex.split(line))
        try:
            command.make_context(line.split()[0], arguments)
        except Exception as error:  # typer's own, whose names it keeps to itself
            pytest.fail(f"litconvert {line}: {getattr(error, 'message', error)}")


def test_every_span_names_only_commands_and_options_that_exist() -> None:
    names = {path[0] for path in COMMANDS}
    found = [span.partition("litconvert ")[2] for span in spans() if re.search(r"^litconvert |-m litconvert ", span)]
    assert len(found) > 40
    # Those that leave the program's name out.
    found += [span for span in spans() if span.split()[0] in names and " -" in span]
    for span in found:
        words = span.split()
        if words[0] == "COMMAND":
            continue
        command, arguments = (PROGRAM, words) if words[0].startswith("-") else split(words)
        for option in [word for word in arguments if word.startswith("-")]:
            assert option in options_of(command), f"{span}: no option {option}"


def test_options_named_in_the_table_of_commands_exist() -> None:
    rows = re.findall(r"^\| `litconvert ([a-z]+)(?: ([a-z]+))?[^`]*` \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert len(rows) >= 12
    for first, second, text in rows:
        command, _ = split([first, second])
        for option in re.findall(r"`(--[a-z-]+)`", text):
            assert option in options_of(command), f"{first}: no option {option}"


def test_the_reference_has_every_command_with_exactly_its_options() -> None:
    text = PAGES[DOCS / "commands.md"]
    sections = dict(re.findall(r"^## litconvert ([a-z ]+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    assert sections.keys() == {" ".join(path) for path in COMMANDS}
    shared = text.partition("## Options that several commands have\n")[2].partition("\n## ")[0]
    for path, command in COMMANDS.items():
        name, options = " ".join(path), options_of(command) - HELP
        told = set(re.findall(r"`(--[a-z-]+)", sections[name]))
        assert told == {option for option in options if option.startswith("--")}, name
        for option in options - told:
            assert f"`{option}`" in sections[name] + shared, f"{name}: {option} is told nowhere"


def test_make_targets_and_modules_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", TEXT)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    texts = TEXT + "".join(path.read_text() for path in packaged_recipes().values())
    for module in set(re.findall(r"python\s+-m ((?:benchmarks|litconvert)\.[a-z_.]+)", texts)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def python_blocks() -> list[ast.Module]:
    return [ast.parse(block) for block in re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)]


def test_imports_from_litconvert_find_what_they_name() -> None:
    nodes = [node for block in python_blocks() for node in ast.walk(block)]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("litconvert")]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_calls_of_litconvert_s_functions_give_arguments_that_they_take() -> None:
    nodes = [node for block in python_blocks() for node in ast.walk(block)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("litconvert.")]
    assert len(calls) > 6
    for call in calls:
        name = ast.unparse(call.func).removeprefix("litconvert.")
        assert name in litconvert.__all__
        given = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(getattr(litconvert, name)).bind(*call.args, **given)


def test_names_in_litconvert_are_there() -> None:
    named = {name for span in spans() for name in re.findall(r"^litconvert\.[\w.]*\w", span)} - {"litconvert.json"}
    assert len(named) > 8
    for name in named:
        pkgutil.resolve_name(name)


def test_recipes_exist() -> None:
    families = r"dit-[sblx]|sit-|pixart-(?:alpha|sigma)-|digits|emoji"
    named = {span for span in spans() if re.fullmatch(rf"(?:{families})[\w-]*", span)}
    named |= set(re.findall(r"\bdit-[a-z]+-2-\d+(?:-\w+)?\b", TEXT))
    assert named <= packaged_recipes().keys()
    assert packaged_recipes().keys() <= named, "a packaged recipe is told nowhere"


def problem_with(key: str) -> str:
    """What a recipe says of a key that is set to nothing, which many may not be."""
    try:
        resolve("digits", [f"{key}=null"])
    except UsageError as error:
        return str(error)
    return ""


def test_keys_of_recipes_exist() -> None:
    sections = "|".join(Recipe.model_fields)
    keys = set(re.findall(rf"(?<![\w/.])((?:{sections})(?:\.[a-z0-9_]+)+)", TEXT)) | {"seed"}
    keys = {key for key in keys if not key.endswith(".md")}
    assert len(keys) > 60
    problems = {key: problem_with(key) for key in keys}
    assert not {key: told for key, told in problems.items() if re.search("unknown key|is a list|is a value", told)}
    told_whole: dict[str, type[Section]] = {"solve": Solve, "data.encode": Encode, "data.synthesize": Synthesize}
    for name, section in told_whole.items():
        assert {f"{name}.{field}" for field in section.model_fields} <= keys


def test_the_keys_of_a_stage_are_all_told() -> None:
    table = PAGES[DOCS / "distil.md"].partition("Keys of a stage:\n")[2].partition("\n\n8-bit")[0]
    told = [key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")]
    assert sorted(told) == sorted({*Hybrid.model_fields, *FlowMatchingStage.model_fields} - {"objective"})


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


def links(text: str) -> list[str]:
    """Where the links and pictures of a page point to, those that stay in the repository."""
    prose = re.sub(r"^```.*?^```|^ {4}.*?$|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def test_every_relative_link_points_to_something_that_exists() -> None:
    for page, text in PAGES.items():
        for target in links(text):
            path, _, anchor = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_first_one_and_from_the_readme() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page != README}
    assert len(pages) > 12
    assert pages - {"index.md"} <= set(links(PAGES[DOCS / "index.md"]))
    assert {f"docs/{page}" for page in pages} <= set(links(PAGES[README]))


def test_the_readme_is_short() -> None:
    assert len(PAGES[README].splitlines()) <= MOST_LINES


def test_there_are_no_blanks_left_and_the_version_is_this_one() -> None:
    assert not re.findall(r"@[A-Z_]+@", TEXT)
    assert set(re.findall(r"\blitconvert-(\d[\w.]*)-py3", TEXT)) == {litconvert.__version__}
