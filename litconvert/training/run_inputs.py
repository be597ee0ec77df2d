"""What determines a run's result, and whether a run that is there may go on with it: the same, or only longer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from litconvert.common.files import digest_of, read_json
from litconvert.errors import LitconvertError
from litconvert.families.sources import OpenSource
from litconvert.model.config import ModelConfig
from litconvert.recipe.inputs import Inputs, differences, given
from litconvert.recipe.resolve import read_recorded
from litconvert.recipe.schema import FORMER_STAGES, Recipe
from litconvert.runs.directory import RunDirectory

# How a run is computed, not what: a run may go on with other values.
EXECUTION = {
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "compile",
    "teacher_placement",
    "max_skipped_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "trackers",
    "teacher",  # its weights' digest counts, not where they are
    "start",  # likewise
}
# Keys of `distill` that the first runs had not, and so had not in their digests.
SINCE_FORMAT_1: dict[str, Any] = {
    "max_skipped_steps": True,
    "start": True,
    "stages": {"__all__": {"solved_learning_rate", "snr_power", "stratified_timesteps"}},
}


@dataclass(frozen=True)
class File:
    """A checkpoint that a run reads: its content, not where it is.

    Attributes:
        sha256: of the file.
        weights: which set of it.
        config: what hints make of it.
    """

    sha256: str
    weights: str | None
    config: ModelConfig

    @classmethod
    def of(cls, source: OpenSource) -> "File":
        """Read and hashed now."""
        return cls(source.checkpoint.sha256(), source.checkpoint.weights, source.config)

    @property
    def values(self) -> dict[str, Any]:
        """For a digest."""
        return {"sha256": self.sha256, "weights": self.weights, "config": self.config.given}


@dataclass(frozen=True)
class RunInputs:
    """What determines a run.

    Attributes:
        student: what is trained: `{"sha256": ...}` of a converted model, `{"scratch": config}` of one from nothing.
        files: the source and the teacher, where there are any.
        data: digest of the data set.
        texts: the data holds captions as text, which a text encoder reads on the way.
        recipe: resolved.
        start: what a run starts from, where not from the student.
    """

    student: Mapping[str, Any]
    files: Mapping[str, File]
    data: str
    texts: bool
    recipe: Recipe
    start: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> Inputs:
        """The digest and what goes into it."""
        recipe, encoder = self.recipe, self.recipe.source.text_encoder if self.texts else None
        values = {
            "student": {
                key: ModelConfig.of(one).given if key == "scratch" else one for key, one in self.student.items()
            },
            **{name: file.values for name, file in self.files.items()},
            "data": {"digest": self.data, "flip": recipe.data.flip},
            "source.text_encoder": given(encoder),
            "distill": given(recipe.distill, exclude=EXECUTION),
            "diffusion": given(recipe.diffusion),
            "seed": recipe.seed,
        }
        first = {
            "student": self.student,
            "sources": {name: (file.sha256, file.weights, file.config.values) for name, file in self.files.items()},
            "data": self.data,
            "text_encoder": encoder.model_dump() if encoder else None,
            "flip": recipe.data.flip,
            "distill": recipe.distill.model_dump(mode="json", exclude=dict.fromkeys(EXECUTION, True) | SINCE_FORMAT_1),
            "timesteps": recipe.diffusion.num_timesteps,
            "seed": recipe.seed,
        }
        if self.start is not None:
            return Inputs({**values, "start": dict(self.start)})
        return Inputs(values, digest_of(first))

    def with_steps(self, steps: Sequence[int]) -> "RunInputs":
        """The same with stages of so many steps."""
        stages = self.recipe.distill.stages
        changed = tuple(stage.model_copy(update={"steps": n}) for stage, n in zip(stages, steps, strict=True))
        distill = self.recipe.distill.model_copy(update={"stages": changed})
        return replace(self, recipe=self.recipe.model_copy(update={"distill": distill}))


def go_on(run: RunDirectory, wanted: RunInputs, more: Mapping[str, Any], *, force: bool) -> list[str]:
    """Begin a run of these inputs in its directory, or have the run that is there go on with them.

    A run may be given more steps, or fewer that it has not made yet, in the stage it is at and those after it.

    Args:
        more: what else to write into its record.

    Returns: notes for the user.

    Raises LitconvertError, which names what changed, for a run of other inputs, unless `force` replaces it.
    """
    notes, replaced = list[str](), False
    try:
        notes = check_goes_on(run, wanted)
    except LitconvertError:
        if not force:
            raise
        notes, replaced = [f"the run in {run.path}, of other inputs, is replaced"], True
    run.start({**wanted.inputs.record, **more}, wanted.recipe.to_yaml(), replace=replaced)
    return notes


def check_goes_on(run: RunDirectory, wanted: RunInputs) -> list[str]:
    """Whether the run that is there, if any, may go on with these inputs. Returns notes for the user.

    Raises LitconvertError, which names what changed.
    """
    found = run.record()
    if found is None or wanted.inputs.made(found):
        return []
    before, stages = _recorded_steps(run, found), wanted.recipe.distill.stages
    if before is not None and len(before) == len(stages) and wanted.with_steps(before).inputs.made(found):
        return _lengthen(run, wanted, before)
    raise LitconvertError(
        f"{run.path} holds a run of other inputs: {_changes(run, found, wanted)}. Choose another path, or replace it "
        "with --force; `--from` starts another run from its weights"
    )


def goes_on(run: RunDirectory, wanted: RunInputs) -> bool:
    """`check_goes_on`, as yes or no."""
    try:
        check_goes_on(run, wanted)
    except LitconvertError:
        return False
    return True


def is_finished(run: RunDirectory, wanted: RunInputs) -> bool:
    """Whether the run's model is that of these inputs."""
    return run.model.is_dir() and wanted.inputs.made(read_json(run.model / "litconvert.json"))


def _recorded_steps(run: RunDirectory, found: Mapping[str, Any]) -> list[int] | None:
    """The steps of each stage that the run was begun with; None where they are not known."""
    if "inputs" in found:
        return [int(stage["steps"]) for stage in found["inputs"].get("distill", {}).get("stages", ())]
    try:
        return [stage.steps for stage in read_recorded(run.path / "recipe.yaml").distill.stages]
    except LitconvertError:
        return None


def _lengthen(run: RunDirectory, wanted: RunInputs, before: Sequence[int]) -> list[str]:
    """Whether a run may go on with stages of other lengths. Raises LitconvertError; returns what to know."""
    latest = run.latest_checkpoint()
    notes = []
    for index, (stage, old) in enumerate(zip(wanted.recipe.distill.stages, before, strict=True)):
        if stage.steps == old:
            continue
        if latest is not None and index < latest[1].stage:
            raise LitconvertError(
                f"{run.path} is at stage {latest[1].stage}: distill.stages.{index}.steps was {old} and cannot become "
                f"{stage.steps} any more; `--from` starts another run from its weights"
            )
        if latest is not None and index == latest[1].stage and stage.steps < latest[1].step:
            raise LitconvertError(
                f"{run.path} has made {latest[1].step} steps of stage {index}: distill.stages.{index}.steps cannot "
                f"become {stage.steps}; choose no fewer, or another path"
            )
        notes.append(f"stage {index}: {stage.steps} steps, {old} before")
        if latest is None and run.model.is_dir():
            notes.append(f"{run.path} has a model but no checkpoint to go on from: it begins again")
        if stage.schedule != "constant" and latest is not None and index == latest[1].stage and latest[1].step:
            notes.append(
                f"the learning rate follows the {stage.schedule} schedule of {stage.steps} steps from here on, and "
                f"followed that of {old} before: a run of {stage.steps} steps from its start would be another one"
            )
    return notes


def _changes(run: RunDirectory, found: Mapping[str, Any], wanted: RunInputs) -> str:
    """What differs from the inputs of the run that is there."""
    if "inputs" in found:
        objectives = [stage["objective"] for stage in found["inputs"].get("distill", {}).get("stages", ())]
        former = next((FORMER_STAGES[one] for one in objectives if one in FORMER_STAGES), None)
        return former or wanted.inputs.changes(found)
    # A run of format 1 kept no inputs, but its recipe.
    try:
        recorded = replace(wanted, recipe=read_recorded(run.path / "recipe.yaml")).inputs.plain
    except LitconvertError as error:
        return f"its recipe cannot be read ({error}), and it kept no other record of them"
    return differences(recorded, wanted.inputs.plain) or "the student, the source, the teacher or the data"
