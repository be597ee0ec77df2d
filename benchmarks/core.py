"""Linear attention in bf16 on one CPU thread, beside the formula as autograd differentiates it, SDPA and Sana's code.

    python -m benchmarks.core                 times, then errors: a few minutes
    python -m benchmarks.core --rounds 100    more rounds, for a machine that others use too

One sample of width 1152, queries and keys after the kernel function, values whose channels have means of about half a
standard deviation over tokens. In one process the sides take turns, in another order each round. `ms` is CPU time, the
time that an idle machine takes on one thread: median and quartiles over rounds. `over_core` is the time of a side over
that of litconvert's core in the same round. `plain` is the core as it was when autograd made its gradient.

Errors are relative (L2), against float64 on the same bf16 inputs, for one head and means of 0 to 3 standard deviations:
of the output, in training and where nothing is differentiated (`sampled`), and of the gradients of q, k and v. Written
to benchmarks/results/core.json.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import provenance
from litconvert.common.device import bf16_in_hardware
from litconvert.model.modeling_lit import LinearAttention, heads_of, linear_attention

RESULTS = Path(__file__).parent / "results"
WIDTH = 1152
SDPA_HEADS = 16
EPS = 1e-6
WARM_UP = 2
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The formula, float32 where it has to be, and autograd's gradient."""
    k_sum = k.sum(dim=1, keepdim=True, dtype=torch.float32)
    outputs = []
    for q_head, k_head, v_head, k_sum_head in zip(
        *(heads_of(x, num_heads) for x in (q.float(), k, v, k_sum)), strict=True
    ):
        denominator = torch.bmm(q_head, k_sum_head.transpose(1, 2)) + v.shape[1] * EPS
        weighted = (q_head * denominator.reciprocal()).to(v.dtype)
        outputs.append(torch.bmm(weighted, torch.bmm(k_head.transpose(1, 2), v_head)))
    return torch.cat(outputs, dim=-1)


def sana(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """What diffusers' SanaLinearAttnProcessor2_0 computes between its projections."""
    query, key, value = (x.transpose(1, 2).unflatten(1, (num_heads, -1)) for x in (q, k, v))
    query, key, value = F.relu(query).float(), F.relu(key.transpose(2, 3)).float(), value.float()
    value = F.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
    out = torch.matmul(torch.matmul(value, key), query)
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention."""
    query, key, value = (x.unflatten(-1, (SDPA_HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def inputs(tokens: int, width: int, mean: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k after ReLU + eps; v, its channels' means drawn with so many standard deviations; an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 1, tokens, width, generator=generator).unbind()
    v = v + mean * torch.randn(1, 1, width, generator=generator)
    return F.relu(q).bfloat16() + EPS, F.relu(k).bfloat16() + EPS, v.bfloat16(), upstream.bfloat16()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each side, and their ratios to the core's."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(WARM_UP + rounds):
        # In any order: what runs before leaves caches and heap behind.
        for name in order.sample(list(runs), len(runs)):
            began = time.process_time()
            runs[name]()
            times[name].append(1000 * (time.process_time() - began))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    return {
        name: {
            "ms": spread(values),
            "over_core": spread([this / core for this, core in zip(values, times["core"], strict=True)]),
        }
        for name, values in times.items()
    }


def time_cores(tokens: int, num_heads: int, rounds: int, *, with_sdpa: bool) -> dict[str, Any]:
    """Every side with so many linear heads, forward alone and with its backward pass."""
    q, k, v, upstream = inputs(tokens, WIDTH, 0.5)
    side = math.isqrt(tokens)
    layer = LinearAttention(WIDTH, num_heads, "relu", 5, EPS).bfloat16()
    cores: dict[str, Core] = {
        "core": lambda q, k, v: linear_attention(q, k, v, num_heads, EPS),
        "plain": lambda q, k, v: plain(q, k, v, num_heads),
        "with convolution": lambda q, k, v: linear_attention(q, k, v, num_heads, EPS) + layer.convolve(v, (side, side)),
        "sana": lambda q, k, v: sana(q, k, v, num_heads),
    }
    if with_sdpa:
        cores[f"sdpa, {SDPA_HEADS} heads"] = sdpa

    def forward(core: Core) -> Callable[[], object]:
        return torch.no_grad()(lambda: core(q, k, v))

    def both(core: Core) -> Callable[[], object]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(core(*leaves), leaves, upstream)

    before = os.getloadavg()[0]
    result: dict[str, Any] = {"tokens": tokens, "heads": num_heads, "rounds": rounds}
    result["forward"] = take_turns({name: forward(core) for name, core in cores.items()}, rounds)
    result["forward and backward"] = take_turns({name: both(core) for name, core in cores.items()}, rounds)
    return {**result, "load": [round(before, 1), round(os.getloadavg()[0], 1)]}


def errors(tokens: int, head_dim: int, mean: float) -> dict[str, Any]:
    """Relative errors of the core and of the plain formula, one head."""
    q, k, v, upstream = inputs(tokens, head_dim, mean)

    def outcome(core: Core, values: list[Tensor], upstream: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        output = core(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT + tokens * EPS)

    def error(value: Tensor, reference: Tensor) -> float:
        return float(f"{((value - reference).norm() / reference.norm()).item():.3g}")

    references = outcome(exact, [x.double() for x in (q, k, v)], upstream.double())
    cores: dict[str, Core] = {
        "core": lambda q, k, v: linear_attention(q, k, v, 1, EPS),
        "plain": lambda q, k, v: plain(q, k, v, 1),
    }
    result: dict[str, Any] = {"tokens": tokens, "head_dim": head_dim, "mean_over_std": mean}
    for name, core in cores.items():
        values = outcome(core, [q, k, v], upstream)
        result[name] = {
            part: error(value, reference)
            for part, value, reference in zip(("output", "q", "k", "v"), values, references, strict=True)
        }
    result["core"]["sampled"] = error(linear_attention(q, k, v, 1, EPS), references[0])
    return result


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="at least 2; half of them for 4096 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "bf16_in_hardware": bf16_in_hardware(),
        "diffusers": diffusers.__version__,
        **provenance(),
        "times": [],
        "errors": [],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, measured: dict[str, Any]) -> None:
        print(json.dumps(measured), flush=True)
        result[kind].append(measured)
        (RESULTS / "core.json").write_text(json.dumps(result, indent=2) + "\n")

    for tokens, rounds in ((1024, arguments.rounds), (4096, arguments.rounds // 2)):
        for num_heads in (4, 16, 2):
            keep("times", time_cores(tokens, num_heads, rounds, with_sdpa=num_heads == 4))
    for tokens in (4096, 16384):
        for head_dim in (72, 288, 576):
            for mean in (0.0, 0.5, 1.0, 3.0):
                keep("errors", errors(tokens, head_dim, mean))


if __name__ == "__main__":
    main()
