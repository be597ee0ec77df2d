"""The trainer: a linear student learns from its softmax teacher, stage by stage, on accelerate."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from litconvert.checkpoints import TensorInfo, digest_of, read_json, require_space, whole_directory
from litconvert.conversion import (
    DTYPES,
    FORMAT_VERSION,
    OpenSource,
    open_source,
    read_model,
    read_provenance,
    versions,
    write_model_directory,
)
from litconvert.draws import generator_of, permutation
from litconvert.errors import LitconvertError, UsageError
from litconvert.latents import LatentDataset, open_latents, synthesize_resolved
from litconvert.modeling_lit import LiTTransformer2DModel
from litconvert.objectives import DDPM, hybrid_terms, transfer_terms
from litconvert.recipe import AttentionTransfer, Hybrid, Recipe, ResolvedRecipe, Source, read_recorded, resolve
from litconvert.run_directory import Progress, RunDirectory
from litconvert.sampling import SampleSheet


class Interrupted(LitconvertError):
    """SIGINT or SIGTERM: the state is saved, the same command goes on."""

    exit_code = 130


@dataclass(frozen=True)
class Batch:
    """One micro-batch, drawn once for student and teacher alike.

    Attributes:
        clean: x_0 (N, C, H, W).
        noise: eps (N, C, H, W).
        timestep: (N,) int64.
        class_labels: (N,) int64, some of them the null class.
    """

    clean: Tensor
    noise: Tensor
    timestep: Tensor
    class_labels: Tensor


def draw_batch(
    data: LatentDataset,
    positions: range,
    *,
    seed: int,
    step: int,
    batch_size: int,
    num_timesteps: int,
    null_class: int,
    condition_dropout: float,
) -> Batch:
    """The samples at these positions of a step's global batch.

    Everything is a function of (seed, step, position): the sample, its noise, its timestep, and whether its condition is
    dropped. Neither the number of processes nor an interruption changes a draw.
    """
    indices, noise, timesteps, dropped = [], [], [], []
    for position in positions:
        visit = step * batch_size + position
        epoch, place = divmod(visit, len(data))
        indices.append(int(_order(seed, epoch, len(data))[place]))
        generator = generator_of(seed, "sample", step, position)
        noise.append(torch.randn(data.shape, generator=generator))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        dropped.append(torch.rand((), generator=generator) < condition_dropout)
    clean, labels = data.read(indices)
    labels = torch.where(torch.stack(dropped), torch.full_like(labels, null_class), labels)
    return Batch(clean, torch.stack(noise), torch.stack(timesteps), labels)


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def _order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation of an epoch; the last two are kept, since a batch can straddle two epochs."""
    key = (seed, epoch, length)
    if key not in _ORDERS:
        for old in list(_ORDERS)[:-1]:
            del _ORDERS[old]
        _ORDERS[key] = permutation(seed, epoch, length)
    return _ORDERS[key]


class AttentionLayers(nn.Module):
    """The student's linear attentions alone, as one module, so that the engine wraps what a transfer stage trains."""

    def __init__(self, student: LiTTransformer2DModel) -> None:
        super().__init__()
        kinds = enumerate(student.config.attention)
        self.layers = [index for index, kind in kinds if kind == "linear"]
        self.attentions = nn.ModuleList(student.blocks[index].attn for index in self.layers)

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

    handles = [model.blocks[layer].attn.register_forward_hook(record) for layer in layers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def bf16_in_hardware() -> bool:
    """Whether bf16 autocast is faster than float32 here: a GPU with bf16, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The engine. Raises UsageError when this process was launched as one of several but is in no group."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and bf16_in_hardware())
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"this is one of {launched} launched processes, but they are in no process group, so each would train alone "
            "and overwrite the others; launch with `accelerate launch -m litconvert distill ...`"
        )
    return accelerator


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
                raise LitconvertError(
                    f"step {step}: {name} holds NaN or infinite values; nothing was updated. {kept}. Lower learning_rate, "
                    "set max_grad_norm, or run with distill.mixed_precision=no"
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


def check_pair(
    student: LiTTransformer2DModel, teacher: LiTTransformer2DModel, data: LatentDataset, recipe: Recipe
) -> None:
    """Everything that can be refused before the first step. Raises UsageError."""
    mine, theirs = student.config, teacher.config
    for key in ("in_channels", "sample_size", "out_channels", "num_classes"):
        if mine[key] != theirs[key]:
            raise UsageError(
                f"the teacher's {key} is {theirs[key]}, the student's is {mine[key]}: they cannot see the same input; "
                "choose a teacher of the same latent and classes (--teacher, or distill.teacher.path)"
            )
    if data.shape[0] != mine.in_channels or any(side % mine.patch_size for side in data.shape[1:]):
        raise UsageError(
            f"the data set's latents are {data.shape}, the student takes {mine.in_channels} channels and sides that are "
            f"multiples of {mine.patch_size}; draw or encode the data for this model"
        )
    if not recipe.distill.stages:
        raise UsageError("the recipe has no distill.stages; `litconvert recipes show digits` shows an example")
    processes = int(os.environ.get("WORLD_SIZE", "1")) * recipe.distill.gradient_accumulation_steps
    for index, stage in enumerate(recipe.distill.stages):
        if stage.batch_size % processes:
            raise UsageError(
                f"distill.stages.{index}.batch_size={stage.batch_size} is not a multiple of processes times accumulation, "
                f"{processes}"
            )
        if stage.condition_dropout and not mine.null_class:
            raise UsageError(
                f"distill.stages.{index}.condition_dropout needs a null class, which this model was trained without; set 0"
            )
        if isinstance(stage, AttentionTransfer) and "linear" not in mine.attention:
            raise UsageError(f"distill.stages.{index} transfers attention, but the student has no linear layer")
        if isinstance(stage, Hybrid) and mine.out_channels != 2 * mine.in_channels:
            wants = stage.variance_weight or stage.variational_bound
            raise UsageError(
                f"distill.stages.{index} trains a learned variance, which this model has not"
                if wants
                else "models without a learned variance are not supported"
            )


def _same_attention(student: LiTTransformer2DModel, source: LiTTransformer2DModel) -> bool:
    keys = ("hidden_size", "num_layers", "patch_size", "in_channels")
    return all(student.config[key] == source.config[key] for key in keys)


def run_inputs(
    student: Path, teacher: OpenSource, source: OpenSource, data: LatentDataset, recipe: Recipe, student_digest: str
) -> dict[str, Any]:
    """What determines a run's result."""
    return {
        "student": student_digest,
        "source": source.checkpoint.sha256(),
        "teacher": teacher.checkpoint.sha256(),
        "teacher_weights": teacher.checkpoint.weights,
        "data": data.digest,
        "distill": recipe.distill.model_dump(
            mode="json", exclude={"checkpoint_every", "keep_checkpoints", "sample_every", "teacher"}
        ),
        "timesteps": recipe.diffusion.num_timesteps,
        "seed": recipe.seed,
    }


def resolve_run(
    student: Path, recipe: str | None, overrides: Sequence[str], teacher: str | None
) -> tuple[ResolvedRecipe, Recipe]:
    """The run's recipe, with the source that the student was converted from; and the student's own recipe."""
    recorded = read_recorded(student / "recipe.yaml")
    resolved = resolve(recipe or str(student / "recipe.yaml"), overrides)
    update: dict[str, Any] = {"source": recorded.source, "student": recorded.student, "inherit": recorded.inherit}
    if teacher is not None:
        base = resolved.recipe.distill.teacher or Source(license=recorded.source.license)
        distill = resolved.recipe.distill.model_copy(update={"teacher": base.model_copy(update={"path": teacher})})
        update["distill"] = distill
    merged = resolved.recipe.model_copy(update=update)
    return ResolvedRecipe(resolved.name, merged, resolved.origins), recorded


def distill(
    student: str | Path,
    out: str | Path,
    recipe: str | None = None,
    *,
    teacher: str | None = None,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_draw: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Teach a converted student with its softmax teacher. Called again with the same inputs, it goes on where it was.

    Args:
        student: model directory that `convert` wrote.
        out: run directory: recipe.yaml, metrics.csv, curves.png, samples/, checkpoints/, model/.
        recipe: name or path; None: the one recorded in the student.
        teacher: another checkpoint for the hybrid stage; None: the recipe's, or else the source.
        data: dataset folder; None: the recipe's, or else the teacher draws it into a folder `out`-latents.
        overrides: `key=value`, over the recipe.
        force: replace a run of other inputs.
        on_step, on_draw, on_note: for the console.

    Returns: the run directory.

    Raises UsageError for inputs that do not fit, LitconvertError when it had to stop, Interrupted after a signal.
    """
    student, out = Path(student), Path(out)
    provenance = read_provenance(student)
    resolved, _ = resolve_run(student, recipe, overrides, teacher)
    settings = resolved.recipe
    accelerator = make_accelerator(settings.distill.mixed_precision)
    main = accelerator.is_main_process
    quiet: Callable[..., None] = lambda *arguments: None  # noqa: E731

    source = open_source(settings.source, settings.inherit.weights)
    if source.checkpoint.sha256() != provenance["source"]["sha256"]:
        raise LitconvertError(
            f"{settings.source.path} has changed since {student} was converted from it; convert it again, or restore it"
        )
    teacher_source = open_source(settings.distill.teacher) if settings.distill.teacher else source
    folder = data or settings.data.path
    if folder is None:
        # Beside the run, not in it: the run's own digest is known only once the data is drawn.
        folder = out.parent / f"{out.name}-latents"
        if main:
            synthesize_resolved(resolved, folder, on_progress=on_draw)
        accelerator.wait_for_everyone()
    dataset = open_latents(folder)

    student_source = open_source(Source(path=str(student)))
    model = read_model(student_source, torch.float32)
    source_model = read_model(source, torch.float32)
    teacher_model = source_model if teacher_source is source else read_model(teacher_source, torch.float32)
    if not _same_attention(model, source_model):
        raise UsageError(f"{student} does not have the shape of {settings.source.path}, its recorded source")
    check_pair(model, teacher_model, dataset, settings)

    inputs = run_inputs(student, teacher_source, source, dataset, settings, student_source.checkpoint.sha256())
    digest = digest_of(inputs)
    run = RunDirectory(out)
    if main:
        run.start(digest, settings.to_yaml(), force=force)
    accelerator.wait_for_everyone()
    if run.model.is_dir() and read_json(run.model / "litconvert.json").get("digest") == digest:
        return out
    if main:
        # Model, EMA and two Adam moments in float32, once for each kept checkpoint and one in the making; the result.
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        require_space(out, 4 * size * (settings.distill.keep_checkpoints + 1) + size)
        on_note(
            f"{accelerator.device.type}, {accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'float32'}"
        )

    sheet = SampleSheet(settings, teacher_model, run.samples) if main else None
    trainer = Trainer(
        accelerator,
        model,
        source_model,
        teacher_model,
        dataset,
        settings,
        run,
        on_step if main else quiet,
        (lambda name: sheet.draw(model, name)) if sheet else quiet,
    )
    if sheet and run.latest_checkpoint() is None:
        sheet.draw(model, "before")
    trainer.fit()
    if main and sheet:
        sheet.draw(model.eval(), "after")
        run.plot_curves()
        _write_result(run, trainer, student_source, teacher_source, provenance, digest)
    accelerator.wait_for_everyone()
    return out


def _write_result(
    run: RunDirectory,
    trainer: Trainer,
    student: OpenSource,
    teacher: OpenSource,
    provenance: Mapping[str, Any],
    digest: str,
) -> None:
    """model/: the EMA's weights as a model directory, with how they were trained."""
    recipe = trainer.recipe
    state = trainer.student.state_dict()
    dtype = recipe.student.dtype
    tensors = {
        name: TensorInfo(tuple(value.shape), DTYPES[dtype] if dtype else student.checkpoint.tensors[name].dtype)
        for name, value in state.items()
    }
    result = {
        **provenance,
        "format": FORMAT_VERSION,
        "digest": digest,
        "versions": versions(),
        "distillation": {
            "steps": trainer.total_steps,
            "stages": [stage.model_dump(mode="json") for stage in recipe.distill.stages],
            "teacher": {
                "path": teacher.checkpoint.source,
                "weights": teacher.checkpoint.weights,
                "sha256": teacher.checkpoint.sha256(),
            },
            "data": {"samples": len(trainer.data), "digest": trainer.data.digest},
            "seed": recipe.seed,
        },
        "metrics": {},
    }
    with whole_directory(run.model) as folder:
        write_model_directory(
            folder,
            config=student.reading.config,
            tensors=tensors,
            produce=lambda name: state[name].cpu(),
            recipe=recipe,
            provenance=result,
        )
