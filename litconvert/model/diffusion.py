"""What a diffusion model is trained on: DDPM's loss with a learned range variance, or flow matching; and the
distillation loss on top."""

import math

import torch
from torch import Tensor

from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig


def linear_betas(num_timesteps: int) -> Tensor:
    """Ho et al.'s linear schedule, float64: 1e-4 to 0.02 at 1000 timesteps, scaled to keep the same total noise.

    Raises UsageError for 20 timesteps and fewer, whose last beta would not be below 1.
    """
    if num_timesteps <= 20:
        raise UsageError(f"diffusion.num_timesteps must be more than 20, got {num_timesteps}")
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def sample_means(x: Tensor) -> Tensor:
    """Mean over all dimensions but the batch."""
    return x.flatten(1).mean(dim=1)


def _standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the original uses; exact to 2e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class DDPM:
    """Gaussian diffusion with noise prediction and learned range variance (Nichol & Dhariwal, arXiv 2102.09672).

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. The model gives eps and v in [-1, 1] (raw), with
    log variance = f log(beta_t) + (1 - f) log(beta~_t), f = (v + 1) / 2,
    beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t).

    Args:
        num_timesteps: length of the schedule.
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        betas = linear_betas(num_timesteps)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # beta~_0 is 0; the original takes beta~_1 there, so that its logarithm exists.
        clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        self._tables = {
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "sqrt_recip_alphas_cumprod": alphas_cumprod.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
            "posterior_mean_clean": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_noisy": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
            "log_betas": betas.log(),
            "log_posterior_variance": clipped.log(),
        }

    def _at(self, name: str, timestep: Tensor) -> Tensor:
        """A schedule's values at each timestep, (N, 1, 1, 1) float32."""
        # Kept where it is asked for: each copy to a GPU would wait for it. A Mac's GPU has no float64.
        table = self._tables[name] = self._tables[name].float().to(timestep.device)
        return table[timestep].view(-1, 1, 1, 1)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of x_0 (N, C, H, W) and noise of the same shape at timestep (N,)."""
        return (
            self._at("sqrt_alphas_cumprod", timestep) * clean
            + self._at("sqrt_one_minus_alphas_cumprod", timestep) * noise
        )

    def clean(self, noisy: Tensor, predicted: Tensor, timestep: Tensor) -> Tensor:
        """The x_0 (N, C, H, W) that a prediction of eps, of the same shape, means for x_t at timestep (N,)."""
        return (
            self._at("sqrt_recip_alphas_cumprod", timestep) * noisy
            - self._at("sqrt_recipm1_alphas_cumprod", timestep) * predicted
        )

    def snr_weights(self, timestep: Tensor, power: float) -> Tensor:
        """SNR(t)^-power at each timestep, (N,) float32, of mean 1 over them all; SNR(t) = abar_t / (1 - abar_t)."""
        name = f"snr_weights {power}"
        if name not in self._tables:
            weights = self._tables["sqrt_recipm1_alphas_cumprod"].cpu().double() ** (2 * power)
            self._tables[name] = weights / weights.mean()
        return self._at(name, timestep).flatten()

    def terms(self, model_output: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The terms of DiT's loss for each sample, before weighting.

        Args:
            model_output: (N, 2C, H, W), noise then raw variance, or the noise alone (N, C, H, W).
            clean: x_0 (N, C, H, W), in [-1, 1] for the likelihood at t = 0 to be that of 8-bit values.
            noise: eps (N, C, H, W).
            timestep: (N,) int64.

        Returns: `noise` (N,), the mean squared error of eps; `variational_bound` (N,), in bits per dimension, with eps
        detached so that it trains the variance alone: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the
        negative log-likelihood of x_0 under the discretised Gaussian with 255 bins on [-1, 1]. There is none without a
        variance.
        """
        clean, noise, channels = clean.float(), noise.float(), clean.shape[1]
        predicted_noise, variance = model_output.float().split([channels, model_output.shape[1] - channels], dim=1)
        if variance.shape[1] == 0:
            return {"noise": sample_means((predicted_noise - noise) ** 2)}
        noisy = self.add_noise(clean, noise, timestep)
        predicted_clean = self.clean(noisy, predicted_noise.detach(), timestep)
        mean_clean, mean_noisy = self._at("posterior_mean_clean", timestep), self._at("posterior_mean_noisy", timestep)
        true_mean = mean_clean * clean + mean_noisy * noisy
        model_mean = mean_clean * predicted_clean + mean_noisy * noisy
        true_log_variance = self._at("log_posterior_variance", timestep)
        fraction = (variance + 1) / 2
        log_variance = fraction * self._at("log_betas", timestep) + (1 - fraction) * true_log_variance

        kl = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - model_mean) ** 2 * torch.exp(-log_variance)
            - 1.0
        )
        likelihood = self._discretized_log_likelihood(clean, model_mean, 0.5 * log_variance)
        bound = torch.where(timestep == 0, -sample_means(likelihood), sample_means(kl)) / math.log(2.0)
        return {"noise": sample_means((predicted_noise - noise) ** 2), "variational_bound": bound}

    @staticmethod
    def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """log P of the 1/255-wide bin around x under N(mean, exp(log_scale)^2), the outer bins open-ended, in nats."""
        inverse = torch.exp(-log_scale)
        upper = _standard_normal_cdf((x - mean + 1 / 255) * inverse)
        lower = _standard_normal_cdf((x - mean - 1 / 255) * inverse)
        tiny = 1e-12
        return torch.where(
            x < -0.999,
            upper.clamp(min=tiny).log(),
            torch.where(x > 0.999, (1 - lower).clamp(min=tiny).log(), (upper - lower).clamp(min=tiny).log()),
        )


class FlowMatching:
    """Flow matching on the straight path between noise and data (SiT, arXiv 2401.08740; the linear interpolant).

    With s the share of data, x_t = s x_0 + (1 - s) eps, and the model gives the velocity dx_t / dt. s = t, velocity
    x_0 - eps where data is at t = 1 (SiT's code); s = 1 - t, velocity eps - x_0 where it is at t = 0.

    Args:
        data_timestep: the end of [0, 1] where x_t is data.
    """

    def __init__(self, data_timestep: int = 1) -> None:
        self.data_timestep = data_timestep

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of x_0 (N, C, H, W) and noise of the same shape at timestep (N,) in [0, 1]."""
        share = (timestep if self.data_timestep == 1 else 1 - timestep).view(-1, 1, 1, 1)
        return share * clean + (1 - share) * noise

    def clean(self, noisy: Tensor, predicted: Tensor, timestep: Tensor) -> Tensor:
        """The x_0 (N, C, H, W) that a predicted velocity, of the same shape, means for x_t at timestep (N,)."""
        way = 1 - timestep if self.data_timestep == 1 else -timestep
        return noisy + way.view(-1, 1, 1, 1) * predicted

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        """dx_t / dt (N, C, H, W), the same at every timestep."""
        return clean - noise if self.data_timestep == 1 else noise - clean

    def terms(self, model_output: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """`velocity` (N,): the mean squared error of the velocity (N, C, H, W), for each sample, before weighting."""
        return {"velocity": sample_means((model_output.float() - self.velocity(clean, noise).float()) ** 2)}


def make_diffusion(config: ModelConfig, num_timesteps: int) -> DDPM | FlowMatching:
    """The forward process of a model: flow matching where it predicts velocity, DDPM of so many steps elsewhere."""
    velocity = config.predicts_velocity
    return FlowMatching(config.data_timestep) if velocity else DDPM(num_timesteps)
