"""`env --check` on a machine without a GPU: how checks end, what is said of them, and that they see what is wrong.

Checks run in processes of their own, which import this module: torch is imported where it is needed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from litconvert.checks.check import Check, Context, Error, Finding, Outcome, Skipped, judge, perform
from litconvert.checks.report import all_checks
from litconvert.checks.runner import Worker, run_checks
from litconvert.cli import check as checking
from litconvert.errors import UsageError
from tests.helpers.command import command

if TYPE_CHECKING:
    from torch import Tensor

HERE = "tests.checks.test_runner"


def passes(context: Context, **given: Any) -> Finding:
    return Finding("all well", {"process": os.getpid(), "device": context.device, **given})


def fails(context: Context) -> Finding:
    return Finding("", {"error": float("nan")}, "2 is over its limit of 1")


def cannot(context: Context) -> Finding:
    raise Skipped("there is no such thing here")


def crashes(context: Context) -> Finding:
    raise ZeroDivisionError(f"in {context.folder}\nand more lines")


def refuses(context: Context) -> Finding:
    raise UsageError("it cannot be; choose another")


def dies(context: Context) -> Finding:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(context: Context) -> Finding:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.folder / "child").write_text(str(child.pid))
    time.sleep(600)
    raise AssertionError


def sleeps(context: Context) -> Finding:
    time.sleep(1.5)
    return Finding("slept")


def named(*names: str) -> list[Check]:
    return [Check(name, f"{HERE}:{name}") for name in names]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the command make these checks alone."""

    def choose(*names: str) -> None:
        monkeypatch.setattr("litconvert.checks.report.all_checks", lambda: named(*names))

    return choose


def here(tmp_path: Path, device: str = "cpu") -> Context:
    return Context(device, tmp_path, 300.0)


def test_every_check_ends_as_one_entry_whatever_happens_in_it(tmp_path: Path) -> None:
    checks = [*named("passes", "fails", "cannot", "passes", "crashes"), *named("refuses", "dies", "passes")]
    checks.append(Check("alone", f"{HERE}:passes", {"given": 3}, alone=True))
    begun: list[str] = []
    outcomes = run_checks(checks, "cpu", tmp_path, 60.0, begun.append)
    statuses = ["passed", "failed", "skipped", "passed", "failed", "failed", "failed", "passed", "passed"]
    assert [one.status for one in outcomes] == statuses
    assert begun == [one.name for one in outcomes] == [check.name for check in checks]
    first, failed, skipped, same, crashed, refused, died, later, alone = outcomes
    assert (first.text, failed.text) == ("all well", "2 is over its limit of 1")
    assert skipped.text == "there is no such thing here"
    assert crashed.text == f"ZeroDivisionError: in {tmp_path}"
    assert crashed.traceback is not None
    assert "in crashes" in crashed.traceback
    assert refused.text == "it cannot be; choose another"
    assert died.text == "its process died (signal SIGKILL)"
    assert died.traceback == "the last words"
    # One process for all of them, as long as nothing is wrong with it.
    processes = [one.figures["process"] for one in (first, same, later, alone)]
    assert processes[0] == processes[1] != os.getpid()
    assert len(set(processes)) == 3
    assert alone.figures["given"] == 3


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    first, hanging = named("passes", "hangs")
    with Worker(tmp_path / "log") as worker:
        worker.perform(first, here(tmp_path), 60.0)
        began = time.monotonic()
        hung = worker.perform(hanging, here(tmp_path), 2.0)
        assert time.monotonic() - began < 30
        assert (hung.status, hung.text) == ("failed", "it had not ended after 2 s, and was made to")
        assert worker.perform(first, here(tmp_path), 60.0).status == "passed"
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # whoever inherits it may take a moment to notice
        state = Path(f"/proc/{child}/status")
        if not state.exists() or "State:\tZ" in state.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} is still there")


def test_what_would_begin_after_the_time_is_skipped(tmp_path: Path) -> None:
    begun: list[str] = []
    slept, later = run_checks(named("sleeps", "passes"), "cpu", tmp_path, 1.0, begun.append)
    assert (slept.status, later.status, later.text) == ("passed", "skipped", "no time left (--minutes)")
    assert begun == ["sleeps"]


def test_the_verdict_comes_first_and_a_failed_check_is_a_failed_gate(only: Callable[..., None], tmp_path: Path) -> None:
    only("passes", "fails", "cannot", "crashes")
    result = command("env", "--check", "--out", tmp_path / "check.json")
    assert result.code == 3
    lines = result.out.splitlines()
    assert lines[0].startswith("1 passed, 2 failed, 1 skipped on ")
    assert lines[0].endswith(" s")
    assert max(map(len, lines)) <= 80
    assert result.err.splitlines()[0] == "checking: passes"
    assert result.err.splitlines()[-1] == "litconvert: failed: fails; crashes (--json says more, for a bug report)"
    assert "2 is over its limit of 1" in result.out
    assert "Traceback" not in result.out
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["verdict"] == lines[0]

    only("passes", "cannot")
    assert command("env", "--check").code == 0


def test_the_json_is_alone_on_stdout_and_names_nobody(
    only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("NCCL_DEBUG", "/home/ada/log")
    monkeypatch.setenv("LITCONVERT_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    only("fails", "crashes")
    result = command("env", "--check", "--json", "--minutes", 1)
    assert result.code == 3
    report = json.loads(result.out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert list(report) == ["verdict", "passed", "failed", "skipped", "seconds", "versions", "variables", "checks"]
    assert (report["passed"], report["failed"], report["skipped"]) == (0, 2, 0)
    assert report["versions"]["torch"]
    assert report["variables"]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert report["variables"]["NCCL_DEBUG"] == "/home/USER/log"
    assert "hf_secret" not in result.out
    failed, crashed = report["checks"]
    assert failed == {**failed, "status": "failed", "reason": "2 is over its limit of 1", "figures": {"error": "nan"}}
    assert crashed["reason"] == "ZeroDivisionError: in TEMPORARY"
    assert str(Path.home()) not in crashed["traceback"]
    assert str(Path(__file__).parents[2]) not in crashed["traceback"]


def test_the_module_is_the_same_command(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("fails")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--minutes", "1"])
    with pytest.raises(SystemExit) as end:
        checking.main()
    assert end.value.code == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "--minutes", 0), "--minutes is how long"),
        (("--check", "--out", "/no/such/folder/check.json"), "there is no folder /no/such/folder"),
        (("--check", "--device", "gpu"), "'gpu' is not one of"),
        (("--minutes", 3), "add --check"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[object, ...], message: str, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITCONVERT_DEVICE", "")
    only()
    result = command("env", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    monkeypatch.setenv("LITCONVERT_DEVICE", "")  # what --device names, names it for good
    assert command("env", "--check").code == 0


def test_a_launcher_is_refused(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only()
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("env", "--check")
    assert result.code == 2
    assert "start it alone" in result.err


@pytest.mark.slow
def test_every_listed_check_exists_and_has_a_name_of_its_own() -> None:
    import importlib

    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        module, _, function = check.call.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_error_that_is_no_number_is_over_every_limit() -> None:
    finding = judge([Error("a", 1.0, 2.0), Error("b", float("nan"), 1.0), Error("c", 9.0, 1.0)], {})
    assert finding.wrong == "2 of 3 errors over the limit; worst: b: nan, limit 1.0e+00"
    assert judge([Error("a", 1.0, 2.0)], {}) == Finding("a: 1.0e+00, limit 2.0e+00")


def test_the_device_is_described_and_multiplies_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from litconvert.checks import devices

    monkeypatch.setenv("LITCONVERT_DEVICE", "cpu")
    finding = devices.check_devices(here(tmp_path))
    assert (finding.wrong, finding.figures["device"]) == ("", "cpu")
    assert finding.figures["products"]["float32"]["error"] < 1e-5
    json.dumps(finding.figures)

    monkeypatch.setattr(devices, "bf16_in_hardware", lambda: True)
    monkeypatch.setattr(devices, "_product", lambda device, kind: (kind.itemsize * 1e12, 0.0))
    assert (
        "4 in float32 and 2 in bfloat16 TFLOP/s; bf16 is said to be fast"
        in devices.check_devices(here(tmp_path)).summary
    )
    monkeypatch.setattr(devices, "_product", lambda device, kind: (1e12, float("nan")))
    assert "multiplies matrices wrongly: float32 (nan)" in devices.check_devices(here(tmp_path)).wrong

    # A GPU that the driver sees and PyTorch does not, unless another device was chosen.
    monkeypatch.setattr(devices, "_nvidia", lambda field: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.unusable_gpu() == ""
    monkeypatch.setenv("LITCONVERT_DEVICE", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "there is a GPU (NVIDIA H100) that PyTorch" in devices.unusable_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.unusable_gpu() == ""

    assert devices.idle_mac_gpu() == ""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert "--device mps uses it" in devices.idle_mac_gpu()
    monkeypatch.setenv("LITCONVERT_DEVICE", "mps")
    assert devices.idle_mac_gpu() == ""


def test_the_reference_of_linear_attention_is_the_sum_over_all_pairs() -> None:
    import torch

    from litconvert.checks.numerics import EPS, exact_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 9, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    parts = []
    for channels in ([0, 1, 2], [3, 4, 5]):
        weights = q[..., channels] @ k[..., channels].transpose(1, 2)
        parts.append(weights @ v[..., channels] / (weights.sum(-1, keepdim=True) + 9 * EPS))
    torch.testing.assert_close(exact_attention(q, k, v, 2), torch.cat(parts, -1))


@pytest.mark.parametrize("kind", ["core", "layer"])
def test_numerics_pass_where_they_are_right_and_fail_where_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from litconvert.checks import numerics
    from litconvert.model import modeling_lit

    shapes = (numerics.Shape(1, 16, 2, 32), numerics.Shape(2, 64, 2, 16))
    check = {"core": numerics.check_core, "layer": numerics.check_layer}[kind]
    right = modeling_lit.linear_attention

    def finding() -> Finding:
        return check(here(tmp_path), "float16", shapes)

    assert finding().wrong == ""
    cases = finding().figures["cases"]
    assert [case["order"] for case in cases] == ["quadratic", "linear"]
    assert all(0 < case[name] < 2e-3 for case in cases for name in ("output", "q", "k", "v"))

    def off(q: "Tensor", k: "Tensor", v: "Tensor", num_heads: int, eps: float) -> "Tensor":
        return right(q, k, v, num_heads, eps) * 1.01

    def infinite(q: "Tensor", k: "Tensor", v: "Tensor", num_heads: int, eps: float) -> "Tensor":
        return right(q, k, v, num_heads, eps) * torch.inf

    monkeypatch.setattr(modeling_lit, "linear_attention", off)
    assert finding().wrong.startswith("8 of 8 errors over the limit")
    monkeypatch.setattr(modeling_lit, "linear_attention", infinite)
    assert "nan" in finding().wrong


def test_larger_shapes_are_left_out_where_they_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litconvert.checks import numerics

    monkeypatch.setattr(numerics, "SECONDS", -1.0)
    with pytest.raises(ValueError, match="no errors"):
        numerics.check_core(here(tmp_path), "float16", (numerics.Shape(1, 16, 2, 32),))


def test_a_softmax_block_agrees_with_its_float64_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litconvert.checks import numerics

    monkeypatch.setattr(numerics, "BLOCK_SHAPE", numerics.Shape(1, 64, 2, 16))
    finding = numerics.check_softmax_block(here(tmp_path))
    assert finding.wrong == ""
    assert [case["precision"] for case in finding.figures["cases"]] == ["float32", "bfloat16"]
    assert finding.figures["cases"][0]["weights"] < 1e-5 < finding.figures["cases"][1]["weights"]


def test_compiled_blocks_are_held_to_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litconvert.checks import compiled
    from litconvert.model.modeling_lit import LiTTransformer2DModel

    cases = [compiled.Case(compiled.BOTH, 64, (8, 16), 2), compiled.Case(("linear",), 64, (8, 8), 1, captions=True)]
    monkeypatch.setattr(compiled, "why_not", lambda device: "")
    monkeypatch.setattr(compiled, "compile_blocks", lambda model, recorded: None)
    assert compiled.check_compiled(here(tmp_path), cases).wrong == ""

    def miscompile(model: LiTTransformer2DModel, recorded: bool) -> None:
        weight = model.get_parameter("blocks.0.adaLN_modulation.weight")
        weight.register_hook(lambda gradient: gradient * 1.01)

    monkeypatch.setattr(compiled, "compile_blocks", miscompile)
    wrong = compiled.check_compiled(here(tmp_path), cases[:1]).wrong
    assert wrong.startswith("1 of 2 errors over the limit; worst: gradient of blocks.0.adaLN_modulation.weight")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself where it compiles
def test_compiled_blocks_have_the_gradients_of_plain_ones_on_this_processor(tmp_path: Path) -> None:
    """Which they had not while tokens kept the strides of the patch embedding's image."""
    from litconvert.checks import compiled

    if reason := compiled.why_not("cpu"):
        pytest.skip(reason)
    found = compiled.check_compiled(here(tmp_path), [compiled.Case(compiled.BOTH, 64, (16, 16), 2)])
    assert found.wrong == ""


def test_compiling_is_skipped_with_the_reason_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litconvert.checks import compiled

    check = Check("compiled", "litconvert.checks.compiled:check_compiled")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    reasons = {device: perform(check, here(tmp_path, device)) for device in ("cpu", "cuda", "mps")}
    assert {outcome.status for outcome in reasons.values()} == {"skipped"}
    assert "no C++ compiler" in reasons["cpu"].text
    assert "triton is not installed" in reasons["cuda"].text
    assert "when asked" in reasons["mps"].text
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h" in compiled.why_not("cpu")
    (tmp_path / "Python.h").touch()
    assert compiled.why_not("cpu") == ""


def test_the_teacher_that_ships_is_reproduced(tmp_path: Path) -> None:
    from litconvert.checks.training import check_teacher

    finding = check_teacher(here(tmp_path))
    assert finding.wrong == ""
    assert 0 < finding.figures["its output"] < 1e-5


def write_run(out: Path, losses: list[float]) -> None:
    from litconvert.runs.directory import RunDirectory

    out.mkdir(parents=True)
    for step, loss in enumerate(losses, 1):
        RunDirectory(out).append_metrics({"step": step, "stage": "0:hybrid", "loss": loss})


@pytest.mark.parametrize(
    ("losses", "off", "ok"),
    [
        ([5.0, 6.0, 4.0], 0.02, True),
        ([5.0, 6.0, 4.0], 0.5, False),
        ([5.0, 6.0, 4.0], None, False),
        ([], 0.02, False),
        ([float("nan"), 4.0, 3.0], 0.02, False),
        ([5.0, float("inf"), 3.0], 0.02, False),
    ],
)
def test_the_digits_line_must_end_near_its_teacher(
    losses: list[float], off: float | None, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from litconvert.checks.training import check_digits_line

    def run_line(recipe: str, out: Path, *, overrides: object) -> SimpleNamespace:
        write_run(out, losses)
        (out / "model").mkdir(exist_ok=True)
        solve = {} if off is None else {"solve": {"output": {"after": off}}}
        (out / "model" / "litconvert.json").write_text(json.dumps({"format": 1, **solve}))
        return SimpleNamespace(run=out)

    monkeypatch.setattr("litconvert.workflow.run_line", run_line)
    assert (check_digits_line(here(tmp_path)).wrong == "") is ok


@pytest.mark.slow
def test_what_two_processes_do_is_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litconvert.checks import processes

    def launch(arguments: list[str], device: str, log: Path) -> tuple[int | None, list[str]]:
        monkeypatch.setattr(sys, "argv", ["processes", *arguments])
        processes.main()  # in this one process
        return code, ["the last line"]

    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    code: int | None = 0
    finding = processes.check_processes(here(tmp_path))
    assert finding.wrong == ""
    assert len(finding.figures["together"]) == 4
    assert all(len(losses) == 12 for losses in finding.figures["together"].values())

    code = 1  # a launch that fails after it has trained
    assert processes.check_processes(here(tmp_path)).wrong == "torchrun ended with code 1; not trained: none of them"
    for way in processes.WAYS[1:]:
        shutil.rmtree(tmp_path / "processes" / way.name)
    monkeypatch.setattr(processes, "launch", lambda *arguments: (None, []))
    wrong = processes.check_processes(here(tmp_path)).wrong
    assert wrong.startswith("two processes had not ended after 180 s; not trained: data parallel, bf16, sharded")


@pytest.mark.slow
def test_two_processes_are_launched_and_what_they_print_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litconvert.checks import processes

    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(processes, "LAUNCHED", HERE)
    code, printed = processes.launch(["0"], "cpu", tmp_path / "log")
    assert code == 0, printed
    assert {"0 of 2 on cpu", "1 of 2 on cpu"} <= set(printed)


@pytest.mark.slow
def test_what_needs_another_machine_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)

    def reason(call: str, device: str, **given: str) -> str:
        outcome: Outcome = perform(Check("", f"litconvert.checks.{call}", given), here(tmp_path, device))
        assert outcome.status == "skipped", outcome
        return outcome.text

    assert reason("processes:check_processes", "cuda") == "one GPU"
    assert reason("processes:check_processes", "mps") == "a Mac has one GPU"
    assert "from a GPU of NVIDIA" in reason("training:check_offload", "cpu")
    assert "for CPUs" in reason("steps:check_step", "mps", size="DiT-S/2")
    assert "only when asked" in reason("steps:check_compiled_step", "cpu", size="DiT-S/2")


@pytest.mark.slow
@pytest.mark.parametrize("captions", [False, True])
def test_a_step_is_measured_beside_its_estimate(
    captions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litconvert.checks import steps

    tiny = steps.Size(48, 2, 3, 2, sample_size=8, captions=captions)
    monkeypatch.setitem(steps.SIZES, "tiny", tiny)
    monkeypatch.setattr(steps, "TIME_LIMITS", (0.0, float("inf")))  # of a busy machine
    finding = steps.check_step(here(tmp_path), "tiny")
    figures = finding.figures
    assert figures["micro_batch"] == 1
    assert figures["step_seconds"] > 0
    assert figures["images_per_second"] == pytest.approx(1 / figures["step_seconds"])
    assert figures["peak_bytes"] > 1e8  # the whole process, with its libraries
    assert figures["flops_utilization"] is None
    json.dumps(figures)

    outcome = perform(Check("", "litconvert.checks.steps:check_step", {"size": "tiny"}), Context("cpu", tmp_path, 0.0))
    assert outcome.status == "skipped"
    assert "no time left (--minutes)" in outcome.text
    monkeypatch.setattr(steps, "available_memory", lambda device: 1 << 20)
    outcome = perform(Check("", "litconvert.checks.steps:check_step", {"size": "tiny"}), here(tmp_path))
    assert outcome.status == "skipped"
    assert "of what is free may be taken" in outcome.text


def test_an_estimate_that_is_far_off_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litconvert.checks import steps

    size = steps.Size(48, 2, 3, 2, sample_size=8)
    estimate = steps.fitting(size, "cpu")
    seconds, peak = estimate.step_seconds, estimate.peak
    assert steps.report(size, estimate, seconds, peak, compiled=False).wrong == ""
    assert "memory is outside 0.8 to 1.25" in steps.report(size, estimate, seconds, 2 * peak, compiled=False).wrong
    assert "time is outside 0.4 to 2.5" in steps.report(size, estimate, seconds / 4, peak, compiled=False).wrong
    assert steps.report(size, estimate, seconds / 4, 2 * peak, compiled=True).wrong == ""


if __name__ == "__main__":  # as torchrun launches it
    print(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {os.environ['LITCONVERT_DEVICE']}")
