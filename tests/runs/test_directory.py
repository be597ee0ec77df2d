"""Observation: what a run's tables, plots, display, trackers and backups hold, and that none of them can stop it."""

import io
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litconvert.cli import terminal as console
from litconvert.cli.live import screen
from litconvert.common.listener import StepReport
from litconvert.common.quantities import duration
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Recipe
from litconvert.runs.backup import Backup
from litconvert.runs.directory import COLUMNS, Progress, RunDirectory
from litconvert.runs.plots import running_median
from litconvert.runs.throughput import Throughput, peak_flops, stage_work, training_flops
from litconvert.runs.trackers import Trackers, tracker_packages
from litconvert.training.observer import timestep_errors
from tests.helpers.hub import TOKEN, enter
from tests.helpers.hub_server import HubServer
from tests.helpers.listener import Hearing

STEP = {
    "loss": 0.25,
    "noise": 0.125,
    "teacher_noise": 0.125,
    "gradient_norm": 1.5,
    "learning_rate": 1e-4,
    "ema_decay": 0.9,
    "seconds": 0.5,
    "images_per_second": 128.0,
    "memory_bytes": 2_000_000_000,
    "eta_seconds": 90.0,
}
PICO = {"sample_size": 16, "in_channels": 2, "out_channels": 4, "num_classes": 4, "num_attention_heads": 2}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has begun."""
    directory = RunDirectory(tmp_path / "run")
    directory.start({"digest": "digest"}, "")
    directory.truncate_metrics(0)
    return directory


def train(run: RunDirectory, first: int, last: int, stage: str = "0:hybrid") -> None:
    for step in range(first, last + 1):
        run.append_metrics({"step": step, "stage": stage, **STEP})


def steps(run: RunDirectory) -> list[int]:
    return [int(row["step"]) for row in run.read_metrics()]


# The tables.


def test_a_row_has_every_term_and_leaves_empty_what_the_stage_or_the_device_has_not(run: RunDirectory) -> None:
    train(run, 1, 1)
    (row,) = run.read_metrics()
    assert tuple(row) == COLUMNS
    assert row["memory_bytes"] == "2000000000"
    assert row["velocity"] == row["features"] == row["flops_utilization"] == ""


def test_a_column_nobody_knows_is_refused_rather_than_lost(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="novel_term"):
        run.append_metrics({"step": 1, "stage": "0:hybrid", "novel_term": 1.0})


def test_wherever_a_row_was_cut_short_it_is_skipped_and_gone_after_resuming(run: RunDirectory) -> None:
    train(run, 1, 3)
    whole = run.metrics.read_bytes()
    end_of_second = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(end_of_second, len(whole)):
        run.metrics.write_bytes(whole[:cut])
        assert steps(run) == [1, 2]
        run.truncate_metrics(2)
        train(run, 3, 3)
        assert run.metrics.read_bytes() == whole


def test_resuming_forgets_the_steps_and_measurements_after_the_checkpoint(run: RunDirectory) -> None:
    train(run, 1, 5)
    for step in (2, 4):
        run.append_timestep_errors(step, [0.5, math.nan], 1000)
    assert run.last_step() == 5
    run.truncate_metrics(3)
    assert steps(run) == [1, 2, 3]
    assert run.timestep_errors.read_text() == "step,bucket_low,bucket_high,error\n2,0,500,0.5\n2,500,1000,\n"


def test_a_step_that_is_measured_again_is_there_once(run: RunDirectory) -> None:
    run.append_timestep_errors(4, [0.5, 0.25], 1.0)
    run.append_timestep_errors(4, [0.5, 0.125], 1.0)
    assert run.timestep_errors.read_text().splitlines()[1:] == ["4,0,0.5,0.5", "4,0.5,1,0.125"]


def test_a_table_of_an_older_version_is_taken_over(run: RunDirectory) -> None:
    run.metrics.write_text("step,stage,loss,seconds,forgotten\n1,0:hybrid,0.5,0.1,7\n2,0:hybrid,0.4,0.1,7\n")
    run.truncate_metrics(1)
    (row,) = run.read_metrics()
    assert tuple(row) == COLUMNS
    assert (row["loss"], row["noise"]) == ("0.5", "")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00\x00\x00", b"\xff\xfe\n1,2\n", b"loss\n1\n"])
def test_a_table_that_was_lost_begins_anew(run: RunDirectory, content: bytes) -> None:
    run.metrics.write_bytes(content)
    assert steps(run) == []
    run.truncate_metrics(0)
    train(run, 1, 1)
    assert steps(run) == [1]


def test_a_step_costs_the_same_however_many_there_were(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "litconvert.runs.step_table.StepTable.rows", lambda self: pytest.fail("the table is read again")
    )
    train(run, 1, 2)


# The plots.


def picture(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def test_the_curves_have_a_panel_for_each_stage(run: RunDirectory) -> None:
    train(run, 1, 30, "0:hybrid")
    run.plot_curves()
    one = picture(run.path / "curves.png")
    train(run, 31, 330, "1:hybrid")
    run.plot_curves()
    assert picture(run.path / "curves.png").shape[1] > 1.8 * one.shape[1]
    run.append_timestep_errors(30, [0.5, 0.2], 1000)
    run.plot_timestep_errors()
    assert picture(run.path / "timestep_errors.png").std() > 0
    assert not [path for path in run.path.iterdir() if "partial" in path.name]


def test_a_run_without_steps_has_no_plots(run: RunDirectory) -> None:
    run.plot_curves()
    run.plot_timestep_errors()
    assert not list(run.path.glob("*.png"))


def test_smoothing_keeps_a_jump_where_it_is_and_drops_an_outlier() -> None:
    values = np.where(np.arange(1000) < 500, 8.0, 1.0)
    values[250] = 1e6
    at, smoothed = running_median(np.arange(1000.0), values)
    assert np.array_equal(smoothed, np.where(at < 500, 8.0, 1.0))


# The error by timestep.


def test_the_errors_before_and_after_a_run_are_means_of_what_was_measured(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.error_summary() is None
    run.append_timestep_errors(0, [0.5, 0.25], 1000)
    run.append_timestep_errors(2, [math.nan, math.nan], 1000)
    run.append_timestep_errors(4, [0.125, math.nan], 1000)
    assert run.error_summary() == (0.375, 0.125)


def test_the_error_is_that_of_the_noise_half_in_each_part_of_the_range() -> None:
    """A student that is off by a factor 1 + a has the relative squared error a^2."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.tensor([0.5, 0.0, 2.0, 0.1])

    def teacher(noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return torch.cat([condition["scale"] * noisy, torch.ones_like(noisy)], dim=1)

    def student(noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        output = teacher(noisy, timestep, condition) * (1 + factors[timestep // 250]).view(-1, 1, 1, 1)
        output[:, 2:] += 100  # the variance does not count
        return output

    def batches() -> Iterator[tuple[Tensor, Tensor, dict[str, float]]]:
        for timestep in ([0, 249, 999], [500, 749, 750]):
            yield torch.randn(3, 2, 4, 4, generator=generator), torch.tensor(timestep), {"scale": 3.0}

    errors = timestep_errors(student, teacher, batches(), 1000, buckets=4)
    assert errors[::2] == pytest.approx([0.25, 4.0], rel=1e-5)
    assert errors[3] == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(errors[1])


def test_times_of_a_flow_fall_into_the_range_to_its_end() -> None:
    batch: tuple[Tensor, Tensor, dict[str, Any]] = (torch.ones(3, 1, 2, 2), torch.tensor([0.0, 0.95, 1.0]), {})
    errors = timestep_errors(lambda x, t, c: 0 * x, lambda x, t, c: x, [batch], 1.0)
    assert (errors[0], errors[9]) == (1.0, 1.0)
    assert all(math.isnan(error) for error in errors[1:9])


# Speed, memory and utilisation.


def recipe_of(*stages: dict[str, Any], **distill: Any) -> Recipe:
    defaults = {"objective": "hybrid", "steps": 10, "batch_size": 8}
    return Recipe.model_validate({"distill": {"stages": [{**defaults, **stage} for stage in stages], **distill}})


def config(kind: str, **values: Any) -> ModelConfig:
    size = {"hidden_size": 64, "num_layers": 4, "linear_num_heads": 2, "linear_conv_size": 5}
    return ModelConfig.of({**PICO, **size, "attention": [kind] * 4, **values})


def counted(work: Callable[[], object]) -> int:
    """FLOPs of the products that PyTorch really carries out."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("conv_size", [0, 5])
def test_a_steps_flops_are_those_that_pytorch_counts(conv_size: int) -> None:
    made = [LiTTransformer2DModel(**config(kind, linear_conv_size=conv_size).values) for kind in ("linear", "softmax")]
    student, teacher = (model.train() for model in made)
    noisy, timestep, labels = torch.randn(1, 2, 16, 16), torch.tensor([3]), torch.tensor([1])

    def teach() -> None:
        with torch.no_grad():
            teacher(noisy, timestep, labels)

    def learn() -> Any:
        return student(noisy, timestep, labels).sample

    if conv_size == 0:
        expected = counted(teach) + counted(lambda: learn().sum().backward())
    else:  # PyTorch counts the backward pass of a depth-wise convolution as that of a dense one
        expected = counted(teach) + 3 * counted(learn)
    stage = recipe_of({}).distill.stages[0]
    assert training_flops(stage, ModelConfig.of(student.config), ModelConfig.of(teacher.config)) == pytest.approx(
        expected, rel=0.03
    )


def test_a_teacher_that_is_not_run_is_not_counted() -> None:
    student, teacher = config("linear"), config("softmax")
    alone = recipe_of({"noise_weight": 0, "variance_weight": 0}).distill.stages[0]
    taught = recipe_of({}).distill.stages[0]
    featured = recipe_of({"feature_weight": 0.5}).distill.stages[0]
    least = training_flops(alone, student, teacher)
    assert least == training_flops(taught, student, None) == training_flops(taught, student, teacher, kept=True)
    assert least < training_flops(featured, student, teacher, kept=True) == training_flops(taught, student, teacher)


def throughput(recipe: Recipe, stage: int = 0, device: str = "cpu", processes: int = 1) -> Throughput:
    work = stage_work(recipe, config("linear"), config("softmax"))
    return Throughput(recipe, stage, work, torch.device(device), processes)


def test_the_speed_is_that_of_the_last_twenty_steps() -> None:
    meter = throughput(recipe_of({"batch_size": 8}))
    meter.update(60.0, 9)  # compiling
    for _ in range(20):
        metrics = meter.update(0.5, 6)
    assert metrics["images_per_second"] == pytest.approx(16)
    assert metrics["eta_seconds"] == pytest.approx(3)
    assert metrics["memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert "flops_utilization" not in metrics


def test_the_time_left_counts_later_stages_by_their_work() -> None:
    recipe = recipe_of({"steps": 10}, {"steps": 5, "batch_size": 16})
    assert throughput(recipe).update(1.0, 14)["eta_seconds"] == pytest.approx(9 + 5 * 2)
    assert throughput(recipe, 1).update(1.0, 4)["eta_seconds"] == pytest.approx(4)


def test_utilisation_is_over_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    recipe = recipe_of({"batch_size": 8})
    flops = 8 * training_flops(recipe.distill.stages[0], config("linear"), config("softmax"))
    metrics = throughput(recipe, device="cuda", processes=2).update(0.25, 9)
    assert metrics["flops_utilization"] == pytest.approx(flops / 0.25 / (2 * 362e12))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B300", None),
    ],
)
def test_a_peak_is_a_data_sheets_or_none(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


# The display.


def report(step: int, steps: int = 50, total: int = 60, **metrics: float) -> StepReport:
    return StepReport("hybrid", step, steps, step + total - steps, total, {**STEP, **metrics})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    """Puts 80 columns in the place of stderr: a terminal, or a log."""

    def make(interactive: bool) -> io.StringIO:
        screen = io.StringIO()
        monkeypatch.setattr(
            console, "err", Console(file=screen, force_terminal=interactive, force_interactive=interactive, width=80)
        )
        return screen

    return make


def test_a_log_has_the_first_and_last_step_of_a_stage_and_no_control_characters(
    terminal: Callable[[bool], io.StringIO],
) -> None:
    log = terminal(False)
    display = screen()
    with display.training("distil"):
        for step in range(1, 51):
            display.step(report(step))
    first, last = log.getvalue().splitlines()
    assert first.startswith("distil: hybrid 1/50 (11/60 in all): loss 0.25, noise 0.125, teacher noise 0.125")
    assert last.startswith("distil: hybrid 50/50")
    assert last.endswith("128 images/s, memory 2.00 GB, ETA 0:01:30")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", log.getvalue())


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 2), (10.0, 11)], ids=["short", "long"])
def test_a_log_has_a_line_as_work_begins_and_ends_and_for_each_tenth_that_takes_its_time(
    terminal: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    log, clock = terminal(False), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with screen().task("draw", 40) as task:
        for image in range(40):
            clock[0] += seconds
            task.advance(remark=f"image {image}")
    lines = log.getvalue().splitlines()
    assert lines[0] == "draw: 0/40"
    assert lines[-1] == "draw: 40/40 image 39"
    assert len(lines) == count


def test_work_on_a_terminal_is_a_bar(terminal: Callable[[bool], io.StringIO]) -> None:
    shown = terminal(True)
    with screen().task("draw", 4) as task:
        task.advance(4, "all of them")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "4/4" in text
    assert "all of them" in text


def test_a_log_of_a_long_run_has_a_line_every_half_minute(
    terminal: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, clock = terminal(False), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    display = screen()
    with display.training("distil"):
        for step in range(1, 50):
            clock[0] += 10
            display.step(report(step))
    assert [re.findall(r"hybrid (\d+)/", line) for line in log.getvalue().splitlines()][:3] == [["1"], ["4"], ["7"]]


def test_a_terminal_shows_everything_within_80_columns(terminal: Callable[[bool], io.StringIO]) -> None:
    shown = terminal(True)
    long = {"variational_bound": 0.000123, "teacher_variance": 1.23e-5, "features": 0.123, "flops_utilization": 0.412}
    display = screen()
    with display.training("distil"):
        display.step(report(99_000, 100_000, 100_080, **long, eta_seconds=300_000))
        console.note("a note")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "")
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("a note", "99000/100000", "teacher variance 1.23e-05", "features 0.123", "MFU 41.2%", "128 images/s"):
        assert part in text
    assert "learning rate 1.00e-04" in text
    assert "ETA 3d 11:20:00" in text


def test_quiet_shows_nothing(terminal: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(True)
    monkeypatch.setitem(console._settings, "quiet", True)
    display = screen()
    with display.training("distil"):
        display.step(report(1))
    assert shown.getvalue() == ""


def test_durations_are_read_at_a_glance() -> None:
    shown = [duration(seconds) for seconds in (0.4, 59.6, 3725, 90061)]
    assert shown == ["0:00:00", "0:01:00", "1:02:05", "1d 01:01:01"]


# Trackers.


class FakeTracker(GeneralTracker):  # type: ignore[misc]
    """Keeps what it is given."""

    requires_logging_directory = False

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(_blank=True)
        self.name, self.fails, self.steps, self.finished = name, fails, list[int | None](), False

    @property
    def tracker(self) -> object:
        return self

    def start(self) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.fails:
            raise ConnectionError("the service is gone")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def start_fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have these trackers started, in the place of those of their names."""

    def start(*fakes: FakeTracker) -> None:
        by_name = {fake.name: fake for fake in fakes}
        monkeypatch.setattr("litconvert.runs.trackers.start_tracker", lambda name, folder, options: by_name[name])

    return start


def checkpoint(run: RunDirectory, step: int) -> None:
    run.save_checkpoint(Progress(0, step, step), lambda folder: None, keep=2, main=True)


def test_a_tracker_whose_package_is_missing_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    tracker_packages(("tensorboard", "trackio"))
    with pytest.raises(UsageError, match="pip install wandb"):
        tracker_packages(("tensorboard", "wandb"))


def test_a_tracker_that_keeps_every_row_is_given_each_step_once_over_resumes(
    run: RunDirectory, start_fakes: Callable[..., None]
) -> None:
    tracker = FakeTracker("trackio")
    start_fakes(tracker)
    recipe = recipe_of({}, trackers=["trackio"])

    def session(first: int, last: int) -> None:
        trackers = Trackers(run, recipe, Hearing(note=pytest.fail))
        run.truncate_metrics(first - 1)
        for step in range(first, last + 1):
            train(run, step, step)
            trackers.log(step, STEP)
        trackers.finish()

    session(1, 6)
    checkpoint(run, 4)
    session(5, 8)
    assert tracker.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert tracker.finished


def test_a_tracker_that_fails_is_given_up_with_a_note_and_the_others_go_on(
    run: RunDirectory, start_fakes: Callable[..., None]
) -> None:
    good, bad, notes = FakeTracker("tensorboard"), FakeTracker("wandb", fails=True), list[str]()
    start_fakes(bad, good)
    recipe = recipe_of({}, trackers=["tensorboard", "wandb"])
    trackers = Trackers(run, recipe, Hearing(note=notes.append))
    for step in (1, 2):
        trackers.log(step, STEP)
    assert good.steps == [1, 2]
    assert len(notes) == 1
    assert "wandb" in notes[0]
    assert "the service is gone" in notes[0]


def test_tensorboard_shows_each_step_once_over_resumes(run: RunDirectory) -> None:
    reading = "tensorboard.backend.event_processing.event_accumulator"
    event_accumulator = pytest.importorskip(reading, reason="needs tensorboard")
    recipe = recipe_of({}, trackers=["tensorboard"])
    for first, last in ((1, 6), (5, 8)):
        if first > 1:
            checkpoint(run, first - 1)
        trackers = Trackers(run, recipe, Hearing(note=pytest.fail))
        for step in range(first, last + 1):
            trackers.log(step, {**STEP, "loss": 10.0 * first + step})
        trackers.finish()
    events = event_accumulator.EventAccumulator(str(run.path / "logs" / "litconvert"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 11), (2, 12), (3, 13), (4, 14), (5, 55), (6, 56), (7, 57), (8, 58)]


# Backups.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for one test, which this process is logged in to."""
    with HubServer(TOKEN) as server:
        enter(server, monkeypatch)
        yield server


def kept(hub: HubServer) -> dict[str, bytes]:
    return {name: data for name, data in hub.files("tester/backup").items() if name != ".gitattributes"}


def backup(run: RunDirectory, notes: list[str], *, minutes: float = 60, private: bool = True) -> Backup:
    return Backup(run.path, "tester/backup", minutes, private=private, listener=Hearing(note=notes.append))


def test_a_backup_holds_the_run_without_checkpoints_and_what_is_half_written(run: RunDirectory, hub: HubServer) -> None:
    notes: list[str] = []
    train(run, 1, 2)
    checkpoint(run, 2)
    (run.path / ".model.partial-1").mkdir()
    (run.path / ".model.partial-1" / "config.json").write_text("{")
    uploads = backup(run, notes)
    train(run, 3, 4)
    uploads.stop()
    assert set(kept(hub)) == {"run/metrics.csv", "run/recipe.yaml", "run/run.json"}
    assert kept(hub)["run/metrics.csv"] == run.metrics.read_bytes()
    assert hub.repositories["tester/backup"].private
    assert notes == []


def test_a_backup_that_fails_is_noted_and_made_up_for(run: RunDirectory, hub: HubServer) -> None:
    notes: list[str] = []
    hub.fail_next("POST", "/commit/", 403)
    uploads = backup(run, notes)
    deadline = time.monotonic() + 20
    while not notes and time.monotonic() < deadline:
        time.sleep(0.02)
    train(run, 1, 1)
    uploads.stop()
    assert len(notes) == 1
    assert "training goes on" in notes[0]
    assert kept(hub)["run/metrics.csv"] == run.metrics.read_bytes()


def test_a_hub_that_is_out_of_reach_at_the_start_is_tried_again(run: RunDirectory, hub: HubServer) -> None:
    notes: list[str] = []
    hub.fail_next("POST", "/api/repos/create", 503)
    uploads = backup(run, notes, minutes=0.002)
    deadline = time.monotonic() + 20
    while uploads.uploads is None and time.monotonic() < deadline:
        time.sleep(0.02)
    uploads.stop()
    assert len(notes) == 1
    assert "run/run.json" in kept(hub)


def test_a_backup_that_can_never_work_is_refused_before_training(
    run: RunDirectory, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        Backup(run.path, "backup", 5, private=True, listener=Hearing(note=pytest.fail))
    hub.fail_next("POST", "/api/repos/create", 403)
    with pytest.raises(LitconvertError, match="refused"):
        backup(run, [])
    backup(run, [], private=False).stop()
    with pytest.raises(LitconvertError, match="is public"):
        backup(run, [])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LitconvertError, match="hf auth login"):
        backup(run, [])
