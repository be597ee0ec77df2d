"""Distillation: what the two networks see, what a run leaves behind, and that it resumes exactly."""

import csv
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import litconvert
from litconvert.common.listener import StepReport
from litconvert.data.batches import Batch, MicroBatches
from litconvert.data.dataset import LatentDataset, Samples, open_latents, write_latents
from litconvert.data.synthesize import synthesize
from litconvert.distillation.teacher_outputs import TeacherOutputs
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.runs.directory import RunDirectory
from litconvert.training.engine import Engine
from litconvert.training.trainer import Interrupted, Trainer
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.listener import Hearing
from tests.helpers.processes import kept_by_another_process

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten random latents of the pico model."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.rand((10, 1, 8, 8), generator=generator) * 2 - 1
    return write_latents(latents, torch.arange(10) % 4, tmp_path / "data", "random")


def weights(run: Path) -> dict[str, Tensor]:
    return dict(load_file(run / "model" / WEIGHTS))


def steps_of(run: Path) -> list[int]:
    return [int(row["step"]) for row in RunDirectory(run).read_metrics()]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_a_run_leaves_its_recipe_metrics_curves_samples_checkpoints_and_model(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    run = litconvert.distill(pico_student, tmp_path / "run", data=data)
    assert steps_of(run) == list(range(1, 9))
    for name in ("recipe.yaml", "curves.png", "samples/teacher.png", "samples/before.png", "samples/after.png"):
        assert (run / name).stat().st_size > 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    model = litconvert.load(run / "model")
    assert model.config.attention == ["linear", "linear"]
    before = load_file(pico_student / WEIGHTS)
    assert all(not torch.equal(value, before[name]) for name, value in weights(run).items() if "attn" in name)


def test_teacher_and_student_receive_the_same_noise_timestep_and_condition(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, list[tuple[Tensor, ...]]] = {"softmax": [], "linear": []}
    forward = LiTTransformer2DModel.forward

    def spy(self: LiTTransformer2DModel, hidden: Tensor, timestep: Tensor, class_labels: Tensor, **more: Any) -> Any:
        # Sampling passes a scalar, and the error by timestep is measured ten at a time.
        if timestep.dim() == 1 and len(timestep) == 8:
            kind = self.config.attention[0]
            received[kind].append((hidden.clone(), timestep.clone(), class_labels.clone()))
            assert self.training == (kind == "linear")
            assert torch.is_grad_enabled() == (kind == "linear")
        return forward(self, hidden, timestep, class_labels, **more)

    monkeypatch.setattr(LiTTransformer2DModel, "forward", spy)
    stages = "distill.stages=[{objective: hybrid, steps: 6, batch_size: 8, condition_dropout: 0.5}]"
    litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[stages])
    assert len(received["softmax"]) == len(received["linear"]) == 6
    for teacher, student in zip(received["softmax"], received["linear"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))
    labels = torch.cat([call[2] for call in received["linear"]])
    assert 0.2 < (labels == 4).float().mean() < 0.8  # dropped to the null class, for both


def test_the_loss_falls_and_ends_near_the_teacher(tmp_path: Path, pico_student: Path, data: Path) -> None:
    schedule = "batch_size: 8, learning_rate: 3.0e-3, schedule: cosine, condition_dropout: 0"
    stages = f"distill.stages=[{{objective: hybrid, steps: 60, feature_weight: 0.1, {schedule}}}]"
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[stages])
    losses = [float(row["loss"]) for row in RunDirectory(run).read_metrics()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_accumulation_gives_the_same_weights_as_one_batch(tmp_path: Path, pico_student: Path, data: Path) -> None:
    stages = "distill.stages=[{objective: hybrid, steps: 3, batch_size: 8, max_grad_norm: 1.0}]"
    runs = [
        litconvert.distill(
            pico_student,
            tmp_path / f"run-{parts}",
            data=data,
            overrides=[stages, f"distill.gradient_accumulation_steps={parts}"],
        )
        for parts in (1, 4)
    ]
    first, second = weights(runs[0]), weights(runs[1])
    # Adam's first steps turn rounding of tiny gradients into steps; the loss is the steadier witness.
    assert all((first[name] - second[name]).abs().max() < 2e-4 for name in first)
    losses = [[float(row["loss"]) for row in RunDirectory(run).read_metrics()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path, pico_student: Path, data: Path) -> None:
    runs = [
        litconvert.distill(
            pico_student, tmp_path / f"run-{on}", data=data, overrides=[f"distill.gradient_checkpointing={on}"]
        )
        for on in (0.0, 0.5, 1.0)
    ]
    first = weights(runs[0])
    for run in runs[1:]:
        assert all(torch.allclose(value, weights(run)[name], atol=1e-5) for name, value in first.items())


@pytest.mark.slow
def test_schedule_warmup_clipping_and_ema_are_as_the_recipe_says(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    run = litconvert.distill(pico_student, tmp_path / "run", data=data)
    rows = RunDirectory(run).read_metrics()
    hybrid = [row for row in rows if row["stage"] == "1:hybrid"]
    assert [float(row["learning_rate"]) for row in hybrid] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3])
    # The first average is the first weights; then min(0.9, (1 + s) / (10 + s)).
    assert [float(row["ema_decay"]) for row in hybrid] == pytest.approx([0, 2 / 11, 3 / 12, 4 / 13, 5 / 14])


def test_a_second_run_of_the_same_command_does_nothing(tmp_path: Path, pico_student: Path, data: Path) -> None:
    run = litconvert.distill(pico_student, tmp_path / "run", data=data)
    before = (run / "model" / WEIGHTS).stat().st_mtime_ns
    steps: list[StepReport] = []
    litconvert.distill(pico_student, tmp_path / "run", data=data, listener=Hearing(steps.append))
    assert not steps
    assert (run / "model" / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_of_other_inputs_is_refused_and_force_replaces_it(tmp_path: Path, pico_student: Path, data: Path) -> None:
    run = litconvert.distill(pico_student, tmp_path / "run", data=data)
    with pytest.raises(LitconvertError, match=r"other inputs: seed was 0 and is 1\..*--force"):
        litconvert.distill(pico_student, run, data=data, overrides=["seed=1"])
    assert steps_of(run) == list(range(1, 9))
    litconvert.distill(pico_student, run, data=data, overrides=["seed=1"], force=True)
    assert steps_of(run) == list(range(1, 9))


@pytest.mark.slow
def test_what_a_kill_at_the_start_leaves_is_no_obstacle(tmp_path: Path, pico_student: Path, data: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.partial-12").touch()
    litconvert.distill(pico_student, run, data=data)
    assert steps_of(run) == list(range(1, 9))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(LitconvertError, match="is not a run of litconvert"):
        litconvert.distill(pico_student, foreign, data=data, force=True)


@pytest.mark.slow
def test_what_the_student_was_converted_with_cannot_be_changed_by_distilling(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, data: Path
) -> None:
    for override in ("student.num_attention_heads=1", "source.num_attention_heads=4", "inherit.attention=all"):
        with pytest.raises(UsageError, match=r"convert the source again"):
            litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[override])
    # The same value is no change, and files may have moved.
    moved = pico_checkpoint.rename(tmp_path / "moved.pt")
    sets = ["student.num_attention_heads=2", f"source.path={moved}"]
    litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    assert steps_of(tmp_path / "run") == list(range(1, 9))


@pytest.mark.slow
def test_force_draws_the_data_again_where_they_are_other_data(tmp_path: Path, pico_student: Path) -> None:
    run, drawn = tmp_path / "run", tmp_path / "run-latents"
    litconvert.distill(pico_student, run)
    before = (drawn / "litconvert-latents.json").stat().st_mtime_ns
    litconvert.distill(pico_student, run, overrides=["seed=1"], force=True)
    assert (drawn / "litconvert-latents.json").stat().st_mtime_ns == before
    fewer = ["data.synthesize.num_samples=7"]
    with pytest.raises(LitconvertError, match=r"other inputs \(data.synthesize.num_samples was 12 and is 7\).*--force"):
        litconvert.distill(pico_student, run, overrides=fewer)
    litconvert.distill(pico_student, run, overrides=fewer, force=True)
    assert len(open_latents(drawn)) == 7


def test_a_failure_in_any_step_resumes_to_the_same_weights(tmp_path: Path, pico_student: Path, data: Path) -> None:
    expected = weights(litconvert.distill(pico_student, tmp_path / "whole", data=data))

    class Crash(Exception):
        pass

    def crash_at(step: int) -> Callable[[StepReport], None]:
        def on_step(report: StepReport) -> None:
            if report.global_step == step:
                raise Crash

        return on_step

    run = tmp_path / "crashed"
    for step in (1, 4, 7):  # before the first checkpoint, in the second stage, after a checkpoint
        with pytest.raises(Crash):
            litconvert.distill(pico_student, run, data=data, listener=Hearing(crash_at(step)))
    litconvert.distill(pico_student, run, data=data)
    assert steps_of(run) == list(range(1, 9))
    assert_same(weights(run), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_same_command_goes_on(
    tmp_path: Path, pico_student: Path, data: Path, number: signal.Signals
) -> None:
    expected = weights(litconvert.distill(pico_student, tmp_path / "whole", data=data))

    def interrupt(report: StepReport) -> None:
        if report.global_step == 5:
            os.kill(os.getpid(), number)

    run = tmp_path / "interrupted"
    with pytest.raises(Interrupted, match="step 6 of 8, saved"):
        litconvert.distill(pico_student, run, data=data, listener=Hearing(interrupt))
    assert (run / "checkpoints" / "step-00000006").is_dir()
    litconvert.distill(pico_student, run, data=data)
    assert steps_of(run) == list(range(1, 9))
    assert_same(weights(run), expected)


@pytest.mark.slow
def test_what_was_to_be_looked_at_when_a_run_stopped_is_looked_at_on_resuming(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    def interrupt(report: StepReport) -> None:
        if report.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run, sets = tmp_path / "run", ["distill.sample_every=6", "distill.checkpoint_every=100"]
    with pytest.raises(Interrupted, match="step 6 of 8, saved"):
        litconvert.distill(pico_student, run, data=data, overrides=sets, listener=Hearing(interrupt))
    litconvert.distill(pico_student, run, data=data, overrides=sets)
    assert (run / "samples" / "step-00000006.png").is_file()
    assert {row.split(",")[0] for row in (run / "timestep_errors.csv").read_text().splitlines()[1:]} == {"0", "6", "8"}


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_weights_bit_for_bit(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    stages = (
        "distill.stages=[{objective: hybrid, steps: 20, batch_size: 4, feature_weight: 0.5},"
        "{objective: hybrid, steps: 60, batch_size: 4, schedule: cosine}]"
    )
    sets = [stages, "distill.checkpoint_every=7"]
    torch.set_num_threads(1)
    expected = weights(litconvert.distill(pico_student, tmp_path / "whole", data=data, overrides=sets))
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "litconvert", "distill", str(pico_student), str(run), "--data", str(data), "-q"]
    command += [part for one in sets for part in ("--set", one)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = random.randrange(2, 75)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and len(steps_of(run)) < victim:
        time.sleep(0.002)
    process.kill()
    _, message = process.communicate()
    assert process.returncode == -signal.SIGKILL, message.decode()
    assert not (run / "model").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert steps_of(run) == list(range(1, 81))
    assert_same(weights(run), expected)


def test_nan_stops_the_run_with_the_step_and_the_tensor_named(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = LatentDataset.read, [0]

    def poisoned(self: LatentDataset, bucket: int, indices: Any, **draws: Any) -> Samples:
        samples = read(self, bucket, indices, **draws)
        calls[0] += len(indices) == 4  # what is read for measuring comes ten at a time
        return samples._replace(clean=samples.clean * float("nan")) if calls[0] == 5 else samples

    monkeypatch.setattr(LatentDataset, "read", poisoned)
    with pytest.raises(LitconvertError, match=r"step 5: the data holds NaN.*step 4 is kept"):
        litconvert.distill(pico_student, tmp_path / "run", data=data)
    monkeypatch.setattr(LatentDataset, "read", read)
    litconvert.distill(pico_student, tmp_path / "run", data=data)
    assert steps_of(tmp_path / "run") == list(range(1, 9))


def test_an_exploding_gradient_is_named(tmp_path: Path, pico_student: Path, data: Path) -> None:
    stages = "distill.stages=[{objective: hybrid, steps: 9, batch_size: 4, learning_rate: 1.0e+30}]"
    with pytest.raises(LitconvertError, match=r"step \d: .* holds NaN or infinite values.*another learning_rate"):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[stages])


@pytest.mark.slow
def test_a_larger_teacher_may_teach(tmp_path: Path, pico_student: Path, data: Path) -> None:
    torch.save(dit_state(width=48, layers=3, seed=9), tmp_path / "large.pt")
    sets = ["distill.stages.0.feature_weight=0"]
    large, heads = str(tmp_path / "large.pt"), "distill.teacher.num_attention_heads=3"
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, teacher=large, overrides=[*sets, heads])
    own = litconvert.distill(pico_student, tmp_path / "own", data=data, overrides=sets)
    rows, own_rows = RunDirectory(run).read_metrics(), RunDirectory(own).read_metrics()
    assert rows[0]["noise"] == own_rows[0]["noise"]
    assert rows[0]["teacher_noise"] != own_rows[0]["teacher_noise"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "in_channels is 2, the student's is 1"),
        ({"sample_size": 16}, "sample_size is 16, the student's is 8"),
        ({"rows": 4}, "num_classes is 3, the student's is 4"),
    ],
)
def test_a_teacher_that_cannot_see_the_same_input_is_refused(
    tmp_path: Path, pico_student: Path, data: Path, change: dict[str, int], message: str
) -> None:
    torch.save(dit_state(**change), tmp_path / "other.pt")
    sets = ["distill.teacher.num_attention_heads=2"]
    with pytest.raises(UsageError, match=message):
        litconvert.distill(
            pico_student, tmp_path / "run", data=data, teacher=str(tmp_path / "other.pt"), overrides=sets
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_another_process_is_at_is_left_to_it(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litconvert.common.files.HANDOVER_SECONDS", 0.2)
    run, refusal = tmp_path / "run", "another process is at work"

    def interrupt(report: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        litconvert.distill(pico_student, run, data=data, listener=Hearing(interrupt))
    kept = (run / "metrics.csv").read_bytes()
    with kept_by_another_process(run):
        with pytest.raises(LitconvertError, match=refusal):
            litconvert.distill(pico_student, run, data=data)
        with pytest.raises(LitconvertError, match=refusal):
            litconvert.distill(pico_student, run, data=data, overrides=["seed=1"], force=True)
    assert (run / "metrics.csv").read_bytes() == kept
    litconvert.distill(pico_student, run, data=data)
    assert steps_of(run) == list(range(1, 9))


@pytest.mark.slow
def test_with_no_data_the_teacher_draws_it(tmp_path: Path, pico_student: Path) -> None:
    litconvert.distill(pico_student, tmp_path / "run")
    assert len(open_latents(tmp_path / "run-latents")) == 12


def test_a_source_that_changed_since_the_conversion_is_refused(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, data: Path
) -> None:
    torch.save(dit_state(seed=3), pico_checkpoint)
    with pytest.raises(LitconvertError, match=r"has changed since .* converted"):
        litconvert.distill(pico_student, tmp_path / "run", data=data)


def test_the_result_keeps_the_lineage(tmp_path: Path, pico_student: Path, data: Path) -> None:
    import json

    run = litconvert.distill(pico_student, tmp_path / "run", data=data)
    record = json.loads((run / "model" / "litconvert.json").read_text())
    before = json.loads((pico_student / "litconvert.json").read_text())
    assert record["source"] == before["source"]
    assert record["distillation"]["steps"] == 8
    assert [stage["steps"] for stage in record["distillation"]["stages"]] == [3, 5]


def test_a_hand_made_data_set_of_the_right_columns_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="not a complete data set"):
        open_latents(tmp_path)


# Steps that are left out.

LONG = "distill.stages=[{objective: hybrid, steps: 9, batch_size: 4, learning_rate: 1.0e-3}]"


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Data that is NaN at these steps, counted from 1, whichever process or run reads it."""
    batch = MicroBatches.batch

    def poisoned(self: MicroBatches, step: int, positions: Sequence[int]) -> Batch:
        drawn = batch(self, step, positions)
        if self.stage < 0 or step + 1 not in steps:
            return drawn
        clean = drawn.samples.clean.clone()
        clean[0, 0, 0, 0] = float("nan")
        return replace(drawn, samples=drawn.samples._replace(clean=clean))

    monkeypatch.setattr(MicroBatches, "batch", poisoned)


@pytest.mark.slow
def test_a_step_that_is_nan_can_be_skipped(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, 4)
    notes: list[str] = []
    run = litconvert.distill(
        pico_student,
        tmp_path / "run",
        data=data,
        overrides=[LONG, "distill.max_skipped_steps=2"],
        listener=Hearing(note=notes.append),
    )
    rows = RunDirectory(run).read_metrics()
    assert [row["skipped_steps"] for row in rows] == ["1", "1", "1", "2", "2", "2", "2", "2", "2"]
    assert [row["loss"] == "nan" for row in rows] == [index in (0, 3) for index in range(9)]
    assert [row["ema_decay"] == "" for row in rows] == [index in (0, 3) for index in range(9)]
    skipped = [note for note in notes if "nothing was updated" in note]
    assert skipped[0].startswith("step 1: the data holds NaN")
    assert "(skipped 2 of at most 2 steps)" in skipped[1]


@pytest.mark.slow
def test_a_skipped_step_updates_nothing(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimiser, weights and average are after step 4 what they were after step 3."""
    poison(monkeypatch, 4)
    sets = [LONG, "distill.max_skipped_steps=1", "distill.checkpoint_every=1", "distill.keep_checkpoints=9"]
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    before, after, next_one = (_state(run, step) for step in (3, 4, 5))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not all(torch.equal(value, next_one[name]) for name, value in before.items())


def _state(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    engine = Engine("no")
    stored, _ = engine.stored(folder)
    state = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in stored.items()}
    engine.load(folder, state)
    return state


@pytest.mark.slow
def test_one_more_than_the_bound_stops_the_run_and_names_the_tensor(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, 4, 7)
    sets = [LONG, "distill.max_skipped_steps=2", "distill.checkpoint_every=3"]
    refusal = r"step 7: the data holds NaN.*2 steps were skipped before it.*checkpoint of step 6 is kept"
    with pytest.raises(LitconvertError, match=refusal):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    # The count is the run's, not the process's; and the bound may be raised for the same run.
    with pytest.raises(LitconvertError, match=refusal):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    litconvert.distill(
        pico_student, tmp_path / "run", data=data, overrides=[LONG, "distill.max_skipped_steps=3", sets[2]]
    )
    rows = RunDirectory(tmp_path / "run").read_metrics()
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [row["skipped_steps"] for row in rows] == ["0", "1", "1", "2", "2", "2", "3", "3", "3"]


def test_of_gradients_the_one_that_is_no_number_is_named(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping by a norm that is NaN would make all of them NaN, and the first of all would be named."""
    name = "blocks.1.ff.fc1.weight"
    clip = Trainer._clip

    def spoilt(self: Trainer, stage: Any) -> Tensor:
        self.student.get_parameter(name).grad.view(-1)[0] = float("nan")
        return clip(self, stage)

    monkeypatch.setattr(Trainer, "_clip", spoilt)
    stages = LONG.replace("steps: 9", "steps: 2, max_grad_norm: 1.0")
    with pytest.raises(LitconvertError, match=f"step 1: the gradient of {re.escape(name)} holds NaN"):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[stages])


def test_a_teachers_output_that_went_wrong_is_computed_again(tmp_path: Path) -> None:
    kept = TeacherOutputs(tmp_path / "outputs", [(4, (2,))])
    rows, wrong = torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    kept.get(0, rows, lambda: wrong)
    kept.keep()
    again = TeacherOutputs(tmp_path / "outputs", [(4, (2,))])
    right = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert torch.equal(again.get(0, rows, lambda: right), right)
    again.keep()
    assert torch.equal(again.get(0, rows, lambda: wrong), right)


@pytest.mark.slow
def test_a_change_of_precision_in_the_middle_is_said(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: StepReport) -> None:
        if report.global_step == 4:
            raise KeyboardInterrupt

    notes: list[str] = []
    sets = [LONG, "distill.checkpoint_every=2", "distill.mixed_precision=auto"]
    monkeypatch.setenv("LITCONVERT_BF16", "1")
    with pytest.raises(KeyboardInterrupt):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets, listener=Hearing(stop))
    monkeypatch.setenv("LITCONVERT_BF16", "0")
    litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets, listener=Hearing(note=notes.append))
    assert any("computed in bf16 autocast so far, and goes on in float32" in note for note in notes)


@pytest.mark.slow
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    litconvert.distill(pico_student, tmp_path / "run", data=data, listener=Hearing(note=notes.append))
    assert not any("without locks" in note for note in notes)

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    litconvert.distill(pico_student, tmp_path / "other", data=data, listener=Hearing(note=notes.append))
    assert any(f"{tmp_path / 'other'} is on a file system without locks" in note for note in notes)
    assert (tmp_path / "other" / "model").is_dir()
    pairs = [tmp_path / "drawn", tmp_path / "pico.pt", tmp_path / "pico.yaml"]
    notes.clear()
    synthesize(pairs[1], pairs[0], str(pairs[2]), listener=Hearing(note=notes.append))
    assert any("without locks" in note for note in notes)


def test_a_model_without_learned_variance_is_taught_its_noise_alone(tmp_path: Path, pico_recipe: Path) -> None:
    state = dit_state()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name][: len(state[name]) // 2].clone()
    torch.save(state, tmp_path / "source.pt")
    student = litconvert.convert(tmp_path / "source.pt", tmp_path / "student", str(pico_recipe))
    notes: list[str] = []
    run = litconvert.distill(student, tmp_path / "run", listener=Hearing(note=notes.append))
    assert any("no learned variance: it learns the noise alone" in note for note in notes)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["noise"]) > 0 and float(row["teacher_noise"]) > 0 for row in rows)
    assert not any(row["teacher_variance"] or row["variational_bound"] for row in rows)
    before, after = (litconvert.load(one).state_dict() for one in (student, run))
    assert after["final_layer.linear.bias"].shape == (4,)
    assert not torch.equal(before["final_layer.linear.bias"], after["final_layer.linear.bias"])
