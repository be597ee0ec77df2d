"""The losses against their definitions in float64, and draws that depend on nothing but what they are for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from litconvert.common.seeds import generator_of, permutation
from litconvert.data.batches import Batch, MicroBatches, Schedule
from litconvert.data.conditions import Conditioner
from litconvert.data.dataset import LatentDataset, open_latents, write_latents
from litconvert.distillation.objectives import attention_error, distillation_terms
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.diffusion import DDPM, FlowMatching, linear_betas
from litconvert.recipe.schema import FlowMatchingStage, Hybrid

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
    terms = distillation_terms(stage, DDPM(), output, teacher, clean, noise, timesteps)
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


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_samples_count_by_their_signal_to_noise_ratio(power: float) -> None:
    alphas_cumprod = torch.cumprod(1 - linear_betas(1000), 0)
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    timesteps = torch.tensor([0, 30, 999])
    weights = (ratio**-power / (ratio**-power).mean())[timesteps]
    everywhere = DDPM().snr_weights(torch.arange(1000), power)
    assert everywhere.double().mean().item() == pytest.approx(1, rel=1e-6)
    output, clean, noise = tensors(3)
    teacher = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    stage = hybrid(noise_weight=0.5, variance_weight=0.05, snr_power=power)
    terms = distillation_terms(stage, DDPM(), output, teacher, clean, noise, timesteps)
    ddpm = DDPM().terms(output, clean, noise, timesteps)
    difference = (output - teacher).double().square()
    expected = {
        "noise": ddpm["noise"].double(),
        "variational_bound": ddpm["variational_bound"].double(),
        "teacher_noise": 0.5 * difference[:, :2].mean((1, 2, 3)),
        "teacher_variance": 0.05 * difference[:, 2:].mean((1, 2, 3)),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx((weights * value).mean().item(), rel=1e-5), name


def test_with_a_power_of_1_errors_of_the_clean_image_count_alike() -> None:
    # x_0 is (x_t - sqrt(1 - abar) eps) / sqrt(abar), so its squared error is that of eps over the ratio.
    _, clean, noise = tensors(3)
    timesteps = torch.tensor([20, 400, 950])
    ddpm = DDPM()
    noisy = ddpm.add_noise(clean, noise, timesteps)
    wrong = noise + 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    of_noise = (wrong - noise).double().square().mean((1, 2, 3))
    of_image = (ddpm.clean(noisy, wrong, timesteps) - clean).double().square().mean((1, 2, 3))
    share = ddpm.snr_weights(timesteps, 1.0).double() * of_noise / of_image
    torch.testing.assert_close(share, share[:1].expand(3), rtol=1e-3, atol=0)


def test_a_student_that_equals_its_teacher_pays_nothing_for_it() -> None:
    output, clean, noise = tensors(3)
    terms = distillation_terms(hybrid(), DDPM(), output, output.clone(), clean, noise, torch.tensor([0, 30, 999]))
    assert terms["teacher_noise"] == 0
    assert terms["teacher_variance"] == 0
    assert terms["noise"] > 0


def test_terms_of_no_weight_are_left_out() -> None:
    output, clean, noise = tensors(3)
    stage = hybrid(noise_weight=0, variance_weight=0, variational_bound=False)
    assert list(distillation_terms(stage, DDPM(), output, output, clean, noise, torch.tensor([0, 30, 999]))) == [
        "noise"
    ]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_features_measure_what_is_missing_whatever_the_layers_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = [scale * torch.randn((2, 6, 8), generator=generator) + scale for _ in range(3)]
    nothing = [torch.zeros_like(x) for x in teacher]
    assert attention_error(teacher, teacher) == 0
    assert attention_error(nothing, teacher).item() == pytest.approx(1, rel=1e-6)
    # One layer of three missing is a third.
    assert attention_error([nothing[0], *teacher[1:]], teacher).item() == pytest.approx(1 / 3, rel=1e-6)


def test_every_epoch_visits_everything_once_in_an_order_of_its_own() -> None:
    epochs = [permutation(5, "order", 40, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(40)) for order in epochs)
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    assert torch.equal(permutation(5, "order", 40, 1), epochs[1])
    assert not torch.equal(permutation(6, "order", 40, 1), epochs[1])


@pytest.mark.parametrize(
    "other", [(1, "noise", 3), (0, "order", 3), (0, "noise", 4), (0, "noise", 3, 0), (0, "noise", 30)]
)
def test_a_draw_is_a_function_of_seed_purpose_and_place(other: tuple[int, str, int]) -> None:
    draw = torch.randn(4, generator=generator_of(0, "noise", 3))
    assert torch.equal(torch.randn(4, generator=generator_of(0, "noise", 3)), draw)
    assert not torch.equal(torch.randn(4, generator=generator_of(*other)), draw)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Ten samples whose every value is their index, of class index modulo 4."""
    index = torch.arange(10)
    latents = index.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float().contiguous()
    return open_latents(write_latents(latents, index % 4, tmp_path_factory.mktemp("rows") / "data", "rows"))


@dataclass(frozen=True)
class Drawer:
    """Draws batches of eight of the ten rows."""

    data: LatentDataset

    def __call__(self, positions: range, *, seed: int = 1, step: int = 2, condition_dropout: float = 0.5) -> Batch:
        draws = MicroBatches(self.data, seed, 0, batch_size=8, num_timesteps=1000, condition_dropout=condition_dropout)
        return draws.batch(step, positions)


@pytest.fixture(scope="module")
def drawn(rows: LatentDataset) -> Drawer:
    return Drawer(rows)


def parts(batch: Batch) -> tuple[Tensor, ...]:
    labels = batch.samples.class_labels
    assert labels is not None
    return batch.samples.clean, labels, batch.noise, batch.timestep, batch.dropped


def joined(batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*map(parts, batches), strict=True))


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_batch_is_the_same_whoever_draws_its_parts(drawn: Drawer, pieces: int) -> None:
    whole = parts(drawn(range(8)))
    starts = range(0, 8, pieces)
    # Drawn in another order, after other draws: no generator carries a history.
    drawn(range(8), seed=2)
    assert same(joined([drawn(range(start, start + pieces)) for start in starts]), whole)
    assert same(joined([drawn(range(start, start + pieces)) for start in reversed(starts)][::-1]), whole)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}])
def test_another_seed_or_step_draws_other_noise_and_timesteps(drawn: Drawer, change: dict[str, int]) -> None:
    one, other = drawn(range(8)), drawn(range(8), **change)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.timestep, other.timestep)


def test_samples_of_one_batch_share_no_noise(drawn: Drawer) -> None:
    noise = drawn(range(8)).noise.flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 8


def test_steps_walk_through_the_data_epoch_by_epoch(drawn: Drawer) -> None:
    # Five steps of eight are four epochs of ten; batches straddle epochs.
    visited = torch.cat([drawn(range(8), step=step).samples.clean[:, 0, 0, 0] for step in range(5)])
    for epoch in visited.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert visited[:10].tolist() != visited[10:20].tolist()


def test_buckets_take_turns_by_their_share_and_each_walks_through_its_own_samples() -> None:
    schedule = Schedule([40, 8, 24], batch_size=8, seed=0, stage=0)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(18):  # two cycles of 5 + 1 + 3 batches
        bucket, indices, _ = schedule.at(step, range(8))
        # Whoever draws part of the batch draws of the same bucket.
        assert schedule.at(step, range(4, 8))[:2] == (bucket, indices[4:])
        seen[bucket] += indices
    for bucket, size in enumerate((40, 8, 24)):
        assert sorted(seen[bucket]) == sorted([*range(size)] * 2)
    orders = [[schedule.at(cycle * 9 + place, [0])[0] for place in range(9)] for cycle in range(3)]
    assert len({tuple(order) for order in orders}) > 1


def test_a_finite_noise_set_comes_round_with_its_timestep_and_its_dropped_condition(rows: LatentDataset) -> None:
    draws = MicroBatches(rows, 0, 0, batch_size=10, num_timesteps=1000, condition_dropout=0.5, noise_set=3)
    seen: dict[int, tuple[Tensor, ...]] = {}
    for step in range(9):  # nine epochs: every sample meets each of its three noises three times
        batch = draws.batch(step, range(10))
        assert batch.rows is not None
        for place, row in enumerate(batch.rows.tolist()):
            assert row // 3 == int(batch.samples.clean[place, 0, 0, 0])
            mine = (batch.noise[place], batch.timestep[place], batch.dropped[place])
            assert same(seen.setdefault(row, mine), mine)
    assert sorted(seen) == list(range(30))
    assert len({float(noise.sum()) for noise, _, _ in seen.values()}) == 30


@pytest.mark.parametrize("num_timesteps", [1000, None])
def test_stratified_timesteps_are_one_in_each_part_whoever_draws_them(
    rows: LatentDataset, num_timesteps: int | None
) -> None:
    draws = MicroBatches(rows, 0, 0, batch_size=8, num_timesteps=num_timesteps, stratified=True)
    scale = num_timesteps or 1
    for step in range(20):
        whole = draws.batch(step, range(8))
        assert (whole.timestep * 8 / scale).floor().tolist() == list(range(8))
        assert same(joined([draws.batch(step, [place]) for place in range(8)]), parts(whole))
    # Within its part a timestep is anywhere.
    last = torch.stack([draws.batch(step, [7]).timestep[0] for step in range(200)]).double() / scale
    assert last.mean().item() == pytest.approx(15 / 16, abs=0.01)
    assert last.std().item() == pytest.approx(1 / 8 / 12**0.5, rel=0.15)


def test_readers_ahead_read_what_is_read_between_the_steps(rows: LatentDataset) -> None:
    draws = MicroBatches(rows, 0, 0, batch_size=8, num_timesteps=1000, accumulation=2)
    now, ahead = ([parts(batch) for batch in draws.read_ahead(3, 7, workers)] for workers in (0, 2))
    assert len(now) == 8
    assert all(same(one, other) for one, other in zip(now, ahead, strict=True))
    assert same(now[0], parts(draws.batch(3, range(4))))


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.1, 0.1), (1.0, 1.0)])
def test_conditions_are_dropped_as_often_as_asked(drawn: Drawer, dropout: float, share: float) -> None:
    batches = [drawn(range(8), step=step, condition_dropout=dropout) for step in range(100)]
    *_, dropped = joined(batches)
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.03)
    config = ModelConfig(num_classes=4)
    labels = torch.cat([Conditioner(config)(batch)["class_labels"] for batch in batches])
    clean, own, *_ = joined(batches)
    assert torch.equal(labels, torch.where(dropped, 4, own))
    assert torch.equal(own, clean[:, 0, 0, 0].long() % 4)


def test_dropout_changes_neither_noise_nor_timestep(drawn: Drawer) -> None:
    one, other = drawn(range(8), condition_dropout=0.0), drawn(range(8), condition_dropout=1.0)
    assert torch.equal(one.noise, other.noise)
    assert torch.equal(one.timestep, other.timestep)


def test_timesteps_cover_the_whole_schedule(drawn: Drawer) -> None:
    timesteps = torch.cat([drawn(range(8), step=step).timestep for step in range(250)])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=4, min=0, max=1000)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.05


# Flow matching


@pytest.mark.parametrize("data_timestep", [0, 1])
def test_the_path_of_flow_matching_is_straight_from_noise_to_data(data_timestep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    flow = FlowMatching(data_timestep)

    def at(time: float) -> Tensor:
        return flow.add_noise(clean, noise, torch.full((3,), time, dtype=torch.float64))

    torch.testing.assert_close(at(float(data_timestep)), clean)
    torch.testing.assert_close(at(1.0 - data_timestep), noise)
    # The velocity is its derivative, by a difference quotient.
    torch.testing.assert_close((at(0.6) - at(0.4)) / 0.2, flow.velocity(clean, noise), rtol=1e-9, atol=1e-9)
    exact = flow.terms(flow.velocity(clean, noise), clean, noise, torch.rand(3))
    assert exact["velocity"].max() == 0


def test_the_teachers_velocity_is_weighted_and_its_variance_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, clean, noise = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(4))
    stage = FlowMatchingStage(objective="flow_matching", steps=1, velocity_weight=0.25)
    terms = distillation_terms(stage, FlowMatching(1), student, teacher, clean, noise, torch.rand(3))
    own = ((student.double() - (clean - noise).double()) ** 2).mean()
    theirs = 0.25 * ((student.double() - teacher.double()) ** 2).mean()
    assert terms["velocity"].item() == pytest.approx(own.item(), rel=1e-6)
    assert terms["teacher_velocity"].item() == pytest.approx(theirs.item(), rel=1e-6)
    assert list(terms) == ["velocity", "teacher_velocity"]


def test_losses_do_not_depend_on_how_a_batch_is_split() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    # Samples of very different scale: a quotient of batch means would not be the mean of its parts.
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, 1)
    mine, theirs = student.flatten(2) * scale, teacher.flatten(2) * scale
    whole = attention_error([mine], [theirs])
    halves = [attention_error([mine[half]], [theirs[half]]) for half in (slice(2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_without_a_variance_the_noise_alone_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    output, clean, noise = (torch.randn(4, channels, 3, 3, generator=generator) for channels in (4, 2, 2))
    timestep = torch.tensor([0, 1, 500, 999])
    whole, alone = (DDPM(1000).terms(part, clean, noise, timestep) for part in (output, output[:, :2]))
    assert set(alone) == {"noise"}
    assert torch.equal(whole["noise"], alone["noise"])
