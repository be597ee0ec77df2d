"""What a student learns from: its teacher, and the terms of the loss that it adds."""

from collections.abc import MutableMapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from litconvert.distillation.objectives import attention_error, distillation_terms
from litconvert.distillation.teacher_outputs import TeacherOutputs
from litconvert.model.attention_layers import recorded_attention
from litconvert.model.compilation import compile_blocks, compiles
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import AnyStage, Distill, teacher_weights
from litconvert.training.engine import Engine
from litconvert.training.objective import StepInputs


class Teacher:
    """What the student learns from: the teacher's output and, where a stage gives them weight, its attention outputs.

    Args:
        teacher: often the model inherited from; None: there is none, and no stage may ask.
        layers: the student's linear layers.
        settings: where the weights are.
        outputs: where outputs for a finite set of noises are kept; None: they are always computed.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: LiTTransformer2DModel | None,
        layers: list[int],
        settings: Distill,
        outputs: TeacherOutputs | None = None,
    ) -> None:
        self.layers, self.outputs = layers, outputs
        self.teacher = teacher
        if teacher is None:
            return
        teacher.eval().requires_grad_(False)
        if compiles(settings.compile, engine.device):
            compile_blocks(teacher, recorded=any(stage.feature_weight > 0 for stage in settings.stages))
        place(teacher, settings.teacher_placement, engine)

    def terms(
        self, stage: AnyStage, student: nn.Module, inputs: StepInputs, watched: MutableMapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss of a micro-batch; see `litconvert.training.objective.Objective`."""
        teacher, theirs = self.output(stage, inputs)
        output, mine = student(inputs.noisy, inputs.timestep, inputs.condition)
        if teacher is not None:
            watched["the teacher's output"] = teacher
        watched["the student's output"] = output
        terms = distillation_terms(
            stage, inputs.diffusion, output, teacher, inputs.clean, inputs.noise, inputs.timestep
        )
        if stage.feature_weight:
            for who, outputs in (("teacher", theirs), ("student", mine)):
                for layer, attended in zip(self.layers, outputs, strict=True):
                    watched[f"the {who}'s attention output of layer {layer}"] = attended
            terms["features"] = stage.feature_weight * attention_error(mine, theirs)
        return terms

    @torch.no_grad()
    def output(self, stage: AnyStage, inputs: StepInputs) -> tuple[Tensor | None, list[Tensor]]:
        """The teacher's output, None where the stage gives it no weight, and its attention outputs where it does."""
        if not any(teacher_weights(stage)):
            return None, []
        assert self.teacher is not None
        teacher, batch = self.teacher, inputs.batch
        if stage.feature_weight:
            with recorded_attention(teacher, self.layers) as (_, outputs):
                return teacher(inputs.noisy, inputs.timestep, **inputs.condition, return_dict=False)[0], outputs

        def compute() -> Tensor:
            output: Tensor = teacher(inputs.noisy, inputs.timestep, **inputs.condition, return_dict=False)[0]
            return output

        if self.outputs is None or batch.rows is None:
            return compute(), []
        return self.outputs.get(batch.bucket, batch.rows, compute).to(inputs.noisy.device), []

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
