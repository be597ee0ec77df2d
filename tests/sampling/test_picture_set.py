"""Pictures by the thousand: the same whatever the batches, the parts and the processes; killed, they go on."""

import io
import resource
import shutil
import signal
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from litconvert.sampling.captions import Captions
from litconvert.sampling.picture_set import IMAGES, PictureSet, digest_of_conditions, first_of_parts, save_npz
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command
from tests.helpers.processes import Forker, patience

SETS = ("--set", "sampling.mixed_precision=no", "--set", "sampling.shard_size=16")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of 3x16x16 pictures and four classes."""
    path = tmp_path / "source.pt"
    torch.save(dit_state(channels=3, sample_size=16), path)
    return path


def asked(source: Path, npz: Path, *more: object, num: int = 50) -> list[str]:
    sheet = npz.with_suffix(".png")
    options = ["--num-attention-heads", 2, "-n", num, "--steps", 3, "--seed", 4, "--npz", npz, "--out", sheet]
    return [str(part) for part in ("sample", source, *options, *SETS, *more)]


def pictures(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(path) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        return arrays["arr_0"], arrays["arr_1"]


def assert_same_pictures(mine: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    difference = np.abs(mine.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def test_pictures_do_not_depend_on_batches_or_parts(tmp_path: Path, source: Path) -> None:
    assert command(*asked(source, tmp_path / "one.npz")).code == 0
    images, labels = pictures(tmp_path / "one.npz")
    assert images.shape == (50, 16, 16, 3)
    assert (str(images.dtype), str(labels.dtype)) == ("uint8", "int64")
    assert labels.tolist() == [index % 4 for index in range(50)]
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    for name, sets in (("batches", ["sample.batch_size=7"]), ("parts", ["sampling.shard_size=500"])):
        more = [part for one in sets for part in ("--set", one)]
        assert command(*asked(source, tmp_path / f"{name}.npz", *more)).code == 0
        others, their_labels = pictures(tmp_path / f"{name}.npz")
        assert_same_pictures(images, others)
        assert labels.tolist() == their_labels.tolist()
    assert not list(tmp_path.glob(".*"))


def test_the_teacher_is_drawn_for_the_sheet_alone(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litconvert.sampling.request.NPZ_SHEET", 6)
    outcome = command(*asked(source, tmp_path / "x.npz", "--teacher", source, "--json"))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "x.png").is_file()
    assert len(pictures(tmp_path / "x.npz")[0]) == 50


def test_a_killed_set_goes_on_and_draws_nothing_twice(tmp_path: Path, source: Path) -> None:
    whole = tmp_path / "whole.npz"
    assert command(*asked(source, whole, num=200)).code == 0
    with Forker() as forker:
        for _ in range(2):
            workers = forker.launch(asked(source, tmp_path / "x.npz", num=200), tmp_path / "log")
            seen = len(parts_of(tmp_path))
            with patience(60):
                while len(parts_of(tmp_path)) < seen + 2:
                    time.sleep(0.005)
            workers.kill(signal.SIGKILL)
            workers.wait()
            assert not (tmp_path / "x.npz").exists()
        before = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path)}
        assert len(before) >= 4
        workers = forker.launch(asked(source, tmp_path / "x.npz", num=200), tmp_path / "log")
        while before and all(path.exists() for path in before):
            assert all(path.stat().st_mtime_ns == made for path, made in before.items() if path.exists())
            time.sleep(0.005)
        assert workers.wait() == [0]
    assert "shards of" in (tmp_path / "log").read_text()
    assert_same_pictures(pictures(whole)[0], pictures(tmp_path / "x.npz")[0])
    assert not list(tmp_path.glob(".*"))


def parts_of(folder: Path) -> list[Path]:
    """Finished parts of x.npz."""
    return sorted(folder.glob(".x.npz.shards-*/[0-9]*/" + IMAGES))


def test_stopped_between_the_sheet_and_the_npz_the_same_command_goes_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    command_line = asked(source, tmp_path / "x.npz", "--teacher", source)
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.sampling.request.save_npz", stop)
        assert command(*command_line).code != 0
    assert {path.name for path in tmp_path.glob("x.*")} == {"x.png"}
    # What is another's stays refused: a file that was there before, and the sheet of other pictures.
    sheet = (tmp_path / "x.png").read_bytes()
    (tmp_path / "mine.png").write_text("mine")
    for more in (("--out", tmp_path / "mine.png"), ("--seed", 5)):
        refused = command(*command_line, *more)
        assert (refused.code, "png exists; choose another name" in refused.err) == (1, True)
    assert ((tmp_path / "mine.png").read_text(), (tmp_path / "x.png").read_bytes()) == ("mine", sheet)
    outcome = command(*command_line)
    assert (outcome.code, "goes on: 4 of 4 shards" in outcome.err) == (0, True), outcome.err
    assert len(pictures(tmp_path / "x.npz")[0]) == 50
    assert (tmp_path / "x.png").read_bytes() == sheet
    assert not list(tmp_path.glob(".*"))
    again = command(*command_line)
    assert (again.code, "x.png and" in again.err) == (1, True)


def test_no_sheet_is_an_npz_without_it(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("litconvert.sampling.request.save_sheet", fail)
        assert command(*asked(source, tmp_path / "x.npz")).code == 1
    assert not list(tmp_path.glob("x.*"))
    assert command(*asked(source, tmp_path / "x.npz")).code == 0


@pytest.mark.slow
def test_two_processes_draw_the_same_set(tmp_path: Path, source: Path) -> None:
    assert command(*asked(source, tmp_path / "alone.npz")).code == 0
    with Forker() as forker:
        workers = forker.launch(asked(source, tmp_path / "both.npz", "--json"), tmp_path / "log", processes=2)
        assert workers.wait() == [0, 0], workers.log.read_text()
    said = (tmp_path / "log").read_text()
    assert said.count('"written"') == 1
    (mine, labels), (theirs, their_labels) = pictures(tmp_path / "alone.npz"), pictures(tmp_path / "both.npz")
    assert_same_pictures(mine, theirs)
    assert labels.tolist() == their_labels.tolist()
    with Forker() as forker:  # so few are drawn by one of them
        few = ["sample", str(source), "--num-attention-heads", "2", "-n", "4", "--steps", "1"]
        workers = forker.launch([*few, "-o", str(tmp_path / "few.png")], tmp_path / "few", processes=2)
        assert workers.wait() == [0, 0], workers.log.read_text()
    assert (tmp_path / "few.png").is_file()


def test_another_model_or_setting_begins_anew(tmp_path: Path, source: Path) -> None:
    left = tmp_path / f".x.npz.shards-{12 * 'a'}"
    left.mkdir()
    assert command(*asked(source, tmp_path / "x.npz")).code == 0
    assert not left.exists()
    outcome = command(*asked(source, tmp_path / "x.npz"))
    assert outcome.code == 1
    assert "--force" in outcome.err
    first = pictures(tmp_path / "x.npz")[0]
    assert command(*asked(source, tmp_path / "x.npz", "--force", "--classes", "2")).code == 0
    second, labels = pictures(tmp_path / "x.npz")
    assert set(labels.tolist()) == {2}
    assert not np.array_equal(first, second)


def test_the_npz_is_what_numpy_writes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for channels in (1, 3):
        images = draw.integers(0, 256, (5, 8, 6, channels), dtype=np.uint8)
        for part, some in enumerate((images[:3], images[3:])):
            (tmp_path / f"{channels}-{part}").mkdir()
            np.save(tmp_path / f"{channels}-{part}" / IMAGES, some)
        folders = [tmp_path / f"{channels}-{part}" for part in range(2)]
        save_npz(folders, torch.arange(5), tmp_path / "x.npz")
        colour = images.repeat(3, axis=-1) if channels == 1 else images
        expected = io.BytesIO()
        np.savez(expected, arr_0=colour, arr_1=np.arange(5))
        with zipfile.ZipFile(tmp_path / "x.npz") as mine, zipfile.ZipFile(expected) as theirs:
            assert [(one.filename, mine.read(one)) for one in mine.infolist()] == [
                (one.filename, theirs.read(one)) for one in theirs.infolist()
            ]


def test_more_parts_than_files_may_be_open_are_joined(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (120, 4, 4, 1), dtype=np.uint8)
    folders = []
    for number, image in enumerate(images):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        np.save(folders[-1] / IMAGES, image[None])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        save_npz(folders, None, tmp_path / "all.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images.repeat(3, axis=-1))


def test_what_the_disk_has_no_room_for_is_refused_before_it_is_drawn(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 50 * 16 * 16 * 3 * 2  # drawn, and joined
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free - 1))
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.sampling.picture_set.draw", None)
        refused = command(*asked(source, tmp_path / "some.npz"))
    assert refused.code == 1
    assert "0.1 MB are needed and 0.1 MB are free" in refused.err
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))
    assert command(*asked(source, tmp_path / "some.npz")).code == 0


def test_pictures_of_captions_have_no_labels_and_their_features_are_never_all_in_memory() -> None:
    asked: list[int] = []

    def conditions(indices: range) -> Captions:
        asked.append(len(indices))
        return Captions(torch.zeros(len(indices), 3, 8), torch.ones(len(indices), 3, dtype=torch.int64))

    unused: Any = None
    assert PictureSet(unused, conditions, 50_000, unused, None, 500).labels is None
    assert max(asked) == 1


def test_the_first_pictures_are_read_of_no_more_parts_than_hold_them(tmp_path: Path) -> None:
    folders = [tmp_path / str(part) for part in range(3)]
    for part, folder in enumerate(folders[:2]):
        folder.mkdir()
        np.save(folder / IMAGES, np.full((4, 2, 2, 3), part, dtype=np.uint8))
    for count, last in ((3, 0), (4, 0), (6, 1), (8, 1)):
        found = first_of_parts(folders, count)  # the third part is not there
        assert (len(found), int(found[-1].max())) == (count, last)


def test_any_condition_that_differs_is_told_apart() -> None:
    labels = torch.arange(1000) % 4
    captions = Captions(torch.zeros(100, 3, 8), torch.ones(100, 3, dtype=torch.int64))
    last = captions.features.clone()
    last[99, 2, 7] = 1
    null = torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.int64)
    others: list[torch.Tensor | Captions] = [
        labels,
        torch.where(torch.arange(1000) == 999, 0, labels),
        labels.int(),
        captions,
        replace(captions, features=last),
        replace(captions, null_features=null[0], null_mask=null[1]),
        replace(captions, null_features=null[0], null_mask=torch.tensor([[1, 1, 0]])),
    ]
    assert len({digest_of_conditions(one) for one in others}) == len(others)
    assert digest_of_conditions(labels.clone()) == digest_of_conditions(labels)
