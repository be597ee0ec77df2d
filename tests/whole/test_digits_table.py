"""The digits table: its rows and their order, its arithmetic, what its variants leave out, and two rows, small."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from benchmarks import digits_plots, digits_table
from benchmarks.digits_results import Results, paired
from benchmarks.digits_rows import (
    ARMS,
    CLAIM_SEEDS,
    GROUPS,
    LOCAL,
    SEARCH_SEED,
    SIZES,
    SOLVED,
    all_rows,
    local_name,
    search_name,
    solving_defaults,
    states_name,
)
from benchmarks.digits_table import Work
from benchmarks.digits_variants import variant
from litconvert.recipe.schema import Hybrid

ROOT = Path(__file__).parents[2]
ROWS = all_rows()
TINY = (
    "evaluate.num_samples=20",
    "data.synthesize.num_samples=16",
    "solve.states=16",
    "solve.held_out=4",
    "solve.local_steps=1",
    "distill.stages.0.steps=1",
)
PICO = (
    "source.num_attention_heads=2",
    "student.num_attention_heads=2",
    "student.conv_size=3",
    "inherit.attention=q+k+v",
)
SOLVE = ("solve.states=24", "solve.held_out=8", "solve.drawing_steps=2", "solve.mixed_precision=no")


def work_in(folder: Path) -> Work:
    return Work(Results(folder / "digits"), folder / "work")


def write(results: Results, name: str, seed: int, distance: float, **more: Any) -> None:
    """A result as the table's measuring writes it."""
    results.folder.mkdir(parents=True, exist_ok=True)
    scores = {"frechet_distance": {"mean": distance}, "class_accuracy": {"mean": 0.9}}
    costs = {f"{part}_{unit}": 5.0 for part in ("walk", "training") for unit in ("core_seconds", "macs")}
    record = {"row": name, "seed": seed, **costs, **more, "models": {name: scores}}
    results.path(name, seed).write_text(json.dumps(record))


def test_every_row_has_a_recipe_and_what_it_differs_from_is_a_row(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    for row in ROWS.values():
        recipe = work.recipe(row, 2)
        (stage,) = recipe.distill.stages
        assert isinstance(stage, Hybrid)
        assert (recipe.solve is None) == (row.start is not None and row.start.arm == "paper")
        assert (recipe.seed, recipe.data.synthesize.seed, recipe.evaluate.seeds) == (2, 3, (102,))
        assert (recipe.data.synthesize.num_samples, recipe.evaluate.num_samples) == (1024, 1000)
        if row.training is not None:
            assert (stage.steps, stage.batch_size, stage.schedule) == (row.training.steps, 16, "cosine")
            assert all(name in ROWS for name in row.searched)
        if row.group == "factors":
            assert digits_plots.base_of(row) in ROWS
    for arm in SOLVED:
        assert all(local_name(arm, count) in ROWS for count in LOCAL)
        assert all(states_name(arm, count) in ROWS for count in SIZES)
        assert work.recipe(ROWS[f"{arm}-0"], 0).solve is not None
        assert solving_defaults(arm)[0] in SIZES


def test_rates_are_searched_on_a_seed_that_nothing_else_has() -> None:
    searching = {search_name(arm, steps, rate) for arm in ARMS for steps in (50, 300, 800) for rate in ARMS[arm].rates}
    assert searching <= set(ROWS)
    for row in ROWS.values():
        searches = row.training is not None and row.training.rate is not None
        assert (row.seeds == (SEARCH_SEED,)) == searches
        assert searches or SEARCH_SEED not in row.seeds


def test_what_is_missing_comes_by_importance_and_after_what_it_needs(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    tasks = replace(work, seeds=CLAIM_SEEDS).tasks()
    places = {task.key: place for place, task in enumerate(tasks)}
    assert len(places) == len(tasks)
    for task in tasks:
        assert all(places[need.key] < places[task.key] for need in task.needs)
    groups = [GROUPS.index(ROWS[task.name].group) for task in tasks if task.kind == "row"]
    assert all(first <= second for first, second in pairwise(groups))
    needed = {task.key for task in replace(work, names=("fresh-300",), seeds=(0,)).tasks()}
    assert needed >= {"row-fresh-300-at-5e-5-7", "student-fresh-7", "student-fresh-0", "data-0", "data-7"}
    # What is measured is not missing, nor is what only it needed.
    write(work.results, "fresh-0", 0, 1.5)
    assert [task.key for task in replace(work, names=("fresh-0",), seeds=(0,)).tasks()] == []
    assert len(replace(work, names=("fresh-0",), seeds=(0, 1)).tasks()) == 3


def test_a_row_takes_the_rate_that_was_best_on_the_search_seed(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    for rate, distance in zip(ARMS["fresh"].rates, (2.0, 1.2, 3.0), strict=True):
        write(work.results, search_name("fresh", 300, rate), SEARCH_SEED, distance)
    assert work.results.best_rate("fresh", 300) == ARMS["fresh"].rates[1]
    for name in ("fresh-300", "fresh-300-lambda-0"):
        assert work.recipe(ROWS[name], 0).distill.stages[0].learning_rate == ARMS["fresh"].rates[1]


def test_paired_intervals_are_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = [1.4, 1.5, 1.3, 1.6, 1.2, 1.4], [2.0, 2.3, 2.4, 2.1, 2.2, 2.6]
    for count in (2, 3, 6):
        found = paired(first[:count], second[:count])
        expected = stats.ttest_rel(first[:count], second[:count]).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)
        assert found.pairs == count


def test_tables_and_curves_of_what_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path / "digits")
    assert digits_plots.NOT_MEASURED in digits_plots.markdown(results)
    for row in ROWS.values():
        for seed in row.seeds[:4]:
            more = {"learning_rate": 1.5e-4} if row.training else {}
            write(results, row.name, seed, (8.0 if "paper" in row.name else 1.5) + 0.1 * seed, **more)
    text = digits_plots.markdown(results)
    assert digits_plots.NOT_MEASURED not in text
    assert (
        "| fresh Q, K, V, O, 0 steps - the paper's recipe, 800 steps | -6.50 (95 %: -6.50 to -6.50, 4 seeds) |" in text
    )
    assert "| fresh Q, K, V, O, 50 steps | 1.5e-4 | 1.60 ± 0.10 | 90.0 ± 0.0 | 5 + 5 | 0.0 + 0.0 | 3 |" in text
    digits_plots.plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size <= 150_000
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1100, 800)


def attention_of(source: Path, out: Path, name: str | None, *overrides: str) -> Mapping[str, Tensor]:
    with variant(name):
        student = litconvert.convert(source, out, None, (*PICO, *SOLVE, *overrides))
    state = load_file(student / "diffusion_pytorch_model.safetensors")
    return {name: value for name, value in state.items() if ".attn." in name}


def test_variants_leave_out_what_they_say(pico_checkpoint: Path, tmp_path: Path) -> None:
    closed = "solve.local_steps=0"
    start = attention_of(pico_checkpoint, tmp_path / "start", None, "solve=null")
    whole = attention_of(pico_checkpoint, tmp_path / "whole", None, closed)
    changed = {name for name in start if not torch.equal(start[name], whole[name])}
    assert {name.split(".", 3)[-1].split(".")[0] for name in changed} == {"to_out", "dwc"}

    o_alone = attention_of(pico_checkpoint, tmp_path / "o", "O alone", closed)
    for name, value in start.items():
        assert torch.equal(value, o_alone[name]) == (".to_out." not in name), name

    unsolved = attention_of(pico_checkpoint, tmp_path / "no-steps", "steps alone", closed)
    assert all(torch.equal(value, unsolved[name]) for name, value in start.items())
    steps = attention_of(pico_checkpoint, tmp_path / "steps", "steps alone", "solve.local_steps=2")
    assert not any(torch.equal(value, steps[name]) for name, value in start.items() if name.endswith("weight"))

    # Behind a layer that is the teacher's own, the student's stream is the teacher's: the repairing target is the own.
    kept = attention_of(pico_checkpoint, tmp_path / "kept", None, closed, "student.softmax_layers=[0]")
    own = attention_of(pico_checkpoint, tmp_path / "own", "own target", closed)
    for name, value in own.items():
        same = kept if name.startswith("blocks.1.") else whole
        assert torch.allclose(value, same[name], atol=1e-5), name
    assert not torch.allclose(own["blocks.1.attn.to_out.weight"], whole["blocks.1.attn.to_out.weight"], atol=1e-5)

    again = attention_of(pico_checkpoint, tmp_path / "again", None, closed)  # a variant ends with its block
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_other_settings_are_not_written_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        digits_table.main(["--dry-run", "--set", TINY[0]])
    assert "--results" in capsys.readouterr().err


@pytest.mark.slow
def test_two_rows_are_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--rows", "fresh-0", "fresh-50-at-5e-5", "--seeds", "0", "--set", *TINY]
    arguments = [*rows, "--results", str(tmp_path / "digits"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "benchmarks.digits_table", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert "row-fresh-0-0: " in done
    results = Results(tmp_path / "digits")
    assert sorted(path.name for path in results.folder.iterdir()) == ["fresh-0-0.json", "fresh-50-at-5e-5-7.json"]
    solved, trained = results.read("fresh-0", 0), results.read("fresh-50-at-5e-5", SEARCH_SEED)
    assert solved is not None
    assert trained is not None
    assert solved["walk_seconds"] > 0
    assert solved["solve"]["output"]["after"] < solved["solve"]["output"]["before"]
    assert (solved["training_steps"], solved["training_macs"], trained["training_steps"]) == (0, 0, 1)
    assert trained["learning_rate"] == 5e-5
    assert trained["training_seconds"] > 0 < trained["training_macs"]
    assert trained["seeds"] == [107]
    assert (tmp_path / "digits-curves.png").is_file()
    assert digits_table.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tasks")
