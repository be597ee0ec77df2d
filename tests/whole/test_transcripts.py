"""What the main commands write through a pipe: whole lines, ours alone, the result first."""

import re

import pytest

from benchmarks.transcripts import COMMANDS, Written, piped

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.timeout(1200)]

# Every line on stderr begins as one of these; what another library says begins as none of them.
OURS = re.compile(
    r"\* taken by itself |recipe: |reading |writing |written: |already done: |goes on |converted: |the teacher draws |"
    r"measuring what |"
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    return dict(piped(tmp_path_factory.mktemp("user")))


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
