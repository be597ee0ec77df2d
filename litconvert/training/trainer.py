"""The training loop: stages, steps, checkpoints and signals."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litconvert.common.listener import SILENT, Listener, StepReport
from litconvert.common.memory import is_out_of_memory, measured_peak, reset_peak
from litconvert.data.batches import Batch, MicroBatches
from litconvert.data.conditions import Conditioner
from litconvert.errors import LitconvertError
from litconvert.model.compilation import compiles
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM, make_diffusion
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.batch_split import out_of_memory_advice
from litconvert.recipe.schema import AnyStage
from litconvert.runs.directory import Progress
from litconvert.runs.throughput import Throughput, stage_work
from litconvert.training.engine import whole
from litconvert.training.objective import StepInputs, TrainingRun
from litconvert.training.optimization import (
    LearningRate,
    MovingAverage,
    load_training_state,
    make_optimizer,
    trained_names,
    training_state,
)
from litconvert.training.student import Student

SAME_SIGNAL_SECONDS = 2.0


class Interrupted(LitconvertError):
    """SIGINT or SIGTERM: the state is saved, the same command goes on."""

    exit_code = 130


@dataclass
class _Stage:
    """A stage while it runs."""

    index: int
    settings: AnyStage
    micro_batches: MicroBatches
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: LearningRate
    average: MovingAverage


def _is_finite(tensor: Tensor) -> bool:
    """Whether this process's part of a tensor holds neither NaN nor infinity."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())


class Trainer:
    """The loop of one run, and where it stands.

    Args:
        training: what the run is made of.
        conditioner: what a batch is conditioned on, as the models' arguments.
        listener: told on the main process of each step, and of steps that are skipped.
        on_observe: called on every process when samples are due, with the step and the EMA's whole state.
        describe: called on the main process with a checkpoint's folder, to say what model it holds.
    """

    def __init__(
        self,
        training: TrainingRun,
        conditioner: Conditioner,
        *,
        listener: Listener = SILENT,
        on_observe: Callable[[int, Mapping[str, Tensor]], None] = lambda step, state: None,
        describe: Callable[[Path, Progress], None] = lambda folder, progress: None,
    ) -> None:
        self.training, self.conditioner = training, conditioner
        self.engine, self.recipe, self.run = training.engine, training.recipe, training.directory
        self.student = training.model.to(training.engine.device).train()
        self.objective, self.total_steps = training.objective, training.total_steps
        self.listener = listener if self.engine.is_main else SILENT
        self.on_observe, self.describe = on_observe, describe
        self.skipped_steps = 0
        self.diffusion = make_diffusion(training.config, self.recipe.diffusion.num_timesteps)
        self.stop_signal: int | None = None
        self.stopped_at = 0.0
        # The last micro-batch's tensors by name, so that the NaN guard can say where it began.
        self.watched: dict[str, Tensor] = {}

    def fit(self) -> dict[str, Tensor]:
        """Run every stage from the latest checkpoint on; returns the last stage's EMA and the weights it left alone.

        Raises Interrupted after a signal, and LitconvertError when it cannot go on.
        """
        # One process decides: on a shared file system the others may see an older state of the folder.
        resumed = self.engine.from_main(self.run.latest_checkpoint() if self.engine.is_main else None)
        progress = resumed[1] if resumed else Progress()
        self.skipped_steps = progress.skipped_steps
        if self.engine.is_main:
            self.run.truncate_metrics(progress.global_step)
        if resumed:
            self.listener.note(f"goes on from step {progress.global_step} of {self.total_steps}")
        if compiles(self.recipe.distill.compile, self.engine.device):
            self.listener.note("the first steps compile the model, which takes from seconds to minutes")
        result: dict[str, Tensor] = {}
        done = 0
        with self._signals(), self.engine.group_failures():
            for index, stage in enumerate(self.recipe.distill.stages):
                if index >= progress.stage:
                    here = resumed[0] if resumed and index == progress.stage else None
                    first = progress.step if index == progress.stage else 0
                    result = {}  # not kept on the device while the next stage trains
                    try:
                        result = self._run_stage(index, stage, first, done, here)
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        advice = out_of_memory_advice(self.recipe, index, self.engine.processes)
                        raise LitconvertError(f"out of memory in stage {index}: {advice}") from error
                done += stage.steps
        return result

    def _run_stage(
        self, index: int, settings: AnyStage, first: int, done: int, checkpoint: Path | None
    ) -> dict[str, Tensor]:
        """One stage, from its step `first`; `done` steps were made in the stages before it. Returns its EMA."""
        reset_peak()
        stage = self._begin(index, settings)
        if checkpoint is not None:
            load_training_state(
                self.engine,
                checkpoint,
                self.student.state_dict(),
                stage.optimizer,
                stage.parameters,
                stage.average,
            )
            # The process before this one may have ended between its checkpoint and what was to be looked at then.
            self._observe(stage, done + first)
        teacher = self.objective.teacher
        work = stage_work(
            self.recipe, self.training.config, None if teacher is None else ModelConfig.of(teacher.config)
        )
        throughput = Throughput(self.recipe, index, work, self.engine.device, self.engine.processes)
        batches = stage.micro_batches.read_ahead(first, settings.steps, self.recipe.data.workers)
        for step in range(first, settings.steps):
            began = time.perf_counter()
            rate = stage.rate.set(step)
            metrics = self._step(stage, batches)
            stop = metrics.pop("stop") > 0
            metrics["learning_rate"] = rate
            metrics |= self._update(stage, step, done + step + 1, metrics)
            metrics["seconds"] = time.perf_counter() - began
            progress = Progress(index, step + 1, done + step + 1, self.skipped_steps)
            metrics |= throughput.update(metrics["seconds"], self.total_steps - progress.global_step)
            self._report(settings, progress, metrics)
            self._checkpoint(stage, progress, stop=stop)
            self._observe(stage, progress.global_step)
        if self.engine.is_main:
            self.run.record_usage(index, settings.objective, measured_peak())
        result = self._averaged(stage)
        if self.engine.sharded:
            # The next stage trains other weights, and is split anew: from a whole model.
            state = {name: whole(value).cpu() for name, value in self.student.state_dict().items()}
            self.student = LiTTransformer2DModel.from_config(self.student.config)
            self.student.load_state_dict(state)
            self.student.to(self.engine.device).train()
        return result

    def _begin(self, index: int, settings: AnyStage) -> _Stage:
        """Wrap what the stage trains for the processes, with its optimiser, schedule and average."""
        names = [name for name, _ in self.student.named_parameters()]
        trained = set(trained_names(names, settings, f"distill.stages.{index}"))
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        student = Student(self.student, settings, self.recipe.distill)
        module = self.engine.wrap(student, student.parts)
        parameters = {name: value for name, value in self.student.named_parameters() if name in trained}
        optimizer = make_optimizer(settings, parameters, self.training.fresh, self.training.solved)
        micro_batches = MicroBatches(
            self.training.data,
            seed=self.recipe.seed,
            stage=index,
            batch_size=settings.batch_size,
            num_timesteps=self.diffusion.num_timesteps if isinstance(self.diffusion, DDPM) else None,
            condition_dropout=settings.condition_dropout,
            flip=self.recipe.data.flip,
            noise_set=self.recipe.distill.noise_set,
            stratified=settings.stratified_timesteps,
            processes=self.engine.processes,
            process=self.engine.process,
            accumulation=self.recipe.distill.gradient_accumulation_steps,
        )
        return _Stage(
            index,
            settings,
            micro_batches,
            module,
            parameters,
            optimizer,
            LearningRate(settings, optimizer),
            MovingAverage(parameters, settings.ema_decay),
        )

    def _step(self, stage: _Stage, batches: Iterator[Batch]) -> dict[str, float]:
        """The gradients of one step: its loss terms, their sum and the gradient norm, averaged over processes, and
        whether all of that is `finite`, which is decided on the device and the same on all processes."""
        parts = self.recipe.distill.gradient_accumulation_steps
        stage.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            with self.engine.accumulate(stage.module, last=part == parts - 1):
                batch = next(batches)
                condition = self.conditioner(batch)  # T5 in its own precision, as when it encodes a data set
                with self.engine.autocast():
                    terms = self._terms(stage, batch, condition)
                loss = torch.stack(list(terms.values())).sum() / parts
                loss.backward()
            for name, term in {**terms, "loss": loss * parts}.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / parts
        norm = self._clip(stage)
        stop = torch.tensor(float(self.stop_signal is not None), device=self.engine.device)
        # The norm is NaN or infinite where any gradient is, and the means where those of any process are.
        means = self.engine.mean(torch.stack([*sums.values(), norm, stop]).float())
        values = torch.cat([means, means.isfinite().all().float().view(1)]).tolist()
        return dict(zip([*sums, "gradient_norm", "stop", "finite"], values, strict=True))

    def _update(self, stage: _Stage, step: int, global_step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Move the weights and their average by the gradients, or leave the step out where these are not finite.

        Raises LitconvertError when more steps would be left out than the recipe allows.
        """
        if not metrics.pop("finite"):
            self._skip(global_step, metrics)
            return {"skipped_steps": self.skipped_steps}
        stage.optimizer.step()
        return {"ema_decay": stage.average.update(step), "skipped_steps": self.skipped_steps}

    def _clip(self, stage: _Stage) -> Tensor:
        """The norm of all gradients, which are scaled down to the stage's limit where it has one."""
        gradients = [parameter.grad for parameter in stage.parameters.values() if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if stage.settings.max_grad_norm is not None:
            # By a norm that is no number all would be scaled to none, and where it came from could not be told.
            norm_or_none = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
            nn.utils.clip_grads_with_norm_(stage.parameters.values(), stage.settings.max_grad_norm, norm_or_none)
        return norm.detach()

    def _terms(self, stage: _Stage, batch: Batch, condition: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted loss terms of a micro-batch."""
        device = self.engine.device
        clean, noise, timestep = (
            value.to(device, non_blocking=True) for value in (batch.samples.clean, batch.noise, batch.timestep)
        )
        noisy = self.diffusion.add_noise(clean, noise, timestep)
        self.watched = {"the data": clean}
        inputs = StepInputs(batch, clean, noise, noisy, timestep, condition, self.diffusion)
        return self.objective.terms(stage.settings, stage.module, inputs, self.watched)

    def _skip(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leave a step out, whose gradients an optimiser would spread; every process is here.

        Raises LitconvertError, which names the step and the first tensor with a NaN, when no more may be left out.
        """
        name = self._first_bad(metrics)
        bound = self.recipe.distill.max_skipped_steps
        if self.skipped_steps < bound:
            self.skipped_steps += 1
            self.listener.note(
                f"step {step}: {name} holds NaN or infinite values; nothing was updated, and the run goes on (skipped "
                f"{self.skipped_steps} of at most {bound} steps)"
            )
            return
        latest = self.run.latest_checkpoint()
        kept = f"The checkpoint of step {latest[1].global_step} is kept" if latest else "No checkpoint was due yet"
        advice = (
            f"Leave such steps out (--set distill.max_skipped_steps={max(10, 2 * bound)}, and the same command again), "
            "or set another learning_rate, max_grad_norm or distill.mixed_precision=no: since these are part of a run, "
            "give it another directory"
        )
        if name.startswith("the data"):
            advice = "Draw the data again, or look at where it comes from"
        skipped = (
            f" {bound} steps were skipped before it, as many as distill.max_skipped_steps allows." if bound else ""
        )
        raise LitconvertError(
            f"step {step}: {name} holds NaN or infinite values; nothing was updated.{skipped} {kept}. {advice}"
        )

    def _first_bad(self, metrics: Mapping[str, float]) -> str:
        """The first tensor of the step that is not finite: an output on any process, or else a gradient."""
        terms = {
            f"the loss term {name}": torch.tensor(value) for name, value in metrics.items() if name != "gradient_norm"
        }
        gradients = {
            f"the gradient of {name}": parameter.grad
            for name, parameter in self.student.named_parameters()
            if parameter.grad is not None
        }
        # Gradients are exchanged already: where they are NaN on one process, they are on all.
        groups = (self.watched, gradients, terms)
        found = [next((name for name, tensor in group.items() if not _is_finite(tensor)), None) for group in groups]
        for names in zip(*self.engine.from_all(found), strict=True):
            for process, name in enumerate(names):
                if name is not None:
                    return name if self.engine.processes == 1 else f"{name} (on process {process})"
        return "the norm of the gradients, each of which is finite,"

    def _report(self, settings: AnyStage, progress: Progress, metrics: dict[str, float]) -> None:
        if not self.engine.is_main:
            return
        name = f"{progress.stage}:{settings.objective}"
        self.run.append_metrics({"step": progress.global_step, "stage": name, **metrics})
        self.listener.step(
            StepReport(
                settings.objective, progress.step, settings.steps, progress.global_step, self.total_steps, metrics
            )
        )

    def _averaged(self, stage: _Stage) -> dict[str, Tensor]:
        """The student's whole state with the EMA's weights in it. Every process must ask.

        Split states are put together in main memory: they may not fit on a device.
        """
        state = {name: stage.average.shadow.get(name, value) for name, value in self.student.state_dict().items()}
        if self.engine.sharded:
            return {name: whole(value).detach().cpu() for name, value in state.items()}
        return {name: value.detach() for name, value in state.items()}

    def _checkpoint(self, stage: _Stage, progress: Progress, *, stop: bool) -> None:
        """Save when it is due, and leave when a signal asked for it."""
        settings, last = self.recipe.distill, progress.step == stage.settings.steps
        if last or stop or progress.global_step % settings.checkpoint_every == 0:
            self.objective.keep()

            def save(folder: Path) -> None:
                state = training_state(self.student.state_dict(), stage.optimizer, stage.parameters, stage.average)
                self.engine.save(folder, state)
                if self.engine.is_main:
                    self.describe(folder, progress)

            self.run.save_checkpoint(progress, save, keep=settings.keep_checkpoints, main=self.engine.is_main)
        if stop:
            raise Interrupted(
                f"stopped after step {progress.global_step} of {self.total_steps}, saved; run the same command to go on"
            )

    def _observe(self, stage: _Stage, global_step: int) -> None:
        """Look at the EMA when it is due; the last step is left to whoever called `fit`."""
        every = self.recipe.distill.sample_every
        if every is not None and global_step % every == 0 and global_step != self.total_steps:
            try:
                self.on_observe(global_step, self._averaged(stage))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise LitconvertError(
                    f"out of memory while step {global_step} was looked at; lower sample.batch_size or set "
                    "distill.sample_every=null, and run the same command again"
                ) from None  # with it as its cause it would be taken for the stage's
            self.engine.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, and obeyed after the step; a second Ctrl-C is obeyed at once.

        Launchers pass a signal on that the processes have had already: what comes again at once is the same one.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is None:
                self.stop_signal, self.stopped_at = number, time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - self.stopped_at > SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt

        try:
            previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever embeds us handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
