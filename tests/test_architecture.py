"""The rules of the house, held by reading the source: who may import whom, how large things are, what mirrors what.

Imports inside functions and imports for types count. CONTRIBUTING.md says what each room is.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# A room imports from itself and from those above it, never from one beside it (`|`) or below. A module at the root is a
# room of its own; `__init__` is the public API.
LAYERS = (
    "errors",
    "common",
    "recipe | checkpoints | model",
    "runs",
    "families",
    "conversion | sampling",
    "data",
    "publishing | encoding",
    "training",
    "solving | distillation",
    "objectives | estimates | evaluation",
    "workflow",
    "__init__",
    "checks",
    "cli",
    "gpu_check | __main__",
)
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms.split(" | ")}
SHIPPED = ("modeling_lit.py", "pipeline_lit.py", "pipeline_lit_text.py")
SCREEN = ("rich", "typer", "litconvert.cli")
LINES, PARAMETERS, FILES = 60, 6, 12
MODELS = {"Module", "ModelMixin", "DiffusionPipeline"}
NO_MIRRORS = {"helpers", "whole", "test_architecture.py"}
HERE = Path(__file__).parents[1]
Rule = Callable[[Path], Iterator[str]]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text()))) if path.is_file() else []


@cache
def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(root: Path, path: Path) -> str:
    """`litconvert.common.files`; of an `__init__.py` its package."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@cache
def imports(root: Path, path: Path) -> list[tuple[int, str]]:
    """Line and module of each import, at any depth; `from package import module` is one of the module."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                inner = root.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
                found.append((node.lineno, f"{base}.{alias.name}" if is_module else base))
        elif isinstance(node, ast.Call) and "import_module" in vars(node.func).values():
            found += [(node.lineno, str(one.value)) for one in node.args[:1] if isinstance(one, ast.Constant)]
    return list(dict.fromkeys(found))


def ours(root: Path) -> Iterator[tuple[str, Path, int, str]]:
    """Each import of litconvert in litconvert: the module that imports, its file, the line, the module imported."""
    for path in sources(root / "litconvert"):
        for line, module in imports(root, path):
            if is_of(module, "litconvert"):
                yield name_of(root, path), path.relative_to(root), line, module


def commands(root: Path) -> set[str]:
    """What cli/app.py registers: `convert.plan` is handed on there, `terminal.fail(error)` is called."""
    nodes = nodes_of(root / "litconvert/cli/app.py")
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    handed = (node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in called)
    return {f"litconvert.cli.{ast.unparse(node)}" for node in handed}


def public(root: Path) -> set[str]:
    """The public API: where `litconvert._HOMES` says that a function is, and from where `litconvert.objectives` is."""
    found = set()
    for node in nodes_of(root / "litconvert/__init__.py"):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            found |= {f"litconvert.{module}.{name}" for name, module in ast.literal_eval(node.value).items()}
    for node in nodes_of(root / "litconvert/objectives.py"):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layers(root: Path) -> Iterator[str]:
    for path in sources(root / "litconvert"):
        if (room := room_of(name_of(root, path))) not in FLOORS:
            yield f"{path.relative_to(root)}:1: room {room} has no place in LAYERS"
    for importer, path, line, imported in ours(root):
        mine, theirs = room_of(importer), room_of(imported)
        if mine != theirs and FLOORS.get(theirs, 0) >= FLOORS.get(mine, len(LAYERS)):
            yield f"{path}:{line}: {mine} may not import {imported}: {theirs} does not stand before it in LAYERS"


def circles(root: Path) -> Iterator[str]:
    """A circle of modules and one of packages, each told by an import of each of its links."""
    for what, of in (("modules", str), ("packages", room_of)):
        places: dict[tuple[str, str], str] = {}
        graph: dict[str, set[str]] = {}
        for importer, path, line, imported in ours(root):
            places.setdefault((of(importer), of(imported)), f"{path}:{line}")
            graph.setdefault(of(importer), set()).update({of(imported)} - {of(importer)})
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            links = list(zip(error.args[1][1:], error.args[1], strict=False))[::-1]
            yield f"a circle of {what}: " + ", ".join(f"{places[link]}: {link[0]} imports {link[1]}" for link in links)


def shipped_files(root: Path) -> Iterator[str]:
    for _, path, line, imported in ours(root):
        if path.parent.name == "model" and path.name in SHIPPED:
            yield f"{path}:{line}: a shipped file may not import {imported}: it is read where litconvert is not"


def screen(root: Path) -> Iterator[str]:
    for path in sources(root / "litconvert"):
        for line, module in imports(root, path):
            is_library = room_of(name_of(root, path)) not in ("cli", "gpu_check", "__main__")
            if is_library and any(is_of(module, one) for one in SCREEN):
                yield f"{path.relative_to(root)}:{line}: the library may not import {module}: it takes a Listener"


def sizes(root: Path) -> Iterator[str]:
    free = commands(root) | public(root)
    for path in sources(root / "litconvert"):
        classes = (node for node in nodes_of(path) if isinstance(node, ast.ClassDef))
        models = (one for one in classes if MODELS & {ast.unparse(base).split(".")[-1] for base in one.bases})
        constructors = [node for model in models for node in model.body if getattr(node, "name", "") == "__init__"]
        for node in nodes_of(path):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
                f"{name_of(root, path)}.{node.name}" in free
                or node.name == "forward"
                or node in constructors
                or (path.name in SHIPPED[1:] and node.name in ("__call__", "denoise", "predict"))
            ):
                continue
            where = f"{path.relative_to(root)}:{node.lineno}: {node.name} has"
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = sum(one.arg not in ("self", "cls") for one in given)
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > LINES:
                yield f"{where} {length} lines, and {LINES} are the most"
            if parameters > PARAMETERS:
                yield f"{where} {parameters} parameters, and {PARAMETERS} are the most"


def room_sizes(root: Path) -> Iterator[str]:
    for path in sources(root / "litconvert"):
        count = sum(one.is_file() for one in path.parent.iterdir()) - 1
        if path.name == "__init__.py" and count > FILES:
            yield f"{path.relative_to(root)}:1: {count} files stand beside it, and {FILES} are the most"
        if len(path.relative_to(root).parts) > 3:
            yield f"{path.relative_to(root)}:1: a room has no rooms in it"


def imported_tests(root: Path) -> Iterator[str]:
    for path in sources(root / "tests"):
        for line, module in imports(root, path):
            if is_of(module, "tests") and module.split(".")[-1].startswith("test_"):
                yield f"{path.relative_to(root)}:{line}: {module} is no library; what is for both goes to tests/helpers"


def mirrors(root: Path) -> Iterator[str]:
    for path in sources(root / "tests"):
        inside = path.relative_to(root / "tests")
        package = root / "litconvert" / inside.parent
        if inside.parts[0] in NO_MIRRORS:
            continue
        if not (package / "__init__.py").is_file():
            yield f"tests/{inside}:1: there is no package litconvert.{inside.parent}"
        elif path.name.startswith("test_") and not (package / path.name[5:]).is_file():
            yield f"tests/{inside}:1: there is no litconvert/{inside.parent}/{path.name[5:]} that it tests"


RULES = (layers, circles, shipped_files, screen, sizes, room_sizes, imported_tests, mirrors)
SOUND = {
    "__init__.py": "_HOMES = {'load': 'families.sources'}",
    "common/files.py": "from litconvert.errors import E\ndef f(self, a, b, c, d, e, f): ...",
    "cli/app.py": "import rich\nfrom litconvert.cli import convert\napp.command()(convert.plan)",
    "cli/convert.py": "def plan(a, b, c, d, e, f, g): ...",
    "families/__init__.py": "",
    "families/sources.py": "def load(a, b, c, d, e, f, g): ...",
    "model/modeling_lit.py": "class A(nn.Module):\n    def __init__(self, a, b, c, d, e, f, g): ...",
    "model/pipeline_lit.py": "def denoise(a, b, c, d, e, f, g): ...",
    "tests/families/test_sources.py": "from tests.helpers import hub",
    "tests/helpers/hub.py": "",
}
# fmt: off
BROKEN: list[tuple[Rule, dict[str, str], str]] = [
    (layers, {"common/a.py": "def f():\n    from litconvert.cli import app"}, "common/a.py:2: common may not import"),
    (layers, {"recipe/a.py": "if TYPE_CHECKING:\n    from ..model import b"}, "recipe/a.py:2: recipe may not import"),
    (layers, {"common/a.py": "import_module('litconvert.runs')"}, "common/a.py:1: common may not import"),
    (layers, {"attic/a.py": ""}, "attic/a.py:1: room attic has no place"),
    (circles, {"runs/a.py": "from . import b", "runs/b.py": "import litconvert.runs.a"}, "a circle of modules: lit"),
    (circles, {"runs/a.py": "from ..data import b", "data/b.py": "import litconvert.runs.c"}, "circle of packages: "),
    (shipped_files, {"model/pipeline_lit.py": "from litconvert import errors"}, "pipeline_lit.py:1: a shipped file"),
    (screen, {"data/a.py": "def f():\n    from rich.text import Text"}, "data/a.py:2: the library may not import"),
    (screen, {"workflow.py": "from litconvert.cli.live import screen"}, "workflow.py:1: the library may not import"),
    (sizes, {"data/a.py": "def f():\n" + "    x = 1\n" * 60}, "data/a.py:1: f has 61 lines"),
    (sizes, {"cli/convert.py": "def g(a, b, c, d, e, *, f, h): ..."}, "cli/convert.py:1: g has 7 parameters"),
    (room_sizes, {f"families/{i}.py": "" for i in range(12)}, "families/__init__.py:1: 13 files"),
    (room_sizes, {"families/attic/a.py": ""}, "families/attic/a.py:1: a room has no rooms in it"),
    (imported_tests, {"tests/helpers/a.py": "from tests.families import test_sources"}, "a.py:1: tests.families.test"),
    (mirrors, {"tests/families/test_dit.py": ""}, "test_dit.py:1: there is no litconvert/families/dit.py"),
    (mirrors, {"tests/attic/__init__.py": ""}, "attic/__init__.py:1: there is no package litconvert.attic"),
]
# fmt: on


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / ("" if name.startswith("tests/") else "litconvert") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    assert not (breaches := list(rule(HERE))), "\n".join(breaches)


@pytest.mark.parametrize(("rule", "files", "said"), BROKEN, ids=[rule.__name__ for rule, _, _ in BROKEN])
def test_a_breach_is_named_with_its_file_and_line(rule: Rule, files: dict[str, str], said: str, tmp_path: Path) -> None:
    sound = build(tmp_path / "sound", SOUND)
    assert [breach for one in RULES for breach in one(sound)] == []
    (breach,) = rule(build(tmp_path / "broken", {**SOUND, **files}))
    assert said in breach


def defined(name: str) -> bool:
    """Whether `room.module.function` or `room.module.Class.method` is there."""
    room, module, *inner = name.split(".")
    found = nodes_of(HERE / "litconvert" / room / f"{module}.py")[:1]
    for part in inner:
        children = [node for one in found for node in ast.iter_child_nodes(one)]
        targets = [(node, getattr(node, "target", getattr(node, "targets", [node])[0])) for node in children]
        found = [node for node, target in targets if part in (getattr(target, "name", ""), getattr(target, "id", ""))]
    return bool(found)


def test_contributing_describes_the_house_that_stands() -> None:
    text = (HERE / "CONTRIBUTING.md").read_text()
    assert " < ".join(LAYERS) in " ".join(text.split())
    rooms = dict(re.findall(r"^- \*\*`(\w+)/`\*\*(.*?)(?=^- |^\n)", text, re.MULTILINE | re.DOTALL))
    told = {room: set(re.findall(r"`(\w+)`", line)) for room, line in rooms.items()}
    folders = [path.parent for path in (HERE / "litconvert").glob("*/__init__.py")]
    assert told == {folder.name: {path.stem for path in folder.glob("[!_]*.py")} for folder in folders}


def test_what_contributing_names_is_there() -> None:
    text = (HERE / "CONTRIBUTING.md").read_text()
    for way in ("The way of a tensor's name", "The way of a batch"):
        steps = re.findall(r"^\d+\. `([\w.]+)`", text.partition(f"### {way}\n")[2].split("\n#")[0], re.MULTILINE)
        assert len(steps) > 9
        assert [step for step in steps if not defined(step)] == []
    named = re.findall(rf"`(?:litconvert\.)?((?:{'|'.join(FLOORS)})\.\w+\.[\w.]+)`", text)
    assert [name for name in named if not defined(name)] == []
