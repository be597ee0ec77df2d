"""Several processes: the same losses as one, checkpoints that any number resumes, and kills at any moment."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from litconvert.data.dataset import write_latents
from litconvert.data.synthesize import synthesize
from litconvert.runs.directory import RunDirectory
from tests.helpers.matrix import OBJECTIVES, WAYS, Way
from tests.helpers.processes import Forker, patience

STAGES = (
    "distill.stages=[{objective: hybrid, steps: 8, batch_size: 8, learning_rate: 1.0e-3, noise_weight: 2.0},"
    "{objective: hybrid, steps: 12, batch_size: 8, learning_rate: 1.0e-3, schedule: cosine, feature_weight: 0.5}]"
)

SIGNALS = (signal.SIGKILL, signal.SIGTERM)

# Two processes at a time are all that two cores bear: these tests run one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as forker:
        yield forker


@pytest.fixture
def data(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> Path:
    return synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe))


def distill(student: Path, run: Path, data: Path, *sets: str) -> list[str]:
    """The command's arguments."""
    return ["distill", str(student), str(run), "--data", str(data), "-q", *(p for one in sets for p in ("--set", one))]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "diffusion_pytorch_model.safetensors")


def losses(run: Path) -> Tensor:
    rows = RunDirectory(run).read_metrics()
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return torch.tensor([float(row["loss"]) for row in rows], dtype=torch.float64)


def steps_made(run: Path) -> int:
    """Rows of metrics.csv, as they are while somebody writes it."""
    table = run / "metrics.csv"
    return max(0, table.read_bytes().count(b"\n") - 1) if table.is_file() else 0


def run_to_end(forker: Forker, arguments: list[str], log: Path, *, processes: int = 1, sharded: bool = False) -> None:
    with patience(300):
        codes = forker.launch(arguments, log, processes=processes, sharded=sharded).wait()
    assert codes == [0] * processes, log.read_text()


@pytest.mark.parametrize("sharded", [False, True], ids=["data-parallel", "sharded"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_have_the_losses_of_one(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path, sharded: bool, accumulation: int
) -> None:
    parts = f"distill.gradient_accumulation_steps={accumulation}"
    run_to_end(forker, distill(pico_student, tmp_path / "one", data, STAGES), tmp_path / "one.log")
    # A split teacher answers only when every process asks: what looks at it on one of them alone would hang.
    teacher = f"distill.teacher_placement={'sharded' if sharded and accumulation == 2 else 'device'}"
    arguments = distill(pico_student, tmp_path / "two", data, STAGES, parts, teacher)
    run_to_end(forker, arguments, tmp_path / "two.log", processes=2, sharded=sharded)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    assert float(((one - two) / one).abs().max()) < 1e-4
    # The EMA of all of it: what is published is the same model, too.
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=2e-4)


SOLVE = ("source.num_attention_heads=2", "student.num_attention_heads=2", "student.conv_size=3")
SIZES = "states: 30, held_out: 8, drawing_steps: 2, local_batch_size: 6, mixed_precision: no"


@pytest.mark.parametrize(("processes", "local_steps"), [(2, 0), (3, 0), (2, 4)])
def test_several_processes_solve_to_what_one_does(
    tmp_path: Path, forker: Forker, pico_checkpoint: Path, processes: int, local_steps: int
) -> None:
    sets = [*SOLVE, f"solve={{{SIZES}, local_steps: {local_steps}}}", "inherit.attention=q+k+v"]
    options = ["-q", *(part for one in sets for part in ("--set", one))]
    outs = {count: tmp_path / f"of-{count}" for count in (1, processes)}
    for count, out in outs.items():
        run_to_end(forker, ["convert", str(pico_checkpoint), str(out), *options], tmp_path / "log", processes=count)
    one, several = (litconvert.load(out) for out in outs.values())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0, 300, 600, 999]), torch.arange(4)
    with torch.no_grad():
        first, second = (model(*inputs, return_dict=False)[0] for model in (one, several))
    # Steps of Adam make more of rounding than sums do.
    limit = 1e-3 if local_steps else 1e-5
    assert float((first - second).abs().max() / first.abs().max()) < limit
    assert not list(tmp_path.glob(".*solving*"))


def test_split_weights_are_gathered_as_bf16_under_autocast(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path
) -> None:
    half = "distill.mixed_precision=bf16"
    run_to_end(forker, distill(pico_student, tmp_path / "one", data, STAGES, half), tmp_path / "one.log")
    arguments = distill(pico_student, tmp_path / "two", data, STAGES, half)
    run_to_end(forker, arguments, tmp_path / "two.log", processes=2, sharded=True)
    whole = distill(pico_student, tmp_path / "float32", data, STAGES)
    run_to_end(forker, whole, tmp_path / "float32.log", processes=2, sharded=True)
    one, two, exact = (losses(tmp_path / name) for name in ("one", "two", "float32"))
    assert float(((one - two) / one).abs().max()) < 2e-2
    assert 1e-5 < float(((exact - two) / exact).abs().max()) < 5e-2
    # What is trained and kept stays float32.
    assert {value.dtype for value in weights(tmp_path / "two").values()} == {torch.float32}


def test_every_way_to_train_has_the_losses_of_one_process(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path
) -> None:
    """Data parallel or sharded, float32 or bf16, in one part or two, features or not: one launch, sixteen runs."""
    log = tmp_path / "log"
    with patience(300):
        workers = forker.launch(
            [str(pico_student), str(data), str(tmp_path)], log, processes=2, call="tests.helpers.matrix:main"
        )
        codes = workers.wait()
    assert codes == [0, 0], log.read_text()
    alone = {
        (precision, objective): losses(
            litconvert.distill(
                pico_student,
                tmp_path / f"alone-{precision}-{objective}",
                data=data,
                overrides=Way(False, precision, 1, objective).overrides,
            )
        )
        for precision, objective in product(("no", "bf16"), OBJECTIVES)
    }
    limits = {"no": 1e-4, "bf16": 2e-2}
    for way in WAYS:
        found, expected = losses(tmp_path / way.name), alone[way.precision, way.objective]
        difference = float(((expected - found) / expected).abs().max())
        assert difference < limits[way.precision], (way.name, difference)
        # It is really computed in that precision.
        exact = alone["no", way.objective]
        assert way.precision == "no" or float(((exact - found) / exact).abs().max()) > 1e-5, way.name


@pytest.mark.parametrize("sharded", [False, True], ids=["data-parallel", "sharded"])
def test_processes_skip_the_same_steps(tmp_path: Path, forker: Forker, pico_student: Path, sharded: bool) -> None:
    """One sample of sixteen is NaN: one process of two sees it, in one step of every two."""
    latents = torch.rand((16, 1, 8, 8), generator=torch.Generator().manual_seed(7)) * 2 - 1
    latents[3] = float("nan")
    bad = write_latents(latents, torch.arange(16) % 4, tmp_path / "bad", "random")
    stages = "distill.stages=[{objective: hybrid, steps: 6, batch_size: 8, learning_rate: 1.0e-3, max_grad_norm: 1.0}]"
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, processes in zip(runs, (1, 2), strict=True):
        arguments = [
            one for one in distill(pico_student, run, bad, stages, "distill.max_skipped_steps=3") if one != "-q"
        ]
        log = tmp_path / f"{run.name}.log"
        run_to_end(forker, arguments, log, processes=processes, sharded=sharded and processes == 2)
    notes = (tmp_path / "two.log").read_text()
    assert notes.count("the data (on process ") == 3, notes
    one, two = (RunDirectory(run).read_metrics() for run in runs)
    assert [row["skipped_steps"] for row in one] == [row["skipped_steps"] for row in two]
    assert one[-1]["skipped_steps"] == "3"
    for mine, theirs in zip(one, two, strict=True):
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4, nan_ok=True)


def test_the_first_process_alone_decides_what_is_resumed(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path
) -> None:
    """On a shared file system another process may not see the newest checkpoint yet, or any."""
    stages = "distill.stages=[{{objective: hybrid, steps: {}, batch_size: 8, learning_rate: 1.0e-3}}]"
    log = tmp_path / "log"
    for name, steps in (("whole", 8), ("run", 4)):
        run_to_end(forker, distill(pico_student, tmp_path / name, data, stages.format(steps)), log, processes=2)
    with patience(120):
        arguments = distill(pico_student, tmp_path / "run", data, stages.format(8))
        workers = forker.launch(arguments, log, processes=2, call="tests.helpers.matrix:with_a_stale_view")
        assert workers.wait() == [0, 0], log.read_text()
    assert torch.equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))


def test_the_first_process_alone_decides_what_a_run_starts_from(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path
) -> None:
    """Sharded, where a mixture of two checkpoints would go unnoticed: data parallelism sends the first one's to all."""
    stages = "distill.stages=[{objective: hybrid, steps: 6, batch_size: 8, learning_rate: 1.0e-2}]"
    log, first = tmp_path / "log", tmp_path / "first"
    every = ["--set", "distill.checkpoint_every=2", "--set", "distill.keep_checkpoints=9"]
    run_to_end(forker, [*distill(pico_student, first, data, stages), *every], log)
    shutil.rmtree(first / "model")
    run_to_end(forker, [*distill(pico_student, tmp_path / "one", data, stages), "--from", str(first)], log)
    with patience(120):
        arguments = [*distill(pico_student, tmp_path / "two", data, stages), "--from", str(first)]
        call = "tests.helpers.matrix:with_a_stale_view"
        workers = forker.launch(arguments, log, processes=2, sharded=True, call=call)
        assert workers.wait() == [0, 0], log.read_text()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert float(((one - two) / one).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, False), (1, False)), ((1, False), (2, False)), ((2, True), (1, False)), ((1, False), (2, True)),
     ((2, True), (2, False))],
    ids=["2-to-1", "1-to-2", "sharded-to-1", "1-to-sharded", "sharded-to-data-parallel"],
)  # fmt: skip
def test_another_number_of_processes_goes_on(
    tmp_path: Path,
    forker: Forker,
    pico_student: Path,
    data: Path,
    first: tuple[int, bool],
    second: tuple[int, bool],
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    stages = STAGES.replace("steps: 12", "steps: 32")
    run_to_end(forker, distill(pico_student, whole, data, stages), tmp_path / "log")
    # Stopped by SIGTERM in the middle of the second stage, where optimiser, EMA and model all matter.
    arguments = distill(pico_student, run, data, stages)
    workers = forker.launch(arguments, tmp_path / "log", processes=first[0], sharded=first[1])
    with patience(120):
        while len(RunDirectory(run).read_metrics()) < 11:
            time.sleep(0.005)
        workers.kill(signal.SIGTERM, only=0)
        codes = workers.wait()
    assert codes == [130] * first[0], (tmp_path / "log").read_text()
    made = len(RunDirectory(run).read_metrics())
    assert 11 <= made < 40
    assert (run / "checkpoints" / f"step-{made:08d}").is_dir()
    run_to_end(forker, arguments, tmp_path / "log", processes=second[0], sharded=second[1])
    one, mixed = losses(whole), losses(run)
    assert float(((one - mixed) / one).abs().max()) < 1e-4


@pytest.mark.parametrize(("sharded", "times"), [(False, 20), (True, 5)], ids=["data-parallel", "sharded"])
def test_kills_at_random_moments_change_nothing(
    tmp_path: Path, forker: Forker, pico_student: Path, data: Path, sharded: bool, times: int
) -> None:
    """One run of two processes, killed so many times: both or one alone, by SIGKILL or by SIGTERM."""
    stages = (
        "distill.stages=[{objective: hybrid, steps: 60, batch_size: 8, learning_rate: 1.0e-3, feature_weight: 0.5},"
        f"{{objective: hybrid, steps: {16 * times + 20}, batch_size: 8, learning_rate: 1.0e-3, schedule: cosine}}]"
    )
    sets = (stages, "distill.checkpoint_every=9")
    log = tmp_path / "log"
    run_to_end(forker, distill(pico_student, tmp_path / "whole", data, *sets), log, processes=2, sharded=sharded)
    run, arguments = tmp_path / "killed", distill(pico_student, tmp_path / "killed", data, *sets)
    choices = random.Random(0 if sharded else 1)
    kills: list[tuple[str, int | None, int, list[int]]] = []
    while len(kills) < times:
        workers = forker.launch(arguments, log, processes=2, sharded=sharded)
        with patience(120):
            if choices.random() < 0.2:  # while it starts
                time.sleep(choices.uniform(0, 1))
            else:  # in the middle of some step, and so now and then of a checkpoint
                victim = steps_made(run) + choices.randrange(1, 20)
                while steps_made(run) < victim:
                    time.sleep(0.001)
                time.sleep(choices.uniform(0, 0.02))
            made, number, only = steps_made(run), choices.choice(SIGNALS), choices.choice([None, 0, 1])
            assert not (run / "model").exists(), f"the run ended after {kills}; make it longer"
            workers.kill(number, only=only)
            codes = workers.wait()
        kills.append((number.name, only, made, codes))
        assert 0 not in codes, kills
        assert "Traceback" not in log.read_text()
    run_to_end(forker, arguments, log, processes=2, sharded=sharded)
    # Every step once, with the loss it has in the uninterrupted run: the same samples, noise and weights.
    assert torch.equal(losses(run), losses(tmp_path / "whole")), kills
    expected, found = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(found[name], value) for name, value in expected.items()), kills
    assert len({made for _, _, made, _ in kills}) > times // 2, kills
