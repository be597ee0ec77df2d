"""The curves of two small teachers: their rows, how rates are chosen, distances, and two rows, small."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import curve, curve_plots
from benchmarks.curve import Work, distances, named
from benchmarks.curve_rows import CURVES, EMOJI, FLOOR, SEARCH_SEED, Curve, Results, Row
from litconvert.recipe.schema import Hybrid

ROOT = Path(__file__).parents[2]
TINY = (
    "evaluate.num_samples=20",
    "data.synthesize.num_samples=16",
    "solve.states=16",
    "solve.held_out=4",
    "solve.local_steps=1",
    "distill.stages.0.steps=1",
)


def work_in(folder: Path, of: Curve = EMOJI) -> Work:
    return Work(of, Results(folder / of.name), folder / "work")


def write(results: Results, row: Row, seed: int, distance: float, **more: Any) -> None:
    """A result as it is measured."""
    results.folder.mkdir(parents=True, exist_ok=True)
    costs = {f"{part}_core_seconds": 5.0 for part in ("walk", "training")}
    noise = {"error": distance / 100, "interval": [0, 1], "by_timestep": [distance / 100] * 10}
    record = {"frechet_distance": distance, "principal_distance": distance / 2, "agreement": {"noise": noise}}
    results.path(row, seed).write_text(json.dumps({**costs, **record, **more}))


@pytest.mark.parametrize("of", CURVES.values(), ids=CURVES)
def test_every_row_has_a_recipe_with_its_steps_and_seeds(tmp_path: Path, of: Curve) -> None:
    work = work_in(tmp_path, of)
    assert {(row.arm, row.steps) for row, _ in of.rows if row.arm != FLOOR} == {
        (arm, steps) for arm, settings in of.arms.items() for steps in settings.lengths
    }
    for arm in of.arms:
        for row in of.searched(arm):
            write(work.results, row, SEARCH_SEED, 1.0)
    for row, seed in of.rows:
        assert named(of, row.name) == row
        recipe = work.recipe(row, seed)
        (stage,) = recipe.distill.stages
        assert isinstance(stage, Hybrid)
        assert (recipe.solve is None) == (row.arm in ("paper", "lower", "loss", FLOOR))
        assert (recipe.seed, recipe.data.synthesize.seed, recipe.evaluate.seeds) == (seed, 1 + seed, (100 + seed,))
        if row.steps:
            assert (stage.steps, stage.batch_size, stage.schedule) == (row.steps, 16, "cosine")
            assert stage.learning_rate in of.arms[row.arm].rates


def test_the_paper_s_recipe_with_our_loss_has_the_stage_of_ours_but_for_its_length_and_rate(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    (mixed,), (ours,) = (
        work.recipe(row, 0).distill.stages for row in (Row("loss", 800), Row("inherited", 500, rate=5e-4))
    )
    assert mixed == ours.model_copy(update={"steps": 800, "learning_rate": 2e-3})


def test_what_an_arm_s_rate_is_chosen_by_comes_before_its_rows(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    keys = [task.key for task in work.tasks()]
    for arm in ("inherited", "paper"):
        searched = [keys.index(f"row-{row.name}-{SEARCH_SEED}") for row in EMOJI.searched(arm)]
        assert len(searched) >= 3
        assert max(searched) < min(keys.index(f"row-{arm}-{steps}-0") for steps in (100, 300, 800))
    assert work.rate(Row("inherited", 100)) is None
    for row, distance in zip(EMOJI.searched("inherited"), (30.0, 20.0, 40.0), strict=True):
        write(work.results, row, SEARCH_SEED, distance)
    assert {work.rate(Row("inherited", steps)) for steps in (100, 300, 800)} == {EMOJI.arms["inherited"].rates[1]}


def test_a_distance_in_all_directions_is_that_of_all_features() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(500, curve.COMPONENTS, generator=generator)
    second = 1 + 1.5 * torch.randn(400, curve.COMPONENTS, generator=generator)
    found = distances(first, second)
    assert found["principal_distance"] == pytest.approx(found["frechet_distance"], rel=1e-9)
    # Directions in which the reference hardly differs are left out.
    still = torch.cat([1e-6 * torch.randn(500, 8, generator=generator), first], 1)
    moved = torch.cat([100 + torch.zeros(400, 8), second], 1)
    assert distances(still, moved)["principal_distance"] == pytest.approx(found["frechet_distance"], rel=1e-3)
    assert distances(still, moved)["frechet_distance"] > 8e4


def test_rank_correlation_is_spearman_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).tolist()
    expected = stats.spearmanr(first, second).statistic
    assert curve_plots.rank_correlation(first, second) == pytest.approx(expected)


def test_tables_and_plots_of_what_is_there(tmp_path: Path) -> None:
    for of in CURVES.values():
        results = Results(tmp_path / of.name)
        for row, seed in of.rows:
            distance = (80.0 if row.arm == "paper" else 40.0) + row.steps / 100 + seed
            write(results, row, seed, distance, **({"learning_rate": 3e-4} if row.steps else {}))
    text = curve_plots.markdown(tmp_path)
    assert (
        "| solved, Q, K, V inherited, 300 steps | 3e-4 | 22.0 ± 0.5 | 44.0 ± 1.0 | 0.4400 ± 0.0100 | 10 | 3 |" in text
    )
    assert "64 directions: 0.49 of it, -22.50 (95 %: -22.50 to -22.50, 3 seeds)" in text
    assert "rank correlation 1.00; distance ~ error^1.00, within a factor of 1.00" in text
    curve_plots.show(tmp_path)
    for name in ("emoji-curve", "agreement"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size[0] > 800
    assert not (tmp_path / "emoji-samples.png").exists()


def test_an_unknown_row_and_overrides_of_the_committed_results_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["digits", "--rows", "fresh-7"], "no row fresh-7; there are fresh-0, closed-0"),
        (["digits", "--set", TINY[0]], "name a folder for them"),
    ):
        with pytest.raises(SystemExit):
            curve.main([*arguments, "--dry-run"])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_measured_in_two_processes_and_not_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["digits", "--rows", "floor", "fresh-0", "paper-100", "--set", *TINY]
    arguments = [*rows, "--results", str(tmp_path / "curve"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "benchmarks.curve", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert "row-fresh-0-0: " in done
    results = Results(tmp_path / "curve" / "digits")
    names = ["floor", "fresh-0", "paper-100"]
    assert sorted(path.name for path in results.folder.iterdir()) == sorted(
        [f"{name}-0.json" for name in names] + [f"{name}.png" for name in names]
    )
    solved, trained = results.read(Row("fresh"), 0), results.read(Row("paper", 100), 0)
    assert solved is not None
    assert trained is not None
    assert solved["walk_seconds"] > 0 == solved["training_steps"]
    assert (trained["walk_seconds"], trained["training_steps"], trained["learning_rate"]) == (0, 1, 1e-3)
    assert solved["agreement"]["noise"]["error"] < trained["agreement"]["noise"]["error"]
    assert len(solved["agreement"]["noise"]["by_timestep"]) == 10
    assert solved["frechet_distance"] > 0 < trained["principal_distance"]
    assert curve.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tasks")
