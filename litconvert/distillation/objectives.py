"""The loss of a student: its diffusion terms, and what its teacher adds."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litconvert.model.diffusion import DDPM, FlowMatching, sample_means
from litconvert.recipe.schema import FlowMatchingStage, Hybrid


def distillation_terms(
    stage: Hybrid | FlowMatchingStage,
    diffusion: DDPM | FlowMatching,
    student: Tensor,
    teacher: Tensor | None,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> dict[str, Tensor]:
    """The diffusion loss and the teacher's terms on top, each a scalar that is already weighted; their sum is the loss.

    Every term is a mean over samples, so that a batch split over processes and micro-batches has the same loss.
    Stage `hybrid` (LiT, arXiv 2501.12976, section 3; lambda1 = noise_weight, lambda2 = variance_weight):
    L = MSE(eps) + L_vb + lambda1 MSE(eps_student, eps_teacher) + lambda2 MSE(v_student, v_teacher), with v the raw
    variance output. With snr_power p each sample counts SNR(t)^-p times in all four. Stage `flow_matching`:
    L = MSE(u) + velocity_weight MSE(u_student, u_teacher), with u the velocity.

    Args:
        student, teacher: outputs for the same x_t, timestep and condition, (N, 2C, H, W), or (N, C, H, W) of
            velocities and of models without a learned variance, whose terms of it there are not; no teacher when its
            weights are 0.
    """
    errors = diffusion.terms(student, clean, noise, timestep)
    if isinstance(stage, FlowMatchingStage):
        terms = {name: value.mean() for name, value in errors.items()}
        if teacher is not None and stage.velocity_weight:
            terms["teacher_velocity"] = stage.velocity_weight * F.mse_loss(student.float(), teacher.float())
        return terms
    weights = None
    if stage.snr_power:
        assert isinstance(diffusion, DDPM)
        weights = diffusion.snr_weights(timestep, stage.snr_power)

    def mean(of_samples: Tensor) -> Tensor:
        return (of_samples if weights is None else weights * of_samples).mean()

    terms = {name: mean(value) for name, value in errors.items()}
    if not stage.variational_bound:
        terms.pop("variational_bound", None)
    if teacher is None:
        return terms
    parts = [clean.shape[1], student.shape[1] - clean.shape[1]]
    student_noise, student_variance = student.float().split(parts, dim=1)
    teacher_noise, teacher_variance = teacher.float().split(parts, dim=1)
    if stage.noise_weight:
        terms["teacher_noise"] = stage.noise_weight * mean(sample_means((student_noise - teacher_noise) ** 2))
    if stage.variance_weight and student_variance.shape[1]:
        difference = student_variance - teacher_variance
        terms["teacher_variance"] = stage.variance_weight * mean(sample_means(difference**2))
    return terms


def attention_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How much of each layer's attention output (N, T, D) is not reproduced, averaged over layers; a scalar.

    Squared error over the teacher output's mean square, sample by sample: 0 is perfect, 1 knows nothing, whatever the
    layer's scale and however the batch is split.
    """
    losses = [
        (sample_means((mine.float() - theirs.float()) ** 2) / sample_means(theirs.float() ** 2).clamp(min=1e-12)).mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()
