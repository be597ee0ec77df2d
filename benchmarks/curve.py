"""From the start to a trained student: the solved start and the paper's recipe over steps and over time.

    python -m benchmarks.curve emoji     colour emoji at 32 pixels, 256 tokens: about three hours on two cores
    python -m benchmarks.curve digits    the embedded digits, one seed, for agreement beside distance: half an hour
    python -m benchmarks.curve emoji --dry-run    what is missing, and about how long it takes
    python -m benchmarks.curve emoji --table      print the tables of what is there, and draw the plots

Of every student: Fréchet distance of its samples to the teacher's, in all features of the network (`frechet_distance`,
as `litconvert evaluate` has it) and in the 64 directions in which the teacher's samples differ most
(`principal_distance`); agreement with the teacher, which needs no samples; and what the walk and the training took, in
seconds of one core. Drawing the training images, which all arms share, is not counted; drawing for the walk is.

Each row and seed is one JSON file in benchmarks/results/curve/: what is there is not measured again. Each worker has
one core; further runs of this command, at the same time, share the work. The emoji teacher is in benchmarks/teachers/;
`python -m benchmarks.make_emoji_teacher` trains it.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import litconvert
from benchmarks import curve_plots
from benchmarks.curve_rows import CURVES, FLOOR, RESULTS, SEARCH_SEED, Curve, Results, Row
from benchmarks.provenance import provenance
from benchmarks.students import UNTRAINED, make_student, train_student
from benchmarks.tasks import CODE, Task, print_missing, run_workers, with_needs, work_through
from litconvert.common.files import digest_of, whole_file, write_whole
from litconvert.data.synthesize import synthesize
from litconvert.evaluation.agreement import AgreementImages, agreement
from litconvert.evaluation.image_sets import seen
from litconvert.evaluation.metrics import Moments, Statistics, frechet_distance
from litconvert.evaluation.networks import open_network
from litconvert.evaluation.scores import balanced_labels
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe
from litconvert.sampling.draw import SamplerSettings, draw
from litconvert.sampling.pictures import to_images
from litconvert.training.trainer import Interrupted

COMPONENTS, AGREEMENT_IMAGES, AGREEMENT_BATCH, SHOWN = 64, 32, 16, 18
# Seconds of one core, for --dry-run: a pass of one image, of one of them in training, and what a task begins with.
SECONDS = {"emoji": (0.014, 0.05), "digits": (0.003, 0.014)}
BEGIN = 10.0


@dataclass(frozen=True)
class Work:
    """What is measured of one teacher, and where.

    Attributes:
        results: for good.
        folder: for data and models in the making.
        overrides: of all recipes, after all others.
        chosen: names of rows; empty: all.
    """

    curve: Curve
    results: Results
    folder: Path
    overrides: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def tasks(self) -> list[Task]:
        """What is missing, by importance, each after what it needs."""
        rows = [(row, seed) for row, seed in self.curve.rows if not self.chosen or row.name in self.chosen]
        return with_needs([self._task(row, seed) for row, seed in rows], self)

    def _task(self, row: Row, seed: int) -> Task:
        recipe = self.recipe(row, seed)
        one, trained = SECONDS[self.curve.name]
        drawn = one * recipe.evaluate.num_samples * recipe.evaluate.steps
        needs = [Task("reference", "", 99, (), BEGIN + drawn)]
        seconds = BEGIN + drawn
        if row.arm != FLOOR:
            needs.append(Task("student", row.arm, seed, (), self._walk_seconds(recipe)))
        if row.steps:
            seconds += row.steps * 16 * trained
            settings = recipe.data.synthesize
            needs.append(Task("data", "", seed, (), BEGIN + one * settings.num_samples * settings.steps))
            if row.rate is None:
                needs += [self._task(other, SEARCH_SEED) for other in self.curve.searched(row.arm)]
        return Task("row", row.name, seed, tuple(needs), seconds)

    def _walk_seconds(self, recipe: Recipe) -> float:
        one, trained = SECONDS[self.curve.name]
        if recipe.solve is None:
            return BEGIN
        steps = 400 if recipe.solve.local_steps is None else recipe.solve.local_steps
        return BEGIN + one * 6000 + steps * 32 * trained / 3

    def is_done(self, task: Task) -> bool:
        if task.kind == "row":
            return (self.results.folder / f"{task.name}-{task.seed}.json").is_file()
        if task.kind == "reference":
            return self._reference.is_file()
        if task.kind == "data":
            return self.data(task.seed).is_dir()
        return self.student(task.name, task.seed).with_suffix(".json").is_file()

    # What it is made of.

    def rate(self, row: Row) -> float | None:
        """Of a row's training; None where it is not known yet."""
        if not row.steps:
            return None
        return row.rate if row.rate is not None else self.results.best_rate(self.curve, row.arm)

    def overrides_of(self, row: Row, seed: int) -> tuple[str, ...]:
        """Over the recipe of the row's arm."""
        name = self.curve.recipe_name(row.arm)
        # To override how an arm solves that does not solve would make it solve.
        solves = resolve(name).recipe.solve is not None
        told = tuple(one for one in self.overrides if solves or not one.startswith("solve."))
        return (*self.curve.overrides(row, seed, self.rate(row)), *told)

    def recipe(self, row: Row, seed: int) -> Recipe:
        return resolve(self.curve.recipe_name(row.arm), self.overrides_of(row, seed)).recipe

    def _place(self, name: str, settings: Any, suffix: str = "") -> Path:
        """Where what is made by these settings is kept: other code, teacher or settings make it anew."""
        return self.folder / f"{name}-{digest_of([settings, CODE, self._teacher_digest])[:8]}{suffix}"

    @cached_property
    def _teacher_digest(self) -> str:
        """Of its weights; the embedded teacher is part of the code."""
        file = Path(self.curve.teacher) / "diffusion_pytorch_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""

    @cached_property
    def _reference(self) -> Path:
        """The teacher's samples that all are held against."""
        recipe = self.recipe(Row(FLOOR), 0)
        return self._place("reference", recipe.evaluate.model_dump(mode="json"), ".pt")

    def data(self, seed: int) -> Path:
        """Training images of a seed."""
        return self._place(f"data-{seed}", self.recipe(Row(FLOOR), seed).data.model_dump(mode="json"))

    def student(self, arm: str, seed: int) -> Path:
        """A student before training."""
        return self._place(f"student-{arm}-{seed}", self.recipe(Row(arm), seed).model_dump(mode="json"))

    # Doing it.

    def do(self, task: Task) -> str:
        """One task, whose needs are done; returns the distances of a row."""
        if task.kind == "row":
            return self._measure(task)
        if task.kind == "student":
            row, out = Row(task.name), self.student(task.name, task.seed)
            name = self.curve.recipe_name(row.arm)
            facts = make_student(self.curve.teacher, out, name, self.overrides_of(row, task.seed))
            write_whole(out.with_suffix(".json"), json.dumps(facts) + "\n")
        elif task.kind == "data":
            overrides = self.overrides_of(Row(FLOOR), task.seed)
            synthesize(self.curve.teacher, self.data(task.seed), self.curve.recipe_name(FLOOR), overrides)
        else:
            recipe = self.recipe(Row(FLOOR), 0)
            images = samples(self._teacher(), recipe, recipe.evaluate.reference_seed)
            features = self._features(images)
            with whole_file(self._reference) as partial:
                torch.save({"features": features, "images": images[:AGREEMENT_IMAGES]}, partial)
        return ""

    def _teacher(self) -> LiTTransformer2DModel:
        """In float32."""
        model = litconvert.load(self.curve.teacher, recipe=self.curve.recipe_name(FLOOR))
        return model.float().eval()  # type: ignore[no-any-return]

    def _features(self, images: Tensor) -> Tensor:
        outputs = seen([to_images(images, None)], open_network(self.curve.network))
        return outputs.features

    def _measure(self, task: Task) -> str:
        """Train and score one row with one seed."""
        row, seed = named(self.curve, task.name), task.seed
        recipe, teacher = self.recipe(row, seed), self._teacher()
        reference = torch.load(self._reference)
        facts: dict[str, Any] = {}
        model = teacher
        if row.arm != FLOOR:
            student = self.student(row.arm, seed)
            facts = json.loads(student.with_suffix(".json").read_text())
            model, trained = self._trained(row, seed, student, recipe, teacher)
            facts |= trained
        images = samples(model, recipe, recipe.evaluate.seeds[0])
        facts |= distances(reference["features"], self._features(images))
        if row.rate is None and row.arm != FLOOR:
            facts["agreement"] = self._agreement(teacher, model, reference["images"], recipe)
        self.results.folder.mkdir(parents=True, exist_ok=True)
        if row.rate is None and seed == 0:
            strip(to_images(images[:SHOWN], None), self.results.folder / f"{row.name}.png")
        record = {"row": row.name, "seed": seed, **provenance(), **facts}
        write_whole(self.results.path(row, seed), json.dumps(record, indent=2) + "\n")
        found = "distance {frechet_distance:.1f}, in 64 directions {principal_distance:.2f}".format(**facts)
        return found + (f", noise {facts['agreement']['noise']['error']:.4f}" if "agreement" in facts else "")

    def _trained(
        self, row: Row, seed: int, student: Path, recipe: Recipe, teacher: LiTTransformer2DModel
    ) -> tuple[LiTTransformer2DModel, dict[str, Any]]:
        """The student after the row's training, and what that took."""
        if not row.steps:
            return litconvert.load(student).float().eval(), UNTRAINED
        run = self.folder / "runs" / f"{row.name}-{seed}"
        return train_student(student, run, self.data(seed), recipe, self.overrides_of(row, seed), teacher)

    def _agreement(
        self, teacher: LiTTransformer2DModel, model: LiTTransformer2DModel, clean: Tensor, recipe: Recipe
    ) -> dict[str, Any]:
        """As `litconvert evaluate` has it, without most of its intervals."""
        labels = balanced_labels(len(clean), teacher.config.num_classes)
        seed, timesteps = recipe.evaluate.reference_seed, recipe.diffusion.num_timesteps
        found = agreement(teacher, model, AgreementImages(clean, labels, timesteps, seed, AGREEMENT_BATCH))
        quantities = {
            name: {
                "error": one["error"],
                "interval": one["interval"],
                "by_timestep": [part["error"] for part in one["by_timestep"]],
                "largest_by_timestep": [part["largest"] for part in one["by_timestep"]],
            }
            for name, one in found["student"]["quantities"].items()
        }
        nothing = {name: one["error"] for name, one in found["precision"]["quantities"].items()}
        return {**quantities, "layers": [one["error"] for one in found["student"]["layers"]], "bf16": nothing}


def named(curve: Curve, name: str) -> Row:
    """A row by its name."""
    searched = [row for arm in curve.arms for row in curve.searched(arm)]
    return next(row for row in (*(row for row, _ in curve.rows), *searched) if row.name == name)


def samples(model: LiTTransformer2DModel, recipe: Recipe, seed: int) -> Tensor:
    """As many as the recipe's `evaluate` says, of every class as many."""
    settings = recipe.evaluate
    labels = balanced_labels(settings.num_samples, model.config.num_classes)
    sampler = SamplerSettings.of(recipe, settings, seed=seed, batch_size=settings.batch_size)
    return torch.cat(list(draw(model, labels, sampler)))


def distances(reference: Tensor, features: Tensor) -> dict[str, float]:
    """Fréchet distances in all of the features (N, D), and in the reference's COMPONENTS principal directions."""
    theirs, mine = (Moments.of(one).statistics for one in (reference, features))
    # eigh sorts by value, the largest last.
    directions = torch.linalg.eigh(theirs.covariance).eigenvectors[:, -COMPONENTS:]

    def within(one: Statistics) -> Statistics:
        return Statistics(one.mean @ directions, directions.T @ one.covariance @ directions)

    return {
        "frechet_distance": frechet_distance(theirs, mine),
        "principal_distance": frechet_distance(within(theirs), within(mine)),
    }


def strip(pictures: NDArray[np.uint8], path: Path) -> None:
    """Pictures (N, H, W, C) beside one another, as a PNG."""
    whole = np.concatenate(list(pictures), axis=1)
    with whole_file(path) as partial:
        Image.fromarray(whole.squeeze(-1) if whole.shape[-1] == 1 else whole).save(partial, format="PNG")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=CURVES)
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what is missing and about how long it takes")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="some rows, and what they need")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--hours", type=float, default=6.0, help="begin nothing that would end later (default 6)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder for data and models in the making")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of all recipes; needs --results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = make_parser().parse_args(arguments)
    curve, parent = CURVES[given.teacher], given.results.resolve()
    known = [row.name for row, _ in curve.rows]
    if unknown := sorted({*given.rows} - {*known}):
        make_parser().error(f"no row {unknown[0]}; there are {', '.join(dict.fromkeys(known))}")
    if given.set and given.results == RESULTS:
        make_parser().error("--set makes other results: name a folder for them (--results)")
    folder = given.work or Path(tempfile.gettempdir()) / f"litconvert-curve-{curve.name}"
    work = Work(curve, Results(parent / curve.name), folder.resolve(), tuple(given.set), tuple(given.rows))
    if given.worker:
        torch.set_num_threads(1)
        try:
            return 1 if work_through(work, given.hours) else 0
        except (Interrupted, KeyboardInterrupt):
            return 130
    if given.dry_run:
        print_missing(work.tasks(), given.workers)
        return 0
    code = 0
    if not given.table:
        folder.mkdir(parents=True, exist_ok=True)
        code = run_workers("benchmarks.curve", arguments, given.workers)
        if code == 130:
            return code
    curve_plots.show(parent)
    return code


if __name__ == "__main__":
    sys.exit(main())
