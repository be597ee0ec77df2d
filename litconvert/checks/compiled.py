"""Blocks that are compiled as the trainer compiles them, beside the same blocks as they are."""

import copy
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from litconvert.checks.check import Context, Error, Finding, Skipped, judge
from litconvert.common.device import float32_convolutions
from litconvert.estimates.activations import random_inputs
from litconvert.model.compilation import compile_blocks
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel


@dataclass(frozen=True)
class Case:
    """A model and its input: the kinds of its layers, width, latent of (height, width) in patches of 2, samples."""

    layers: tuple[str, ...]
    width: int
    latent: tuple[int, int]
    batch: int
    bf16: bool = False
    captions: bool = False

    @property
    def tokens(self) -> int:
        return self.latent[0] * self.latent[1] // 4

    def __str__(self) -> str:
        of = "captions" if self.captions else "classes"
        return f"{' and '.join(self.layers)}, {of}, {self.tokens} tokens, {'bf16' if self.bf16 else 'float32'}"


BOTH = ("linear", "softmax")
# One sample of many tokens has sums that are split between processors: compilers were wrong there
# (github.com/pytorch/pytorch/issues/193061).
CASES = {
    "cuda": (
        Case(BOTH, 384, (32, 32), 4),
        Case(BOTH, 384, (32, 32), 4, bf16=True),
        Case(("linear",), 1024, (256, 512), 1),
        Case(("linear",), 1024, (256, 512), 1, captions=True),
    ),
    "cpu": (Case(("linear",), 64, (16, 16), 2),),
}
# Relative: of the output, and of the gradient of any weight.
LIMITS = {False: (1e-5, 1e-4), True: (2e-2, 6e-2)}
# Gradients that are smaller than this part of all of them count as this large: that of softmax keys' bias is zero.
SMALL = 1e-3
# A GPU takes so many tokens where it has so much memory.
LONG, LONG_BYTES = 16384, 16e9


def check_compiled(context: Context, cases: Sequence[Case] | None = None) -> Finding:
    """Outputs and gradients of `model.compilation.compile_blocks` against the same model's without it."""
    if reason := why_not(context.device):
        raise Skipped(reason)
    errors, rows, left_out = [], [], []
    for case in CASES[context.device] if cases is None else cases:
        if case.tokens >= LONG and torch.cuda.mem_get_info()[0] < LONG_BYTES:
            left_out.append(f"{case}: needs {LONG_BYTES / 1e9:.0f} GB")
            continue
        forward, gradients = compare(case, context.device)
        worst = max(gradients, key=gradients.__getitem__)
        rows.append({**asdict(case), "output": forward, "worst": worst, "gradients": gradients})
        limits = LIMITS[case.bf16]
        errors += [
            Error(f"output, {case}", forward, limits[0]),
            Error(f"gradient of {worst}, {case}", gradients[worst], limits[1]),
        ]
    return judge(errors, {"cases": rows, "left_out": left_out})


def why_not(device: str) -> str:
    """Why nothing can be compiled for a device here; empty: it can."""
    if device == "cuda":
        return (
            ""
            if has_triton()
            else "triton is not installed or does not know this GPU, so nothing is compiled (distill.compile)"
        )
    if device == "mps":
        return "blocks are compiled on NVIDIA GPUs, and on a CPU when asked"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name):
        return "there is no C++ compiler, which torch.compile needs on a CPU"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h) are not installed, which torch.compile needs on a CPU"
    return ""


def compare(case: Case, device: str) -> tuple[float, dict[str, float]]:
    """Relative errors of the compiled model's output and of the gradient of each weight."""
    torch._dynamo.reset()  # or another size than before would be compiled for any size
    torch.manual_seed(0)
    with float32_convolutions(), torch.device(device):
        model = LiTTransformer2DModel(**_config(case))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        clean, _, timestep, condition = random_inputs(ModelConfig.of(model.config), case.batch)
        noisy = torch.randn(case.batch, clean.shape[1], *case.latent)
        compiled = copy.deepcopy(model)
        compile_blocks(compiled, recorded=False)
        sides = [_pass(one, noisy, timestep, condition, bf16=case.bf16) for one in (model, compiled)]
    (expected, gradients), (output, others) = sides
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    floor = SMALL * total
    errors = {
        name: ((others[name] - gradient).norm() / torch.maximum(gradient.norm(), floor)).item()
        for name, gradient in gradients.items()
    }
    return ((output - expected).norm() / expected.norm()).item(), errors


def _pass(
    model: LiTTransformer2DModel, noisy: Tensor, timestep: Tensor, condition: dict[str, Any], *, bf16: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of each weight for the mean of its square."""
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=bf16):
        output: Tensor = model(noisy, timestep, **condition, return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return output.detach().float(), gradients


def _config(case: Case) -> dict[str, Any]:
    config = {
        "sample_size": case.latent[0],
        "hidden_size": case.width,
        "num_layers": len(case.layers),
        "num_attention_heads": case.width // 64,
        "linear_num_heads": 2,
        "attention": list(case.layers),
    }
    if case.captions:
        return config | {"num_classes": None, "caption_channels": 64, "caption_tokens": 16}
    return config | {"num_classes": 10}
