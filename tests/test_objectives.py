"""The losses against their definitions in float64, and draws that depend on nothing but what they are for."""

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from litconvert.draws import Batch, draw_batch, generator_of, permutation
from litconvert.errors import UsageError
from litconvert.latents import LatentDataset
from litconvert.objectives import DDPM, hybrid_terms, transfer_terms
from litconvert.recipe import Hybrid

# The schedule in its definition: Ho et al., appendix B.
BETAS: list[float] = np.linspace(1e-4, 0.02, 1000).tolist()
ALPHAS_CUMPROD: list[float] = np.cumprod(1 - np.array(BETAS)).tolist()


def tensors(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A model's output (N, 2C, H, W), clean values in [-1, 1], some of them on the bounds, and noise."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand((count, 2, 4, 4), generator=generator) * 2 - 1
    clean[:, 0, 0, 0], clean[:, 0, 0, 1] = 1.0, -1.0
    noise = torch.randn((count, 2, 4, 4), generator=generator)
    predicted = noise + 0.1 * torch.randn((count, 2, 4, 4), generator=generator)
    variance = torch.randn((count, 2, 4, 4), generator=generator)
    return torch.cat([predicted, variance], dim=1), clean, noise


def bound_in_bits(output: Tensor, clean: Tensor, noise: Tensor, t: int, *, exact_cdf: bool) -> float:
    """The variational bound of one sample, from its definition, in float64."""
    output, clean, noise = output.double(), clean.double(), noise.double()
    predicted, raw_variance = output.chunk(2)
    alpha, beta, alpha_bar = 1 - BETAS[t], BETAS[t], ALPHAS_CUMPROD[t]
    previous = ALPHAS_CUMPROD[t - 1] if t else 1.0

    def posterior_variance(s: int) -> float:
        return BETAS[s] * (1 - ALPHAS_CUMPROD[s - 1]) / (1 - ALPHAS_CUMPROD[s])

    noisy = math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise
    guess = (noisy - math.sqrt(1 - alpha_bar) * predicted) / math.sqrt(alpha_bar)

    def posterior_mean(start: Tensor) -> Tensor:
        return (math.sqrt(previous) * beta * start + math.sqrt(alpha) * (1 - previous) * noisy) / (1 - alpha_bar)

    lowest = math.log(posterior_variance(max(t, 1)))
    mix = (raw_variance + 1) / 2
    deviation = torch.exp(0.5 * (mix * math.log(beta) + (1 - mix) * lowest))
    model = Normal(posterior_mean(guess), deviation)
    if t:
        truth = Normal(posterior_mean(clean), torch.full_like(clean, math.exp(0.5 * lowest)))
        return float(kl_divergence(truth, model).mean()) / math.log(2)

    def cdf(x: Tensor) -> Tensor:
        z = (x - model.mean) / model.stddev
        return model.cdf(x) if exact_cdf else 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(clean > 0.999, torch.ones_like(clean), cdf(clean + 1 / 255))
    lower = torch.where(clean < -0.999, torch.zeros_like(clean), cdf(clean - 1 / 255))
    return -float((upper - lower).clamp(min=1e-12).log().mean()) / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 500, 999])
def test_ddpm_terms_are_those_of_the_definition(t: int) -> None:
    output, clean, noise = tensors(3)
    terms = DDPM().terms(output, clean, noise, torch.full((3,), t))
    for sample in range(3):
        error = (output[sample, :2].double() - noise[sample].double()).square().mean()
        assert terms["noise"][sample].item() == pytest.approx(error.item(), rel=1e-5)
        exact = bound_in_bits(output[sample], clean[sample], noise[sample], t, exact_cdf=False)
        assert terms["variational_bound"][sample].item() == pytest.approx(exact, rel=1e-5, abs=1e-7)


def test_each_sample_is_scored_at_its_own_timestep() -> None:
    output, clean, noise = tensors(3)
    timesteps = torch.tensor([999, 0, 40])
    together = DDPM().terms(output, clean, noise, timesteps)
    for sample in range(3):
        only = slice(sample, sample + 1)
        alone = DDPM().terms(output[only], clean[only], noise[only], timesteps[only])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][only], value)


def test_the_approximate_likelihood_is_within_a_hundredth_of_a_bit_of_the_exact_one() -> None:
    output, clean, noise = tensors(3)
    bound = DDPM().terms(output, clean, noise, torch.zeros(3, dtype=torch.int64))["variational_bound"]
    for sample in range(3):
        exact = bound_in_bits(output[sample], clean[sample], noise[sample], 0, exact_cdf=True)
        assert abs(bound[sample].item() - exact) < 1e-2


def test_the_bound_trains_the_variance_and_never_the_noise() -> None:
    output, clean, noise = tensors(3)
    output.requires_grad_()
    bound = DDPM().terms(output, clean, noise, torch.tensor([0, 7, 900]))["variational_bound"]
    gradient = torch.autograd.grad(bound.sum(), output)[0]
    assert torch.equal(gradient[:, :2], torch.zeros_like(gradient[:, :2]))
    assert all(gradient[sample, 2:].abs().max() > 0 for sample in range(3))


def test_the_noise_term_trains_the_noise_and_never_the_variance() -> None:
    output, clean, noise = tensors(3)
    output.requires_grad_()
    term = DDPM().terms(output, clean, noise, torch.tensor([0, 7, 900]))["noise"]
    gradient = torch.autograd.grad(term.sum(), output)[0]
    assert gradient[:, :2].abs().max() > 0
    assert gradient[:, 2:].abs().max() == 0


@pytest.mark.parametrize("num_timesteps", [1000, 250])
def test_noise_is_added_as_diffusers_adds_it(num_timesteps: int) -> None:
    _, clean, noise = tensors(4)
    # The schedule of fewer timesteps is steeper by as much.
    scale = 1000 / num_timesteps
    scheduler = DDPMScheduler(num_timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale, beta_schedule="linear")
    timesteps = torch.tensor([0, 1, num_timesteps // 2, num_timesteps - 1])
    theirs = scheduler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(DDPM(num_timesteps).add_noise(clean, noise, timesteps), theirs, rtol=1e-5, atol=1e-5)


def test_a_schedule_too_short_for_its_betas_is_refused() -> None:
    with pytest.raises(UsageError, match="num_timesteps must be more than 20, got 20"):
        DDPM(20)
    output, clean, noise = tensors(3)
    assert torch.isfinite(DDPM(21).terms(output, clean, noise, torch.tensor([0, 10, 20]))["variational_bound"]).all()


def hybrid(**settings: float | bool) -> Hybrid:
    return Hybrid.model_validate(
        {"objective": "hybrid", "steps": 1, "batch_size": 1, "learning_rate": 1e-3, **settings}
    )


def test_the_hybrid_loss_is_the_papers_sum_with_its_weights() -> None:
    output, clean, noise = tensors(3)
    teacher = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    timesteps = torch.tensor([0, 30, 999])
    stage = hybrid(noise_weight=0.5, variance_weight=0.05)
    terms = hybrid_terms(stage, DDPM(), output, teacher, clean, noise, timesteps)
    ddpm = DDPM().terms(output, clean, noise, timesteps)
    difference = (output - teacher).double().square()
    expected = {
        "noise": ddpm["noise"].double().mean(),
        "variational_bound": ddpm["variational_bound"].double().mean(),
        "teacher_noise": 0.5 * difference[:, :2].mean(),
        "teacher_variance": 0.05 * difference[:, 2:].mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_a_student_that_equals_its_teacher_pays_nothing_for_it() -> None:
    output, clean, noise = tensors(3)
    terms = hybrid_terms(hybrid(), DDPM(), output, output.clone(), clean, noise, torch.tensor([0, 30, 999]))
    assert terms["teacher_noise"] == 0
    assert terms["teacher_variance"] == 0
    assert terms["noise"] > 0


def test_terms_of_no_weight_are_left_out() -> None:
    output, clean, noise = tensors(3)
    stage = hybrid(noise_weight=0, variance_weight=0, variational_bound=False)
    assert list(hybrid_terms(stage, DDPM(), output, output, clean, noise, torch.tensor([0, 30, 999]))) == ["noise"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_attention_transfer_measures_what_is_missing_whatever_the_layers_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = [scale * torch.randn((2, 6, 8), generator=generator) + scale for _ in range(3)]
    nothing = [torch.zeros_like(x) for x in teacher]
    assert transfer_terms(teacher, teacher)["attention"] == 0
    assert transfer_terms(nothing, teacher)["attention"].item() == pytest.approx(1, rel=1e-6)
    # One layer of three missing is a third.
    assert transfer_terms([nothing[0], *teacher[1:]], teacher)["attention"].item() == pytest.approx(1 / 3, rel=1e-6)


def test_every_epoch_visits_everything_once_in_an_order_of_its_own() -> None:
    epochs = [permutation(5, epoch, 40) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(40)) for order in epochs)
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    assert torch.equal(permutation(5, 1, 40), epochs[1])
    assert not torch.equal(permutation(6, 1, 40), epochs[1])


@pytest.mark.parametrize(
    "other", [(1, "noise", 3), (0, "order", 3), (0, "noise", 4), (0, "noise", 3, 0), (0, "noise", 30)]
)
def test_a_draw_is_a_function_of_seed_purpose_and_place(other: tuple[int, str, int]) -> None:
    draw = torch.randn(4, generator=generator_of(0, "noise", 3))
    assert torch.equal(torch.randn(4, generator=generator_of(0, "noise", 3)), draw)
    assert not torch.equal(torch.randn(4, generator=generator_of(*other)), draw)


class Rows:
    """Ten samples whose every value is their index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        return {"latent": index.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float(), "class_label": index % 4}


DATA = LatentDataset((1, 2, 2), (0, 3), "rows", Rows())


def drawn(positions: range, *, seed: int = 1, step: int = 2, condition_dropout: float = 0.5) -> Batch:
    return draw_batch(
        DATA,
        positions,
        seed=seed,
        step=step,
        batch_size=8,
        num_timesteps=1000,
        null_class=4,
        condition_dropout=condition_dropout,
    )


def joined(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(Batch)))


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, field.name), getattr(second, field.name)) for field in fields(Batch))


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_batch_is_the_same_whoever_draws_its_parts(pieces: int) -> None:
    whole = drawn(range(8))
    parts = [drawn(range(start, start + pieces)) for start in range(0, 8, pieces)]
    # Drawn in another order, after other draws: no generator carries a history.
    drawn(range(8), seed=2)
    assert same(joined(parts), whole)
    assert same(joined([drawn(range(start, start + pieces)) for start in reversed(range(0, 8, pieces))][::-1]), whole)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}])
def test_another_seed_or_step_draws_other_noise_and_timesteps(change: dict[str, int]) -> None:
    one, other = drawn(range(8)), drawn(range(8), **change)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.timestep, other.timestep)


def test_samples_of_one_batch_share_no_noise() -> None:
    noise = drawn(range(8)).noise.flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 8


def test_steps_walk_through_the_data_epoch_by_epoch() -> None:
    # Five steps of eight are four epochs of ten; batches straddle epochs.
    visited = torch.cat([drawn(range(8), step=step).clean[:, 0, 0, 0] for step in range(5)])
    for epoch in visited.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.1, 0.1), (1.0, 1.0)])
def test_conditions_are_dropped_as_often_as_asked_and_otherwise_kept(dropout: float, share: float) -> None:
    batch = joined([drawn(range(8), step=step, condition_dropout=dropout) for step in range(100)])
    null = batch.class_labels == 4
    assert null.float().mean().item() == pytest.approx(share, abs=0.03)
    assert torch.equal(batch.class_labels[~null], batch.clean[~null, 0, 0, 0].long() % 4)


def test_dropout_changes_neither_noise_nor_timestep() -> None:
    one, other = drawn(range(8), condition_dropout=0.0), drawn(range(8), condition_dropout=1.0)
    assert torch.equal(one.noise, other.noise)
    assert torch.equal(one.timestep, other.timestep)


def test_timesteps_cover_the_whole_schedule() -> None:
    timesteps = joined([drawn(range(8), step=step) for step in range(250)]).timestep
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=4, min=0, max=1000)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.05
