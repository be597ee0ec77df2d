"""The README's table: what each part of the method is worth on the digits teacher, at equal budgets.

    python -m benchmarks.digits_table            everything, three seeds: hours on 2 cores, resumable
    python -m benchmarks.digits_table --table    print the table of what is there

200 optimiser steps at batch 64 in all; 1,000 samples on noise independent of the reference's. One JSON file a row and
seed in benchmarks/results/digits/: what is there is not measured again, so that an interrupted run goes on.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import litconvert
from litconvert.assets.train_digits_classifier import digits
from litconvert.evaluation import evaluate, reference_samples
from litconvert.latents import synthesize, write_latents
from litconvert.recipe_files import resolve

RESULTS = Path(__file__).parent / "results" / "digits"
COMMON = (
    "data.synthesize.num_samples=1024",
    "data.synthesize.steps=10",
    "evaluate.num_samples=1000",
    "evaluate.steps=8",
    "evaluate.reference_seed=99",
)
SCHEDULE = "batch_size: 64, learning_rate: 1.0e-3, schedule: cosine, ema_decay: 0.99"
TRANSFER = f"{{objective: attention_transfer, steps: 70, {SCHEDULE}}}"


def stages(hybrid_steps: int, extra: str = "") -> str:
    """The override for a hybrid stage of so many steps, after transfer when they are fewer than 200."""
    hybrid = f"{{objective: hybrid, steps: {hybrid_steps}, {SCHEDULE}{extra}}}"
    return f"distill.stages=[{hybrid}]" if hybrid_steps == 200 else f"distill.stages=[{TRANSFER}, {hybrid}]"


# name: (what it says in the table, overrides of the recipe `digits`)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "paper": ("the paper's recipe: fresh attention, hybrid stage only", (stages(200),)),
    "no-teacher": ("without the teacher's terms", (stages(200, ", noise_weight: 0, variance_weight: 0"),)),
    "no-convolution": ("without the convolution", (stages(200), "student.conv_size=0")),
    "transfer": ("70 steps of attention transfer, then 130 hybrid (as recipe `digits`)", (stages(130),)),
    "inherit": ("attention inherited, 200 hybrid", (stages(200), "inherit.attention=all")),
    "inherit-transfer": (
        "attention inherited, 70 transfer, 130 hybrid (as recipe `digits-fast`)",
        (stages(130), "inherit.attention=all"),
    ),
    "real-data": ("the paper's recipe on the real digits instead of teacher-drawn data", (stages(200),)),
}


def measure(name: str, seed: int, work: Path, reference: torch.Tensor) -> dict[str, Any]:
    """Convert, distil and score one row with one seed."""
    _, overrides = ROWS[name]
    overrides = (*COMMON, *overrides, f"seed={seed}", f"evaluate.seeds=[{100 + seed}]")
    student, run = work / f"{name}-{seed}-student", work / f"{name}-{seed}-run"
    litconvert.convert(None, student, "digits", overrides)
    data = work / ("real" if name == "real-data" else "drawn")
    litconvert.distill(student, run, "digits", data=data, overrides=overrides)
    model = litconvert.load(run / "model").float()
    result = evaluate({name: model}, reference, resolve("digits", overrides).recipe)
    shutil.rmtree(run)
    shutil.rmtree(student)
    return result


def floor(seed: int, reference: torch.Tensor) -> dict[str, Any]:
    """The teacher against itself on other noise."""
    overrides = (*COMMON, f"evaluate.seeds=[{100 + seed}]")
    return evaluate({"floor": load_teacher()}, reference, resolve("digits", overrides).recipe)


def load_teacher() -> litconvert.modeling_lit.LiTTransformer2DModel:
    """The embedded teacher in float32."""
    model = litconvert.load("asset:dit-digits", recipe="digits")
    return model.float()  # type: ignore[no-any-return]


def run(rows: Sequence[str], seeds: Sequence[int], work: Path) -> None:
    """Measure what is missing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    recipe = resolve("digits", COMMON).recipe
    saved = work / "reference.pt"
    if not saved.exists():
        torch.save(reference_samples(load_teacher(), recipe), saved)
    reference = torch.load(saved)
    synthesize(None, work / "drawn", "digits", COMMON)
    if not (work / "real").exists():
        images, labels = digits()
        write_latents(images, labels, work / "real", "scikit-learn digits")
    for seed in seeds:
        for name in rows:
            out = RESULTS / f"{name}-{seed}.json"
            if out.exists():
                continue
            result = floor(seed, reference) if name == "floor" else measure(name, seed, work, reference)
            out.write_text(
                json.dumps({"row": name, "seed": seed, "torch": torch.__version__, **result}, indent=2) + "\n"
            )
            print(out.name, json.dumps(result["models"][name]), flush=True)


def table() -> str:
    """The results as a Markdown table."""
    lines = ["| | Fréchet distance | class accuracy | seeds |", "|---|---|---|---|"]
    for name, label in {
        **{key: row[0] for key, row in ROWS.items()},
        "floor": "floor: the teacher against itself",
    }.items():
        found = [json.loads(path.read_text())["models"][name] for path in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
        if not found:
            continue
        cells = []
        for metric, form in (("frechet_distance", "{:.2f}"), ("class_accuracy", "{:.1%}")):
            values = [one[metric]["mean"] for one in found]
            spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
            cells.append(form.format(mean(values)) + spread)
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "floor"], choices=[*ROWS, "floor"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for data and models in the making")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        work = arguments.work or Path(tempfile.gettempdir()) / "litconvert-digits-table"
        work.mkdir(parents=True, exist_ok=True)
        run(arguments.rows, arguments.seeds, work)
    print(table())


if __name__ == "__main__":
    main()
