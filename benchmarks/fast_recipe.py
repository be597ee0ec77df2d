"""Whether the fast recipe reaches the paper recipe's Fréchet distance in 300 steps instead of 800, on digits.

    python -m benchmarks.fast_recipe            everything: hours on 2 cores, resumable
    python -m benchmarks.fast_recipe --table    print what is there

All are tuned over the same three learning rates with seed 0. The comparison is of seeds 0, 1 and 2 at each one's best
rate, with a 95 % interval of the difference (Student's t, seeds paired); of the fast ones the better goes on. Batch 16;
1,000 samples on noise independent of the reference's. One JSON file a measurement in benchmarks/results/fast/.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import litconvert
from benchmarks.digits_table import COMMON, load_teacher
from benchmarks.provenance import provenance
from litconvert.data.synthesize import synthesize
from litconvert.evaluation.scores import evaluate, reference_samples
from litconvert.recipe.resolve import resolve

RESULTS = Path(__file__).parent / "results" / "fast"
RATES = (5e-4, 1e-3, 2e-3)
TUNING_SEED, SEEDS = 0, (0, 1, 2)
# Student's t, two-sided 95 %, two degrees of freedom.
T_95 = 4.303
INHERITED = "inherit.attention=all"


@dataclass(frozen=True)
class Candidate:
    """What it says in the table, and what it is.

    Attributes:
        transfer, hybrid: steps of each objective.
        features: weight of the attention outputs beside the model's.
        teacher: weights of the teacher's noise and variance in the hybrid loss; the paper's by default.
    """

    label: str
    transfer: int
    hybrid: int
    features: float = 0.0
    teacher: tuple[float, float] = (0.5, 0.05)
    overrides: tuple[str, ...] = ()

    def stages(self, rate: float) -> str:
        """The override of its stages at a learning rate."""
        schedule = f"batch_size: 16, learning_rate: {rate}, schedule: cosine, ema_decay: 0.99"
        listed = [f"{{objective: attention_transfer, steps: {self.transfer}, {schedule}}}"] if self.transfer else []
        noise, variance = self.teacher
        weights = f"noise_weight: {noise}, variance_weight: {variance}, feature_weight: {self.features}"
        listed.append(f"{{objective: hybrid, steps: {self.hybrid}, {weights}, {schedule}}}")
        return f"distill.stages=[{', '.join(listed)}]"


RECIPES = {
    "paper": Candidate("the paper's recipe, 800 steps", 0, 800),
    "inherit": Candidate("attention inherited, 300 hybrid steps", 0, 300, overrides=(INHERITED,)),
    "inherit-transfer": Candidate(
        "attention inherited, 80 steps of transfer, 220 hybrid", 80, 220, overrides=(INHERITED,)
    ),
    "heads": Candidate(
        "the same with the teacher's 6 heads", 80, 220, overrides=(INHERITED, "student.num_attention_heads=6")
    ),
    "strong": Candidate("attention inherited, 80 and 220, lambda 10 and 1", 80, 220, 0.0, (10.0, 1.0), (INHERITED,)),
    "strong-hybrid": Candidate(
        "attention inherited, 300 hybrid, lambda 10 and 1", 0, 300, 0.0, (10.0, 1.0), (INHERITED,)
    ),
    "features": Candidate(
        "attention inherited, 80 and 220, features at weight 0.5", 80, 220, 0.5, overrides=(INHERITED,)
    ),
    "kept": Candidate(
        "the same, and layers 1 and 2 of 6 kept in softmax (`probe`)",
        80,
        220,
        0.5,
        overrides=(INHERITED, "student.softmax_layers=[1,2]"),
    ),
    "kept-plain": Candidate(
        "those layers kept, without the features", 80, 220, overrides=(INHERITED, "student.softmax_layers=[1,2]")
    ),
}


def result_of(name: str, rate: float, seed: int) -> Path:
    """Where a measurement is kept."""
    return RESULTS / f"{name}-{rate:g}-{seed}.json"


def distance(name: str, rate: float, seed: int) -> float | None:
    """A kept Fréchet distance."""
    path = result_of(name, rate, seed)
    return float(json.loads(path.read_text())["frechet_distance"]) if path.exists() else None


def best_rate(name: str) -> float | None:
    """The learning rate of the smallest distance with the tuning seed, of those that are measured."""
    tried = {rate: distance(name, rate, TUNING_SEED) for rate in RATES}
    found = {rate: value for rate, value in tried.items() if value is not None}
    return min(found, key=found.__getitem__) if found else None


def measure(name: str, rate: float, seed: int, work: Path, reference: torch.Tensor) -> None:
    """Convert, distil and score."""
    out = result_of(name, rate, seed)
    if out.exists():
        return
    candidate = RECIPES[name]
    settings = (candidate.stages(rate), *candidate.overrides)
    overrides = (*COMMON, *settings, f"seed={seed}", f"evaluate.seeds=[{100 + seed}]")
    student, run = work / f"{out.stem}-student", work / f"{out.stem}-run"
    litconvert.convert(None, student, "digits", overrides)
    litconvert.distill(student, run, data=work / "drawn")
    model = litconvert.load(run / "model").float()
    scores: dict[str, Any] = evaluate({name: model}, reference, resolve("digits", overrides).recipe)["models"][name]
    result = {key: scores[key]["mean"] for key in ("frechet_distance", "class_accuracy")}
    record = {"recipe": name, "learning_rate": rate, "seed": seed, **provenance(), **result}
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(out.name, result, flush=True)
    shutil.rmtree(run)
    shutil.rmtree(student)


def finalists() -> list[str]:
    """The paper's recipe and the best of the fast ones that are tuned."""
    rates = {name: best_rate(name) for name in RECIPES}
    tuned = {name: distance(name, rate, TUNING_SEED) for name, rate in rates.items() if rate is not None}
    fast = {name: value for name, value in tuned.items() if name != "paper" and value is not None}
    return ["paper", min(fast, key=fast.__getitem__)] if "paper" in tuned and fast else []


def run(names: Sequence[str], work: Path) -> None:
    """Measure what is missing: the rates of these recipes, and then the finalists with every seed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    synthesize(None, work / "drawn", "digits", COMMON)
    reference = reference_samples(load_teacher(), resolve("digits", COMMON).recipe)
    for rate in RATES:
        for name in names:
            measure(name, rate, TUNING_SEED, work, reference)
    for seed in SEEDS:
        for name in finalists():
            if name in names:
                best = best_rate(name)
                assert best is not None
                measure(name, best, seed, work, reference)


def table() -> str:
    """What is there, as Markdown."""
    lines = ["| | learning rate | Fréchet distance | less than the paper by | seeds |", "|---|---|---|---|---|"]
    for name, candidate in RECIPES.items():
        rate, paper_rate = best_rate(name), best_rate("paper")
        if rate is None or paper_rate is None:
            continue
        pairs = [(distance("paper", paper_rate, seed), distance(name, rate, seed)) for seed in SEEDS]
        whole = [(paper, mine) for paper, mine in pairs if paper is not None and mine is not None]
        if not whole:
            continue
        mine = [value for _, value in whole]
        spread = f" ± {stdev(mine):.2f}" if len(mine) > 1 else ""
        less = "-"
        if name != "paper":
            gains = [paper - value for paper, value in whole]
            less = f"{mean(gains):.2f}"
            if len(gains) == 3:
                half = T_95 * stdev(gains) / 3**0.5
                less += f" (95 %: {mean(gains) - half:.2f} to {mean(gains) + half:.2f})"
        tried = sum(distance(name, one, TUNING_SEED) is not None for one in RATES)
        lines.append(
            f"| {candidate.label} | {rate:g}, best of {tried} | {mean(mine):.2f}{spread} | {less} | {len(mine)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for data and models in the making")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        work = arguments.work or Path(tempfile.gettempdir()) / "litconvert-fast-recipe"
        work.mkdir(parents=True, exist_ok=True)
        run(arguments.recipes, work)
    print(table())


if __name__ == "__main__":
    main()
