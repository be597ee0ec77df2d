"""What is looked at while a run trains: pictures, the error by timestep, trackers and backups."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from litconvert.common.listener import SILENT, Listener, StepReport
from litconvert.data.batches import NO_STAGE, MicroBatches
from litconvert.data.conditions import Conditioner
from litconvert.model.diffusion import make_diffusion
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.runs.backup import Backup
from litconvert.runs.trackers import Trackers
from litconvert.sampling.pictures import SampleSheet
from litconvert.training.objective import TrainingRun

# Of the error by timestep, spread evenly over the range.
ERROR_SAMPLES = 60


class Observer(Listener, AbstractContextManager["Observer"]):
    """Draws and measures a run's EMA, on the main process; the others wait.

    It listens to the trainer, and passes on what it hears.

    Args:
        training: its model as it is before the run is the student before training.
        conditioner: what the error by timestep is measured with.
        listener: told of steps, and of what failed without stopping the run.
    """

    def __init__(self, training: TrainingRun, conditioner: Conditioner, listener: Listener = SILENT) -> None:
        self.data, self.conditioner, self.listener = training.data, conditioner, listener
        self.config = training.config
        self.engine, self.model, self.recipe = training.engine, training.model, training.recipe
        self.teacher = None if training.splits_teacher else training.objective.teacher
        self.run = run = training.directory
        self.sheet = SampleSheet(self.recipe, training.config, run.samples) if self.engine.is_main else None
        self.trackers = Trackers(run, self.recipe, listener, is_main=self.engine.is_main)
        publish = self.recipe.publish
        self.backup: Backup | None = None
        if self.engine.is_main and publish.backup_every is not None and publish.repo_id is not None:
            self.backup = Backup(
                run.path, publish.repo_id, publish.backup_every, private=publish.private, listener=listener
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trackers.finish()
        if self.backup is not None:
            self.backup.stop()

    def note(self, text: str) -> None:
        """Passed on."""
        self.listener.note(text)

    def step(self, report: StepReport) -> None:
        """A step's metrics, for trackers too."""
        self.trackers.log(report.global_step, report.metrics)
        self.listener.step(report)

    def before(self) -> None:
        """The student as it is converted, and its teacher."""
        if self.sheet is not None:
            if self.teacher is not None:
                self.sheet.draw(self.teacher, "teacher", self.listener)
            self._look("before", 0, self._averaged(self.model.state_dict()), self.listener)
        self.engine.wait()

    def observe(self, step: int, state: Mapping[str, Tensor]) -> None:
        """The averaged student of a step."""
        self._look(f"step-{step:08d}", step, self._averaged(state))

    def after(self, step: int, state: Mapping[str, Tensor]) -> None:
        """The result."""
        self._look("after", step, self._averaged(state), self.listener)

    def _averaged(self, state: Mapping[str, Tensor]) -> LiTTransformer2DModel | None:
        """A model of its own: the one in training is left as it is."""
        if self.sheet is None:
            return None
        averaged = LiTTransformer2DModel.from_config(self.model.config).to(self.engine.device).eval()
        averaged.load_state_dict(state)
        return averaged  # type: ignore[no-any-return]

    def _look(self, name: str, step: int, model: LiTTransformer2DModel | None, listener: Listener = SILENT) -> None:
        """Between steps it is not heard: the display of the steps stands then."""
        if self.sheet is None or model is None:
            return
        self.sheet.draw(model, name, listener)
        if self.teacher is not None:
            end = 1.0 if self.config.predicts_velocity else float(self.recipe.diffusion.num_timesteps)
            self.run.append_timestep_errors(
                step, timestep_errors(_predictor(model), _predictor(self.teacher), self._batches(), end), end
            )

    def _batches(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """The same samples and noises each time, their timesteps spread evenly."""
        diffusion = make_diffusion(self.config, self.recipe.diffusion.num_timesteps)
        steps = None if self.config.predicts_velocity else self.recipe.diffusion.num_timesteps
        micro_batches = MicroBatches(self.data, self.recipe.seed, NO_STAGE, ERROR_SAMPLES, steps)
        batches = []
        for start in range(0, ERROR_SAMPLES, 10):
            positions = range(start, start + 10)
            spread = (torch.tensor(positions) + 0.5) / ERROR_SAMPLES
            timestep = spread if steps is None else (spread * steps).long()
            batch = replace(micro_batches.batch(0, positions), timestep=timestep)
            noisy = diffusion.add_noise(batch.samples.clean, batch.noise, timestep)
            device = self.engine.device
            batches.append((noisy.to(device), timestep.to(device), self.conditioner(batch)))
        return batches


def _predictor(model: LiTTransformer2DModel) -> Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]:
    def predict(noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        output: Tensor = model(noisy, timestep, **condition, return_dict=False)[0]
        return output

    return predict


Predict = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


@torch.no_grad()
def timestep_errors(
    student: Predict,
    teacher: Predict,
    batches: Iterable[tuple[Tensor, Tensor, Mapping[str, Any]]],
    timesteps: float,
    buckets: int = 10,
) -> list[float]:
    """How far the student is from its teacher in each part of the timestep range.

    sum ||student - teacher||^2 / sum ||teacher||^2 over a bucket's samples, of what both predict of the noise or the
    velocity: the first C output channels, the rest being the variance. 0 is the teacher itself, 1 an output of zeros.

    Args:
        student, teacher: called with (noisy, timestep, condition), give (N, C or 2C, H, W).
        batches: of (noisy (N, C, H, W), timestep (N,), condition), the same at each call, so that two measurements of
            one run can be compared.
        timesteps: end of the range [0, timesteps]: 1000 for DDPM's steps, 1 for flow matching's time.
        buckets: equal parts of it.

    Returns: the error of each bucket, in the order of timesteps; NaN for one that no sample fell into.
    """
    sums = torch.zeros(2, buckets, dtype=torch.float64)
    for noisy, timestep, condition in batches:
        channels = noisy.shape[1]
        # To main memory before float64, which not every device has.
        mine, theirs = (
            predict(noisy, timestep, condition)[:, :channels].float().cpu().double() for predict in (student, teacher)
        )
        bucket = (timestep.cpu().double() * (buckets / timesteps)).long().clamp(0, buckets - 1)
        for row, values in zip(sums, (mine - theirs, theirs), strict=True):
            row.index_add_(0, bucket, values.square().flatten(1).sum(1))
    errors: list[float] = (sums[0] / sums[1]).tolist()
    return errors
