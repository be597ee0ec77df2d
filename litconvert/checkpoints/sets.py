"""Which of a file's tensors are the model: without wrappers in their names, the moving average where there is one.

Training code nests a state dict (`{"model": ..., "ema": ...}`), puts a name in front of its keys (`net.`,
`model.diffusion_model.`) or both, which are the same here: the parts of a nested name are joined by dots. A set of
weights is what stands behind one prefix and has the numbered blocks and the patch embedder of a transformer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from litconvert.errors import LitconvertError, UsageError, did_you_mean

# Parts of a name that data parallelism, compilation and activation checkpointing put in, anywhere.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What a state dict is known by: the blocks that it numbers, and beside them its patch embedder.
BLOCKS = re.compile(r"((?:.*?\.)?)(?:transformer_)?blocks\.\d+\.")
EMBEDDERS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
# Where neither is there: what training code calls its state dicts.
USUAL = ("model", "ema", "state_dict", "state_dict_ema", "base_model")
# Names of a moving average: ema, model_ema, ema_0.9999, EMAModel's shadow_params, AveragedModel saved as `swa`.
AVERAGE = re.compile(r"(?:^|[._])(?:ema|average|averaged|avg|swa|shadow)(?:\d*[._]|\d*$)", re.IGNORECASE)
# Counters of moving averages, which stand among the weights.
COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "step", "initted", "optimization_step"})
# Buffers, which a list of parameters leaves out.
BUFFERS = frozenset({"pos_embed", "y_embedding"})
# Deeper than any training code nests, and more than any file has; optimisers' states and lists of numbers count.
DEPTH = 8
PARTS = 10_000_000


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before its values are read.

    Attributes:
        shape: of its values.
        container: the names of the dictionaries that it lies in, joined; empty where a file has none.
    """

    shape: tuple[int, ...]
    container: str = ""


@dataclass(frozen=True)
class Chosen:
    """A set of weights.

    Attributes:
        names: of the model's tensors, each with what it is called in the file.
        weights: which set this is (`ema`, `model`, or its name in the file where there are several); None where there
            is only one.
        sets: all sets of the file.
        left_out: what else the file holds, by its outermost name.
    """

    names: Mapping[str, str]
    weights: str | None
    sets: tuple[str, ...]
    left_out: tuple[str, ...]


def flattened(content: Mapping[Any, Any]) -> dict[str, tuple[Tensor, str]]:
    """The tensors that a pickle holds, by joined names, each with those of the dictionaries that it lies in.

    Args:
        content: dictionaries and lists within one another, as untrusted as their file: they may hold themselves.

    Raises LitconvertError for a name that is there twice, and for more parts than any checkpoint has.
    """
    tensors: dict[str, tuple[Tensor, str]] = {}
    around: list[int] = []
    visited = 0

    def visit(value: Any, path: str) -> None:
        nonlocal visited
        around.append(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            visited += 1
            if visited > PARTS:
                raise LitconvertError(f"holds more than {PARTS:,} parts")
            name = f"{path}.{key}" if path else str(key)
            if isinstance(item, Tensor):
                if name in tensors:
                    raise LitconvertError(f"holds {name!r} twice")
                tensors[name] = item, path
            elif isinstance(item, Mapping | list | tuple) and len(around) < DEPTH and id(item) not in around:
                visit(item, name)
        around.pop()

    visit(content, "")
    return tensors


def without_wrappers(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def choose(source: str, headers: Mapping[str, Header], weights: str = "auto") -> Chosen:
    """The set of weights that is asked for, of all that the names in a file tell of.

    Args:
        source: for messages.
        headers: by name, in the order of the file.
        weights: `ema`, `model`, a set's name, or `auto`: the moving average if there is one, else the only set.

    Raises UsageError where there are several and none is asked for, or one that is not there; LitconvertError for a
    tensor that is there twice.
    """
    clean = {name: without_wrappers(name) for name in headers}
    prefixes = _prefixes(clean)
    sets = {prefix: _members(source, prefix, prefixes, clean, headers) for prefix in prefixes}
    raw = [names for prefix, names in sets.items() if not AVERAGE.search(prefix)]
    if len(raw) == 1:
        sets |= _lists(raw[0], clean, headers)
        # What no average is taken of stands in the raw weights alone.
        for prefix, names in sets.items():
            if AVERAGE.search(prefix):
                sets[prefix] = {own: name for own, name in raw[0].items() if _is_buffer(own)} | names
    labels = _labels(list(sets))
    chosen = _asked_for(source, labels, weights)
    tells = len(sets) > 1 or labels[chosen] == "ema"
    used = {name for names in sets.values() for name in names.values()}
    return Chosen(
        sets[chosen],
        labels[chosen] if tells else None,
        tuple(sorted(labels.values())) if tells else (),
        tuple(_left_out(chosen, [name for name in headers if name not in used], clean)),
    )


def _prefixes(clean: Mapping[str, str]) -> list[str]:
    """What stands before the names of each set; nothing, where no transformer is recognised."""
    names = set(clean.values())
    blocks = list(dict.fromkeys(match.group(1) for name in clean.values() if (match := BLOCKS.match(name))))
    whole = [prefix for prefix in blocks if any(prefix + one in names for one in EMBEDDERS)]
    if whole or blocks:
        return whole or blocks
    firsts = {name.partition(".")[0] for name in names if "." in name}
    usual = [f"{one}." for one in USUAL if one in firsts]
    within = {name.removeprefix(usual[0]) for name in names} if usual else set()
    if len(usual) == 1 and all(name.startswith(usual[0]) for name in names):
        return [usual[0] + one for one in _prefixes({name: name for name in within})]
    return usual or [""]


def _members(
    source: str, prefix: str, prefixes: Sequence[str], clean: Mapping[str, str], headers: Mapping[str, Header]
) -> dict[str, str]:
    """The tensors of a set by their own names, each with its name in the file."""
    longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    mine = [name for name, own in clean.items() if own.startswith(prefix) and not (longer and own.startswith(longer))]
    # Where a state dict lies in a dictionary of its own, what lies beside that is not the model's.
    places = {headers[name].container for name in mine if BLOCKS.match(clean[name])}
    members: dict[str, str] = {}
    for name in mine:
        own = clean[name].removeprefix(prefix)
        if (len(places) == 1 and headers[name].container not in places) or _is_counter(own, headers[name]):
            continue
        if own in members:
            raise LitconvertError(f"{source}: holds {own} twice, as {members[own]} and {name}; save one set of weights")
        members[own] = name
    return members


def _lists(
    raw: Mapping[str, str], clean: Mapping[str, str], headers: Mapping[str, Header]
) -> dict[str, dict[str, str]]:
    """Moving averages that are kept as lists, in the order of the model's parameters."""
    parts: dict[str, list[str]] = {}
    for name in headers:
        parts.setdefault(headers[name].container, []).append(name)
    found = {}
    for container, names in parts.items():
        numbers = [name.removeprefix(f"{container}.") for name in names]
        if numbers == [str(index) for index in range(len(names))] and AVERAGE.search(container):
            for own in (list(raw), [one for one in raw if not _is_buffer(one)]):
                shapes = [headers[raw[one]].shape for one in own]
                if shapes == [headers[name].shape for name in names]:
                    found[f"{clean[names[0]].removesuffix('0')}"] = dict(zip(own, names, strict=True))
    return found


def _is_counter(own: str, header: Header) -> bool:
    return own.rpartition(".")[2] in COUNTERS and header.shape in ((), (1,))


def _is_buffer(own: str) -> bool:
    return own.rpartition(".")[2] in BUFFERS


def _labels(prefixes: Sequence[str]) -> dict[str, str]:
    """What each set is called: `ema` and `model` where there is one of each."""
    averages = [prefix for prefix in prefixes if AVERAGE.search(prefix)]
    labels = {}
    for prefix in prefixes:
        label, like = ("ema", averages) if prefix in averages else ("model", [*set(prefixes) - set(averages)])
        labels[prefix] = label if len(like) == 1 or not prefix else prefix.removesuffix(".")
    return labels


def _asked_for(source: str, labels: Mapping[str, str], weights: str) -> str:
    """The prefix of the set that is asked for."""
    names = ", ".join(sorted(labels.values()))
    if weights != "auto":
        for prefix, label in labels.items():
            if label == weights:
                return prefix
        if len(labels) == 1:
            raise UsageError(
                f"{source}: holds one set of weights ({names}), so weights={weights!r} cannot be chosen; leave it out"
            )
        raise UsageError(
            f"{source}: has no {weights!r} weights{did_you_mean(weights, list(labels.values()))}, only {names}; choose "
            "with inherit.weights"
        )
    averages = [prefix for prefix in labels if AVERAGE.search(prefix)]
    candidates = averages or list(labels)
    if len(candidates) > 1:
        listed = ", ".join(sorted(labels[prefix] for prefix in candidates))
        what = "moving averages" if averages else "models"
        raise UsageError(f"{source}: holds several {what} ({listed}); choose one with --set inherit.weights=NAME")
    return candidates[0]


def _left_out(chosen: str, rest: Sequence[str], clean: Mapping[str, str]) -> Iterator[str]:
    """What is not read, by the outermost name that is not the chosen set's too: `opt (240 tensors)`."""
    counts: dict[str, int] = {}
    for name in rest:
        parts = clean[name].split(".")
        if parts[-1] in COUNTERS:
            continue
        depth = 1
        while depth < len(parts) - 1 and chosen.startswith(".".join(parts[:depth]) + "."):
            depth += 1
        top = ".".join(parts[:depth])
        counts[top] = counts.get(top, 0) + 1
    for top, number in counts.items():
        yield f"{top} ({number} tensor{'s' if number > 1 else ''})"
