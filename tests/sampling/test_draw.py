"""Samplers against the original's samples, closed forms and formulas; guidance; pictures; the shipped pipeline."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.pipeline_lit import LiTPipeline, predict
from litconvert.recipe.schema import Guidance, Recipe, Vae
from litconvert.sampling.draw import SamplerSettings, draw, make_scheduler, noise_of, sample
from litconvert.sampling.picture_set import save_npz
from litconvert.sampling.pictures import load_vae, to_images
from litconvert.sampling.request import parse_classes, settings_of
from tests.helpers.checkpoint_files import dit_shapes, dit_state, write_hollow
from tests.helpers.command import command
from tests.helpers.compiled import counted_passes

SCHEDULERS = ("ddim", "ddpm", "dpm-solver++")


@pytest.fixture
def model(pico_checkpoint: Path) -> LiTTransformer2DModel:
    """The pico teacher: 1x8x8, 4 classes and the null class."""
    return litconvert.load(pico_checkpoint, num_attention_heads=2)


@pytest.fixture
def latent_model(tmp_path: Path) -> LiTTransformer2DModel:
    """A pico teacher of four latent channels."""
    path = tmp_path / "latent.pt"
    torch.save(dit_state(channels=4), path)
    return litconvert.load(path, num_attention_heads=2)


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Tensor]:
    """The noise that DDPM adds at its n-th draw, counted from each run's first timestep: known, whatever the seed."""

    def noise(draw: int) -> Tensor:
        return torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(draw))

    drawn = {"times": 0}
    step = DDPMScheduler.step

    def randn_tensor(shape: Any, **options: Any) -> Tensor:
        drawn["times"] += 1
        return noise(drawn["times"])

    def restarting_step(self: DDPMScheduler, output: Tensor, timestep: Tensor, *rest: Any, **options: Any) -> Any:
        if timestep == self.timesteps[0]:
            drawn["times"] = 0
        return step(self, output, timestep, *rest, **options)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", randn_tensor)
    monkeypatch.setattr(DDPMScheduler, "step", restarting_step)
    return noise


def pure_noise(samples: int = 2, channels: int = 1, side: int = 8) -> Tensor:
    return torch.randn((samples, channels, side, side), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_ddim_reproduces_the_original_samplers_digits(shared: Path) -> None:
    oracle = load_file(shared / "dit-digits.oracle.safetensors")
    model = litconvert.load(shared / "dit-digits.pt", num_attention_heads=6)
    drawn = litconvert.sample(
        model, noise=oracle["ddim25_noise"], class_labels=oracle["ddim25_labels"], scheduler="ddim", steps=25
    )
    assert (drawn - oracle["ddim25_sample"]).abs().max() <= 1e-4


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_ddpm_with_learned_variance_is_the_original_ancestral_sampler(
    model: LiTTransformer2DModel, known_noise: Callable[[int], Tensor], steps: int
) -> None:
    labels = torch.tensor([1, 3])
    start = pure_noise()
    drawn = sample(model, noise=start, class_labels=labels, scheduler="ddpm", steps=steps)

    # p_sample over respaced betas, as in Nichol & Dhariwal's code: keep some timesteps, first and last included, and
    # let each step's beta lead from one kept timestep to the next.
    kept = sorted({round(i * 999 / max(steps - 1, 1)) for i in range(steps)})
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept].tolist()
    x = start.double()
    for place in reversed(range(len(kept))):
        alpha_bar, previous = alphas_bar[place], alphas_bar[place - 1] if place else 1.0
        beta = 1 - alpha_bar / previous
        with torch.no_grad():
            output = model(x.float(), torch.tensor(kept[place]), labels).sample.double()
        eps, raw_variance = output.chunk(2, dim=1)
        clean = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        x = (
            math.sqrt(previous) * beta / (1 - alpha_bar) * clean
            + math.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar) * x
        )
        if place:
            mix = (raw_variance + 1) / 2
            log_variance = mix * math.log(beta) + (1 - mix) * math.log(beta * (1 - previous) / (1 - alpha_bar))
            x = x + torch.exp(0.5 * log_variance) * known_noise(len(kept) - place).double()
    torch.testing.assert_close(drawn.double(), x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


class GaussianData:
    """The perfect model of data ~ N(0, 0.5^2), for which the sampling ODE has a closed form."""

    config = FrozenDict(
        in_channels=1, out_channels=2, num_classes=10, null_class=True, caption_channels=None, prediction="noise"
    )
    device = torch.device("cpu")
    dtype = torch.float32
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def variance(self, timestep: int) -> float:
        alpha_bar = float(self.alphas_bar[timestep])
        return alpha_bar * 0.5**2 + 1 - alpha_bar

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        t = int(timestep)
        eps = math.sqrt(1 - self.alphas_bar[t]) / self.variance(t) * x
        return SimpleNamespace(sample=torch.cat([eps, torch.zeros_like(eps)], dim=1))


def error_on_gaussian_data(scheduler: str, steps: int) -> float:
    """Relative error against the closed form x_0 = x_T sigma_0 / sigma_T."""
    data: Any = GaussianData()
    noise = pure_noise(4)
    drawn = sample(data, noise=noise, class_labels=torch.zeros(4).long(), scheduler=scheduler, steps=steps)
    exact = noise * 0.5 / math.sqrt(data.variance(999))
    error: Tensor = (drawn - exact).norm() / exact.norm()
    return error.item()


def test_ddim_and_dpm_solver_converge_to_the_solution_of_the_ode() -> None:
    assert error_on_gaussian_data("ddim", 1000) < 0.01
    assert error_on_gaussian_data("dpm-solver++", 100) < 0.01
    # The second order shows.
    assert error_on_gaussian_data("dpm-solver++", 20) < 0.5 * error_on_gaussian_data("ddim", 20)


@pytest.mark.slow
def test_dpm_solver_ends_where_ddim_with_every_step_ends(model: LiTTransformer2DModel) -> None:
    noise, labels = pure_noise(), torch.tensor([0, 2])
    fine = sample(model, noise=noise, class_labels=labels, scheduler="ddim", steps=1000)
    fast = sample(model, noise=noise, class_labels=labels, scheduler="dpm-solver++", steps=100)
    assert (fast - fine).norm() < 0.02 * fine.norm()


def test_ddpm_draws_samples_of_the_datas_spread() -> None:
    data: Any = GaussianData()
    noise = pure_noise(4, side=64)
    drawn = sample(data, noise=noise, class_labels=torch.zeros(4).long(), scheduler="ddpm", steps=100, seed=3)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    again = sample(data, noise=noise, class_labels=torch.zeros(4).long(), scheduler="ddpm", steps=100, seed=3)
    other = sample(data, noise=noise, class_labels=torch.zeros(4).long(), scheduler="ddpm", steps=100, seed=4)
    assert torch.equal(again, drawn)
    assert not torch.allclose(other, drawn, atol=0.1)


def test_a_shorter_forward_process_is_sampled_over_its_own_timesteps(model: LiTTransformer2DModel) -> None:
    seen: list[int] = []
    handle = model.conditioning.register_forward_pre_hook(lambda module, given: seen.extend(given[0].tolist()))
    sample(model, noise=pure_noise(1), class_labels=torch.tensor([0]), steps=5, num_timesteps=50)
    handle.remove()
    assert seen == [40, 30, 20, 10, 0]


class StraightLine:
    """The velocity of the straight line from noise to one datum: any number of Euler steps ends at the datum."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, data: Tensor, noise: Tensor, data_timestep: int) -> None:
        self.config = FrozenDict(
            in_channels=1,
            out_channels=2,
            num_classes=10,
            null_class=True,
            caption_channels=None,
            prediction="velocity",
            data_timestep=data_timestep,
        )
        self.velocity = data - noise if data_timestep == 1 else noise - data
        self.timesteps: list[float] = []

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.timesteps.append(float(timestep))
        return SimpleNamespace(sample=self.velocity)


@pytest.mark.parametrize("data_timestep", [0, 1])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_straight_flow_ends_at_its_data_after_any_number_of_steps(data_timestep: int, steps: int) -> None:
    noise, data = pure_noise(3), torch.full((3, 1, 8, 8), 0.25)
    model: Any = StraightLine(data, noise, data_timestep)
    drawn = sample(model, noise=noise, class_labels=torch.zeros(3).long(), scheduler="flow-euler", steps=steps)
    torch.testing.assert_close(drawn, data, rtol=0, atol=1e-5)
    # Steps of equal length, from pure noise on.
    levels = [1 - index / steps for index in range(steps)]
    expected = [1 - level if data_timestep == 1 else level for level in levels]
    assert model.timesteps == pytest.approx(expected, abs=1e-5)


@pytest.fixture(params=[0, 1], ids=["data at 0", "data at 1"])
def velocity_model(request: pytest.FixtureRequest, latent_model: LiTTransformer2DModel) -> LiTTransformer2DModel:
    """A SiT of four latent channels, whose data is at either end of time."""
    config = {**latent_model.config, "prediction": "velocity", "data_timestep": request.param}
    model: LiTTransformer2DModel = LiTTransformer2DModel(**config).eval()
    model.load_state_dict(latent_model.state_dict(), strict=True)
    return model


def test_flow_euler_is_eulers_method_with_guidance(velocity_model: LiTTransformer2DModel) -> None:
    noise, labels, steps, scale = pure_noise(2, 4), torch.tensor([1, 3]), 5, 2.0
    drawn = sample(
        velocity_model, noise=noise, class_labels=labels, scheduler="flow-euler", steps=steps, guidance=scale
    )
    x, backwards = noise, velocity_model.config.data_timestep == 1
    with torch.no_grad():
        for index in range(steps):
            time = torch.tensor(index / steps if backwards else 1 - index / steps)
            conditional = velocity_model(x, time, labels).sample
            unconditional = velocity_model(x, time, torch.tensor([4, 4])).sample
            velocity = unconditional + scale * (conditional - unconditional)
            x = x + velocity / steps if backwards else x - velocity / steps
    assert (drawn - x).abs().max() <= 1e-4 * x.abs().max()
    pipe = pipeline(velocity_model, "flow-euler", prediction="velocity")
    shown = pipe([1, 3], steps, guidance_scale=scale, latents=noise, output_type="latent").images
    torch.testing.assert_close(shown, drawn)


def test_a_scheduler_of_the_other_prediction_is_refused_with_the_right_ones_name(
    latent_model: LiTTransformer2DModel, velocity_model: LiTTransformer2DModel
) -> None:
    usual: dict[str, Any] = {"noise": pure_noise(2, 4), "class_labels": torch.tensor([0, 2]), "steps": 2}
    for scheduler in SCHEDULERS:
        with pytest.raises(UsageError, match=r"predicts velocity, which \w+ does not take: use flow-euler"):
            sample(velocity_model, **usual, scheduler=scheduler)
        with pytest.raises(ValueError, match=r"use flow-euler \(FlowMatchEulerDiscreteScheduler\)"):
            pipeline(velocity_model, scheduler)([1], 2)
    with pytest.raises(UsageError, match=r"predicts noise, which FlowMatch\w+ does not take: use ddim, dpm-solver"):
        sample(latent_model, **usual, scheduler="flow-euler")
    with pytest.raises(ValueError, match=r"use ddim, dpm-solver\+\+ or ddpm"):
        pipeline(latent_model, "flow-euler", prediction="velocity")([1], 2)
    assert sample(velocity_model, **usual, scheduler="flow-euler").isfinite().all()
    assert sample(latent_model, **usual, scheduler="ddim").isfinite().all()


def test_sampling_a_sit_says_which_scheduler_it_takes(tmp_path: Path) -> None:
    torch.save(dit_state(channels=4), tmp_path / "sit.pt")
    options = ("sample", tmp_path / "sit.pt", "-q", "--set", "source.family=sit", "--num-attention-heads", 2)
    out = ("-n", 2, "--steps", 2, "--latents", tmp_path / "latents.safetensors")
    refused = command(*options, *out)
    assert refused.code == 2
    assert "use flow-euler" in refused.err
    assert "--scheduler" in refused.err
    accepted = command(*options, *out, "--scheduler", "flow-euler")
    assert (accepted.code, accepted.err) == (0, "")
    assert load_file(tmp_path / "latents.safetensors")["latents"].shape == (2, 4, 8, 8)


class Recorder:
    """A model that remembers its inputs and gives outputs that tell the samples apart."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []
        self.latents: list[Tensor] = []

    def __call__(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.labels.append(class_labels.tolist())
        self.latents.append(latents)
        weights = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)
        output = torch.cat([latents, latents**2], dim=1) * weights * (1 + class_labels.view(-1, 1, 1, 1))
        return SimpleNamespace(sample=output)


@pytest.mark.parametrize(("channels", "guided"), [(None, 4), (3, 3), (1, 1)])
def test_guidance_extrapolates_the_first_noise_channels_and_no_other(channels: int | None, guided: int) -> None:
    latents, labels = pure_noise(2, 4), torch.tensor([1, 3])
    recorder = Recorder()
    null = {"class_labels": torch.tensor([4, 4])}
    output = predict(recorder, latents, torch.tensor(5), {"class_labels": labels}, null, 2.5, channels)
    conditional = Recorder()(latents, torch.tensor(5), labels).sample
    unconditional = Recorder()(latents, torch.tensor(5), torch.tensor([4, 4])).sample
    expected = conditional.clone()
    expected[:, :guided] = unconditional[:, :guided] + 2.5 * (conditional - unconditional)[:, :guided]
    torch.testing.assert_close(output, expected)
    # One call for both, on the same latents.
    assert recorder.labels == [[1, 3, 4, 4]]
    assert torch.equal(recorder.latents[0], torch.cat([latents, latents]))


def test_guidance_is_in_float32_whatever_the_model_rounds_to() -> None:
    latents, labels, null = pure_noise(2, 4), torch.tensor([1, 3]), torch.tensor([4, 4])

    def rounded(latents: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=Recorder()(latents, timestep, class_labels).sample.bfloat16())

    outputs = [rounded(latents, torch.tensor(5), one).sample.double()[:, :4] for one in (labels, null)]
    output = predict(rounded, latents, torch.tensor(5), {"class_labels": labels}, {"class_labels": null}, 4.5, None)
    assert output.dtype == torch.float32
    expected = outputs[1] + 4.5 * (outputs[0] - outputs[1])
    torch.testing.assert_close(output[:, :4].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_samples_that_are_no_numbers_are_refused(model: LiTTransformer2DModel, bf16: bool) -> None:
    sampler = SamplerSettings(Guidance(scheduler="ddim", steps=2), 1000, 0, 2, bf16)
    labels = torch.arange(4)
    assert len(list(draw(model, labels, sampler))) == 2
    with torch.no_grad():
        next(iter(model.conditioning.parameters()))[:] = float("nan")
    with pytest.raises(LitconvertError, match=r"drew NaN or infinite values in .*inspect --weights") as refused:
        list(draw(model, labels, sampler))
    assert ("sampling.mixed_precision=no" in str(refused.value)) == bf16


def test_without_guidance_the_model_is_called_once_a_step_on_the_samples_alone() -> None:
    latents, labels = pure_noise(2, 4), torch.tensor([1, 3])
    recorder = Recorder()
    null = {"class_labels": torch.tensor([4, 4])}
    output = predict(recorder, latents, torch.tensor(5), {"class_labels": labels}, null, 1.0, 3)
    assert recorder.labels == [[1, 3]]
    assert torch.equal(output, Recorder()(latents, torch.tensor(5), labels).sample)


def test_guidance_of_one_is_the_limit_of_guidance(model: LiTTransformer2DModel) -> None:
    noise, labels = pure_noise(), torch.tensor([0, 2])
    plain = sample(model, noise=noise, class_labels=labels, steps=4)
    nearly = sample(model, noise=noise, class_labels=labels, steps=4, guidance=1.0 + 1e-6)
    guided = sample(model, noise=noise, class_labels=labels, steps=4, guidance=4.0)
    torch.testing.assert_close(nearly, plain, rtol=1e-3, atol=1e-3)
    assert (guided - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ({"noise": torch.zeros(2, 3, 8, 8)}, {"noise": torch.zeros(2, 1, 8, 8)}, r"\(N, 1, H, W\), got \(2, 3, 8, 8\)"),
        ({"noise": torch.zeros(1, 8, 8)}, {"noise": torch.zeros(2, 1, 8, 12)}, r"got \(1, 8, 8\)"),
        ({"class_labels": torch.tensor([1])}, {"class_labels": torch.tensor([4, 4])}, r"\(2,\).* got \(1,\)"),
        ({"guidance_channels": 2}, {"guidance_channels": 1}, "guidance_channels must be 1 to 1, got 2"),
        ({"guidance_channels": 0}, {"guidance_channels": None}, "guidance_channels must be 1 to 1, got 0"),
        ({"scheduler": "euler"}, {"scheduler": "dpm-solver++"}, "unknown scheduler 'euler'.*ddpm, ddim"),
        ({"steps": 0}, {"steps": 1}, "steps must be 1 to 1000, got 0"),
        ({"steps": 1001}, {"steps": 4}, "steps must be 1 to 1000, got 1001"),
        ({"steps": 51, "num_timesteps": 50}, {"steps": 50, "num_timesteps": 50}, "steps must be 1 to 50, got 51"),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_the_reason(
    model: LiTTransformer2DModel, wrong: dict[str, Any], right: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"noise": pure_noise(), "class_labels": torch.tensor([0, 2]), "steps": 2}
    with pytest.raises(UsageError, match=message):
        sample(model, **usual | wrong)
    drawn = sample(model, **usual | right)
    assert drawn.shape == (usual | right)["noise"].shape
    assert torch.isfinite(drawn).all()


def test_a_model_without_a_null_class_or_variance_is_sampled_only_without_them() -> None:
    config = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    plain = LiTTransformer2DModel(**config, out_channels=1, num_classes=4, null_class=False)
    usual: dict[str, Any] = {"noise": pure_noise(), "class_labels": torch.tensor([0, 2]), "steps": 2}
    with pytest.raises(UsageError, match="without a null class, so it cannot be guided"):
        sample(plain, **usual, guidance=2.0)
    with pytest.raises(UsageError, match="DDPM sampler needs a learned variance"):
        sample(plain, **usual, scheduler="ddpm")
    for scheduler in ("ddim", "dpm-solver++"):
        assert sample(plain, **usual, guidance=1.0, scheduler=scheduler).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++"])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(model: LiTTransformer2DModel, scheduler: str) -> None:
    settings = Guidance.model_validate({"scheduler": scheduler, "steps": 3, "guidance": 2.0})
    labels = torch.arange(6) % 4

    def drawn(batch_size: int, labels: Tensor = labels, first: int = 0) -> Tensor:
        return torch.cat(list(draw(model, labels, SamplerSettings(settings, 1000, 5, batch_size), first=first)))

    whole = drawn(6)
    for batch_size in (2, 4):
        torch.testing.assert_close(drawn(batch_size), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(2, labels[3:], first=3), whole[3:], rtol=1e-4, atol=1e-4)


def test_starting_noise_is_a_function_of_seed_and_index() -> None:
    assert torch.equal(noise_of(3, 4, (1, 8, 8)), noise_of(3, 4, (1, 8, 8)))
    assert not torch.equal(noise_of(3, 4, (1, 8, 8)), noise_of(3, 5, (1, 8, 8)))
    assert not torch.equal(noise_of(3, 4, (1, 8, 8)), noise_of(4, 4, (1, 8, 8)))


def test_images_are_the_adm_evaluators_bytes() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 2.0]).view(1, 1, 2, 4)
    images = to_images(values, None)
    assert images.dtype == np.uint8
    assert images.shape == (1, 2, 4, 1)
    # clamp(127.5 x + 128, 0, 255), rounded down: DiT's sample_ddp.py.
    assert images.flatten().tolist() == [0, 0, 64, 128, 191, 255, 255, 255]


def test_latents_without_a_decoder_are_refused_and_pixels_are_not() -> None:
    with pytest.raises(UsageError, match=r"latents of 4 channels.*source\.vae\.path"):
        to_images(torch.zeros(1, 4, 2, 2), None)
    assert to_images(torch.zeros(1, 3, 2, 2), None).shape == (1, 2, 2, 3)


def test_the_npz_has_the_adm_evaluators_layout(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    save_npz(gray, torch.arange(5), tmp_path / "new" / "samples.npz")
    with np.load(tmp_path / "new" / "samples.npz") as stored:
        assert stored.files == ["arr_0", "arr_1"]
        assert stored["arr_0"].dtype == np.uint8
        assert stored["arr_0"].shape == (5, 8, 8, 3)
        assert (stored["arr_0"] == gray).all()
        assert stored["arr_1"].tolist() == [0, 1, 2, 3, 4]


def test_classes_are_cycled_and_otherwise_taken_in_turn() -> None:
    assert parse_classes("2,0", 5, 4).tolist() == [2, 0, 2, 0, 2]
    assert parse_classes(None, 6, 4).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [("4", "3", "classes are 0 to 3"), ("-1", "0", "classes are 0 to 3"), ("1;2", "1,2", "write labels as 0,3,7")],
)
def test_wrong_classes_are_refused(wrong: str, right: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_classes(wrong, 2, 4)
    assert len(parse_classes(right, 2, 4)) == 2


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A tiny AutoencoderKL on disk: it doubles the side."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    decoder = AutoencoderKL(
        **blocks, block_out_channels=[4, 4], layers_per_block=1, latent_channels=4, norm_num_groups=2
    )
    decoder.save_pretrained(tmp_path / "decoder" / "vae")
    return tmp_path / "decoder"


def pipeline(model: LiTTransformer2DModel, scheduler: str, decoder: Any = None, *, prediction: str = "noise") -> Any:
    built = LiTPipeline(model, make_scheduler(scheduler, prediction=prediction), decoder)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.mark.usefixtures("known_noise")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_pipeline_draws_what_sample_draws(model: LiTTransformer2DModel, scheduler: str) -> None:
    noise, labels = pure_noise(), [3, 1]
    expected = sample(
        model, noise=noise, class_labels=torch.tensor(labels), scheduler=scheduler, steps=20, guidance=2.0
    )
    drawn = pipeline(model, scheduler)(labels, 20, guidance_scale=2.0, latents=noise, output_type="latent")
    torch.testing.assert_close(drawn.images, expected)


def test_the_pipeline_gives_pictures_of_a_pixel_model(model: LiTTransformer2DModel) -> None:
    noise = pure_noise()
    pipe = pipeline(model, "ddim")
    expected = (sample(model, noise=noise, class_labels=torch.tensor([3, 1]), steps=3) / 2 + 0.5).clamp(0, 1)
    (tensors,) = pipe([3, 1], 3, latents=noise, output_type="pt", return_dict=False)
    torch.testing.assert_close(tensors, expected)
    arrays = pipe([3, 1], 3, latents=noise, output_type="np").images
    assert arrays.shape == (2, 8, 8, 1)
    assert np.allclose(arrays, expected.permute(0, 2, 3, 1))
    pictures = pipe([3, 1], 3, latents=noise).images
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    assert np.abs(np.asarray(pictures[0]) - expected[0, 0].numpy() * 255).max() <= 0.51


def test_the_pipeline_decodes_latents_as_sampling_does(latent_model: LiTTransformer2DModel, vae: Path) -> None:
    decoder = load_vae(Vae(path=str(vae), subfolder="vae"))
    noise = pure_noise(2, 4)
    latents = sample(latent_model, noise=noise, class_labels=torch.tensor([3, 1]), steps=3)
    pipe = pipeline(latent_model, "ddim", decoder)
    (drawn,) = pipe([3, 1], 3, latents=noise, output_type="pt", return_dict=False)
    with torch.no_grad():
        decoded = decoder.decode(latents / 0.18215).sample
    assert decoded.shape == (2, 3, 16, 16)
    torch.testing.assert_close(drawn, (decoded / 2 + 0.5).clamp(0, 1))
    images = to_images(latents, decoder)
    assert (images == (decoded * 127.5 + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()).all()


def test_a_folder_without_a_decoder_is_refused(vae: Path) -> None:
    with pytest.raises(LitconvertError, match=r"decoder: .*no file named config\.json"):
        load_vae(Vae(path=str(vae)))
    assert load_vae(Vae(path=str(vae / "vae"))).config.latent_channels == 4


def test_the_pipeline_starts_from_the_generators_noise(model: LiTTransformer2DModel) -> None:
    pipe = pipeline(model, "ddim")
    drawn = pipe(2, 2, generator=torch.Generator().manual_seed(8), output_type="latent").images
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(drawn, sample(model, noise=noise, class_labels=torch.tensor([2]), steps=2))


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ({"class_labels": [0, 4]}, {"class_labels": [0, 3]}, "class_labels must be 0 to 3, got 4"),
        ({"class_labels": -1}, {"class_labels": 0}, "class_labels must be 0 to 3, got -1"),
        ({"guidance_channels": 2}, {"guidance_channels": 1}, "guidance_channels must be 1 to 1, got 2"),
        ({"num_inference_steps": 0}, {"num_inference_steps": 1}, "num_inference_steps must be 1 to 1000, got 0"),
        ({"output_type": "png"}, {"output_type": "np"}, "output_type must be one of .* got 'png'"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, {"latents": torch.zeros(2, 1, 8, 8)}, r"latents must be \(2, 1, H, W\)"),
    ],
)
def test_the_pipeline_refuses_what_it_cannot_draw(
    model: LiTTransformer2DModel, wrong: dict[str, Any], right: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match=message):
        pipeline(model, "ddim")(**usual | wrong)
    assert len(pipeline(model, "ddim")(**usual | right).images) >= 1


def test_the_pipeline_refuses_to_guide_a_model_without_a_null_class() -> None:
    config = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    plain = LiTTransformer2DModel(**config, out_channels=2, num_classes=4, null_class=False)
    with pytest.raises(ValueError, match="without a null class"):
        pipeline(plain, "ddim")([0], 2, guidance_scale=2.0)
    assert len(pipeline(plain, "ddim")([0], 2, guidance_scale=1.0).images) == 1


def test_ddpm_is_spaced_from_the_first_timestep_to_the_last(model: LiTTransformer2DModel) -> None:
    # The original's 250 steps: https://github.com/openai/improved-diffusion, space_timesteps.
    pipe = pipeline(model, "ddpm")
    pipe([0], 4, output_type="latent")
    assert isinstance(pipe.scheduler, DDPMScheduler)
    assert pipe.scheduler.timesteps.tolist() == [999, 666, 333, 0]


def test_ancestral_samples_do_not_depend_on_the_batch_size(pico_checkpoint: Path) -> None:
    model = litconvert.load(pico_checkpoint, num_attention_heads=2)
    settings = Guidance(scheduler="ddpm", steps=3)
    labels = torch.tensor([0, 1, 2, 3, 0])
    drawn = [torch.cat(list(draw(model, labels, SamplerSettings(settings, 1000, 5, size)))) for size in (2, 5)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_is_not_one_is_refused(tmp_path: Path, pico_student: Path) -> None:
    with pytest.raises(LitconvertError, match=r"AutoencoderKL.*source\.vae\.path"):
        load_vae(Vae(path=str(pico_student)))


def test_a_fused_model_saves_the_same_tensors(tmp_path: Path, pico_student: Path) -> None:
    model = litconvert.load(pico_student)
    names = list(model.state_dict())
    model.fuse_qkv_projections()
    assert list(model.state_dict()) == names


def test_sheets_and_the_scores_of_a_run_are_drawn_by_compiled_models(tmp_path: Path) -> None:
    sets = ["evaluate.num_samples=70", "evaluate.steps=2", "evaluate.guidance=1.0", "evaluate.batch_size=64"]
    sets += ["evaluate.seeds=[1, 2]", "sample.steps=3", "sample.guidance=1.0", "sampling.compile=blocks"]
    told = [part for one in sets for part in ("--set", one)]
    model = tmp_path / "lit"
    assert command("convert", "asset:dit-digits", model, "--no-solve").code == 0
    with counted_passes("litconvert.sampling.request") as found:
        done = command("sample", model, "--teacher", "asset:dit-digits", "-n", 4, "-o", tmp_path / "a.png", *told)
    assert done.code == 0, done.err
    assert found == [[3, 3], [3, 3]]
    with counted_passes("litconvert.evaluation.scores") as found:
        done = command("evaluate", model, *told)
    assert done.code == 0, done.err
    assert found == [[2 * 2 * 2] * 2, [3 * 2 * 2] * 2]  # the teacher draws the reference, too


def test_one_setting_says_in_what_precision_everything_draws(
    model: LiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampler(setting: str, hardware: str) -> SamplerSettings:
        monkeypatch.setenv("LITCONVERT_BF16", hardware)
        recipe = Recipe.model_validate({"sampling": {"mixed_precision": setting}})
        return SamplerSettings.of(recipe, Guidance(steps=2), seed=5, batch_size=2)

    asked = {(setting, hardware): sampler(setting, hardware) for setting in ("auto", "no", "bf16") for hardware in "01"}
    assert [one.bf16 for one in asked.values()] == [False, True, False, False, True, True]
    labels, seen = torch.tensor([0, 1, 2]), list[torch.dtype]()
    block: Any = model.blocks[0]
    block.attn.to_out.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    drawn = {setting: torch.cat(list(draw(model, labels, asked[setting, "1"]))) for setting in ("no", "bf16")}
    assert set(seen[: len(seen) // 2]) == {torch.float32}
    assert set(seen[len(seen) // 2 :]) == {torch.bfloat16}
    assert drawn["bf16"].dtype == torch.float32  # the sampler's own arithmetic
    difference = ((drawn["bf16"] - drawn["no"]) ** 2).mean() / (drawn["no"] ** 2).mean()
    assert 0 < difference < 1e-3


def test_a_checkpoint_without_a_recipe_is_drawn_as_the_packaged_one_says(tmp_path: Path, pico_checkpoint: Path) -> None:
    path = str(write_hollow(tmp_path / "small.safetensors", dit_shapes(width=384, layers=12, sample_size=32)))
    settings, _, packaged = settings_of(path, None, ["sample.steps=7"])
    assert packaged == "dit-s-2-256"
    assert settings.source.vae == Vae(path="stabilityai/sd-vae-ft-ema")
    assert (settings.sample.scheduler, settings.sample.steps) == ("ddpm", 7)
    named, _, packaged = settings_of(path, "dit-xl-2-256-paper", [])
    assert (packaged, named.sample.guidance) == (None, 1.5)
    unknown, _, packaged = settings_of(str(pico_checkpoint), None, [], num_attention_heads=2)
    assert (packaged, unknown.source.vae) == (None, None)
