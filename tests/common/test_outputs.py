"""Folders that are written: filled or renamed, one command at a time, and never over what is not ours."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from litconvert.common.files import OUTPUT_SECONDS, whole_file
from litconvert.common.outputs import (
    DATA_SET,
    MODEL,
    RUN,
    Kind,
    at_work,
    contents,
    is_filled,
    is_unfinished,
    refuse_foreign,
    refuse_place,
    refuse_unfinished,
    whole_directory,
    work_path,
    work_paths,
)
from litconvert.errors import LitconvertError, UsageError
from tests.helpers.mounts import mounted
from tests.helpers.processes import kept_by_another_process

PARTS = ("a.bin", "config.json", "litconvert.json", "z.bin")
SMALL = Kind("a model directory", "litconvert.json", PARTS, MODEL.last)


def fill(out: Path, text: str = "new") -> None:
    with whole_directory(out, SMALL) as folder:
        for name in PARTS:
            (folder / name).write_text(text)


def texts(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


WHOLE = dict.fromkeys(PARTS, "new")


@contextmanager
def a_link(folder: Path) -> Iterator[Path]:
    (folder / "behind").mkdir()
    (folder / "out").symlink_to("behind")
    yield folder / "out"


@contextmanager
def a_link_through_a_link(folder: Path) -> Iterator[Path]:
    (folder / "behind").mkdir()
    (folder / "first").symlink_to(folder / "behind")
    (folder / "out").symlink_to("first")
    yield folder / "out"


@contextmanager
def the_current_folder(folder: Path) -> Iterator[Path]:
    (folder / "out").mkdir()
    before = Path.cwd()
    os.chdir(folder / "out")
    try:
        yield Path(".")
    finally:
        os.chdir(before)


@contextmanager
def the_current_folder_by_its_name(folder: Path) -> Iterator[Path]:
    with the_current_folder(folder):
        yield folder / "out"


@contextmanager
def a_mount(folder: Path) -> Iterator[Path]:
    with mounted(folder / "out") as out:
        (out / "lost+found").mkdir()  # of every new ext4
        yield out


@contextmanager
def a_bind_mount(folder: Path) -> Iterator[Path]:
    """Of the same file system, which os.path.ismount does not tell."""
    (folder / "bound").mkdir()
    with mounted(folder / "out", bound=folder / "bound") as out:
        assert not os.path.ismount(out)
        yield out


PLACES = [a_link, a_link_through_a_link, the_current_folder, the_current_folder_by_its_name, a_mount, a_bind_mount]
Place = Callable[[Path], AbstractContextManager[Path]]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_folder_that_has_to_stay_is_filled_and_its_files_replaced(tmp_path: Path, place: Place) -> None:
    with place(tmp_path) as out:
        number, is_link = out.stat().st_ino, out.is_symlink()
        for text in ("new", "newer"):
            with at_work(out):
                fill(out, text)
            assert texts(out) == dict.fromkeys(PARTS, text)
            assert (out.stat().st_ino, out.is_symlink()) == (number, is_link)
            assert not is_unfinished(out)
        # Nothing hidden is left, in it or beside it.
        assert {path.name for path in out.iterdir()} - {"lost+found"} == set(PARTS)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_whose_parent_takes_no_other_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the superuser, as whom tests may run, never meets."""
    (tmp_path / "out").mkdir()
    number = (tmp_path / "out").stat().st_ino
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))
    fill(tmp_path / "out")
    assert texts(tmp_path / "out") == WHOLE
    assert (tmp_path / "out").stat().st_ino == number
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_any_other_folder_is_renamed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert not is_filled(out)
    assert not is_filled(tmp_path / "new")
    number = out.stat().st_ino
    fill(out)
    assert texts(out) == WHOLE
    assert out.stat().st_ino != number


def test_a_link_to_nothing_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("elsewhere/behind")
    with at_work(tmp_path / "out"):
        fill(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert texts(tmp_path / "elsewhere" / "behind") == WHOLE


def fail_as_a_reader(out: Path) -> None:
    with at_work(out), whole_directory(out, SMALL):
        refuse_unfinished(out)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_what_is_being_filled_is_unfinished_and_what_failed_is_empty_again(tmp_path: Path, place: Place) -> None:
    with place(tmp_path) as out:
        with pytest.raises(LitconvertError, match="is unfinished: a command is filling it"):
            fail_as_a_reader(out)
        refuse_unfinished(out)
        assert not contents(out)
        assert {path.name for path in out.iterdir()} <= {"lost+found"}


@pytest.mark.parametrize("earlier", [False, True], ids=["into nothing", "over an earlier one"])
@pytest.mark.parametrize("at", range(len(PARTS)))
def test_a_fill_that_is_killed_at_any_file_is_unfinished_and_filled_again(
    tmp_path: Path, at: int, earlier: bool
) -> None:
    """By ending the process as it moves the file of that number."""
    with a_link(tmp_path) as out:
        if earlier:
            fill(out, "old")
        child = os.fork()
        if child == 0:
            rename, seen = Path.rename, list[str]()

            def end(path: Path, target: Path) -> Path:
                if len(seen) == at:
                    os._exit(7)
                seen.append(path.name)
                return rename(path, target)

            Path.rename = end  # type: ignore[method-assign, assignment]
            try:
                fill(out)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert is_unfinished(out)
        found = texts(out)
        assert "old" not in found.values()
        # The files that make it loadable come last, config.json the very last.
        assert "config.json" not in found
        assert ("litconvert.json" in found) == (at == len(PARTS) - 1)
        fill(out)
        assert texts(out) == WHOLE
        assert not is_unfinished(out)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("x")


OURS = {
    MODEL: ("config.json", "litconvert.json", "diffusion_pytorch_model-00001-of-00002.safetensors", "evaluation.json"),
    DATA_SET: ("litconvert-latents.json", "state.json", "16x32/state.json", "16x32/data-00000-of-00001.arrow"),
    RUN: ("run.json", "model/config.json", "checkpoints/step-00000002/a/b", "samples/step-00000002.png", "logs/a/b"),
}


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        (MODEL, "notes.txt", "notes.txt"),
        (MODEL, "run/run.json", "run/"),
        (MODEL, "empty/", "empty/"),
        (MODEL, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        (MODEL, "diffusion_pytorch_model.safetensors.bak", "diffusion_pytorch_model.safetensors.bak"),
        (DATA_SET, "16x32/mine.csv", "16x32/mine.csv"),
        (DATA_SET, "images/0.png", "images/"),
        (DATA_SET, ".git/HEAD", ".git/"),
        (RUN, "model/notes.txt", "model/notes.txt"),
        (RUN, "samples/favourite.png", "samples/favourite.png"),
        (RUN, "second/run.json", "second/"),
        (MODEL, ".partial-notes", ".partial-notes"),
        (MODEL, ".shards-mine/0.txt", ".shards-mine/"),
        (MODEL, ".solving-later", ".solving-later"),
        (MODEL, ".a.partial-12-older", ".a.partial-12-older"),
        (RUN, "checkpoints/.partial-notes", "checkpoints/.partial-notes"),
        (RUN, "checkpoints/.dropped-mine/0.txt", "checkpoints/.dropped-mine/"),
    ],
)
def test_what_is_not_ours_is_named_and_what_is_ours_or_nobody_s_is_not(
    tmp_path: Path, kind: Kind, name: str, told: str
) -> None:
    write(tmp_path, *OURS[kind], ".DS_Store", "__pycache__/modeling_lit.cpython-311.pyc", ".x.partial-1", ".lock")
    write(tmp_path, ".partial-1-old/a", f".shards-{12 * '0'}/a", f".solving-{6 * '1f'}/a", ".partial-lock")
    refuse_foreign(tmp_path, kind)
    write(tmp_path, name)
    with pytest.raises(LitconvertError, match="not even --force deletes what is not ours") as refusal:
        refuse_foreign(tmp_path, kind)
    assert f": {told}; move it away" in str(refusal.value)
    with pytest.raises(LitconvertError, match="no part of"), whole_directory(tmp_path, kind):
        pass
    assert (tmp_path / name).exists()


# No process has this number, whatever the system.
GONE = 999_999_999


def test_what_killed_commands_left_is_removed_and_what_only_looks_like_it_is_not(tmp_path: Path) -> None:
    left = (f".out.partial-{GONE}/", f".out.partial-{GONE}-old/", f".x.npz.partial-{GONE}")
    mine = (".out.partial-notes/a", f".out.partial-{GONE}-older/a", ".x.npz.partial-notes", ".x.npz.partial-lock")
    write(tmp_path, *left, *mine)
    fill(tmp_path / "out")
    with whole_file(tmp_path / "x.npz") as file:
        file.write_text("new")
    assert not [name for name in left if (tmp_path / name).exists()]
    assert [(tmp_path / name).read_text() for name in mine] == len(mine) * ["x"]
    shards = [f".x.npz.shards-{12 * '0'}/", ".x.npz.shards-mine/"]
    write(tmp_path, *shards)
    assert work_paths(tmp_path / "x.npz", "shards-") == [tmp_path / shards[0]]


def test_where_a_folder_is_filled_only_what_was_being_made_goes(tmp_path: Path) -> None:
    with a_link(tmp_path) as out:
        fill(out, "old")
        write(out, f".shards-{12 * '0'}/a", f".solving-{12 * '0'}/a", f".partial-{GONE}/a", "desktop.ini")
        fill(out)
        assert {path.name for path in out.iterdir()} == {*PARTS, "desktop.ini"}
        write(out, ".shards-mine/a")
        with pytest.raises(LitconvertError, match=r"no part of a model directory: \.shards-mine/; move it away"):
            fill(out)
        assert (out / ".shards-mine" / "a").exists()


def test_of_many_strangers_the_first_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.txt" for number in range(8)))
    with pytest.raises(LitconvertError, match=r"0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt and 3 more"):
        refuse_foreign(tmp_path, MODEL)


def test_what_came_while_the_work_was_done_is_not_replaced_either(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(LitconvertError, match=r"notes\.txt"), whole_directory(tmp_path / "out", SMALL):
        write(tmp_path / "out", "notes.txt")
    assert texts(tmp_path / "out") == {**dict.fromkeys(PARTS, "old"), "notes.txt": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("record", ["litconvert.json", "litconvert-latents.json"])
def test_an_output_inside_another_one_is_refused_and_one_beside_it_is_not(tmp_path: Path, record: str) -> None:
    write(tmp_path, f"mine/{record}")
    (tmp_path / "link").symlink_to("mine")
    for inside in (tmp_path / "mine" / "run", tmp_path / "mine" / "runs" / "deep", tmp_path / "link" / "run"):
        with pytest.raises(UsageError, match=r"is inside .*mine, a .*; write it beside that folder"):
            refuse_place(inside)
    refuse_place(tmp_path / "mine")
    refuse_place(tmp_path / "run")


@pytest.mark.parametrize("place", [None, a_link, the_current_folder])
def test_an_output_is_kept_to_one_command_and_its_lock_is_gone_in_the_end(
    tmp_path: Path, place: Place | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litconvert.common.files.OUTPUT_SECONDS", OUTPUT_SECONDS / 10)
    with (place or a_new_one)(tmp_path) as out:
        lock = work_path(out, "partial-lock")
        with (
            kept_by_another_process(lock.parent, lock.name),
            pytest.raises(LitconvertError, match=r"another process is at work in .*; wait for it or end it"),
            at_work(out),
        ):
            pytest.fail("let in")
        # Whoever kept it was killed: the file is there, and nobody holds it.
        assert lock.exists()
        with at_work(out):
            assert lock.exists()
            with pytest.raises(LitconvertError, match="another process is at work"), at_work(out):
                pytest.fail("let in")
        assert not lock.exists()
        assert not is_unfinished(out)


@contextmanager
def a_new_one(folder: Path) -> Iterator[Path]:
    yield folder / "out"


def test_folders_on_the_way_to_an_output_that_came_to_nothing_are_gone_again(tmp_path: Path) -> None:
    with at_work(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with at_work(tmp_path / "a" / "b" / "out"):
        fill(tmp_path / "a" / "b" / "out")
    assert texts(tmp_path / "a" / "b" / "out") == WHOLE
