"""What a user does first, small: the teacher that ships draws the same, and `run digits` ends near its teacher."""

import math
from collections.abc import Sequence

import torch

import litconvert
from litconvert.checks.check import Context, Error, Finding, Skipped, judge
from litconvert.checks.numerics import relative_error
from litconvert.checks.processes import PICO, difference, losses_of, pico
from litconvert.common.device import float32_convolutions
from litconvert.conversion.provenance import Provenance

TEACHER_LIMIT = 1e-4
# With convolutions in TensorFloat-32, as cuDNN computes them unless it is told not to: 10 bits after the point.
TF32_LIMIT = 5e-3
# Sums on a GPU are not in the same order twice, and AdamW makes much of small gradients.
OFFLOAD_LIMIT = 1e-4
# Of the output's squared error after a short walk; 0.02 was seen, and 0.6 before it.
SOLVED_LIMIT = 0.1
# Small enough for 20 to 40 seconds on two cores.
DIGITS = (
    "solve={states: 128, held_out: 32, drawing_steps: 4, local_steps: 10}",
    "data.synthesize.num_samples=64",
    "data.synthesize.shard_size=64",
    "data.synthesize.batch_size=64",
    "data.synthesize.steps=4",
    "distill.stages=[{objective: hybrid, steps: 24, batch_size: 16, learning_rate: 1.0e-4}]",
    "sample.num_images=10",
    "sample.steps=4",
    "evaluate.features=null",
)


def check_teacher(context: Context) -> Finding:
    """The digits teacher's output in float32 against its own in float64 on the CPU."""
    model = litconvert.load("asset:dit-digits", recipe="digits")
    torch.manual_seed(0)
    noise = torch.randn(8, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    timestep, labels = torch.linspace(0, 999, 8).long(), torch.arange(8)
    with torch.inference_mode():
        exact = model.double()(noise.double(), timestep, labels, return_dict=False)[0]
        model = model.float().to(context.device)

        def error() -> float:
            given = (one.to(context.device) for one in (noise, timestep, labels))
            return relative_error(model(*given, return_dict=False)[0], exact)

        usual = error()
        with float32_convolutions():
            errors = [Error("its output", error(), TEACHER_LIMIT)]
    if context.device == "cuda" and torch.backends.cudnn.allow_tf32:
        errors.append(Error("its output with TensorFloat-32 in convolutions, the default", usual, TF32_LIMIT))
    return judge(errors, {error.what: error.value for error in errors})


def check_digits_line(context: Context, overrides: Sequence[str] = DIGITS) -> Finding:
    """`litconvert run digits`, a few steps."""
    from litconvert.workflow import run_line

    run = run_line("digits", context.folder / "digits", overrides=overrides).run
    losses, solve = losses_of(run), Provenance.read(run / "model").solve
    if not losses or solve is None:
        return Finding("", {"losses": losses}, "no step was made" if solve else "the student was not solved")
    off = solve["output"]["after"]
    text = f"solved to {off:.1%} off its teacher, loss {losses[0]:.3g} to {losses[-1]:.3g}"
    known = {"losses": losses, "output_error": off}
    if not all(map(math.isfinite, losses)):
        return Finding(text, known, f"a loss is not finite: {text}")
    return Finding(text, known, "" if off < SOLVED_LIMIT else f"the solved start is not near its teacher: {text}")


def check_offload(context: Context) -> Finding:
    """A teacher that stays in main memory, against one on the device: the same losses."""
    if context.device != "cuda":
        raise Skipped("a teacher is offloaded from a GPU of NVIDIA, to main memory")
    student, data = pico(context.folder / "offload")
    losses = {}
    for placement in ("device", "offloaded"):
        run = context.folder / "offload" / placement
        overrides = [*PICO, f"distill.teacher_placement={placement}", "distill.mixed_precision=no"]
        litconvert.distill(student, run, data=data, overrides=overrides)
        losses[placement] = losses_of(run)
    error = Error("losses", difference(*losses.values()), OFFLOAD_LIMIT)
    return judge([error], {"losses": losses})
