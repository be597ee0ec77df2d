"""The tables and curves of docs/results.md: the solved start and what each part of it is worth, on the digits teacher.

    python -m benchmarks.digits_table              everything, in hours on two cores; interrupted, it goes on
    python -m benchmarks.digits_table --dry-run    what is missing, and about how long it takes
    python -m benchmarks.digits_table --table      print the tables of what is there, and draw the curves

Every row is scored on 1,000 samples in 8 steps, on noise independent of the reference's. Each row and seed is one JSON
file in benchmarks/results/digits/: what is there is not measured again. Rates are the best of three on a seed of their
own. Each worker has one core; further runs of this command, at the same time, share the work.

Seconds are of one core. `..._seconds` passed on the clock, and in `..._core_seconds` the core was at work: where other
processes take their share of it, these are the ones that compare. Drawing the training images, which all arms share, is
not counted; drawing for the walk is.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import litconvert
from benchmarks import digits_plots
from benchmarks.digits_results import RESULTS, Results
from benchmarks.digits_rows import ARMS, COMMON, GROUPS, SEARCH_SEED, Row, all_rows, recipe_of
from benchmarks.digits_variants import variant
from benchmarks.provenance import provenance
from benchmarks.students import UNTRAINED, make_student, remove_student, train_student
from benchmarks.tasks import CODE, Task, print_missing, run_workers, with_needs, work_through
from litconvert.common.files import digest_of, whole_file, write_whole
from litconvert.conversion.solve_plan import LOCAL_STEPS, STATES, STATES_PER_IMAGE
from litconvert.data.synthesize import synthesize
from litconvert.evaluation.scores import evaluate, reference_samples
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe, Section
from litconvert.training.trainer import Interrupted

# Seconds of one core on a busy machine, for --dry-run: an image drawn, a state, a local step, a training step, and what
# a task begins with.
IMAGE, STATE, LOCAL_STEP, STEP, BEGIN = 0.05, 0.045, 0.14, 0.22, 3.0
ROWS = all_rows()


@dataclass(frozen=True)
class Work:
    """What is measured, and where.

    Attributes:
        results: for good.
        folder: for data and models in the making.
        overrides: of all recipes, after all others.
        names, seeds: rows, and those of their seeds.
    """

    results: Results
    folder: Path
    overrides: tuple[str, ...] = ()
    names: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = tuple(range(10))

    # What there is to do.

    def tasks(self) -> list[Task]:
        """What is missing for these rows and seeds, in order: each after what it needs."""
        pairs = in_order([ROWS[name] for name in self.names], self.seeds)
        return with_needs([self._row_task(row, seed) for row, seed in pairs], self)

    def _row_task(self, row: Row, seed: int) -> Task:
        """Scoring a row; what it needs is the reference, its student, data to train on and a rate."""
        recipe = self.recipe(row, seed)
        scored = recipe.evaluate.num_samples * IMAGE
        needs = [Task("reference", "", recipe.evaluate.reference_seed, (), scored)]
        seconds = BEGIN + scored
        if row.start is not None:
            needs.append(Task("student", row.start.name, seed, (), self._walk_seconds(row, seed)))
        if row.training is not None:
            seconds += recipe.distill.stages[0].steps * STEP
            needs.append(Task("data", "", seed, (), recipe.data.synthesize.num_samples * IMAGE))
        needs += [self._row_task(ROWS[name], SEARCH_SEED) for name in row.searched]
        return Task("row", row.name, seed, tuple(needs), seconds)

    def _walk_seconds(self, row: Row, seed: int) -> float:
        settings = self.recipe(row, seed).solve
        if settings is None:
            return BEGIN
        states, local_steps = settings.states or STATES, settings.local_steps
        walk = states * STATE + (LOCAL_STEPS if local_steps is None else local_steps) * LOCAL_STEP
        return BEGIN + states / (settings.states_per_image or STATES_PER_IMAGE) * IMAGE + settings.walks * walk

    def is_done(self, task: Task) -> bool:
        if task.kind == "row":
            return self.results.path(task.name, task.seed).is_file()
        if task.kind == "reference":
            return self._reference.is_file()
        if task.kind == "data":
            return self.data(task.seed).is_dir()
        facts = self._facts(task.name, task.seed)
        return facts.is_file() and json.loads(facts.read_text())["made_of"] == self._made_of(task.name, task.seed)

    # What it is made of.

    def recipe(self, row: Row, seed: int) -> Recipe:
        """A row's with a seed; its rate is that of its training, where it has one."""
        name = "fresh" if row.start is None else row.start.arm
        given = () if row.start is None else row.start.overrides
        return recipe_of(name, (*given, *self.overrides_of(row, seed)))

    def _told(self, arm: str) -> tuple[str, ...]:
        """What the command line overrides of an arm's recipe; to override how it solves would make it solve."""
        solves = recipe_of(arm).solve is not None
        return tuple(one for one in self.overrides if solves or not one.startswith("solve."))

    def overrides_of(self, row: Row, seed: int) -> tuple[str, ...]:
        """Those of the training, the seed and the command line."""
        given: list[str] = []
        if row.training is not None:
            given += [f"distill.stages.0.steps={row.training.steps}", *row.training.overrides]
            rate = row.training.rate
            if rate is None and all(self.results.read(name, SEARCH_SEED) for name in row.searched):
                assert row.start is not None
                rate = self.results.best_rate(row.start.arm, row.training.steps)
            if rate is not None:
                given.append(f"distill.stages.0.learning_rate={rate}")
        arm = "fresh" if row.start is None else row.start.arm
        return (*given, *self._seeded(seed), *self._told(arm))

    def _seeded(self, seed: int) -> tuple[str, ...]:
        return (f"seed={seed}", f"data.synthesize.seed={1 + seed}", f"evaluate.seeds=[{100 + seed}]")

    @cached_property
    def _reference(self) -> Path:
        """The teacher's samples that all are held against."""
        return self.folder / f"reference-{self._digest(recipe_of('fresh', self.overrides).evaluate)}.pt"

    def data(self, seed: int) -> Path:
        """Training images of a seed."""
        recipe = recipe_of("fresh", (*self._seeded(seed), *self.overrides))
        return self.folder / f"data-{seed}-{self._digest(recipe.data)}"

    def _digest(self, settings: Section) -> str:
        """Of what was made by these settings: other code or settings make it anew."""
        return digest_of([settings.model_dump(mode="json"), CODE])[:8]

    def student(self, start: str, seed: int) -> Path:
        """A student before training."""
        return self.folder / "students" / f"{start}-{seed}"

    def _facts(self, start: str, seed: int) -> Path:
        return self.folder / "students" / f"{start}-{seed}.json"

    def _made_of(self, start: str, seed: int) -> str:
        """The digest of a student's recipe, and of the code: another one's walk is not gone on from."""
        row = next(row for row in ROWS.values() if row.start is not None and row.start.name == start)
        assert row.start is not None
        recipe = recipe_of(row.start.arm, (*row.start.overrides, *self._seeded(seed), *self._told(row.start.arm)))
        return digest_of([recipe.model_dump(mode="json"), row.start.variant, CODE])

    # Doing it.

    def do(self, task: Task) -> str:
        """One task, whose needs are done; returns the scores of a row."""
        if task.kind == "row":
            self._measure(ROWS[task.name], task.seed)
            scores = (self.results.values(task.name, key, [task.seed])[task.seed] for key in digits_plots.METRICS)
            return "distance {:.2f}, classes {:.1%}".format(*scores)
        if task.kind == "student":
            self._convert(task.name, task.seed)
        elif task.kind == "data":
            synthesize(None, self.data(task.seed), "digits", (*COMMON, *self._seeded(task.seed), *self.overrides))
        else:
            samples = reference_samples(load_teacher(), resolve("digits", (*COMMON, *self.overrides)).recipe)
            with whole_file(self._reference) as partial:
                torch.save(samples, partial)
        return ""

    def _convert(self, start: str, seed: int) -> None:
        """A student, from its beginning."""
        row = next(row for row in ROWS.values() if row.start is not None and row.start.name == start)
        assert row.start is not None
        out = self.student(start, seed)
        self._facts(start, seed).unlink(missing_ok=True)
        arm = ARMS[row.start.arm]
        told = self._told(row.start.arm)
        overrides = (*COMMON, *arm.overrides, *row.start.overrides, *self._seeded(seed), *told)
        with variant(row.start.variant):
            facts = make_student(None, out, arm.recipe, overrides)
        made_of = self._made_of(start, seed)
        write_whole(self._facts(start, seed), json.dumps({"made_of": made_of, **facts}) + "\n")

    def _remove_student(self, start: str, seed: int) -> None:
        self._facts(start, seed).unlink(missing_ok=True)
        remove_student(self.student(start, seed))

    def _measure(self, row: Row, seed: int) -> None:
        """Train and score one row with one seed."""
        facts: dict[str, Any] = {}
        recipe = self.recipe(row, seed)
        if row.start is None:
            model = load_teacher()
        else:
            facts = json.loads(self._facts(row.start.name, seed).read_text())
            del facts["made_of"]
            model, trained = self._trained(row, seed, recipe)
            facts |= trained
        scores = evaluate({row.name: model}, torch.load(self._reference), recipe)
        record = {"row": row.name, "seed": seed, **provenance(), **facts, **scores}
        self.results.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.results.path(row.name, seed), json.dumps(record, indent=2) + "\n")
        self._tidy(row, seed)

    def _trained(self, row: Row, seed: int, recipe: Recipe) -> tuple[LiTTransformer2DModel, dict[str, Any]]:
        """The student after the row's training, and what that took."""
        assert row.start is not None
        student, run = self.student(row.start.name, seed), self.folder / "runs" / f"{row.name}-{seed}"
        if row.training is None:
            return litconvert.load(student).float(), UNTRAINED
        overrides = self.overrides_of(row, seed)
        return train_student(student, run, self.data(seed), recipe, overrides, load_teacher())

    def _tidy(self, row: Row, seed: int) -> None:
        """Remove a student that no other row waits for."""
        if row.start is None:
            return
        others = (other for other in ROWS.values() if other.start is not None and other.start.name == row.start.name)
        if all(self.results.path(other.name, seed).is_file() for other in others if seed in other.seeds):
            self._remove_student(row.start.name, seed)


def in_order(rows: Sequence[Row], seeds: Sequence[int]) -> list[tuple[Row, int]]:
    """Rows and the seeds that they have, by importance: after the curve, all rows of a group have one seed first."""
    pairs = [(row, seed) for row in rows for seed in row.seeds if seed in (*seeds, SEARCH_SEED)]
    return sorted(pairs, key=lambda pair: (GROUPS.index(pair[0].group), pair[0].group != "curve" and pair[1]))


def load_teacher() -> LiTTransformer2DModel:
    """The embedded teacher in float32."""
    model = litconvert.load("asset:dit-digits", recipe="digits")
    return model.float()  # type: ignore[no-any-return]


def chosen_rows(given: argparse.Namespace) -> tuple[str, ...]:
    """Of the groups and names that were asked for, in the order of importance."""
    return tuple(
        name for name, row in ROWS.items() if row.group in given.only and (not given.rows or name in given.rows)
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what is missing and about how long it takes")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=GROUPS, metavar="GROUP", help=str(GROUPS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="some rows, and what they need")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)), help="of those that a row has")
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
    if given.set and given.results == RESULTS:
        make_parser().error("--set makes other results: name a folder for them (--results)")
    folder = given.work or Path(tempfile.gettempdir()) / "litconvert-digits-table"
    work = Work(
        Results(given.results.resolve()), folder.resolve(), tuple(given.set), chosen_rows(given), tuple(given.seeds)
    )
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
        code = run_workers("benchmarks.digits_table", arguments, given.workers)
        if code == 130:
            return code
    digits_plots.show(work.results)
    return code


if __name__ == "__main__":
    sys.exit(main())
