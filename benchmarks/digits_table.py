"""The README's table: the paper's guidelines, and what each part of the method is worth, on the digits teacher.

    python -m benchmarks.digits_table            everything, three seeds: hours on 2 cores, resumable
    python -m benchmarks.digits_table --table    print the table of what is there

200 optimiser steps at batch 64 in all; 1,000 samples on noise independent of the reference's. One JSON file a row and
seed in benchmarks/results/digits/: what is there is not measured again, so that an interrupted run goes on.

The maturity of the teacher is measured on two small ones trained here (recipe digits-teacher at width 96, 4 layers),
and against the real digits, since their own samples differ.
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
from torch import Tensor

import litconvert
from benchmarks.provenance import provenance
from benchmarks.train_digits_classifier import digits
from litconvert.data.dataset import write_latents
from litconvert.data.synthesize import synthesize
from litconvert.distillation.pretraining import train
from litconvert.evaluation.scores import evaluate, reference_samples
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.resolve import resolve

RESULTS = Path(__file__).parent / "results" / "digits"
COMMON = (
    "data.synthesize.num_samples=1024",
    "data.synthesize.steps=10",
    "evaluate.num_samples=1000",
    "evaluate.steps=8",
    "evaluate.reference_seed=99",
)
SCHEDULE = "batch_size: 64, learning_rate: 1.0e-3, schedule: cosine, ema_decay: 0.99"
SMALL = (
    "scratch.hidden_size=96",
    "scratch.num_layers=4",
    "scratch.num_attention_heads=3",
    # Many small steps: classes are learnt late, and 2,500 steps of 64 samples were not enough for them.
    "distill.stages.0.batch_size=16",
    "distill.stages.0.learning_rate=1e-3",
    "distill.checkpoint_every=2000",
)
TEACHER_STEPS = {"young": 1000, "converged": 10000}


def stage(extra: str = "") -> str:
    """The override for the hybrid stage, with more of its keys."""
    return f"distill.stages=[{{objective: hybrid, steps: 200, {SCHEDULE}{extra}}}]"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: what it says.
        overrides: of the recipe `digits-paper`.
        base: the row it is compared with, for the paper's trend.
        paper: FID of this row and of its base in the paper's ablation (LiT-S/2, ImageNet 256).
    """

    label: str
    overrides: tuple[str, ...] = (stage(),)
    base: str | None = None
    paper: tuple[float, float] | None = None


def heads(count: int) -> tuple[str, ...]:
    return (stage(), f"student.num_attention_heads={count}")


INHERITED = "inherit.attention=all"
ROWS: dict[str, Row] = {
    "paper": Row("**the paper's recipe**: convolution, 2 heads, fresh attention, lambda 0.5 and 0.05"),
    "no-convolution": Row("without the convolution", (stage(), "student.conv_size=0"), "paper", (88.46, 63.66)),
    "heads-1": Row("1 head", heads(1), "paper", (64.42, 63.24)),
    "heads-3": Row("3 heads", heads(3), "paper", (63.21, 63.24)),
    "heads-6": Row("6 heads", heads(6), "paper", (63.66, 63.24)),
    "heads-48": Row("48 heads", heads(48), "paper", (78.76, 63.24)),
    "no-teacher": Row(
        "lambda 0 and 0: no teacher",
        (stage(", noise_weight: 0, variance_weight: 0"),),
        "paper",
        (53.83, 50.79),
    ),
    "noise-only": Row("lambda 0.5 and 0: the noise alone", (stage(", variance_weight: 0"),), "paper", (51.13, 50.79)),
    "strong-teacher": Row("ours: lambda 10 and 1", (stage(", noise_weight: 10, variance_weight: 1"),), "paper"),
    "inherit": Row("attention inherited (Q, K, V, O)", (stage(), INHERITED), "paper", (55.29, 54.80)),
    "converged": Row("a small teacher, converged: its student against the real digits"),
    "young": Row("the same teacher, young", (stage(),), "converged", (57.84, 53.83)),
    "features": Row("ours: features beside the output, weight 0.5", (stage(", feature_weight: 0.5"),), "paper"),
    "features-light": Row("ours: the same, weight 0.05", (stage(", feature_weight: 0.05"),), "paper"),
    "kept": Row(
        "ours: 2 of 6 layers kept in softmax (1 and 2, by `probe`)",
        (stage(), "student.softmax_layers=[1,2]"),
        "paper",
    ),
    "real-data": Row("on the real digits instead of teacher-drawn data", base="paper"),
    "floor": Row("floor: the teacher against itself"),
}


def measure(name: str, seed: int, work: Path, reference: Tensor) -> dict[str, Any]:
    """Convert, distil and score one row with one seed."""
    overrides = (*COMMON, *ROWS[name].overrides, f"seed={seed}", f"evaluate.seeds=[{100 + seed}]")
    student, run = work / f"{name}-{seed}-student", work / f"{name}-{seed}-run"
    source, data = None, work / ("real" if name == "real-data" else "drawn")
    if name in TEACHER_STEPS:
        source = str(teacher(name, work))
        data = work / f"{name}-drawn"
        overrides += ("source.num_attention_heads=null",)  # its config.json says it
        synthesize(source, data, "digits-paper", overrides)
        reference = digits()[0]
    litconvert.convert(source, student, "digits-paper", overrides)
    litconvert.distill(student, run, data=data)
    model = litconvert.load(run / "model").float()
    result = evaluate({name: model}, reference, resolve("digits-paper", overrides).recipe)
    shutil.rmtree(run)
    shutil.rmtree(student)
    return result


def teacher(name: str, work: Path) -> Path:
    """A small teacher, trained here for so many steps."""
    steps = f"distill.stages.0.steps={TEACHER_STEPS[name]}"
    return train(work / f"teacher-{name}", "digits-teacher", data=work / "real", overrides=(*SMALL, steps)) / "model"


def floor(seed: int, reference: Tensor) -> dict[str, Any]:
    """The teacher against itself on other noise."""
    overrides = (*COMMON, f"evaluate.seeds=[{100 + seed}]")
    return evaluate({"floor": load_teacher()}, reference, resolve("digits-paper", overrides).recipe)


def load_teacher() -> LiTTransformer2DModel:
    """The embedded teacher in float32."""
    model = litconvert.load("asset:dit-digits", recipe="digits-paper")
    return model.float()  # type: ignore[no-any-return]


def run(rows: Sequence[str], seeds: Sequence[int], work: Path) -> None:
    """Measure what is missing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    recipe = resolve("digits-paper", COMMON).recipe
    saved = work / "reference.pt"
    if not saved.exists():
        torch.save(reference_samples(load_teacher(), recipe), saved)
    reference = torch.load(saved)
    synthesize(None, work / "drawn", "digits-paper", COMMON)
    if not (work / "real").exists():
        images, labels = digits()
        write_latents(images, labels, work / "real", "scikit-learn digits")
    for seed in seeds:
        for name in rows:
            out = RESULTS / f"{name}-{seed}.json"
            if out.exists():
                continue
            result = floor(seed, reference) if name == "floor" else measure(name, seed, work, reference)
            out.write_text(json.dumps({"row": name, "seed": seed, **provenance(), **result}, indent=2) + "\n")
            print(out.name, json.dumps(result["models"][name]), flush=True)


def values_of(name: str, metric: str) -> list[float]:
    """A row's metric, one value a seed."""
    found = (json.loads(path.read_text())["models"][name] for path in sorted(RESULTS.glob(f"{name}-[0-9].json")))
    return [float(one[metric]["mean"]) for one in found]


def agreement(name: str) -> str:
    """Whether a row differs from its base in the paper's direction, by more than two standard errors."""
    row = ROWS[name]
    if row.paper is None or row.base is None:
        return ""
    mine, base = values_of(name, "frechet_distance"), values_of(row.base, "frechet_distance")
    theirs = row.paper[0] - row.paper[1]
    text = f"{row.paper[1]} to {row.paper[0]}: "
    if min(len(mine), len(base)) < 2:
        return text + "too few seeds"
    ours = mean(mine) - mean(base)
    error = (stdev(mine) ** 2 / len(mine) + stdev(base) ** 2 / len(base)) ** 0.5
    if abs(ours) <= 2 * error:
        return text + "no difference seen here"
    return text + ("**agrees**" if ours * theirs > 0 else "**disagrees**")


def table() -> str:
    """The results as a Markdown table."""
    lines = ["| | Fréchet distance | class accuracy | seeds | the paper's FID, and ours |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        cells = []
        for metric, form in (("frechet_distance", "{:.2f}"), ("class_accuracy", "{:.1%}")):
            values = values_of(name, metric)
            spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
            cells.append(form.format(mean(values)) + spread if values else "not measured")
        count = len(values_of(name, "frechet_distance"))
        lines.append(f"| {row.label} | {cells[0]} | {cells[1]} | {count} | {agreement(name)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
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
