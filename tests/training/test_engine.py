"""Precision, devices, and what a launcher says: whatever the machine has, and any number of runs in one process."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import litconvert
from litconvert.common import device
from litconvert.common.launch import refuse_launcher_settings
from litconvert.data.synthesize import synthesize
from litconvert.errors import UsageError
from litconvert.runs.directory import RunDirectory
from litconvert.training.engine import Engine, sum_in_float32
from tests.helpers.command import command


@pytest.fixture
def data(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> Path:
    return synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe))


@pytest.fixture
def train(tmp_path: Path, pico_student: Path, data: Path) -> Callable[..., Path]:
    """Distil the pico student into a folder of this name, with these overrides."""

    def run(name: str, *overrides: str) -> Path:
        return litconvert.distill(pico_student, tmp_path / name, data=data, overrides=overrides)

    return run


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "diffusion_pytorch_model.safetensors")


def losses(run: Path) -> list[str]:
    return [row["loss"] for row in RunDirectory(run).read_metrics()]


@pytest.mark.slow
def test_runs_of_any_precision_follow_one_another_in_one_python_process(train: Callable[..., Path]) -> None:
    first = train("first", "distill.mixed_precision=no")
    half = train("half", "distill.mixed_precision=bf16")
    last = train("last", "distill.mixed_precision=no")
    assert losses(first) == losses(last)
    assert all(torch.equal(value, weights(last)[name]) for name, value in weights(first).items())
    # The one in between was really of another precision, and near.
    assert losses(half) != losses(first)
    assert [float(loss) for loss in losses(half)] == pytest.approx([float(loss) for loss in losses(first)], rel=5e-2)


@pytest.mark.slow
def test_a_run_does_not_mind_what_accelerate_was_set_up_for_before_it(train: Callable[..., Path]) -> None:
    first = train("first", "distill.mixed_precision=no")
    try:
        Accelerator(cpu=True, mixed_precision="bf16")  # as somebody's notebook may have done
        second = train("second", "distill.mixed_precision=no")
    finally:
        Accelerator(cpu=True).free_memory()
        # What accelerate keeps for as long as Python runs is not left to other tests.
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=False)
    assert losses(first) == losses(second)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_launchers_accumulation(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train("plain", "distill.gradient_accumulation_steps=2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = train("told", "distill.gradient_accumulation_steps=2")
    assert losses(plain) == losses(told)
    norms = [[row["gradient_norm"] for row in RunDirectory(run).read_metrics()] for run in (plain, told)]
    assert norms[0] == norms[1]
    assert all(torch.equal(value, weights(told)[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize("processor_has_it", [False, True])
@pytest.mark.parametrize(("told", "bf16"), [(None, None), ("0", False), ("1", True)])
def test_an_environment_variable_overrides_what_the_processor_says(
    monkeypatch: pytest.MonkeyPatch, processor_has_it: bool, told: str | None, bf16: bool | None
) -> None:
    monkeypatch.setattr("litconvert.common.device._says_bf16", lambda: processor_has_it)
    monkeypatch.delenv("LITCONVERT_BF16", raising=False)
    if told is not None:
        monkeypatch.setenv("LITCONVERT_BF16", told)
    expected = processor_has_it if bf16 is None else bf16
    assert device.bf16_in_hardware() is expected
    assert Engine("auto").bf16 is expected
    assert Engine("bf16").bf16
    assert not Engine("no").bf16
    facts = command("env")
    assert facts.code == 0
    assert f"{expected}" in next(line for line in facts.out.splitlines() if line.startswith("bf16 in hardware"))
    overridden = any("LITCONVERT_BF16" in line for line in facts.out.splitlines())
    assert overridden is (told is not None)


def test_another_value_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITCONVERT_BF16", "yes")
    with pytest.raises(UsageError, match="LITCONVERT_BF16=yes: set 1"):
        device.bf16_in_hardware()


def test_sums_of_bf16_products_stay_float32_on_cuda_alone() -> None:
    setting = torch.backends.cuda.matmul
    before = setting.allow_bf16_reduced_precision_reduction
    try:
        setting.allow_bf16_reduced_precision_reduction = True
        sum_in_float32(torch.device("cpu"))
        assert setting.allow_bf16_reduced_precision_reduction
        sum_in_float32(torch.device("cuda"))
        assert not setting.allow_bf16_reduced_precision_reduction
    finally:
        setting.allow_bf16_reduced_precision_reduction = before


def test_a_device_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setenv("LITCONVERT_DEVICE", "")
    assert device.default_device().type == "cuda"
    device.choose_device("cpu")
    assert (device.default_device().type, device.has_gpu()) == ("cpu", False)
    device.choose_device(None)
    assert device.default_device().type == "cpu"
    device.choose_device("auto")
    assert device.default_device().type == "cuda"
    with pytest.raises(UsageError, match=r"--device gpu .*there are cuda, mps, cpu and auto"):
        device.choose_device("gpu")
    with pytest.raises(UsageError, match=r"--device mps .*this machine has none"):
        device.choose_device("mps")


def test_a_macs_gpu_is_named_and_used_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setenv("LITCONVERT_DEVICE", "")
    if not torch.cuda.is_available():
        assert device.default_device().type == "cpu"
    assert "used with --device mps alone" in device.describe_devices()
    device.choose_device("mps")
    assert device.default_device().type == "mps"
    assert not device.has_gpu()  # which stands for NVIDIA's


def test_launched_processes_in_no_group_are_refused(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litconvert.common.launch.PartialState", lambda **settings: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"no process group.*accelerate launch"):
        train("run")


# What `accelerate launch --use_fsdp --fsdp_version 2` writes down when nobody asks for more.
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}


def launcher_environment(*arguments: str) -> dict[str, str]:
    """What accelerate's own launcher sets for these arguments."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parsed = launch_command_parser().parse_args(["--main_process_port", "0", *arguments, "script.py"])
    parsed.num_processes, parsed.num_machines, parsed.main_process_ip = 2, 1, None
    parsed.mixed_precision = parsed.mixed_precision or "no"
    parsed.dynamo_backend = parsed.dynamo_backend or "no"
    parsed.num_cpu_threads_per_process = 1
    before = {"PATH": "/bin"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", before)
        found: dict[str, str] = prepare_multi_gpu_env(parsed)
    return {name: value for name, value in found.items() if name not in before}


def apply(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_", "MEGATRON_")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--use_fsdp",),
        ("--use_fsdp", "--fsdp_version", "2"),
        ("--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_backward_prefetch", "BACKWARD_PRE"),
        ("--use_fsdp", "--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
        ("--mixed_precision", "bf16"),
    ],
    ids=" ".join,
)
def test_what_the_launcher_is_told_and_is_carried_out_is_accepted(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    apply(monkeypatch, launcher_environment(*arguments))
    refuse_launcher_settings("bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fsdp_offload_params", "true"), r"--fsdp_offload_params true \(FSDP_OFFLOAD_PARAMS\).*teacher_placement"),
        (("--fsdp_activation_checkpointing", "true"), "--fsdp_activation_checkpointing true.*gradient_checkpointing=1"),
        (("--fsdp_activation_checkpointing_offload", "true"), "--fsdp_activation_checkpointing_offload true"),
        (("--fsdp_reshard_after_forward", "false"), "--fsdp_reshard_after_forward false"),
        (("--fsdp_reshard_after_forward", "SHARD_GRAD_OP"), "--fsdp_reshard_after_forward shard_grad_op"),
        (("--fsdp_sharding_strategy", "HYBRID_SHARD"), "--fsdp_sharding_strategy HYBRID_SHARD"),
        (("--fsdp_min_num_params", "1000"), "--fsdp_min_num_params 1000"),
        (("--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"), "--fsdp_auto_wrap_policy SIZE_BASED_WRAP"),
        (("--fsdp_transformer_layer_cls_to_wrap", "FeedForward"), "--fsdp_transformer_layer_cls_to_wrap FeedForward"),
        (("--fsdp_backward_prefetch", "BACKWARD_POST"), "--fsdp_backward_prefetch BACKWARD_POST"),
        (("--fsdp_state_dict_type", "FULL_STATE_DICT"), "--fsdp_state_dict_type FULL_STATE_DICT"),
        (("--fsdp_forward_prefetch", "true"), "--fsdp_forward_prefetch true"),
        (("--fsdp_use_orig_params", "false"), "--fsdp_use_orig_params false"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16.*is not carried out"),
        (("--dynamo_backend", "inductor"), "--dynamo_backend inductor.*distill.compile=blocks"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_the_launcher_is_told_and_is_not_carried_out_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    apply(monkeypatch, launcher_environment("--use_fsdp", *arguments))
    with pytest.raises(UsageError, match=message):
        refuse_launcher_settings("bf16")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_IGNORED_MODULES", "blocks.0", "--fsdp_ignored_modules blocks.0"),
        ("FSDP_SOMETHING_NEW", "1", "FSDP_SOMETHING_NEW"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "--use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--use_parallelism_config"),
    ],
)
def test_settings_of_other_engines_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    apply(monkeypatch, LAUNCHER)
    refuse_launcher_settings("no")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        refuse_launcher_settings("no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "hardware", "refused"),
    [("no", True, True), ("bf16", False, False), ("auto", True, False), ("auto", False, True)],
)
def test_the_launchers_precision_may_not_contradict_the_recipes(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, recipe: str, hardware: bool, refused: bool
) -> None:
    monkeypatch.setenv("LITCONVERT_BF16", str(int(hardware)))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    if not refused:
        train("run", f"distill.mixed_precision={recipe}")
        return
    with pytest.raises(UsageError, match=r"--mixed_precision bf16 .*contradicts.*distill\.mixed_precision"):
        train("run", f"distill.mixed_precision={recipe}")
