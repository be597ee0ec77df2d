"""The training loop: stages, steps, checkpoints and signals, on accelerate."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from litconvert.draws import Batch, draw_batch
from litconvert.errors import LitconvertError
from litconvert.latents import LatentDataset
from litconvert.modeling_lit import Attention, Block, LiTTransformer2DModel
from litconvert.objectives import DDPM, hybrid_terms, transfer_terms
from litconvert.recipe import AttentionTransfer, Hybrid, Recipe
from litconvert.run_directory import Progress, RunDirectory


class Interrupted(LitconvertError):
    """SIGINT or SIGTERM: the state is saved, the same command goes on."""

    exit_code = 130


def attention_of(model: LiTTransformer2DModel, layer: int) -> Attention:
    """A layer's self-attention."""
    return cast(Block, model.blocks[layer]).attn


class AttentionLayers(nn.Module):
    """The student's linear attentions alone, as one module, so that the engine wraps what a transfer stage trains."""

    def __init__(self, student: LiTTransformer2DModel) -> None:
        super().__init__()
        kinds = enumerate(student.config.attention)
        self.layers = [index for index, kind in kinds if kind == "linear"]
        self.attentions = nn.ModuleList(attention_of(student, index) for index in self.layers)

    def forward(self, inputs: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Each attention's output (N, T, D) on its own input (N, T, D)."""
        return [attention(x, grid) for attention, x in zip(self.attentions, inputs, strict=True)]


@contextmanager
def recorded_attention(
    model: LiTTransformer2DModel, layers: Sequence[int]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the inputs and outputs of these layers' attention during one forward pass."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs.append(arguments[0])
        outputs.append(output)

    handles = [attention_of(model, layer).register_forward_hook(record) for layer in layers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


class _TrainingState:
    """The current stage's EMA and learning-rate schedule, as accelerate saves and loads them."""

    def __init__(self) -> None:
        self.ema: EMAModel | None = None
        self.scheduler: Any = None

    def state_dict(self) -> dict[str, Any]:
        assert self.ema is not None
        return {"ema": self.ema.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.ema is not None
        device = self.ema.shadow_params[0].device
        self.ema.load_state_dict(dict(state["ema"]))
        self.ema.to(device)
        self.scheduler.load_state_dict(state["scheduler"])


@dataclass(frozen=True)
class StepReport:
    """What the console shows of a step."""

    stage: str
    step: int
    steps: int
    global_step: int
    total_steps: int
    metrics: Mapping[str, float]


class Trainer:
    """One run: the models, the data, and where it stands.

    Args:
        student: trained in place, float32.
        source: the softmax model inherited from, whose layers teach in attention transfer.
        teacher: teaches in the hybrid stage; often the source itself.
        data: clean latents.
        recipe: resolved.
        run: the directory.
        on_step: called on the main process after each step.
        on_samples: called with a name when samples are due, with the EMA's weights in the student.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: LiTTransformer2DModel,
        source: LiTTransformer2DModel,
        teacher: LiTTransformer2DModel,
        data: LatentDataset,
        recipe: Recipe,
        run: RunDirectory,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_samples: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.accelerator = accelerator
        self.student = student.to(accelerator.device).train()
        self.source = source.to(accelerator.device).eval().requires_grad_(False)
        self.teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        self.data = data
        self.recipe = recipe
        self.run = run
        self.on_step = on_step
        self.on_samples = on_samples
        self.diffusion = DDPM(recipe.diffusion.num_timesteps)
        self.state = _TrainingState()
        accelerator.register_for_checkpointing(self.state)
        self.stop_signal: int | None = None
        # The last micro-batch's tensors by name, so that the NaN guard can say where it began.
        self.watched: dict[str, Tensor] = {}

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.recipe.distill.stages)

    def fit(self) -> None:
        """Run every stage from the latest checkpoint on; leaves the last stage's EMA in the student."""
        resumed = self.run.latest_checkpoint()
        progress = resumed[1] if resumed else Progress()
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(progress.global_step)
        with self._signals():
            done = 0
            for index, stage in enumerate(self.recipe.distill.stages):
                if index >= progress.stage:
                    here = resumed[0] if resumed and index == progress.stage else None
                    first = progress.step if index == progress.stage else 0
                    self._run_stage(index, stage, first, done, here)
                done += stage.steps
        if self.state.ema is not None:
            self.state.ema.copy_to(self.parameters)

    def _run_stage(
        self, index: int, stage: AttentionTransfer | Hybrid, first: int, done: int, checkpoint: Path | None
    ) -> None:
        """One stage, from its step `first`; `done` steps were made in the stages before it."""
        self.accelerator.free_memory()
        module: nn.Module = AttentionLayers(self.student) if isinstance(stage, AttentionTransfer) else self.student
        self.student.requires_grad_(False)
        module.requires_grad_(True)
        if self.recipe.distill.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.parameters = list(module.parameters())
        optimizer = torch.optim.AdamW(
            self.parameters, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.state.ema = EMAModel(self.parameters, decay=stage.ema_decay, foreach=True)
        self.state.scheduler = get_scheduler(
            "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
            optimizer,
            num_warmup_steps=stage.warmup_steps,
            num_training_steps=stage.steps,
        )
        module, prepared = self.accelerator.prepare(module, optimizer)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
        for step in range(first, stage.steps):
            began = time.perf_counter()
            global_step = done + step
            metrics = self._step(stage, module, prepared, global_step)
            metrics["learning_rate"] = float(self.state.scheduler.get_last_lr()[0])
            self.state.scheduler.step()
            self.state.ema.step(self.parameters)
            metrics["ema_decay"] = float(self.state.ema.cur_decay_value)
            metrics["seconds"] = time.perf_counter() - began
            progress = Progress(index, step + 1, global_step + 1)
            self._report(stage, progress, metrics)
            self._checkpoint(progress, last=step + 1 == stage.steps, stop=metrics["stop"] > 0)

    def _step(
        self, stage: AttentionTransfer | Hybrid, module: nn.Module, optimizer: Any, global_step: int
    ) -> dict[str, float]:
        """One optimiser step: its loss terms, their sum and the gradient norm, averaged over processes."""
        accelerator, accumulation = self.accelerator, self.recipe.distill.gradient_accumulation_steps
        size = stage.batch_size // (accelerator.num_processes * accumulation)
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for micro in range(accumulation):
            start = (micro * accelerator.num_processes + accelerator.process_index) * size
            batch = self._batch(stage, range(start, start + size), global_step)
            with accelerator.no_sync(module) if micro < accumulation - 1 else nullcontext():
                with accelerator.autocast():
                    terms = self._terms(stage, module, batch)
                loss = torch.stack(list(terms.values())).sum() / accumulation
                accelerator.backward(loss)
            for name, term in {**terms, "loss": loss * accumulation}.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / accumulation
        limit = float("inf") if stage.max_grad_norm is None else stage.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.parameters, limit)
        stop = torch.tensor(float(self.stop_signal is not None), device=accelerator.device)
        names = [*sums, "gradient_norm", "stop"]
        values = accelerator.reduce(torch.stack([*sums.values(), norm.detach(), stop]).float(), "mean").tolist()
        metrics = dict(zip(names, values, strict=True))
        if not all(value == value and abs(value) != float("inf") for value in metrics.values()):
            self._refuse_nan(global_step + 1, metrics, module)
        optimizer.step()
        return metrics

    def _batch(self, stage: AttentionTransfer | Hybrid, positions: range, global_step: int) -> Batch:
        batch = draw_batch(
            self.data,
            positions,
            seed=self.recipe.seed,
            step=global_step,
            batch_size=stage.batch_size,
            num_timesteps=self.recipe.diffusion.num_timesteps,
            null_class=self.student.config.num_classes,
            condition_dropout=stage.condition_dropout,
        )
        device = self.accelerator.device
        return Batch(*(getattr(batch, name).to(device) for name in ("clean", "noise", "timestep", "class_labels")))

    def _terms(self, stage: AttentionTransfer | Hybrid, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss terms of a micro-batch."""
        noisy = self.diffusion.add_noise(batch.clean, batch.noise, batch.timestep)
        if isinstance(stage, AttentionTransfer):
            layers = AttentionLayers(self.student).layers
            with torch.inference_mode(), recorded_attention(self.source, layers) as (inputs, outputs):
                self.source(noisy, batch.timestep, batch.class_labels)
            # Clones are ordinary tensors, which the student's backward pass may keep; inference tensors it may not.
            inputs, outputs = [x.clone() for x in inputs], [x.clone() for x in outputs]
            patch = self.student.config.patch_size
            mine = module(inputs, (noisy.shape[-2] // patch, noisy.shape[-1] // patch))
            self.watched = {
                f"the teacher's attention output of layer {n}": x for n, x in zip(layers, outputs, strict=True)
            }
            self.watched |= {
                f"the student's attention output of layer {n}": x for n, x in zip(layers, mine, strict=True)
            }
            return transfer_terms(mine, outputs)
        with torch.inference_mode():
            teacher = self.teacher(noisy, batch.timestep, batch.class_labels).sample
        teacher = teacher.clone()
        student = module(noisy, batch.timestep, batch.class_labels).sample
        self.watched = {"the data": batch.clean, "the teacher's output": teacher, "the student's output": student}
        return hybrid_terms(stage, self.diffusion, student, teacher, batch.clean, batch.noise, batch.timestep)

    def _refuse_nan(self, step: int, metrics: Mapping[str, float], module: nn.Module) -> None:
        """Stop before the optimiser spreads a NaN, naming the step and the first tensor that holds one."""
        gradients = {
            f"the gradient of {name}": parameter.grad
            for name, parameter in self.student.named_parameters()
            if parameter.grad is not None
        }
        terms = {f"the loss term {name}": torch.tensor(value) for name, value in metrics.items()}
        for name, tensor in {**self.watched, **terms, **gradients}.items():
            if not torch.isfinite(tensor).all():
                latest = self.run.latest_checkpoint()
                kept = (
                    f"The checkpoint of step {latest[1].global_step} is kept" if latest else "No checkpoint was due yet"
                )
                advice = "Lower learning_rate, set max_grad_norm, or run with distill.mixed_precision=no"
                if name == "the data":
                    advice = "Draw the data again, or look at where it comes from"
                raise LitconvertError(
                    f"step {step}: {name} holds NaN or infinite values; nothing was updated. {kept}. {advice}"
                )
        raise LitconvertError(f"step {step}: another process met NaN or infinite values; its message names the tensor")

    def _report(self, stage: AttentionTransfer | Hybrid, progress: Progress, metrics: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        shown = {key: value for key, value in metrics.items() if key != "stop"}
        name = f"{progress.stage}:{stage.objective}"
        self.run.append_metrics({"step": progress.global_step, "stage": name, **shown})
        self.on_step(
            StepReport(stage.objective, progress.step, stage.steps, progress.global_step, self.total_steps, shown)
        )

    def _checkpoint(self, progress: Progress, *, last: bool, stop: bool) -> None:
        """Save when it is due, sample when it is due, and leave when a signal asked for it."""
        settings = self.recipe.distill
        if last or stop or progress.global_step % settings.checkpoint_every == 0:

            def save(folder: Path) -> None:
                self.accelerator.wait_for_everyone()
                self.accelerator.save_state(str(folder))
                self.accelerator.wait_for_everyone()

            main = self.accelerator.is_main_process
            self.run.save_checkpoint(progress, save, keep=settings.keep_checkpoints, main=main)
        if stop:
            raise Interrupted(
                f"stopped after step {progress.global_step} of {self.total_steps}, saved; run the same command to go on"
            )
        due = settings.sample_every is not None and progress.global_step % settings.sample_every == 0
        if due and not last and self.accelerator.is_main_process:
            assert self.state.ema is not None
            self.state.ema.store(self.parameters)
            self.state.ema.copy_to(self.parameters)
            self.on_samples(f"step-{progress.global_step:08d}")
            self.state.ema.restore(self.parameters)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted, and obeyed after the step; a second one is obeyed at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

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
