"""The objectives, for code of yours: forward processes and the loss of a student."""

from litconvert.distillation.objectives import attention_error, distillation_terms
from litconvert.model.diffusion import DDPM, FlowMatching, linear_betas, make_diffusion

__all__ = ["DDPM", "FlowMatching", "attention_error", "distillation_terms", "linear_betas", "make_diffusion"]
