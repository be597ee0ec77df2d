"""What a run was made from: what counts, what is named when it changed, and which runs may go on."""

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

import litconvert
import litconvert.distillation.pretraining
from litconvert.common.files import read_json
from litconvert.common.listener import StepReport
from litconvert.data.synthesize import synthesize
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe import schema as recipes
from litconvert.recipe.inputs import Inputs, differences, given
from litconvert.recipe.schema import Hybrid, Recipe
from litconvert.runs.directory import RunDirectory
from tests.helpers.defaults import TABLE, changed, current_defaults
from tests.helpers.listener import Hearing
from tests.helpers.processes import Forker, kept_by_another_process, patience

CONSTANT = (
    "distill.stages=[{{objective: hybrid, steps: {steps}, batch_size: 8, learning_rate: 1.0e-3, ema_decay: 0.9}}]"
)


class Stop(Exception):
    """Ends a run as a kill does."""


def stop_at(step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.global_step == step:
            raise Stop

    return on_step


@pytest.fixture
def data(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> Path:
    return synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe))


@pytest.fixture
def train(tmp_path: Path, pico_student: Path, data: Path) -> Callable[..., Path]:
    """Distil the pico student into a folder of this name, with these overrides."""

    def run(name: str, *overrides: str, **options: Any) -> Path:
        return litconvert.distill(pico_student, tmp_path / name, data=data, overrides=overrides, **options)

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one / "model"), weights(other / "model")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    losses = [[row["loss"] for row in RunDirectory(run).read_metrics()] for run in (one, other)]
    assert losses[0] == losses[1]


# The table of defaults.


def test_another_default_has_another_number() -> None:
    kept = json.loads(TABLE.read_text())
    now = json.loads(json.dumps(current_defaults()))
    others = {key: (value, now[key]) for key, value in kept["defaults"].items() if changed(value, now.get(key, value))}
    assert not others or kept["number"] != recipes.DEFAULTS, (
        f"raise DEFAULTS in litconvert/recipe/schema.py, since these defaults changed: "
        f"{others}; then `python -m tests.helpers.defaults`"
    )
    assert now == kept["defaults"], "keys came or went: write the table anew with `python -m tests.helpers.defaults`"
    assert kept["number"] == recipes.DEFAULTS


def test_a_key_that_is_added_changes_no_digest_and_another_default_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class LaterHybrid(Hybrid):
        novelty: int = Field(default=3)

    settings: dict[str, Any] = {"objective": "hybrid", "steps": 5, "learning_rate": 1e-3}
    now, later = (Inputs({"stage": given(kind(**settings))}) for kind in (Hybrid, LaterHybrid))
    assert now.digest == later.digest
    assert now.digest != Inputs({"stage": given(LaterHybrid(**settings, novelty=4))}).digest
    monkeypatch.setattr("litconvert.recipe.inputs.DEFAULTS", recipes.DEFAULTS + 1)
    changed = Inputs(now.values)
    assert changed.digest != now.digest
    assert "the defaults (table" in differences(now.values, now.values, recipes.DEFAULTS)


def test_a_value_that_is_the_default_counts_like_one_that_is_not_given() -> None:
    plain = Recipe.model_validate({"distill": {"stages": [{"objective": "hybrid", "steps": 5}]}})
    spelt = Recipe.model_validate({"distill": {"stages": [{"objective": "hybrid", "steps": 5, "noise_weight": 0.5}]}})
    assert given(plain.distill) == given(spelt.distill)


# What changed.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed was 0 and is 1"),
        ("distill.stages.1.learning_rate=2.0e-3", "distill.stages.1.learning_rate was 0.001 and is 0.002"),
        ("distill.stages.1.noise_weight=1", "distill.stages.1.noise_weight was the default and is 1.0"),
        ("diffusion.num_timesteps=500", "diffusion.num_timesteps was the default and is 500"),
        ("distill.mixed_precision=bf16", "distill.mixed_precision was no and is bf16"),
    ],
)
def test_a_changed_key_is_named(train: Callable[..., Path], override: str, named: str) -> None:
    train("run")
    with pytest.raises(LitconvertError) as refusal:
        train("run", override)
    assert f"holds a run of other inputs: {named}. Choose another path" in str(refusal.value)
    train("run")


@pytest.mark.slow
def test_a_changed_file_is_named_for_what_it_is(
    tmp_path: Path, train: Callable[..., Path], pico_student: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    run = train("run")
    other = synthesize(pico_checkpoint, tmp_path / "other", str(pico_recipe), ["data.synthesize.seed=7"])
    with pytest.raises(LitconvertError, match=r"other inputs: the data set\. "):
        litconvert.distill(pico_student, run, data=other)
    another = litconvert.convert(pico_checkpoint, tmp_path / "student-2", str(pico_recipe), ["seed=3"])
    with pytest.raises(
        LitconvertError, match=r"other inputs: the student's weights; the data set; seed was 0 and is 3\. "
    ):
        litconvert.distill(another, run, data=other)


@pytest.mark.slow
def test_how_a_run_is_computed_is_no_input_of_it(train: Callable[..., Path]) -> None:
    with pytest.raises(Stop):
        train("run", listener=Hearing(stop_at(5)))
    train("run", "distill.checkpoint_every=3", "distill.max_skipped_steps=4", "distill.gradient_checkpointing=1")


# More steps.


@pytest.mark.slow
def test_a_run_given_more_steps_is_the_longer_run(train: Callable[..., Path]) -> None:
    whole = train("whole", CONSTANT.format(steps=40))
    run = train("run", CONSTANT.format(steps=20))
    assert read_json(run / "model" / "litconvert.json")["distillation"]["steps"] == 20
    notes: list[str] = []
    train("run", CONSTANT.format(steps=40), listener=Hearing(note=notes.append))
    assert "stage 0: 40 steps, 20 before" in notes
    assert not any("schedule" in note for note in notes)
    assert read_json(run / "model" / "litconvert.json")["distillation"]["steps"] == 40
    assert_same(run, whole)


@pytest.mark.slow
def test_two_processes_given_more_steps_make_the_longer_run(tmp_path: Path, pico_student: Path, data: Path) -> None:
    with Forker() as forker:
        for name, lengths in (("whole", (40,)), ("run", (20, 40))):
            for steps in lengths:
                sets = ["--set", CONSTANT.format(steps=steps)]
                arguments = ["distill", str(pico_student), str(tmp_path / name), "--data", str(data), "-q", *sets]
                with patience(200):
                    codes = forker.launch(arguments, tmp_path / "log", processes=2).wait()
                assert codes == [0, 0], (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_an_interrupted_run_may_be_given_more_steps_and_fewer(train: Callable[..., Path]) -> None:
    whole, shorter = train("whole", CONSTANT.format(steps=12)), train("shorter", CONSTANT.format(steps=7))
    with pytest.raises(Stop):
        train("run", CONSTANT.format(steps=9), listener=Hearing(stop_at(7)))  # the checkpoint is that of step 6
    train("run", CONSTANT.format(steps=7))
    assert_same(whole.with_name("run"), shorter)
    train("run", CONSTANT.format(steps=12))
    assert_same(whole.with_name("run"), whole)
    with pytest.raises(LitconvertError, match=r"has made 12 steps of stage 0: .* cannot become 11"):
        train("run", CONSTANT.format(steps=11))


@pytest.mark.slow
def test_a_schedule_that_ends_elsewhere_is_said(train: Callable[..., Path]) -> None:
    cosine = CONSTANT.replace("ema_decay", "schedule: cosine, ema_decay")
    run = train("run", cosine.format(steps=6))
    notes: list[str] = []
    train("run", cosine.format(steps=9), listener=Hearing(note=notes.append))
    assert any("follows the cosine schedule of 9 steps from here on" in note for note in notes)
    assert [int(row["step"]) for row in RunDirectory(run).read_metrics()] == list(range(1, 10))


@pytest.mark.slow
def test_a_stage_that_is_done_keeps_its_length(train: Callable[..., Path]) -> None:
    train("run")  # a stage of 3 steps, then one of 5
    with pytest.raises(LitconvertError, match=r"is at stage 1: distill.stages.0.steps was 3 and cannot become 4"):
        train("run", "distill.stages.0.steps=4")
    train("run", "distill.stages.1.steps=6")
    with pytest.raises(
        LitconvertError, match=r"other inputs: distill.stages.1.steps was 6 and is 9; seed was 0 and is 1"
    ):
        train("run", "distill.stages.1.steps=9", "seed=1")


# Starting from another run.


@pytest.mark.slow
def test_a_run_starts_from_another_runs_weights(tmp_path: Path, train: Callable[..., Path], pico_student: Path) -> None:
    first = train("first", CONSTANT.format(steps=6), "distill.keep_checkpoints=9")
    seen: list[int] = []
    tiny = CONSTANT.format(steps=1).replace("1.0e-3", "1.0e-30")
    second = train("second", tiny, start=f"{first}@4", listener=Hearing(lambda report: seen.append(report.global_step)))
    assert seen == [1]
    # A step of no length: what comes out is what it started from.
    average = litconvert.load(f"{first}@4").state_dict()
    assert all(torch.allclose(value, average[name], atol=1e-7) for name, value in weights(second / "model").items())
    assert not torch.equal(average["x_embedder.proj.weight"], weights(pico_student)["x_embedder.proj.weight"])
    raw = train("raw", tiny, "distill.start.weights=model", start=f"{first}@4")
    expected = litconvert.load(f"{first}@4", weights="model").state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-7) for name, value in weights(raw / "model").items())
    assert any(not torch.equal(expected[name], average[name]) for name in expected)

    record = read_json(second / "model" / "litconvert.json")["distillation"]["start"]
    assert (record["path"], record["step"], record["weights"]) == (f"{first}@4", 4, "ema")
    assert record["lineage"]["stages"][0]["steps"] == 6
    third = train("third", tiny, start=str(second))
    again = read_json(third / "model" / "litconvert.json")["distillation"]["start"]
    assert again["lineage"]["start"] == record
    # Whoever trains that model on starts from it, and from nothing before it.
    assert "start: null" in (third / "model" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_warm_start_is_an_input_and_needed_only_once(train: Callable[..., Path]) -> None:
    first = train("first", CONSTANT.format(steps=4))
    with pytest.raises(Stop):
        train("second", CONSTANT.format(steps=6), start=str(first), listener=Hearing(stop_at(5)))
    whole = train("whole", CONSTANT.format(steps=6), start=str(first))
    with pytest.raises(LitconvertError, match="other inputs: the weights to start from"):
        train("second", CONSTANT.format(steps=6))
    # The other run goes on, and so its latest weights are others; and then it is gone altogether.
    train("first", CONSTANT.format(steps=5))
    first.rename(first.with_name("moved"))
    second = train("second", CONSTANT.format(steps=6), start=str(first))
    assert_same(second, whole)


@pytest.mark.slow
def test_a_warm_run_that_begins_again_begins_where_it_did(tmp_path: Path, train: Callable[..., Path]) -> None:
    keep = "distill.keep_checkpoints=9"
    with pytest.raises(Stop):
        train("first", CONSTANT.format(steps=8), keep, listener=Hearing(stop_at(5)))
    first = tmp_path / "first"  # at the checkpoint of step 4
    second = train("second", CONSTANT.format(steps=4), start=str(first))
    train("first", CONSTANT.format(steps=8), keep)  # whose latest weights are others now
    shutil.rmtree(second / "checkpoints")
    notes: list[str] = []
    train("second", CONSTANT.format(steps=6), start=str(first), listener=Hearing(note=notes.append))
    assert any("no checkpoint to go on from: it begins again" in note for note in notes)
    assert_same(second, train("whole", CONSTANT.format(steps=6), start=f"{first}@4"))
    shutil.rmtree(second / "checkpoints")
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(LitconvertError, match="the weights of step 4 that it started from are gone"):
        train("second", CONSTANT.format(steps=8), start=str(first))


@pytest.mark.slow
def test_force_replaces_only_what_would_be_refused(train: Callable[..., Path]) -> None:
    first = train("first", CONSTANT.format(steps=4))
    with pytest.raises(Stop):
        train("second", CONSTANT.format(steps=6), start=str(first), force=True, listener=Hearing(stop_at(5)))
    train("first", CONSTANT.format(steps=5))
    seen: list[int] = []
    notes: list[str] = []
    again: dict[str, Any] = {
        "start": str(first),
        "force": True,
        "listener": Hearing(lambda report: seen.append(report.global_step), notes.append),
    }
    train("second", CONSTANT.format(steps=6), **again)
    assert seen == [5, 6]
    train("second", CONSTANT.format(steps=7), **again)
    assert seen == [5, 6, 7]
    notes.clear()
    train("second", CONSTANT.format(steps=7), "seed=5", **again)
    assert seen == [5, 6, 7, *range(1, 8)]
    assert any("of other inputs, is replaced" in note for note in notes)


def test_a_run_that_another_command_is_at_is_left_alone(
    tmp_path: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        train("run", CONSTANT.format(steps=6), listener=Hearing(stop_at(2)))
    monkeypatch.setattr("litconvert.common.files.HANDOVER_SECONDS", 0.2)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("run.json", "recipe.yaml")}
    kept = kept_by_another_process(tmp_path / "run", ".lock")
    with kept, pytest.raises(LitconvertError, match="another process is at work"):
        train("run", CONSTANT.format(steps=9))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_a_finished_run_keeps_the_precision_that_it_was_computed_in(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITCONVERT_BF16", "0")
    with pytest.raises(Stop):
        train("run", "distill.mixed_precision=auto", "distill.checkpoint_every=1", listener=Hearing(stop_at(2)))
    monkeypatch.setenv("LITCONVERT_BF16", "1")
    notes: list[str] = []
    listener = Hearing(stop_at(3), notes.append)
    with pytest.raises(Stop):
        train("run", "distill.mixed_precision=auto", "distill.checkpoint_every=1", listener=listener)
    (note,) = (note for note in notes if "was computed in" in note)
    assert note.startswith("this run was computed in float32 so far, and goes on in bf16 autocast")
    assert "LITCONVERT_BF16=0" in note
    run = train("run", "distill.mixed_precision=auto", "distill.checkpoint_every=1")
    monkeypatch.setenv("LITCONVERT_BF16", "0")
    notes.clear()
    train("run", "distill.mixed_precision=auto", "distill.checkpoint_every=1", listener=Hearing(note=notes.append))
    assert not [note for note in notes if "was computed in" in note]
    assert json.loads((run / "run.json").read_text())["bf16"] is True


def test_training_from_nothing_starts_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model that is trained from nothing has no start"):
        litconvert.distillation.pretraining.train(
            tmp_path / "run", "digits-teacher", data=tmp_path, overrides=["distill.start.path=x"]
        )


@pytest.mark.slow
def test_what_a_student_scored_is_not_said_of_what_it_becomes(tmp_path: Path, train: Callable[..., Path]) -> None:
    record = read_json(tmp_path / "student" / "litconvert.json")
    record["metrics"] = {"frechet_distance": 999.0}
    (tmp_path / "student" / "litconvert.json").write_text(json.dumps(record))
    run = train("run", CONSTANT.format(steps=4))
    folders = [run / "model", *(run / "checkpoints").iterdir()]
    assert [read_json(folder / "litconvert.json")["metrics"] for folder in folders] == [{}] * len(folders)
    # A student that was distilled before keeps that in its lineage.
    further = litconvert.distill(
        run / "model", tmp_path / "further", data=tmp_path / "data", overrides=[CONSTANT.format(steps=1)]
    )
    assert read_json(further / "model" / "litconvert.json")["distillation"]["student"]["steps"] == 4


def test_what_cannot_be_started_from_is_refused(
    tmp_path: Path, train: Callable[..., Path], pico_student: Path, pico_checkpoint: Path, pico_recipe: Path, data: Path
) -> None:
    first = train("first", CONSTANT.format(steps=4))
    with pytest.raises(UsageError, match=r"--from .*nowhere: no such run"):
        train("second", start=str(tmp_path / "nowhere"))
    with pytest.raises(
        UsageError, match=r"first@3: no checkpoint of this step is there; the run keeps those of steps 2, 4"
    ):
        train("second", start=f"{first}@3")
    with pytest.raises(UsageError, match="a finished model holds its moving average alone"):
        train("second", "distill.start.weights=model", start=str(first / "model"))
    other = litconvert.convert(pico_checkpoint, tmp_path / "other", str(pico_recipe), ["student.conv_size=5"])
    with pytest.raises(UsageError, match="its model has linear_conv_size=3, the student 5"):
        litconvert.distill(other, tmp_path / "second", data=data, start=str(first))
    with pytest.raises(UsageError, match=r"holds .*which the run reads"):
        train("first", CONSTANT.format(steps=4), start=str(first), force=True)
    assert not (tmp_path / "second").exists()


# Runs of the first format.


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an earlier commit wrote, in the current folder."""
    folder = tmp_path / "old"
    folder.mkdir()
    with tarfile.open(Path(__file__).parents[1] / "helpers" / "format-1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_run_of_the_first_format_goes_on(old: Path) -> None:
    before = [row["loss"] for row in RunDirectory(old / "stopped").read_metrics()][:5]
    litconvert.distill("student", "stopped", data="data")
    rows = RunDirectory(old / "stopped").read_metrics()
    assert [row["loss"] for row in rows][:5] == before
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    # As the earlier version finished the same run; another processor may round otherwise.
    expected = weights(old / "finished" / "model")
    for name, value in weights(old / "stopped" / "model").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    record = read_json(old / "stopped" / "run.json")
    assert (record["format"], record["defaults"]) == (2, recipes.DEFAULTS)


def test_what_the_first_format_finished_is_finished(old: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.is_file() and path.name != "run.json"}
    litconvert.convert("pico.pt", "student", "pico.yaml", ["solve=null"])
    synthesize("pico.pt", "data", "pico.yaml")
    steps: list[StepReport] = []
    litconvert.distill("student", "finished", data="data", listener=Hearing(steps.append))
    assert not steps
    written = {"recipe.yaml"}  # resolved anew each time
    assert {path.name for path, time in kept.items() if path.stat().st_mtime_ns != time} <= written


@pytest.mark.slow
def test_a_run_of_the_first_format_takes_more_steps_and_names_what_changed(old: Path) -> None:
    with pytest.raises(LitconvertError, match=r"other inputs: distill.stages.1.learning_rate was 0.001 and is 0.01\. "):
        litconvert.distill("student", "stopped", data="data", overrides=["distill.stages.1.learning_rate=0.01"])
    litconvert.distill("student", "finished", data="data", overrides=["distill.stages.1.steps=7"])
    assert [int(row["step"]) for row in RunDirectory(old / "finished").read_metrics()] == list(range(1, 11))


def test_a_checkpoint_of_the_first_format_is_refused_as_a_model_with_the_reason(old: Path) -> None:
    with pytest.raises(
        LitconvertError, match="do not say what model they hold; run the same `litconvert distill` again"
    ):
        litconvert.load("stopped")
    assert litconvert.load("finished").config.hidden_size == 16


# A stage that there was.

TRANSFER = "distill.stages.0: `convert` solves the attention now, there is no attention_transfer: leave the stage out"


def with_a_former_stage(path: Path) -> None:
    """The first stage of a recorded recipe or run, as an earlier version wrote it."""
    text = path.read_text().replace("objective: hybrid", "objective: attention_transfer", 1)
    path.write_text(text.replace('"objective": "hybrid"', '"objective": "attention_transfer"', 1))


def test_a_student_recorded_with_a_former_stage_is_refused_until_its_recipe_leaves_it_out(
    train: Callable[..., Path], pico_student: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    with_a_former_stage(pico_student / "recipe.yaml")
    with pytest.raises(UsageError, match=re.escape(TRANSFER)):
        train("run")
    litconvert.convert(pico_checkpoint, pico_student, str(pico_recipe))
    train("run", CONSTANT.format(steps=1))


def test_a_run_with_a_former_stage_is_refused_and_force_replaces_it(train: Callable[..., Path]) -> None:
    run = train("run", CONSTANT.format(steps=1))
    with_a_former_stage(run / "run.json")
    record = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps({**record, "digest": "of that stage"}))
    with pytest.raises(LitconvertError, match=r"other inputs: `convert` solves the attention now.* --force"):
        train("run", CONSTANT.format(steps=1))
    train("run", CONSTANT.format(steps=1), force=True)


def test_a_run_of_the_first_format_with_a_former_stage_is_refused(old: Path) -> None:
    with_a_former_stage(old / "stopped" / "recipe.yaml")
    with pytest.raises(LitconvertError, match=re.escape(TRANSFER)):
        litconvert.distill("student", "stopped", data="data", overrides=["seed=3"])


@pytest.mark.slow
def test_a_run_of_a_newer_litconvert_is_left_alone(train: Callable[..., Path]) -> None:
    run = train("run")
    record = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps({**record, "format": 3}))
    with pytest.raises(LitconvertError, match="format 3, this litconvert reads up to 2; upgrade it"):
        train("run")
