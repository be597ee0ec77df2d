"""Pictures in GenEval's folders: the layout its tool reads, what resumes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from litconvert.common.outputs import at_work
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.drawing import EvaluationRequest
from litconvert.evaluation.geneval import draw_geneval, geneval_commands, read_metadata
from tests.helpers.command import command
from tests.helpers.compiled import counted_passes
from tests.helpers.pretrained import Pretrained

ENTRIES = [
    {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "a red fox"},
    {"tag": "counting", "include": [{"class": "bird", "count": 2}], "prompt": "two birds"},
    {"tag": "position", "include": [{"class": "cat", "count": 1}], "prompt": "a cat by the sea"},
]


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in ENTRIES) + "\n")
    return path


def request(pretrained: Pretrained, folder: Path, *overrides: str) -> EvaluationRequest:
    recipe = pretrained.recipe(folder / "recipe.yaml")
    few = ("evaluate.batch_size=8", "sample.steps=2")
    return EvaluationRequest(str(pretrained.folder / "sigma"), recipe=str(recipe), overrides=(*few, *overrides))


def test_every_prompt_has_its_folder_with_its_line_and_four_pictures(
    tmp_path: Path, pretrained: Pretrained, metadata: Path
) -> None:
    out = tmp_path / "out"
    asked = request(pretrained, tmp_path)
    words = ("--recipe", asked.recipe, *(part for one in asked.overrides for part in ("--set", one)))
    done = command("evaluate", asked.model, "--geneval", metadata, "--out", out, *words)
    assert done.code == 0, done.err
    assert done.out == f"12 pictures of 3 prompts in {out}, as GenEval reads them.\n"
    assert done.err.splitlines()[-2:] == [f"next, in GenEval's repository: {one}" for one in geneval_commands(out)]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["00000", "00001", "00002"]
    for index, entry in enumerate(ENTRIES):
        folder = out / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == entry
        pictures = sorted((folder / "samples").iterdir())
        assert [path.name for path in pictures] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        contents = {path.read_bytes() for path in pictures}
        assert len(contents) == 4  # each from noise of its own
        assert Image.open(pictures[0]).mode == "RGB"

    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    shutil.rmtree(out / "00001")
    assert draw_geneval(asked, metadata, out) == 3
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [
        path for path in times if "00001" in path.parts
    ]

    shutil.rmtree(out / "00000")
    shutil.rmtree(out / "00001")
    again = request(pretrained, tmp_path, "evaluate.batch_size=4", "sampling.compile=blocks")
    with counted_passes("litconvert.evaluation.geneval") as found:
        draw_geneval(again, metadata, out)
    assert found[0][0] == 2 * found[0][1] == 8  # with guidance a pass is of two batches in one


def test_another_folder_is_not_drawn_into(tmp_path: Path, pretrained: Pretrained, metadata: Path) -> None:
    out = tmp_path / "out"
    draw_geneval(request(pretrained, tmp_path, "sampling.mixed_precision=no"), metadata, out)
    smaller = request(pretrained, tmp_path, "sampling.mixed_precision=no", "evaluate.batch_size=4")
    assert draw_geneval(smaller, metadata, out) == 3
    with pytest.raises(LitconvertError, match=r"made from other inputs \(evaluate\.guidance was"):
        draw_geneval(request(pretrained, tmp_path, "evaluate.guidance=2.0"), metadata, out)
    for override, message in {
        "sampling.mixed_precision=bf16": r"sampling\.mixed_precision was no and is bf16",
        "diffusion.num_timesteps=500": r"diffusion\.num_timesteps was the default and is 500",
    }.items():
        with pytest.raises(LitconvertError, match=message):
            draw_geneval(request(pretrained, tmp_path, override), metadata, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(LitconvertError, match="holds something else"):
        draw_geneval(request(pretrained, tmp_path), metadata, tmp_path / "other")


def test_several_processes_and_two_commands_at_once_are_refused(
    tmp_path: Path, pretrained: Pretrained, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with at_work(out), pytest.raises(LitconvertError, match="another process is at work"):
        draw_geneval(request(pretrained, tmp_path), metadata, out)
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.evaluation.geneval.launched_processes", lambda: 2)
        with pytest.raises(UsageError, match="start it without a launcher"):
            draw_geneval(request(pretrained, tmp_path), metadata, out)
    assert draw_geneval(request(pretrained, tmp_path), metadata, out) == 3


def test_pictures_of_two_precisions_are_not_mixed_whoever_chose_them(
    tmp_path: Path, pretrained: Pretrained, metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, by_device = tmp_path / "out", request(pretrained, tmp_path, "sampling.mixed_precision=auto")
    monkeypatch.setenv("LITCONVERT_BF16", "0")
    draw_geneval(by_device, metadata, out)
    assert draw_geneval(request(pretrained, tmp_path, "sampling.mixed_precision=no"), metadata, out) == 3
    monkeypatch.setenv("LITCONVERT_BF16", "1")
    with pytest.raises(LitconvertError, match=r"\(sampling\.mixed_precision was no and is bf16\)"):
        draw_geneval(by_device, metadata, out)


def test_what_is_no_prompt_of_geneval_is_refused(tmp_path: Path, metadata: Path, pico_checkpoint: Path) -> None:
    assert [one.text for one in read_metadata(metadata)] == [entry["prompt"] for entry in ENTRIES]
    for text, message in {
        "a red fox\n": ":1: not an entry",
        '{"prompt": "a fox"}': ":1: not an entry",
        '{"tag": "x", "include": [], "prompt": "a"}\n[]': ":2: not an entry",
        "\n": "holds no prompt",
    }.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_metadata(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"bad\.jsonl: not a text file"):
        read_metadata(tmp_path / "bad.jsonl")
    with pytest.raises(UsageError, match="draws classes"):
        draw_geneval(EvaluationRequest(str(pico_checkpoint), num_attention_heads=2), metadata, tmp_path / "out")
