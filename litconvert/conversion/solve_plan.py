"""What the solved start will do to a model, and what it will cost: from shapes alone."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from litconvert.common.device import default_device, uses_bf16
from litconvert.common.quantities import size, span
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import count_macs, count_parameters
from litconvert.recipe.schema import Recipe, Solve

# The first choice, measured on the digits teacher: docs/results.md.
STATES, HELD_OUT, STATES_PER_IMAGE, LOCAL_STEPS = 1024, 64, 4, 400
# On a GPU so many tokens at most: their two streams take 2 x 4 bytes times the width each.
MOST_TOKENS = 1 << 18
# On a CPU a walk of more multiply-accumulates than these, some ten minutes of two cores, is left to the closed forms.
CPU_MACS = 2e13
# Up to this width a projection's normal equations are factorised, and beyond it solved by conjugate gradients, in about
# so many steps.
EXACT_WIDTH, GRADIENT_STEPS = 512, 15
# With the closed forms alone: tokens for each unknown of the projection, and less of everything else.
TOKENS_PER_UNKNOWN, FEWEST_STATES, FEW_HELD_OUT, MORE_STATES_PER_IMAGE = 16, 32, 16, 8


@dataclass(frozen=True)
class SolvePlan:
    """The solved start of a student, every number chosen.

    Attributes:
        layers: those that are solved: linear in the student, and not in the source.
        inherits_values: V is inherited, so that the convolution can be solved too.
        states, held_out: calibration states, and those that errors are measured on.
        images: clean images that they, and the held-out states, are made of.
        draws: the teacher draws those images.
        guided: with classifier-free guidance, which is two passes a step.
        local_steps: gradient steps on each layer.
        settings: of the recipe.
        source, student: their configs.
    """

    layers: tuple[int, ...]
    inherits_values: bool
    states: int
    held_out: int
    images: int
    draws: bool
    guided: bool
    local_steps: int
    settings: Solve
    source: ModelConfig
    student: ModelConfig

    @property
    def learning_rate(self) -> float:
        """Of the local steps, at the first: what is fresh has further to go."""
        return self.settings.learning_rate or (1e-3 if self.inherits_values else 2e-3)

    @property
    def convolution(self) -> bool:
        """Whether the convolution is solved."""
        return self.inherits_values and self.student.linear_conv_size > 0

    def solves(self, name: str) -> bool:
        """Whether the walk gives this tensor of the student its values."""
        return _solves(name, self.layers, bool(self.local_steps), self.convolution)

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by part.

        `drawing` and `gradients` (conjugate ones) are in float32, `passes` and `local_steps` in the precision of
        passes, `closed_forms` in float64.
        """
        side, width = self.source.sample_size, self.source.hidden_size
        teacher, student = count_macs(self.source, side), count_macs(self.student, side)
        tokens, layers, solved = self.source.tokens, self.source.num_layers, len(self.layers)
        attention = max(0, student - count_macs_of_rest(self.student))
        states, twice = self.states, 2 if self.local_steps else 1
        exact = width <= EXACT_WIDTH
        factorised = width * states + width * (width + 1) / 6 if exact else states * tokens
        equations = (states * tokens + factorised) * (width + 1) ** 2
        unknowns = self.student.linear_conv_size**2 + 2
        convolution = states * tokens * width * unknowns**2 if self.convolution else 0
        shown = self.settings.local_batch_size * self.local_steps
        gradients = 0 if exact else GRADIENT_STEPS * states * min(2 * tokens * width**2, width**3)
        passes = (states + self.held_out) * (teacher + student)
        walked = {
            "passes": passes + states * twice * attention * solved // layers,
            "gradients": solved * twice * gradients,
            "closed_forms": int(solved * (twice * equations + convolution)),
            "local_steps": shown * 3 * attention * solved // layers,
        }
        drawing = (1 + self.guided) * self.images * self.settings.drawing_steps * teacher if self.draws else 0
        return {"drawing": drawing, **{part: macs * self.settings.walks for part, macs in walked.items()}}

    @cached_property
    def memory(self) -> int:
        """Bytes at the peak, the teacher's weights among them, without what the libraries take."""
        width, tokens = self.source.hidden_size, self.source.tokens
        states = self.states + self.held_out
        caption = self.source.caption_tokens * width if self.source.reads_captions else 0
        streams = 4 * states * (2 * tokens * width + caption + 6 * width)
        # The features and, where equations are factorised, the Gram matrices one by one and then side by side.
        grams = 4 * self.states * tokens * width
        if width <= EXACT_WIDTH:
            grams += 2 * 8 * self.states * (width + 1) ** 2
        else:
            grams += 5 * 8 * width**2 + (4 * self.states * (width + 1) ** 2 if 2 * tokens > width else 0)
        unknowns = self.student.linear_conv_size**2 + 2
        batch = 4 * self.settings.batch_size * tokens * width * 24 + 3 * 8 * tokens * width * unknowns
        trained = 4 * 4 * len(self.layers) * width**2 + (1 << 29)
        return 4 * count_parameters(self.source) + streams + grams + batch + trained

    @cached_property
    def seconds(self) -> float:
        """About how long, from products of matrices that are timed now."""
        bf16 = uses_bf16(self.settings.mixed_precision)
        device = default_device()
        single = rate_of(str(device), torch.bfloat16 if bf16 else torch.float32)
        double = rate_of(str(device), torch.float64)
        plain = rate_of(str(device), torch.float32)
        macs = self.macs
        return (
            (macs["drawing"] + macs["gradients"]) / plain
            + (macs["passes"] + macs["local_steps"]) / single
            + macs["closed_forms"] / double
        )

    @property
    def cost(self) -> str:
        """What is done and what it takes, in a sentence."""
        where = f"{self.images} images that the teacher draws" if self.draws else f"images of {self.settings.data}"
        steps = f"closed forms and {self.local_steps} local steps a layer" if self.local_steps else "closed forms alone"
        return (
            f"{len(self.layers)} layers are solved on {self.states} states of {where}: {steps}; about "
            f"{span(self.seconds)} and {size(self.memory)} of memory (--no-solve leaves it out)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what depends on how fast this machine is now."""
        names = ("convolution", "states", "held_out", "images", "draws", "local_steps")
        known = {name: getattr(self, name) for name in names}
        return {
            "solved_layers": list(self.layers),
            **known,
            "walks": self.settings.walks,
            "macs": self.macs,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class SolvedStart:
    """What the walk gave.

    Attributes:
        tensors: the solved ones, by the student's names.
        record: for litconvert.json, plain data: what was done, and the errors before and after.
        inputs: what determines them, beside what determines every conversion.
    """

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    inputs: Mapping[str, Any]


def _solves(name: str, layers: Collection[int], stepped: bool, convolution: bool) -> bool:
    """Whether a tensor of that name is solved: with local steps all of an attention is."""
    parts = name.split(".")
    if parts[0] != "blocks" or parts[2] != "attn" or int(parts[1]) not in layers:
        return False
    return stepped or parts[3] == "to_out" or (parts[3] == "dwc" and convolution)


def solved_names(record: Mapping[str, Any] | None, names: Collection[str]) -> frozenset[str]:
    """Which of a student's tensors were solved, by what litconvert.json says of it."""
    if record is None:
        return frozenset()
    facts = (record["solved_layers"], bool(record["local_steps"]), bool(record["convolution"]))
    return frozenset(name for name in names if _solves(name, *facts))


def count_macs_of_rest(config: ModelConfig) -> int:
    """Multiply-accumulates of everything but self-attention, of one image of the model's own size."""
    core = config.tokens * config.hidden_size * 4 * config.hidden_size * config.num_layers
    return count_macs(config, config.sample_size) - core


@lru_cache
def rate_of(device: str, dtype: torch.dtype) -> float:
    """Multiply-accumulates a second, of a product that is timed now; half of it is what a pass comes to."""
    on = torch.device("cpu" if device == "mps" and dtype == torch.float64 else device)
    one = torch.randn(1024, 1024, device=on).to(dtype)
    one @ one
    best = math.inf
    for _ in range(3):
        if on.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        one @ one
        if on.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 0.5 * 1024**3 / best


def solve_plan(source: ModelConfig, student: ModelConfig, recipe: Recipe) -> tuple[SolvePlan | None, str | None]:
    """What is to be solved; and where nothing is although the recipe asks for it, why.

    Raises UsageError for captions that nothing would be drawn for.
    """
    settings = recipe.solve
    kinds = zip(student.attention, source.attention, strict=True)
    layers = tuple(layer for layer, (mine, theirs) in enumerate(kinds) if mine == "linear" != theirs)
    if settings is None or not layers:
        return None, None
    if settings.embeddings is not None and (settings.data is not None or not source.reads_captions):
        why = "the data has captions of its own" if source.reads_captions else "the model draws classes"
        raise UsageError(f"solve.embeddings (--embeddings) means nothing here, since {why}: leave it out")
    if source.reads_captions and not (settings.data or settings.embeddings or source.null_caption):
        return None, (
            "no captions are at hand to solve its attention for, and the checkpoint stores no null caption: give "
            "--data DATA or --embeddings FILE"
        )
    states, held_out, per_image, local_steps = _chosen(source, student, settings, layers)
    images = -(-states // per_image) + -(-held_out // per_image)
    draws, guided = settings.data is None, recipe.data.synthesize.guidance != 1
    numbers = (states, held_out, images, draws, guided, local_steps)
    return SolvePlan(layers, "v" in recipe.inherit.attention, *numbers, settings, source, student), None


def _chosen(
    source: ModelConfig, student: ModelConfig, settings: Solve, layers: Sequence[int]
) -> tuple[int, int, int, int]:
    """States, held-out states, states an image and local steps: the recipe's, or by device and size."""
    tokens, width = source.tokens, source.hidden_size
    states = max(FEWEST_STATES, min(STATES, MOST_TOKENS // tokens))
    chosen = (states, HELD_OUT, STATES_PER_IMAGE, LOCAL_STEPS)
    first = (states, HELD_OUT, states // STATES_PER_IMAGE, True, False, LOCAL_STEPS)
    macs = SolvePlan(tuple(layers), False, *first, settings, source, student).macs
    if default_device().type != "cuda" and sum(macs.values()) > CPU_MACS:
        needed = -(-TOKENS_PER_UNKNOWN * (width + 1) // tokens)
        chosen = (max(FEWEST_STATES, min(states, needed)), FEW_HELD_OUT, MORE_STATES_PER_IMAGE, 0)
    states, held_out, per_image, local_steps = chosen
    return (
        settings.states or states,
        settings.held_out or held_out,
        settings.states_per_image or per_image,
        local_steps if settings.local_steps is None else settings.local_steps,
    )
