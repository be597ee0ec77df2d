"""The estimate of a stage: counted as the allocator counts, and what to do when memory runs out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import litconvert
from litconvert.common.memory import is_out_of_memory, measured_peak, reset_peak
from litconvert.data.dataset import write_latents
from litconvert.errors import UsageError
from litconvert.estimates.activations import LiveMemory
from litconvert.estimates.stage import Workload, estimate_stage
from litconvert.estimates.states import optimizer_bytes
from litconvert.estimates.times import BlockTimer
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import count_macs
from litconvert.recipe.batch_split import micro_batch_of, out_of_memory_advice
from litconvert.recipe.schema import Hybrid, Recipe
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command

CPU = torch.device("cpu")
TENSORS = ("student weights", "teacher weights", "optimiser states", "EMA", "gradients", "activations")


def recipe_of(*stages: dict[str, Any], **settings: Any) -> Recipe:
    return Recipe.model_validate({"distill": {"mixed_precision": "no", "stages": stages, **settings}})


def hybrid(**settings: Any) -> dict[str, Any]:
    return {"objective": "hybrid", "steps": 2, "batch_size": 12, **settings}


def pico(*kinds: str, **settings: Any) -> ModelConfig:
    """The config of the pico model of the fixtures, with these kinds of attention."""
    base = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "hidden_size": 32, "num_attention_heads": 2}
    linear = {"linear_num_heads": 2, "linear_conv_size": 3}
    kinds = kinds or ("linear", "linear")
    return ModelConfig.of(
        {**base, **linear, "num_classes": 4, "num_layers": len(kinds), "attention": list(kinds), **settings}
    )


TEACHER = pico("softmax", "softmax")


def test_memory_is_counted_from_making_a_storage_to_freeing_it() -> None:
    with LiveMemory() as memory:
        first = torch.ones(1000)
        view = first.view(10, 100)[2:]  # the same storage
        second = first + 1
        assert memory.live == 8000
        del first, second
        assert memory.live == 4000
        del view
        assert memory.live == 0
        assert memory.peak[0] == 8000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sets"),
    [
        (hybrid(noise_weight=0, variance_weight=0), []),
        (hybrid(feature_weight=0.5), []),
        (hybrid(), ["distill.gradient_checkpointing=0.5", "distill.gradient_accumulation_steps=3"]),
    ],
)
def test_the_estimate_is_what_the_allocator_gave_a_real_run(
    tmp_path: Path, pico_recipe: Path, stage: dict[str, Any], sets: list[str]
) -> None:
    source = tmp_path / "source.pt"
    torch.save(dit_state(width=64, layers=2, sample_size=16), source)
    data = write_latents(torch.rand(12, 1, 16, 16), torch.arange(12) % 4, tmp_path / "data", "random")
    sets = [f"distill.stages=[{json.dumps(stage)}]", "sample.num_images=1", "sample.steps=1", *sets]
    student = litconvert.convert(source, tmp_path / "student", str(pico_recipe), sets)
    options = [part for override in sets for part in ("--set", override)]
    planned = command("plan", source, "--recipe", pico_recipe, "--stage", 0, "--json", *options)
    memory = json.loads(planned.out)[0]["memory"]
    measured = allocated(lambda: litconvert.distill(student, tmp_path / "run", data=data, overrides=sets), tmp_path)
    assert sum(memory[name] for name in TENSORS) == pytest.approx(measured, rel=0.03)


def allocated(run: Callable[[], object], folder: Path) -> int:
    """The most bytes that tensors took at a time, as torch's own allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = [event for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if "args" in event]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    live: dict[int, int] = {}
    total = most = 0
    for change in (event["args"] for event in changes):
        # What is mapped from a file counts as reserved; what an earlier profile saw is freed without being known.
        if change["Bytes"] > 0 and not change["Total Reserved"]:
            live[change["Addr"]] = change["Bytes"]
            total += change["Bytes"]
            most = max(most, total)
        elif change["Bytes"] < 0:
            total -= live.pop(change["Addr"], 0)
    return most


def test_an_attention_matrix_that_the_kernel_does_not_make_is_not_counted() -> None:
    config = pico("softmax", sample_size=128)  # 4096 tokens
    matrix = 4 * 2 * 4096**2  # float32, two heads
    recipe = recipe_of(hybrid(batch_size=1, noise_weight=0, variance_weight=0))
    estimate = estimate_stage(Workload(recipe, config, device=CPU), 0)
    assert 0 < estimate.memory["activations"] < matrix / 4
    assert estimate.memory["teacher weights"] == 0


@pytest.mark.parametrize(("size", "device"), [(12, "cpu"), (20, "cpu:0")])
def test_counting_leaves_the_model_usable(size: int, device: str) -> None:
    """Also on a device that tensors name otherwise than who asks for it: "cpu:0" is "cpu" to them, "cuda" "cuda:0"."""
    config = pico("linear", sample_size=size)
    teacher = pico("softmax", sample_size=size)
    estimate_stage(Workload(recipe_of(hybrid()), config, teacher, device=torch.device(device)), 0)
    model = LiTTransformer2DModel(**config.values)
    sample = model(torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sample
    assert type(sample) is torch.Tensor  # not one without data


@pytest.mark.slow
def test_checkpointing_and_accumulation_take_less_memory_and_two_processes_half_a_batch() -> None:
    def activations(processes: int = 1, **settings: Any) -> int:
        recipe = recipe_of(hybrid(), **settings)
        work = Workload(recipe, pico(), TEACHER, processes=processes, device=CPU)
        return estimate_stage(work, 0).memory["activations"]

    whole = activations()
    assert activations(gradient_checkpointing=1.0) < 0.7 * whole
    assert activations(gradient_accumulation_steps=4) < 0.3 * whole
    assert activations(processes=2) == pytest.approx(whole / 2, rel=0.05)


def test_frozen_tensors_have_no_states_and_no_average() -> None:
    stage = hybrid(batch_size=4, frozen=["blocks.1.*", "blocks.*.ff.*", "blocks.*.adaLN*", "final*", "x_*", "cond*"])
    estimate = estimate_stage(Workload(recipe_of(stage), pico("linear", "softmax"), TEACHER, device=CPU), 0)
    attention = 4 * (32 * 32 + 32) + 16 * (3 * 3 + 1)  # four projections, a convolution of 16 channels
    assert estimate.parameters == attention
    assert estimate.memory["EMA"] == 4 * attention
    assert estimate.memory["optimiser states"] == 8 * attention


def test_the_teacher_in_memory_is_the_one_that_is_named() -> None:
    larger = pico("softmax", "softmax", "softmax")
    memory = estimate_stage(Workload(recipe_of(hybrid()), pico(), larger, device=CPU), 0).memory
    model = LiTTransformer2DModel(**larger.values)
    assert memory["teacher weights"] == sum(4 * value.numel() for value in model.parameters())


def test_optimisers_keep_what_their_papers_say() -> None:
    shapes = [(128, 64), (100,)]

    def size(optimizer: str) -> int:
        return optimizer_bytes(Hybrid.model_validate(hybrid(optimizer=optimizer)), shapes)

    assert size("adamw") == 8 * (8192 + 100)
    # Two bytes and, for each 256 numbers, two scales; small tensors stay float32.
    assert size("adamw-8bit") == 2 * 8192 + 2 * 4 * 32 + 8 * 100
    # One moment, and of the matrix two rows and two columns for the second.
    assert size("came") == 4 * (8192 + 2 * 128 + 2 * 64) + 8 * 100


def test_time_follows_from_timed_blocks() -> None:
    config = pico("linear", "softmax", "linear")
    timer = BlockTimer(config, 4, CPU, bf16=False)
    blocks = sum(timer.macs(kind, 8) for kind in config.attention)
    assert blocks + timer.rest_macs() == count_macs(config, 8)
    estimate = estimate_stage(Workload(recipe_of(hybrid(steps=1000)), config, TEACHER, device=CPU), 0)
    assert estimate.step_seconds > 0
    assert estimate.seconds == pytest.approx(1000 * estimate.step_seconds)


@pytest.mark.slow
def test_plan_prints_every_stage_and_refuses_one_that_is_not_there(pico_checkpoint: Path, pico_recipe: Path) -> None:
    asked = ("plan", pico_checkpoint, "--recipe", pico_recipe)
    shown = command(*asked, "--stage", "all")
    assert shown.code == 0
    for text in ("0: hybrid", "1: hybrid", "activations", "memory at the peak", "time of the stage"):
        assert text in shown.out
    printed = json.loads(command(*asked, "--stage", "1", "--json").out)
    assert [row["objective"] for row in printed] == ["hybrid"]
    assert printed[0]["peak"] == sum(printed[0]["memory"].values())
    for stage, reason in (("2", "stages are 0 to 1"), ("first", "number of a stage")):
        refused = command(*asked, "--stage", stage)
        assert refused.code == 2
        assert reason in refused.err
    split = command(*asked, "--stage", "1", "--processes", "3")
    assert split.code == 2
    assert "not a multiple" in split.err


def test_plan_of_a_model_that_is_trained_from_nothing_has_no_teacher(tmp_path: Path) -> None:
    recipe = tmp_path / "scratch.yaml"
    recipe.write_text(
        "scratch: {sample_size: 8, in_channels: 1, hidden_size: 32, num_layers: 2, num_attention_heads: 2, "
        "num_classes: 4}\ndistill: {stages: [{objective: hybrid, steps: 2, batch_size: 4, noise_weight: 0, "
        "variance_weight: 0}]}\n"
    )
    shown = command("plan", "--recipe", recipe, "--stage", "0", "--json")
    assert json.loads(shown.out)[0]["memory"]["teacher weights"] == 0


def test_errors_that_say_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(allocation.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    wrapped = ValueError("while computing")
    wrapped.__cause__ = allocation.value
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_out_of_memory_is_answered_with_the_next_accumulation_that_divides_every_stage() -> None:
    stages = hybrid(batch_size=12), hybrid(batch_size=8)
    for parts, processes, better in ((1, 1, 2), (2, 1, 4), (1, 2, 2)):
        recipe = recipe_of(*stages, gradient_accumulation_steps=parts)
        advice = out_of_memory_advice(recipe, 0, processes)
        assert f"--set distill.gradient_accumulation_steps={better} keeps the same mathematics" in advice
        followed = recipe_of(*stages, gradient_accumulation_steps=better)
        assert all(micro_batch_of(followed, index, processes) for index in (0, 1))
    assert "exhausted" in out_of_memory_advice(recipe_of(*stages), 0, 4)


def test_when_accumulation_is_exhausted_other_means_are_named() -> None:
    stage = hybrid(batch_size=4)
    assert "--set distill.gradient_checkpointing=1" in out_of_memory_advice(recipe_of(stage), 0, 4)
    full = recipe_of(stage, gradient_checkpointing=1.0)
    assert "--use_fsdp" in out_of_memory_advice(full, 0, 4)


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size=12 is not a multiple of processes times accumulation, 5"):
        micro_batch_of(recipe_of(hybrid()), 0, 5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_measured_peak_is_that_since_it_was_reset() -> None:
    megabytes = 200
    held = torch.ones(megabytes * 250_000)
    high = measured_peak()
    del held
    reset_peak()
    low = measured_peak()
    assert high - low > 0.8e6 * megabytes
    again = torch.ones(megabytes * 250_000)
    assert measured_peak() - low > 0.8e6 * megabytes
    del again
