"""Where commands write, as their users meet it: links, mounts, the current folder, files that are there, odd names."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import litconvert
from litconvert.common.outputs import DATA_SET, MODEL, RUN, refuse_foreign
from litconvert.data.dataset import write_latents
from litconvert.data.synthesize import synthesize
from litconvert.errors import LitconvertError
from tests.helpers.command import Outcome, command
from tests.helpers.listener import Hearing
from tests.helpers.mounts import mounted
from tests.helpers.processes import kept_by_another_process

DRAWING = ("--set", "sample.steps=2", "-n", 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spoken(outcome: Outcome) -> str:
    """What a command that was refused said: a sentence, and nothing of how it came about."""
    assert outcome.code in (1, 2), outcome
    assert "Traceback" not in outcome.err
    assert "unexpected" not in outcome.err, outcome.err
    return outcome.err


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names are those of the folder of the test, and a lock is not waited for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("litconvert.common.files.OUTPUT_SECONDS", 0.1)
    return tmp_path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label in range(3):
        folder = tmp_path / "images" / f"class-{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((8, 8), 40 * label + number, np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    latents = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return write_latents(latents, torch.arange(10) % 4, tmp_path / "data", "random")


# Folders


@pytest.fixture(params=["link", "mount", "current folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An OUT that has to stay where it is."""
    (tmp_path / "elsewhere").mkdir()
    if request.param == "link":
        (tmp_path / "out").symlink_to("elsewhere")
        yield str(tmp_path / "out")
    elif request.param == "mount":
        with mounted(tmp_path / "volume") as volume:
            yield str(volume)
    else:
        monkeypatch.chdir(tmp_path / "elsewhere")
        yield "."


def test_a_conversion_fills_its_place_with_the_very_files(
    tmp_path: Path, place: str, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    arguments = ("convert", pico_checkpoint, place, "--recipe", pico_recipe)
    expected = litconvert.convert(pico_checkpoint, tmp_path / "ordinary", str(pico_recipe))
    first = command(*arguments)
    assert first.code == 0
    name = "../runs/elsewhere" if place == "." else f"runs/{Path(place).name}"
    assert f"next: litconvert distill {place} {name}\n" in first.err
    assert contents(Path(place)) == contents(expected)
    again = command(*arguments)
    assert (again.code, "already done" in again.err) == (0, True)
    assert "seed was 0 and is 1" in spoken(command(*arguments, "--seed", 1))
    assert command(*arguments, "--seed", 1, "--force").code == 0
    assert contents(Path(place)).keys() == contents(expected).keys()
    assert not list(tmp_path.glob(".*"))


def test_the_other_layouts_and_the_data_fill_their_place(
    tmp_path: Path, place: str, pico_checkpoint: Path, pictures: Path
) -> None:
    heads = ("--num-attention-heads", 2)
    for arguments in (
        ("latents", "encode", pictures, place, "--source", pico_checkpoint, *heads),
        ("latents", "synthesize", place, "--source", pico_checkpoint, *heads, "--set", "data.synthesize.num_samples=4"),
        ("convert", pico_checkpoint, place, *heads, "--to", "diffusers"),
    ):
        ordinary = tmp_path / "ordinary"
        assert command(*(ordinary if one == place else one for one in arguments)).code == 0
        assert command(*arguments).code == 0
        found, expected = contents(Path(place)), contents(ordinary)
        assert found.keys() == expected.keys()
        # `datasets` puts a random fingerprint into its state.json.
        assert [name for name in found if found[name] != expected[name]] in ([], ["state.json"])
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        for folder in (ordinary, Path(place)):
            for path in folder.iterdir():
                path.unlink()


@pytest.mark.slow
def test_a_run_fills_its_place_draws_its_data_in_it_and_is_replaced(
    tmp_path: Path, place: str, pico_student: Path
) -> None:
    arguments = ("distill", pico_student, place)
    assert command(*arguments).code == 0
    assert (Path(place) / "latents" / "litconvert-latents.json").is_file()
    metrics = (Path(place) / "metrics.csv").read_bytes()
    again = command(*arguments)
    assert (again.code, "already done" in again.err) == (0, True)
    assert (Path(place) / "metrics.csv").read_bytes() == metrics
    assert command(*arguments, "--seed", 1, "--force").code == 0
    assert json.loads((Path(place) / "run.json").read_text())["inputs"]["seed"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("-latents")]


CONVERTING = (
    "import os, signal, sys, litconvert\n"
    "from litconvert.common.listener import Listener, Task\n"
    "seen = []\n"
    "class Ending(Listener, Task):\n"
    "    def task(self, name, total): return self\n"
    "    def advance(self, count=1, remark=''):\n"
    "        seen.append(count)\n"
    "        if len(seen) == 9: os.kill(os.getpid(), getattr(signal, sys.argv[4]))\n"
    "litconvert.convert(sys.argv[1], sys.argv[2], sys.argv[3], listener=Ending())\n"
)


@pytest.mark.slow
def test_every_reader_refuses_what_a_killed_conversion_left_and_the_same_command_makes_it_whole(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, data: Path
) -> None:
    (tmp_path / "behind").mkdir()
    (tmp_path / "out").symlink_to("behind")
    arguments = (pico_checkpoint, tmp_path / "out", pico_recipe)
    killed = subprocess.run([sys.executable, "-c", CONVERTING, *map(str, arguments), "SIGKILL"], check=False)
    assert killed.returncode == -signal.SIGKILL
    for reading in (
        ("inspect", "out"),
        ("sample", "out", *DRAWING),
        ("convert", "out", "other"),
        ("distill", "out", "run", "--data", data),
        ("distill", pico_checkpoint.parent / "out", "run", "--teacher", "out", "--data", data),
        ("evaluate", "out"),
        ("probe", "out", "--data", data),
        ("push", "out", "me/lit", "--dry-run"),
        ("latents", "show", "out"),
    ):
        assert "out is unfinished: a command is filling it, or was stopped" in spoken(command(*reading))
    with pytest.raises(LitconvertError, match="is unfinished"):
        litconvert.load(tmp_path / "out")
    with pytest.raises(LitconvertError, match="is unfinished"):
        litconvert.open_latents(tmp_path / "out")
    litconvert.convert(*arguments[:2], str(pico_recipe))
    expected = litconvert.convert(pico_checkpoint, tmp_path / "ordinary", str(pico_recipe))
    assert contents(tmp_path / "out") == contents(expected)
    assert command("sample", "out", *DRAWING).code == 0


def test_data_that_is_interrupted_in_its_place_is_unfinished_and_goes_on_there(
    tmp_path: Path, place: str, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    def crash(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    arguments = (pico_checkpoint, place, str(pico_recipe))
    with pytest.raises(KeyboardInterrupt):
        synthesize(*arguments, listener=Hearing(task=crash))
    assert "is unfinished" in spoken(command("latents", "show", place))
    drawn: list[int] = []
    synthesize(*arguments, listener=Hearing(task=lambda done, total: drawn.append(done)))
    assert drawn[0] == 6, "the first shard was kept"
    whole = litconvert.open_latents(synthesize(pico_checkpoint, tmp_path / "ordinary", str(pico_recipe)))
    resumed = litconvert.open_latents(place)
    assert torch.equal(resumed.read(0, range(12)).clean, whole.read(0, range(12)).clean)
    assert not [path for folder in (tmp_path, Path(place)) for path in folder.glob(".*")]


WALK = (
    "solve={states: 32, held_out: 8, drawing_steps: 2, local_steps: 5, local_batch_size: 8, walks: 1}",
    "inherit.attention=q+k+v",
)


@pytest.mark.slow
def test_a_walk_that_is_interrupted_in_its_place_goes_on_there(
    tmp_path: Path, place: str, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    def crash(done: int, total: int) -> None:
        if total == 2 and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        litconvert.convert(pico_checkpoint, place, str(pico_recipe), WALK, listener=Hearing(task=crash))
    assert "is unfinished" in spoken(command("inspect", place))
    notes: list[str] = []
    litconvert.convert(pico_checkpoint, place, str(pico_recipe), WALK, listener=Hearing(note=notes.append))
    assert any(note.startswith("goes on: ") and "layers are solved" in note for note in notes)
    assert not [path for folder in (tmp_path, Path(place)) for path in folder.glob(".*")]
    expected = litconvert.convert(pico_checkpoint, tmp_path / "ordinary", str(pico_recipe), WALK)
    weights = "diffusion_pytorch_model.safetensors"
    assert load_file(Path(place) / weights).keys() == load_file(expected / weights).keys()
    for name, value in load_file(expected / weights).items():
        assert torch.equal(load_file(Path(place) / weights)[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False], ids=["a new folder", "a link"])
def test_a_second_conversion_is_refused_while_the_first_works_and_not_after(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_student: Path, data: Path, new: bool
) -> None:
    if not new:
        (tmp_path / "behind").mkdir()
        (tmp_path / "out").symlink_to("behind")
    arguments = (pico_checkpoint, tmp_path / "out", pico_recipe)
    with subprocess.Popen([sys.executable, "-c", CONVERTING, *map(str, arguments), "SIGSTOP"]) as first:
        waited = os.waitid(os.P_PID, first.pid, os.WSTOPPED)
        assert waited is not None
        for option in ((), ("--seed", 1), ("--seed", 1, "--force")):
            second = command("convert", pico_checkpoint, "out", "--recipe", pico_recipe, *option)
            assert "another process is at work in out; wait for it or end it" in spoken(second)
        synthesis = ("latents", "synthesize", "out", "--source", pico_checkpoint, "--recipe", pico_recipe)
        assert "another process is at work in out" in spoken(command(*synthesis))
        assert "another process is at work in out" in spoken(command("distill", "student", "out", "--data", data))
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    found = contents(tmp_path / "out")
    done = command("convert", pico_checkpoint, "out", "--recipe", pico_recipe)
    assert (done.code, "already done" in done.err) == (0, True)
    assert contents(tmp_path / "out") == found


@pytest.mark.parametrize("what", ["encode", "synthesize"])
def test_data_of_other_inputs_is_refused_while_the_first_is_made(
    tmp_path: Path, what: str, pico_checkpoint: Path, pictures: Path
) -> None:
    source = ("--source", pico_checkpoint, "--num-attention-heads", 2)
    some = ("--set", "data.synthesize.num_samples=4", "--set", "data.synthesize.steps=2")
    arguments = ("latents", what, *([pictures] if what == "encode" else []), "new", *source, *some)
    with kept_by_another_process(tmp_path, ".new.partial-lock"):
        for option in ((), ("--force",), ("--set", "data.synthesize.seed=7", "--set", "data.encode.shard_size=2")):
            assert "another process is at work in new" in spoken(command(*arguments, *option))
    assert not (tmp_path / "new").exists()
    assert command(*arguments).code == 0


def test_a_run_inside_a_model_or_a_data_set_is_refused_before_anything_is_written(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    before = contents(tmp_path)
    for out in ("student/run", "student/runs/deep", "data/run"):
        for arguments in (
            ("distill", pico_student, out, "--data", data),
            ("train", out, "--recipe", "digits-teacher", "--data", data),
            ("convert", "asset:dit-digits", out, "--no-solve"),
            ("latents", "synthesize", out, "--recipe", "digits"),
        ):
            said = spoken(command(*arguments))
            assert f"{out} is inside" in said
            assert "write it beside that folder, not in it" in said
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_what_commands_write_is_ours_and_anything_else_keeps_it_from_being_replaced(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_student: Path, data: Path
) -> None:
    """The table of what is ours is held against what a conversion, data and a run really leave."""
    trackers = ("--set", "distill.trackers=[tensorboard]", "--set", "distill.teacher_noises_per_sample=2")
    run = ("distill", pico_student, "run", "--data", data)
    assert command(*run, *trackers[:2]).code == 0
    synthesis = ("latents", "synthesize", "drawn", "--source", pico_checkpoint, "--recipe", pico_recipe)
    assert command(*synthesis).code == 0
    again = (
        (MODEL, "student", ("convert", pico_checkpoint, "student", "--recipe", pico_recipe, "--seed", 1)),
        (DATA_SET, "drawn", (*synthesis, "--set", "data.synthesize.seed=5")),
        (RUN, "run", (*run, "--seed", 1)),
    )
    for kind, name, arguments in again:
        folder = tmp_path / name
        refuse_foreign(folder, kind)
        (folder / "notes.txt").write_text("mine")
        before = contents(folder)
        assert f"{name} holds what is no part of {kind.name}: notes.txt; move it away" in spoken(
            command(*arguments, "--force")
        )
        assert contents(folder) == before
    # Where nothing is replaced a file of the user's is in nobody's way.
    assert "already done" in command(*run, *trackers[:2]).err
    for _, name, arguments in again:
        (tmp_path / name / "notes.txt").unlink()
        assert command(*arguments, "--force").code == 0, name


@pytest.mark.slow
def test_a_run_whose_model_holds_a_file_of_the_user_s_is_not_begun_again(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    """It would be in the way of the result, hours later."""
    assert command("distill", pico_student, "run", "--data", data).code == 0
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    longer = ("distill", pico_student, "run", "--data", data, "--set", "distill.stages.1.steps=7")
    steps = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert "model holds what is no part of a model directory: notes.txt" in spoken(command(*longer))
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == steps
    (tmp_path / "run" / "model" / "notes.txt").unlink()
    assert command(*longer).code == 0


# Files


@pytest.mark.slow
def test_no_command_replaces_a_file_without_force(tmp_path: Path, pico_student: Path, data: Path) -> None:
    sheet, drawn = ("latents", "show", data), ("sample", pico_student, *DRAWING)
    for arguments, names in (
        ((*sheet, "-o", "a.png"), ["a.png"]),
        ((*drawn, "-o", "a.png"), ["a.png"]),
        ((*drawn, "-o", "new.png", "--npz", "a.npz"), ["a.npz"]),
        ((*drawn, "--latents", "a.safetensors"), ["a.safetensors"]),
        ((*drawn, "-o", "a.webp", "--npz", "b.npz"), ["a.webp", "b.npz"]),
        (("recipes", "copy", "digits", "a.yaml"), ["a.yaml"]),
        (("env", "--check", "--out", "a.json", "--minutes", 0.0001), ["a.json"]),
        (("convert", "pico.pt", "a.pt", "--to", "original", "--num-attention-heads", 2), ["a.pt"]),
    ):
        for name in names:
            (tmp_path / name).write_text("earlier")
        said = spoken(command(*arguments))
        assert f"{' and '.join(names)} exist" in said
        assert "with --force" in said
        assert all((tmp_path / name).read_text() == "earlier" for name in names)
        assert not (tmp_path / "new.png").exists()
        assert command(*arguments, "--force").code == 0
        for name in names:
            assert (tmp_path / name).read_bytes() != b"earlier"
            (tmp_path / name).unlink()
        (tmp_path / "new.png").unlink(missing_ok=True)


def test_a_picture_without_a_name_takes_the_first_that_is_free(tmp_path: Path, pico_student: Path) -> None:
    for number, name in enumerate(("samples.png", "samples-2.png", "samples-3.png")):
        drawn = command("sample", pico_student, *DRAWING, "--seed", number)
        assert (drawn.code, drawn.out) == (0, f"{name}\n")
    first, second = ((tmp_path / name).read_bytes() for name in ("samples.png", "samples-2.png"))
    assert first != second
    assert command("sample", pico_student, *DRAWING, "--seed", 1, "--force").out == "samples.png\n"
    assert (tmp_path / "samples.png").read_bytes() == second
    assert len(list(tmp_path.glob("samples*"))) == 3


@pytest.mark.parametrize("option", ["--npz", "--latents", "--out"])
def test_a_full_disk_leaves_the_earlier_file_and_is_told_with_its_name(
    tmp_path: Path, pico_student: Path, option: str
) -> None:
    name = {"--npz": "x.npz", "--latents": "x.safetensors", "--out": "x.png"}[option]
    drawing = ("sample", pico_student, "--set", "sample.steps=1", *(() if option == "--out" else ("-o", "sheet.png")))
    with mounted(tmp_path / "small", size="40k") as small:
        assert command(*drawing, "-n", 10, option, small / name).code == 0
        before = (small / name).read_bytes()
        said = spoken(command(*drawing, "-n", 2000, option, small / name, "--force"))
        if option == "--npz":  # which is foreseen
            assert "MB are needed and " in said
        else:
            assert f"cannot write {small / name}" in said
            assert "the disk is full" in said
        # Parts that are whole are kept for the same command, which goes on with them.
        assert {path: data for path, data in contents(small).items() if ".shards-" not in path} == {name: before}


@pytest.mark.parametrize("option", ["--npz", "--latents"])
def test_a_file_behind_a_link_is_written_there_and_a_device_is_not_replaced(
    tmp_path: Path, pico_student: Path, option: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    drawing = ("sample", pico_student, *DRAWING, "-o", "sheet.png", "--force", option)
    for _ in range(2):
        assert command(*drawing, "link").code == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").stat().st_size > 100
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a device or a pipe, and a file is written: name a file" in spoken(command(*drawing, "pipe"))
    assert (tmp_path / "pipe").is_fifo()


def test_what_is_drawn_from_is_not_replaced_by_what_is_drawn(tmp_path: Path, pico_student: Path) -> None:
    weights = pico_student / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    for source, arguments in (
        (weights, ("sample", pico_student, *DRAWING, "--latents", weights)),
        (tmp_path / "pico.pt", ("sample", "pico.pt", "--num-attention-heads", 2, *DRAWING, "--npz", "pico.pt")),
    ):
        kept = source.read_bytes()
        assert "is the source itself" in spoken(command(*arguments, "--force"))
        assert source.read_bytes() == kept
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("--out", "--npz"),
        ("--out", "--save-embeddings"),
        ("--npz", "--save-embeddings"),
        ("--latents", "--save-embeddings"),
    ],
)
@pytest.mark.parametrize("name", ["x.png", "../here/x.png", "link/x.png", "linked.png"])
def test_one_file_for_two_outputs_is_refused(
    tmp_path: Path, pico_student: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, name: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(".")
    (tmp_path / "here" / "linked.png").symlink_to("x.png")
    monkeypatch.chdir(tmp_path / "here")
    before = contents(tmp_path)
    for force in ((), ("--force",)):
        ended = command("sample", pico_student, *DRAWING, first, "x.png", second, name, *force)
        assert ended.code == 2
        assert "one file for two outputs" in spoken(ended)
    assert contents(tmp_path) == before


# Names that are not UTF-8


def odd(text: bytes) -> Path:
    return Path(os.fsdecode(text))


def lit(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own, whose output is a pipe."""
    words = [os.fsencode(str(one)) for one in arguments]
    run = [os.fsencode(sys.executable), b"-m", b"litconvert", *words]
    return subprocess.run(run, capture_output=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"ab\x80c\xf0"])
def test_a_folder_whose_name_is_not_utf_8_is_refused_in_a_sentence_wherever_it_stands(
    tmp_path: Path, name: bytes, pico_student: Path, pico_checkpoint: Path, data: Path, pictures: Path
) -> None:
    folder = odd(name)
    folder.mkdir()
    source = ("--source", pico_checkpoint, "--num-attention-heads", 2)
    for path in (pico_student, data, pico_checkpoint):
        (folder / path.name).symlink_to(path)
    for arguments in (
        ("inspect", folder / "pico.pt", "--num-attention-heads", 2),
        ("inspect", folder / "student"),
        ("sample", folder / "student", *DRAWING),
        ("sample", pico_student, "--teacher", folder / "student", *DRAWING),
        ("convert", pico_checkpoint, folder / "lit", "--num-attention-heads", 2, "--no-solve"),
        ("convert", folder / "pico.pt", "lit", "--num-attention-heads", 2, "--no-solve"),
        ("latents", "show", folder / "data"),
        ("latents", "encode", pictures, folder / "encoded", *source),
        ("latents", "synthesize", folder / "drawn", *source),
        ("distill", pico_student, folder / "run", "--data", data),
        ("distill", pico_student, "run", "--data", folder / "data"),
        ("distill", folder / "student", "run", "--data", data),
        ("push", folder / "student", "me/lit", "--dry-run"),
    ):
        said = spoken(command(*arguments))
        assert "not UTF-8" in said, arguments
        assert "rename the file or folder" in said
    assert not [path for path in tmp_path.iterdir() if path.name in ("lit", "run") or path.name.startswith(".")]
    assert {path.name for path in folder.iterdir()} == {"pico.pt", "student", "data"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff"])
def test_files_whose_names_are_not_utf_8_are_written_and_named_as_they_are(
    tmp_path: Path, name: bytes, pico_student: Path, data: Path
) -> None:
    png, npz, latents, copy = (odd(name + end) for end in (b".png", b".npz", b".safetensors", b".yaml"))
    assert command("sample", pico_student, *DRAWING, "-o", png, "--npz", npz).code == 0
    assert Image.open(png).size[0] > 0
    assert np.load(npz)["arr_0"].shape == (2, 8, 8, 3)
    assert command("sample", pico_student, *DRAWING, "--latents", latents).code == 0
    latents.rename("plain.safetensors")
    assert load_file("plain.safetensors")["latents"].shape == (2, 1, 8, 8)
    assert f"{png} exists" in spoken(command("latents", "show", data, "-o", png))
    shown = command("latents", "show", data, "-o", png, "--force")
    assert shown.code == 0
    assert command("recipes", "copy", "digits", copy).code == 0
    # Through a pipe: the bytes of the name alone, or JSON that gives them back.
    assert lit("recipes", "validate", copy).stdout == name + b".yaml: valid\n"
    facts = json.loads(lit("recipes", "copy", "digits", copy, "--force", "--json").stdout)
    assert os.fsencode(facts["recipe"]) == name + b".yaml"
    refused = lit("recipes", "copy", "digits", copy)
    assert refused.returncode == 1
    assert b"exists; choose another name" in refused.stderr
    assert b"Traceback" not in refused.stderr


@pytest.mark.slow
def test_classes_and_images_whose_names_are_not_utf_8_are_encoded_listed_and_drawn(
    tmp_path: Path, pico_checkpoint: Path
) -> None:
    for number, label in enumerate((b"a\xff", b"b", b"caf\xe9")):
        folder = odd(b"images\xe9/" + label)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 50 * number, np.uint8)).save(folder / odd(b"x\xfe.png"), format="PNG")
    encode = ("latents", "encode", odd(b"images\xe9"), "plain", "--source", pico_checkpoint)
    assert command(*encode, "--num-attention-heads", 2).code == 0
    names = json.loads((tmp_path / "plain" / "litconvert-latents.json").read_text())["class_names"]
    assert [os.fsencode(name) for name in names] == [b"a\xff", b"b", b"caf\xe9"]
    assert litconvert.open_latents("plain").labels == (0, 2)
    assert command("latents", "show", "plain", "-o", "sheet.png").code == 0
    assert json.loads(command("latents", "show", "plain", "--json").out)["class_names"] == names
    # A terminal of another encoding has escapes for what that lacks, and the bytes of a name as they are.
    shown = lit("latents", "show", "plain", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert b"caf\xe9" in shown.stdout
