"""What the main commands write through a pipe: whole lines, ours alone, the result first."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.transcripts import COMMANDS, Written, environment, piped

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.timeout(1200)]

# Every line on stderr begins as one of these; what another library says begins as none of them.
OURS = re.compile(
    r"\* taken by itself |recipe: |reading |writing |written: |already done: |goes on |converted: |the teacher draws |"
    r"measuring what |the Hub cannot be reached: |"
    r"stage \d+|device |checkpoints and the model |distil: |next: litconvert |note: |litconvert: |"
    r"\d+ layers are solved|(teacher draws|solve|convert|draw|sample|evaluate|probe)[\w ()]*: \d+/\d+"
)
FIRST = {
    "convert": "The student's output is ",
    "convert-again": "The student's output is ",
    "distill": "The student's output is ",
    "run": "The student's output is ",
    "evaluate": "Fréchet distance of the student",
    "latents-synthesize": "64 samples: latents",
}
NEXT = {"convert": "distill", "distill": "push", "evaluate": "push", "run": "push", "latents-synthesize": "distill"}


# What a command is to take, said before it begins.
COSTS = {
    "convert": r"; about .+ and [\d.]+ [MG]B of memory",
    "latents-synthesize": r"about [^,]+, [\d.]+ [MG]B of memory for its weights, [\d.]+ [kMG]B of disk",
    "distill": r"stage 0, hybrid: about [\d.]+ [MG]B and (?:[\d.]+ s|\d+:\d\d:\d\d)$",
    "run": r"checkpoints and the model take up to [\d.]+ [MG]B of disk",
}
# What is done already, asked for once more as a program asks.
AGAIN = ("convert", "latents-synthesize", "distill", "sample", "evaluate", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Written]:
    return dict(piped(folder))


def test_every_command_ends_as_it_should(written: dict[str, Written]) -> None:
    assert list(written) == list(COMMANDS)
    for name, one in written.items():
        assert one.code == (2 if name == "mistake" else 0), one.err
        assert bool(one.out) == (name != "mistake"), name


def test_stderr_has_our_lines_alone(written: dict[str, Written]) -> None:
    lines = [(name, line) for name, one in written.items() for line in one.err.splitlines()]
    assert len(lines) > 60
    assert not [(name, line) for name, line in lines if not OURS.match(line)]


def test_lines_are_whole_and_plain(written: dict[str, Written]) -> None:
    for name, one in written.items():
        assert not re.search(r"[\r\x1b]", one.out + one.err), name
        assert all(line == line.rstrip() for line in one.out.splitlines()), name
    listed = written["recipes-ls"].out.splitlines()
    assert max(map(len, listed)) > 120, "a summary is longer than a terminal is wide"
    keys = [line.split()[0] for line in written["recipes-show"].out.splitlines()[1:]]
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*", key) for key in keys)
    (header,) = [line for line in written["evaluate"].out.splitlines() if "Fréchet distance to the teacher " in line]
    assert header.endswith("read as the class asked for")


def test_the_result_comes_first_and_the_next_command_last(written: dict[str, Written]) -> None:
    for name, beginning in FIRST.items():
        assert written[name].out.startswith(beginning), name
    for name, command in NEXT.items():
        assert written[name].err.splitlines()[-1].startswith(f"next: litconvert {command} "), name
    assert "already done: lit-digits" in written["convert-again"].err.splitlines()


def test_what_a_step_takes_is_said_before_it_begins(written: dict[str, Written]) -> None:
    for name, cost in COSTS.items():
        said = [re.search(cost, line) is not None for line in written[name].err.splitlines()]
        begins = [": 0/" in line for line in written[name].err.splitlines()]
        assert True in said, name
        assert name == "run" or said.index(True) < begins.index(True), name


@pytest.mark.parametrize("name", AGAIN)
def test_a_program_gets_json_alone_and_silence(written: dict[str, Written], folder: Path, name: str) -> None:
    assert written[name].code == 0
    arguments = [sys.executable, "-m", *shlex.split(COMMANDS[name]), "--json", "-q"]
    arguments += ["--force"] if name == "sample" else []  # a picture that is there is not replaced unasked
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment(), timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(json.loads(done.stdout), dict)
