"""The two sides of a step: the student as a stage trains it, and the teachers it learns from."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from litconvert.data.batches import Batch
from litconvert.distillation.teacher_outputs import TeacherOutputs
from litconvert.model.attention_layers import attention_of, linear_layers, recorded_attention
from litconvert.model.modeling_lit import Block, LiTTransformer2DModel
from litconvert.recipe.schema import AnyStage, AttentionTransfer, Distill, FlowMatching, Hybrid, teacher_weights
from litconvert.training.engine import Engine


def compiles(setting: str, device: torch.device) -> bool:
    """What distill.compile comes to on this device."""
    return setting == "blocks" or (setting == "auto" and device.type == "cuda" and has_triton())


def compile_blocks(model: LiTTransformer2DModel, *, recorded: bool) -> None:
    """torch.compile, block by block: one compilation serves them all.

    With `recorded` attention outputs, attention and feed-forward are compiled each by itself: a hook inside a compiled
    block would not be called.
    """
    # Inductor's mix-order reduction gives silently wrong gradients for the scales and shifts of modulated LayerNorms
    # (torch 2.10 and later; pytorch/pytorch issue 193061).
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    # Data parallelism would cut each block in pieces, for communication to begin in the middle of one.
    torch._dynamo.config.optimize_ddp = False
    for block in cast(Iterator[Block], model.blocks):
        # One code object serves every kind of layer, mode, size and precision: more than the eight there may be of it.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for module in (block.attn, block.ff) if recorded else (block,):
            module.forward = torch.compile(type(module).forward).__get__(module)  # type: ignore[method-assign]


class Student(nn.Module):
    """The student as one module for the engine to wrap, whatever a stage trains of it.

    Args:
        model: with `requires_grad` set on what the stage trains.
        stage: its objective decides what a forward pass is.
        settings: how blocks are recomputed and compiled.
    """

    def __init__(self, model: LiTTransformer2DModel, stage: AnyStage, settings: Distill) -> None:
        super().__init__()
        self.model = model
        self.transfers = isinstance(stage, AttentionTransfer)
        self.records = not isinstance(stage, AttentionTransfer) and stage.feature_weight > 0
        self.layers = linear_layers(model)
        device = next(model.parameters()).device
        for block in model.blocks:
            for module in (block, cast(Block, block).attn, cast(Block, block).ff):
                module.__dict__.pop("forward", None)  # what the stage before it compiled or recomputed
        if compiles(settings.compile, device):
            compile_blocks(model, recorded=self.records or self.transfers)
        if not self.transfers:
            count = len(model.blocks)
            for block in list(model.blocks)[: round(settings.gradient_checkpointing * count)]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def parts(self) -> Iterator[nn.Module]:
        """What sharding gathers by itself: each block, and in transfer each attention, so that no block is gathered."""
        if self.transfers:
            yield from (attention_of(self.model, layer) for layer in self.layers)
        yield from self.model.blocks

    def forward(
        self, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any], inputs: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output for (N, C, H, W), and attention outputs where the stage needs them; with attention `inputs`, the
        outputs of the linear attentions alone."""
        if inputs is not None:
            patch = self.model.config.patch_size
            grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
            outputs = [attention_of(self.model, layer)(x, grid) for layer, x in zip(self.layers, inputs, strict=True)]
            return noisy, outputs
        with recorded_attention(self.model, self.layers if self.records else []) as (_, outputs):
            sample = self.model(noisy, timestep, **condition, return_dict=False)[0]
        return sample, outputs


class Teachers:
    """What the student learns from: the source's layers in attention transfer, the teacher's output after it.

    Args:
        source: the softmax model inherited from; None: there is none, and no stage may ask.
        teacher: often the source itself.
        layers: the student's linear layers.
        settings: where the weights are.
        outputs: where outputs for a finite set of noises are kept; None: they are always computed.
    """

    def __init__(
        self,
        engine: Engine,
        source: LiTTransformer2DModel | None,
        teacher: LiTTransformer2DModel | None,
        layers: list[int],
        settings: Distill,
        outputs: TeacherOutputs | None = None,
    ) -> None:
        self.layers, self.outputs = layers, outputs
        self.source, self.teacher = source, teacher
        unique = {id(model): model for model in (source, teacher) if model is not None}
        needs_records = any(
            isinstance(stage, AttentionTransfer) or stage.feature_weight > 0 for stage in settings.stages
        )
        for model in unique.values():
            model.eval().requires_grad_(False)
            if compiles(settings.compile, engine.device):
                compile_blocks(model, recorded=needs_records)
            place(model, settings.teacher_placement, engine)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The teacher's, if there is one."""
        return None if self.teacher is None else cast(Mapping[str, Any], self.teacher.config)

    @torch.no_grad()
    def attention(
        self, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs (N, T, D) of the source's attention in the student's linear layers."""
        assert self.source is not None
        with recorded_attention(self.source, self.layers) as (inputs, outputs):
            self.source(noisy, timestep, **condition)
        return inputs, outputs

    @torch.no_grad()
    def output(
        self, stage: Hybrid | FlowMatching, batch: Batch, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Any]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The teacher's output, None where the stage gives it no weight, and its attention outputs where it does."""
        if not any(teacher_weights(stage)):
            return None, []
        assert self.teacher is not None
        if stage.feature_weight:
            with recorded_attention(self.teacher, self.layers) as (_, outputs):
                return self.teacher(noisy, timestep, **condition, return_dict=False)[0], outputs

        teacher = self.teacher

        def compute() -> Tensor:
            output: Tensor = teacher(noisy, timestep, **condition, return_dict=False)[0]
            return output

        if self.outputs is None or batch.rows is None:
            return compute(), []
        return self.outputs.get(batch.bucket, batch.rows, compute).to(noisy.device), []

    def keep(self) -> None:
        """Make sure that a checkpoint finds the outputs that were computed before it."""
        if self.outputs is not None:
            self.outputs.keep()


def place(model: LiTTransformer2DModel, placement: str, engine: Engine) -> None:
    """Put a teacher's weights where the recipe says."""
    if placement == "offloaded" and engine.device.type == "cuda":
        model.enable_group_offload(
            onload_device=engine.device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        return
    model.to(engine.device)
    if placement == "sharded" and engine.processes > 1:
        engine.shard(model, iter(model.blocks))


def open_outputs(
    settings: Distill, folder: Path, sizes: Sequence[tuple[int, tuple[int, ...]]]
) -> TeacherOutputs | None:
    """The store of teacher outputs, where noise is drawn from a finite set.

    Args:
        sizes: for each bucket, its samples and the shape of the teacher's output.
    """
    if settings.noise_set is None:
        return None
    return TeacherOutputs(folder, [(count * settings.noise_set, shape) for count, shape in sizes])
