"""The memory of a training step, counted on tensors without data: the real modules run, and nothing is computed.

FakeTensorMode gives every tensor its shape, dtype and device, and attention the kernel that the device would choose,
so that no T x T matrix is counted where none would be made. A dispatch mode beside it sees every operation's outputs,
in the backward pass too, and follows each storage to its end.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litconvert.distillation.objectives import attention_error, distillation_terms
from litconvert.model.attention_layers import recorded_attention
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import make_diffusion
from litconvert.model.modeling_lit import LiTTransformer2DModel, sincos_position_embedding
from litconvert.recipe.schema import AnyStage, Distill
from litconvert.training.optimization import trained_names
from litconvert.training.student import Student

# What glibc keeps in a heap: DEFAULT_MMAP_THRESHOLD_MAX on 64-bit systems.
SMALL = 32 << 20


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live.

    Args:
        known: tensors whose storages are not counted: they are there before.

    Attributes:
        live: bytes now.
        gradients: bytes among them that were handed to `hold_gradient`.
        small: bytes among them in storages of less than 32 MiB.
        peak: live, gradients and small when live was most.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}
        self._gradients: set[int] = set()
        self.live = self.gradients = self.small = 0
        self.peak = (0, 0, 0)

    def hold_gradient(self, parameter: Tensor) -> None:
        """A weight's gradient is complete, and stays until the optimiser has used it."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._gradients:
            self._gradients.add(storage._cdata)
            self.gradients += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        small = nbytes if nbytes < SMALL else 0
        self._storages.add(key)
        self.live += nbytes
        self.small += small
        if self.live > self.peak[0]:
            self.peak = (self.live, self.gradients, self.small)

        def end() -> None:
            self._storages.discard(key)
            self.live -= nbytes
            self.small -= small

        # A storage keeps one Python object for life, so the end of the one is that of the other.
        weakref.finalize(storage, end).atexit = False


class StepMemory(NamedTuple):
    """Bytes at the moment of a step that takes the most, beside weights, optimiser states and EMA."""

    activations: int
    """What the backward pass needs, and what is there for a moment: of the teacher, the loss, the optimiser."""
    gradients: int
    """Those of the weights that exist at that moment: nearly none where the backward pass begins."""
    small: int
    """Of both, in storages of less than 32 MiB."""


@dataclass(frozen=True)
class Step:
    """A step of a stage, as one process computes it.

    Attributes:
        stage: its objective and optimiser.
        settings: gradient checkpointing and accumulation are as they say; nothing is compiled.
        student: config.
        teacher: config of what the stage learns from; None: nothing.
        micro_batch: samples that are computed at a time.
        device: that it is computed on.
        bf16: autocast.
    """

    stage: AnyStage
    settings: Distill
    student: ModelConfig
    teacher: ModelConfig | None
    micro_batch: int
    device: torch.device
    bf16: bool


def step_memory(step: Step) -> StepMemory:
    """Run a step on tensors without data, and count."""
    stage, student, teacher = step.stage, step.student, step.teacher
    # "cuda" is another key than the "cuda:0" that tensors say they are on.
    device = torch.empty(0, device=step.device).device
    for config in filter(None, (student, teacher)):
        # Models keep position embeddings for later calls: they must keep real ones.
        side = config.sample_size // config.patch_size
        scale = config.interpolation_scale
        sincos_position_embedding(config.hidden_size, (side, side), side, device, scale)
    settings = step.settings.model_copy(update={"compile": "no"})
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        model = LiTTransformer2DModel(**student.values).train()
        teaching = None if teacher is None else LiTTransformer2DModel(**teacher.values).eval().requires_grad_(False)
        models: list[nn.Module] = [model] if teaching is None else [model, teaching]
        memory = LiveMemory(tensor for one in models for tensor in (*one.parameters(), *one.buffers()))
        trained = set(trained_names([name for name, _ in model.named_parameters()], stage, "the stage"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name in trained:
                parameter.register_post_accumulate_grad_hook(memory.hold_gradient)
        module = Student(model, stage, settings)
        with memory:
            # From the second part of a step on, all gradients are there from the start.
            for _ in range(min(2, settings.gradient_accumulation_steps)):
                with torch.autocast(device.type, torch.bfloat16) if step.bf16 else nullcontext():
                    loss, _held = _loss(stage, module, teaching, random_inputs(student, step.micro_batch))
                loss.backward()
                del loss, _held
        at_peak, gradients, small = memory.peak
        workspace = optimizer_workspace(stage, [p for p in model.parameters() if p.requires_grad])
        if memory.gradients + workspace > at_peak:
            return StepMemory(workspace, memory.gradients, memory.small)
        return StepMemory(at_peak - gradients, gradients, small)


def optimizer_workspace(stage: AnyStage, parameters: Sequence[Tensor]) -> int:
    """Bytes that an optimiser makes for its step alone: AdamW's kernels none, CAME four of the weight it is at."""
    return 4 * max(parameter.nbytes for parameter in parameters) if stage.optimizer == "came" else 0


class RandomBatch(NamedTuple):
    clean: Tensor
    noise: Tensor
    timestep: Tensor
    condition: dict[str, Any]


def random_inputs(config: ModelConfig, count: int) -> RandomBatch:
    """What a batch and its conditions are to the models; captions have the longest length."""
    size, channels = config.sample_size, config.in_channels
    clean, noise = (torch.randn(count, channels, size, size) for _ in range(2))
    timestep = torch.rand(count) if config.predicts_velocity else torch.randint(1, (count,))
    if not config.reads_captions:
        return RandomBatch(clean, noise, timestep, {"class_labels": torch.randint(1, (count,))})
    condition: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(count, config.caption_tokens, config.caption_width),
        "encoder_attention_mask": torch.ones(count, config.caption_tokens, dtype=torch.int64),
    }
    if config.micro_conditions:
        condition["added_cond_kwargs"] = {"resolution": torch.randn(count, 2), "aspect_ratio": torch.randn(count, 1)}
    return RandomBatch(clean, noise, timestep, condition)


def _loss(
    stage: AnyStage, student: Student, teacher: LiTTransformer2DModel | None, inputs: RandomBatch
) -> tuple[Tensor, list[Any]]:
    """The step's loss as the trainer computes it, and what the trainer holds on to until the next one."""
    clean, noise, timestep, condition = inputs
    diffusion = make_diffusion(ModelConfig.of(student.model.config), num_timesteps=1000)
    noisy = diffusion.add_noise(clean, noise, timestep)
    output, theirs = None, list[Tensor]()
    if teacher is not None:
        layers = student.layers if stage.feature_weight else []
        output, theirs = _teach(teacher, layers, noisy, timestep, condition)
    sample, mine = student(noisy, timestep, condition)
    terms = distillation_terms(stage, diffusion, sample, output, clean, noise, timestep)
    if stage.feature_weight:
        terms["features"] = stage.feature_weight * attention_error(mine, theirs)
    return torch.stack(list(terms.values())).sum(), [inputs, output, sample, theirs, mine]


@torch.no_grad()
def _teach(
    teacher: LiTTransformer2DModel, layers: list[int], noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """The teacher's output, and those of these layers' attention; the inputs are let go of, as the trainer does."""
    with recorded_attention(teacher, layers) as (_, outputs):
        sample = teacher(noisy, timestep, **condition, return_dict=False)[0]
    return sample, outputs
