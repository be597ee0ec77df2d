"""The README's own lines, in a fresh environment with nothing but the wheel in it, as a stranger would type them.

The checkpoint is the embedded one in place of DiT-XL/2's, its recipe is cut short, and the Hub is a stand-in. Lines of
PixArt need its T5 and are left out.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from litconvert.recipe.resolve import resolve
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHORT = (
    "solve={states: 32, held_out: 8, local_steps: 2, drawing_steps: 2}",
    "data.synthesize={num_samples: 16, steps: 2, batch_size: 16, shard_size: 16}",
    "distill.stages.0.steps=2",
    "distill.stages.0.batch_size=4",
    "sample={scheduler: dpm-solver++, steps: 2, num_images: 10}",
    "evaluate.num_samples=20",
    "evaluate.steps=2",
)
# What a stranger has in the place of what the README names.
NAMES = {"DiT-XL-2-256x256.pt": "asset:dit-digits", '"dit-xl-2-256"': '"short.yaml"'}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.timeout(1500)]


def run(command: list[str], folder: Path, **variables: str) -> str:
    """A command that must end well; returns what it wrote to stdout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LITCONVERT", "HF_"))}
    done = subprocess.run(command, cwd=folder, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of a fresh environment are, with the wheel of this checkout in it."""
    folder = tmp_path_factory.mktemp("fresh")
    quiet = ["--quiet", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    run([*build, str(ROOT)], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    run([sys.executable, "-m", "venv", "environment"], folder)
    python = folder / "environment" / "bin" / "python"
    run([str(python), "-m", "pip", "install", *quiet, "-c", str(ROOT / "constraints.txt"), str(wheel)], folder)
    return python.parent


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(user="me") as server:
        yield server


def replaced(text: str) -> str:
    for name, mine in NAMES.items():
        text = text.replace(name, mine)
    return text


def shell_lines() -> list[str]:
    """The README's lines of litconvert, as a stranger types them."""
    lines = re.findall(r"^    (litconvert .+)$", README, flags=re.MULTILINE)
    mine = [replaced(line) for line in lines if "PixArt" not in line and "lit-sigma" not in line]
    assert [line.split()[1] for line in mine] == ["demo", "convert", "distill", "push"]
    return mine


def test_the_readme_s_lines_run_in_a_fresh_environment(tmp_path: Path, binaries: Path, hub: HubServer) -> None:
    (tmp_path / "short.yaml").write_text(resolve("digits", SHORT).recipe.to_yaml())
    variables = {**hub.environment(), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "2"}
    short = [part for one in SHORT for part in ("--set", one)]
    more = {"demo": short, "convert": ["--recipe", "short.yaml"]}
    for line in shell_lines():
        words = shlex.split(line)
        run([str(binaries / words[0]), *words[1:], *more.get(words[1], [])], tmp_path, **variables)
    assert (tmp_path / "runs" / "digits" / "distilled" / "comparison.png").is_file()
    assert (tmp_path / "runs" / "lit-xl" / "model" / "config.json").is_file()
    assert "model_index.json" in hub.files("me/lit-xl-2-256")
    # The block of Python, in a folder of its own.
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    other = tmp_path / "python"
    other.mkdir()
    (other / "short.yaml").write_text((tmp_path / "short.yaml").read_text())
    (other / "script.py").write_text(replaced(block) + "print(url)\n")
    out = run([str(binaries / "python"), "script.py"], other, **variables)
    assert out.strip().endswith("me/lit-xl-2-256")


def test_help_recipes_and_the_environment_are_told_there(tmp_path: Path, binaries: Path) -> None:
    assert "recipes" in run([str(binaries / "litconvert"), "--help"], tmp_path)
    assert "dit-xl-2-256" in run([str(binaries / "litconvert"), "recipes", "ls"], tmp_path)
    assert run([str(binaries / "litconvert"), "recipes", "copy", "digits"], tmp_path).strip() == "digits.yaml"
    assert (tmp_path / "recipe.schema.json").is_file()
    assert "transformers" in run([str(binaries / "litconvert"), "env"], tmp_path)
