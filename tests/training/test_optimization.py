"""What a recipe can ask of a stage: optimisers, rates, frozen tensors, kept outputs, compiled blocks, other sizes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from litconvert.common.listener import StepReport
from litconvert.data.dataset import write_latents
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.runs.directory import RunDirectory
from litconvert.workflow import run_line
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.listener import Hearing

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight random latents of the pico model."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.rand((8, 1, 8, 8), generator=generator) * 2 - 1
    return write_latents(latents, torch.arange(8) % 4, tmp_path / "data", "random")


def hybrid(steps: int = 6, **settings: object) -> str:
    """The override for one hybrid stage."""
    usual: dict[str, object] = {"batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.5}
    listed = ", ".join(f"{key}: {value}" for key, value in {**usual, **settings}.items())
    return f"distill.stages=[{{objective: hybrid, steps: {steps}, {listed}}}]"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / WEIGHTS))


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in RunDirectory(run).read_metrics()]


def crash_at(step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.global_step == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "came"])
def test_every_optimiser_learns_and_resumes_exactly(
    tmp_path: Path, pico_student: Path, data: Path, optimizer: str
) -> None:
    sets = [hybrid(12, optimizer=optimizer, condition_dropout=0), "distill.checkpoint_every=4"]
    whole = litconvert.distill(pico_student, tmp_path / "whole", data=data, overrides=sets)
    assert sum(losses(whole)[-4:]) < sum(losses(whole)[:4])
    run = tmp_path / "crashed"
    with pytest.raises(KeyboardInterrupt):
        litconvert.distill(pico_student, run, data=data, overrides=sets, listener=Hearing(crash_at(7)))
    litconvert.distill(pico_student, run, data=data, overrides=sets)
    assert losses(run) == losses(whole)
    assert all(torch.equal(value, weights(run / "model")[name]) for name, value in weights(whole / "model").items())


@pytest.mark.parametrize(("optimizer", "module"), [("adamw-8bit", "bitsandbytes"), ("came", "came_pytorch")])
def test_a_missing_optimiser_names_its_package(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.replace("_", "-")
    refused = rf"distill\.stages\.0\.optimizer={optimizer} needs {package}, .* pip install {package}"
    overrides = [hybrid(optimizer=optimizer)]
    with pytest.raises(UsageError, match=refused):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=overrides)
    # The whole line says it before anything is converted.
    with pytest.raises(UsageError, match=refused):
        run_line("digits", tmp_path / "line", overrides=overrides)
    assert not any((tmp_path / name).exists() for name in ("run", "line"))


@pytest.mark.slow
def test_inherited_tensors_have_a_learning_rate_of_their_own(tmp_path: Path, pico_student: Path, data: Path) -> None:
    sets = [hybrid(1, inherited_learning_rate=1e-5)]
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    before, after = weights(pico_student), weights(run / "model")
    # Adam's first step is the rate itself, whatever the gradient.
    moved = {name: float((after[name] - value).abs().max()) for name, value in before.items()}
    for name, step in moved.items():
        assert step == pytest.approx(1e-3 if ".attn." in name else 1e-5, rel=0.05), name


@pytest.mark.slow
def test_solved_tensors_have_a_learning_rate_of_their_own(tmp_path: Path, pico_checkpoint: Path, data: Path) -> None:
    sizes = "solve={states: 12, held_out: 4, drawing_steps: 2, local_steps: 0}"
    overrides = ["source.num_attention_heads=2", "student.num_attention_heads=2", "student.conv_size=3", sizes]
    student = litconvert.convert(pico_checkpoint, tmp_path / "solved", None, overrides)
    sets = [hybrid(1, inherited_learning_rate=1e-5, solved_learning_rate=1e-4)]
    run = litconvert.distill(student, tmp_path / "run", data=data, overrides=sets)
    before, after = weights(student), weights(run / "model")
    rates = {".to_out.": 1e-4, ".attn.": 1e-3, "": 1e-5}
    for name, value in before.items():
        rate = next(rate for part, rate in rates.items() if part in name)
        # Adam's first step is the rate itself, whatever the gradient.
        assert float((after[name] - value).abs().max()) == pytest.approx(rate, rel=0.05), name
    with pytest.raises(UsageError, match=r"solve\.states is 12 in .* convert the source again"):
        litconvert.distill(student, tmp_path / "other", data=data, overrides=["solve.states=13"])


def test_frozen_tensors_stay_and_a_pattern_that_freezes_nothing_is_refused(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    sets = [hybrid(2, frozen='["blocks.*.ff.*", "x_embedder.*"]')]
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    before, after = weights(pico_student), weights(run / "model")
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert same == {name for name in before if ".ff." in name or name.startswith("x_embedder.")}
    for pattern, message in (("blocks.*.fff.*", "no tensor is called"), ("*", "freezes everything")):
        with pytest.raises(UsageError, match=message):
            litconvert.distill(pico_student, tmp_path / "no", data=data, overrides=[hybrid(2, frozen=f'["{pattern}"]')])
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_finite_noise_set_asks_the_teacher_once_for_each_noise(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = LiTTransformer2DModel.forward

    def spy(self: LiTTransformer2DModel, hidden: Tensor, timestep: Tensor, *more: object, **named: object) -> object:
        # Sampling passes a scalar, and the error by timestep is measured ten at a time.
        if self.config.attention[0] == "softmax" and timestep.dim() == 1 and len(timestep) == 4:
            asked.append(len(hidden))
        return forward(self, hidden, timestep, *more, **named)

    monkeypatch.setattr(LiTTransformer2DModel, "forward", spy)
    # Eight samples and three noises each are six batches of four; the seventh meets the first noises again.
    sets = [hybrid(14), "distill.noise_set=3", "distill.checkpoint_every=5"]
    whole = litconvert.distill(pico_student, tmp_path / "whole", data=data, overrides=sets)
    assert sum(asked) == 24
    run = tmp_path / "crashed"
    with pytest.raises(KeyboardInterrupt):
        litconvert.distill(pico_student, run, data=data, overrides=sets, listener=Hearing(crash_at(7)))
    asked.clear()
    litconvert.distill(pico_student, run, data=data, overrides=sets)
    assert sum(asked) <= 4  # what the last checkpoint does not vouch for
    assert losses(run) == losses(whole)
    assert all(torch.equal(value, weights(run / "model")[name]) for name, value in weights(whole / "model").items())


@pytest.mark.slow
def test_features_are_a_term_of_their_own_and_bring_the_attention_nearer(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    sets = [hybrid(30, feature_weight=0.5, learning_rate=3e-3, condition_dropout=0)]
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    features = [float(row["features"]) for row in RunDirectory(run).read_metrics()]
    assert sum(features[-5:]) < 0.7 * sum(features[:5])


def test_features_need_a_teacher_of_the_same_layers(tmp_path: Path, pico_student: Path, data: Path) -> None:
    torch.save(dit_state(width=48, layers=3, seed=9), tmp_path / "large.pt")
    teacher, heads = str(tmp_path / "large.pt"), "distill.teacher.num_attention_heads=3"
    with pytest.raises(UsageError, match="compares layer with layer"):
        litconvert.distill(
            pico_student, tmp_path / "run", data=data, teacher=teacher, overrides=[hybrid(feature_weight=0.5), heads]
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself where it compiles
def test_compiled_blocks_teach_what_plain_ones_do(tmp_path: Path, pico_student: Path, data: Path) -> None:
    """With features, since a hook inside a compiled block would not be called."""
    stages = (
        "distill.stages=[{objective: hybrid, steps: 1, batch_size: 4},"
        "{objective: hybrid, steps: 2, batch_size: 4, feature_weight: 0.5}]"
    )
    runs = [
        litconvert.distill(pico_student, tmp_path / how, data=data, overrides=[stages, f"distill.compile={how}"])
        for how in ("no", "blocks")
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


@pytest.mark.slow
def test_a_student_goes_on_at_another_size_with_a_teacher_of_that_size(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    small = litconvert.distill(pico_student, tmp_path / "small", data=data, overrides=[hybrid(2)])
    torch.save(dit_state(sample_size=16, seed=4), tmp_path / "teacher-16.pt")
    sets = ["source.sample_size=16", "distill.teacher={num_attention_heads: 2}", hybrid(2)]
    recipe = tmp_path / "large.yaml"
    recipe.write_text("student: {num_attention_heads: 2, conv_size: 3}\nsample: {scheduler: ddim, steps: 2}\n")
    large = litconvert.convert(small / "model", tmp_path / "large", str(recipe), sets)
    assert all(torch.equal(value, weights(large)[name]) for name, value in weights(small / "model").items())
    latents = torch.rand((8, 1, 16, 16), generator=torch.Generator().manual_seed(1)) * 2 - 1
    wide = write_latents(latents, torch.arange(8) % 4, tmp_path / "wide", "random")
    with pytest.raises(UsageError, match="linear already and has nothing to teach"):
        litconvert.distill(large, tmp_path / "no", data=wide, overrides=["distill.teacher=null", hybrid(2)])
    teacher = str(tmp_path / "teacher-16.pt")
    run = litconvert.distill(large, tmp_path / "run", data=wide, teacher=teacher, overrides=[hybrid(3)])
    assert len(losses(run)) == 3
    assert litconvert.load(run / "model").config.sample_size == 16


@pytest.mark.slow
def test_out_of_memory_names_the_accumulation_that_keeps_the_mathematics(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    expected = litconvert.distill(pico_student, tmp_path / "expected", data=data, overrides=[hybrid()])
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.distillation.teaching.attention_error", full)
        patch.setattr("litconvert.distillation.teaching.distillation_terms", full)
        with pytest.raises(
            LitconvertError, match=r"out of memory in stage 0: --set distill.gradient_accumulation_steps=2"
        ):
            litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[hybrid()])
    # And it is the same run: nothing has to be forced.
    parts = [hybrid(), "distill.gradient_accumulation_steps=2"]
    run = litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=parts)
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.slow
def test_out_of_memory_while_looking_is_told_from_that_of_a_step(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sets = [hybrid(6), "distill.sample_every=4"]
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.training.observer.Observer.observe", full)
        with pytest.raises(LitconvertError, match=r"while step 4 was looked at; lower sample.batch_size or set .*null"):
            litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)
    run = litconvert.distill(
        pico_student, tmp_path / "run", data=data, overrides=[hybrid(6), "distill.sample_every=null"]
    )
    assert len(losses(run)) == 6


def test_kept_outputs_are_of_one_node(
    tmp_path: Path, pico_student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="on one node alone"):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=[hybrid(), "distill.noise_set=3"])


def test_kept_outputs_have_their_own_timesteps(tmp_path: Path, pico_student: Path, data: Path) -> None:
    sets = [hybrid(stratified_timesteps=True), "distill.noise_set=3"]
    with pytest.raises(UsageError, match="set stratified_timesteps to false in all stages"):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets)


@pytest.mark.slow
def test_recomputed_blocks_keep_the_gradient_of_their_features(tmp_path: Path, pico_student: Path, data: Path) -> None:
    sets = [hybrid(4, feature_weight=0.5, learning_rate=3e-3)]
    runs = [
        litconvert.distill(
            pico_student, tmp_path / str(share), data=data, overrides=[*sets, f"distill.gradient_checkpointing={share}"]
        )
        for share in (0.0, 1.0)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
