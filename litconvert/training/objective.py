"""What a run of training is made of, and what its stages learn: the two things that the trainer is given."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from litconvert.conversion.provenance import Provenance
from litconvert.data.batches import Batch
from litconvert.data.dataset import LatentDataset
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM, FlowMatching
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import AnyStage, Recipe
from litconvert.runs.directory import RunDirectory
from litconvert.training.engine import Engine


class StepInputs(NamedTuple):
    """A micro-batch of N samples as the models see it, on their device.

    Attributes:
        batch: as it was drawn.
        clean, noise, noisy: x_0, eps and x_t, (N, C, H, W).
        timestep: (N,).
        condition: the models' other arguments.
        diffusion: the forward process.
    """

    batch: Batch
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor
    condition: Mapping[str, Any]
    diffusion: DDPM | FlowMatching


class Objective(Protocol):
    """What the stages of a run learn, as the trainer asks for it.

    Attributes:
        teacher: what the student learns from, which is drawn and compared with too; None: there is none.
    """

    teacher: LiTTransformer2DModel | None

    def terms(
        self, stage: AnyStage, student: nn.Module, inputs: StepInputs, watched: MutableMapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The loss of a micro-batch as weighted terms, scalars whose sum it is.

        Args:
            student: as the stage trains it (`litconvert.training.student.Student`), wrapped for the processes.
            watched: is given tensors by what they are, in the order they arise, for the case that one is not finite.
        """
        ...

    def keep(self) -> None:
        """A checkpoint is about to be saved: make sure that it finds what was computed before it."""
        ...


@dataclass(frozen=True)
class TrainingRun:
    """What a run of training is made of, once all of it fits together.

    Attributes:
        engine: the processes.
        recipe: resolved.
        directory: what it leaves on disk.
        data: clean latents.
        model: trained in place, float32.
        objective: what it learns.
        fresh, solved: names of its tensors that were neither inherited.
        dtypes: of the written tensors, where the recipe names none.
        provenance: of the result.
        name: what the user sees it called.
    """

    engine: Engine
    recipe: Recipe
    directory: RunDirectory
    data: LatentDataset
    model: LiTTransformer2DModel
    objective: Objective
    fresh: frozenset[str] = frozenset()
    solved: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    name: str = "train"

    @cached_property
    def config(self) -> ModelConfig:
        """The model's."""
        return ModelConfig.of(self.model.config)

    @property
    def splits_teacher(self) -> bool:
        """Whether the teacher answers only when every process asks; the main one looks at it alone."""
        return self.recipe.distill.teacher_placement == "sharded" and self.engine.processes > 1

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.recipe.distill.stages)
