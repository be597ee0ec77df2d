"""The plan of a conversion, tensor by tensor."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.solve_plan import SolvePlan, solve_plan
from litconvert.errors import UsageError
from litconvert.families.companions import NOTHING, Companions, companions_of
from litconvert.families.layout import Origin
from litconvert.families.sources import OpenSource, describe, open_source_of
from litconvert.model.config import ModelConfig
from litconvert.model.shapes import count_macs, count_parameters, model_tensors
from litconvert.recipe.packaged import asset_of, recipe_of
from litconvert.recipe.resolve import ResolvedRecipe, resolve
from litconvert.recipe.schema import Recipe, Source
from litconvert.runs.directory import model_of

Fate = Literal["inherited", "fresh", "solved", "recomputed", "dropped"]

FATES: tuple[Fate, ...] = ("inherited", "fresh", "solved", "recomputed", "dropped")
STORED: tuple[Fate, ...] = ("inherited", "fresh", "solved")


@dataclass(frozen=True)
class Entry:
    """One tensor's fate.

    Attributes:
        target: tensor of the student, None when dropped.
        source: tensor of the source that it is, or of a solved one the tensor that it starts from; None when fresh.
        rows: which rows of the source tensor, None for all.
        copies: how many equal source tensors stand behind it.
    """

    fate: Fate
    target: str | None
    source: str | None
    rows: tuple[int, int] | None
    copies: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class ConversionPlan:
    """What becomes of every tensor, and what it means in parameters, bytes and multiply-accumulates.

    Attributes:
        solve: what is solved and what it costs; None: what is fresh starts at random.
        unsolved_because: why nothing is solved although the recipe asks for it.
        beside: what lies beside the source's weights, of which the recipe has what it uses.
    """

    source: OpenSource
    recipe: Recipe
    config: ModelConfig
    entries: tuple[Entry, ...]
    recipe_name: str | None = None
    solve: SolvePlan | None = None
    unsolved_because: str | None = None
    beside: Companions = NOTHING

    @cached_property
    def groups(self) -> dict[str, dict[str, int]]:
        """For each fate: tensors of the source and of the student, parameters and bytes.

        A fused source tensor of which a part is inherited counts as inherited on the source's side; its dropped rows
        are in the dropped parameters and bytes. Every source tensor is counted once, and every student tensor once.
        """
        fate_of_source: dict[str, str] = {}
        for entry in self.entries:
            for name in entry.copies:
                if fate_of_source.get(name) not in ("inherited", "solved"):
                    fate_of_source[name] = entry.fate
        groups: dict[str, dict[str, int]] = {}
        for fate in FATES:
            if fate == "solved" and self.solve is None:
                continue
            mine = [entry for entry in self.entries if entry.fate == fate]
            groups[fate] = {
                "source_tensors": sum(found == fate for found in fate_of_source.values()),
                "student_tensors": sum(entry.target is not None for entry in mine),
                "parameters": sum(entry.numel for entry in mine),
                "bytes": sum(entry.nbytes for entry in mine),
            }
        return groups

    @cached_property
    def totals(self) -> dict[str, int]:
        """Tensors and parameters of both sides, with and without the fixed position embedding."""
        fixed = sum(entry.numel for entry in self.entries if entry.fate == "recomputed")
        student, teacher = count_parameters(self.config), count_parameters(self.source.config)
        return {
            "source_tensors": len(self.source.checkpoint.tensors),
            "student_tensors": sum(entry.target is not None for entry in self.entries),
            "student_tensors_stored": sum(entry.fate in STORED for entry in self.entries),
            "source_parameters": teacher,
            "source_parameters_with_pos_embed": teacher + fixed,
            "student_parameters": student,
            "student_parameters_with_pos_embed": student + fixed,
            "student_bytes": sum(entry.nbytes for entry in self.entries if entry.fate in STORED),
        }

    @cached_property
    def macs(self) -> list[dict[str, int | float]]:
        """Multiply-accumulates of a forward pass before and after, by image size.

        Latent models (a VAE of factor 8) at 256, 512, 1024 and 2048 pixels; pixel-space models at 1, 2, 4 and 8 times
        their own size.
        """
        native = self.config.sample_size
        pixel_space = self.config.is_pixel_space
        sizes = [native * factor for factor in (1, 2, 4, 8)] if pixel_space else [32, 64, 128, 256]
        rows: list[dict[str, int | float]] = []
        for size in sizes:
            before, after = count_macs(self.source.config, size), count_macs(self.config, size)
            rows.append(
                {
                    "image_size": size if pixel_space else size * 8,
                    "tokens": (size // self.config.patch_size) ** 2,
                    "source_macs": before,
                    "student_macs": after,
                    "ratio": before / after,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain data."""
        return {
            "source": describe(self.source),
            "beside": self.beside.to_json(),
            "recipe": self.recipe_name,
            "student_config": self.config.values,
            "groups": self.groups,
            "totals": self.totals,
            "macs": self.macs,
            **({} if self.solve is None else {"solve": {**self.solve.to_json(), "seconds": self.solve.seconds}}),
            **({} if self.unsolved_because is None else {"unsolved_because": self.unsolved_because}),
            "tensors": [{**asdict(entry), "parameters": entry.numel, "bytes": entry.nbytes} for entry in self.entries],
        }


def student_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The source's config with its attention replaced as the recipe says. Linear layers of the source stay as they are.

    Raises UsageError for layers that do not exist, heads that do not divide the width, and linear layers other than the
    source's own.
    """
    student, num_layers = recipe.student, config.num_layers
    wanted = {
        "linear_num_heads": student.num_attention_heads,
        "linear_kernel": student.kernel,
        "linear_conv_size": student.conv_size,
        "linear_eps": student.eps,
    }
    if "linear" in config.attention:
        for key, value in wanted.items():
            if (own := getattr(config, key)) != value:
                setting = key.removeprefix("linear_").replace("num_heads", "num_attention_heads")
                raise UsageError(
                    f"the source has linear layers already, with {key}={own}, and student.{setting} is "
                    f"{value}; go on with its own (--set student.{setting}={own}), or take a softmax model"
                )
    missing = [layer for layer in student.softmax_layers if layer >= num_layers]
    if missing:
        raise UsageError(
            f"student.softmax_layers names layer {missing[0]}, but the source has layers 0 to {num_layers - 1}"
        )
    kinds = [kind if layer in student.softmax_layers else "linear" for layer, kind in enumerate(config.attention)]
    if "linear" in kinds and config.hidden_size % student.num_attention_heads:
        raise UsageError(
            f"student.num_attention_heads={student.num_attention_heads} does not divide the width "
            f"{config.hidden_size}; set one that does (--set student.num_attention_heads=N)"
        )
    return ModelConfig.of({**config.values, **wanted, "attention": kinds})


def _inherits(name: str, source: Sequence[str], student: Sequence[str], inherited: Sequence[str]) -> bool:
    """Whether a student tensor that the source has is taken over; `source` and `student` are the kinds of layers."""
    if ".attn." not in name:
        return True
    _, layer, _, projection, _ = name.split(".")
    if source[int(layer)] == student[int(layer)]:  # a layer that keeps its kind of attention keeps all of it
        return True
    return {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}[projection] in inherited


def plan_conversion(
    source: OpenSource, recipe: Recipe, recipe_name: str | None = None, solving: SolvePlan | None = None
) -> ConversionPlan:
    """The plan, from headers alone.

    Args:
        recipe_name: for people; None: no recipe, the defaults.
        solving: what is solved and how; None: as the recipe says, and device and size.
    """
    config = student_config(source.config, recipe)
    kinds, checkpoint = (source.config.attention, config.attention), source.checkpoint
    unsolved_because = None
    if solving is None:
        solving, unsolved_because = solve_plan(source.config, config, recipe)
    wanted = recipe.student.dtype

    def name_of(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    def entry(fate: Fate, target: str | None, origin: Origin | None, info: TensorInfo, dtype: str) -> Entry:
        rows, names = None, origin.names if origin else ()
        if origin and origin.parts > 1:
            rows = (origin.part * info.shape[0], (origin.part + 1) * info.shape[0])
        return Entry(fate, target, names[0] if names else None, rows, names, info.shape, dtype)

    entries = []
    own_dtype = name_of(source.dtype())
    taken = set()
    for name, info in model_tensors(config).items():
        origin = source.reading.origins.get(name)
        takes = origin is not None and _inherits(name, *kinds, recipe.inherit.attention)
        if takes:
            taken.add(name)
        if solving is not None and solving.solves(name):
            entries.append(entry("solved", name, origin if takes else None, info, wanted or own_dtype))
        elif takes and origin is not None:
            dtype = wanted or name_of(checkpoint.tensors[origin.names[0]].dtype)
            if dtype not in DTYPES:
                raise UsageError(f"{checkpoint.source}: {origin.names[0]} is {dtype}; set student.dtype=float32")
            entries.append(entry("inherited", name, origin, info, dtype))
        else:
            entries.append(entry("fresh", name, None, info, wanted or own_dtype))
    side = config.sample_size // config.patch_size
    stored = next(iter(source.reading.recomputed), None)
    fixed = TensorInfo((1, side * side, config.hidden_size), torch.float32)
    entries.append(entry("recomputed", "pos_embed", Origin((stored,)) if stored else None, fixed, "float32"))
    for name, info in model_tensors(source.config).items():
        if name not in taken:
            origin = source.reading.origins[name]
            dtype = name_of(checkpoint.tensors[origin.names[0]].dtype)
            entries.append(entry("dropped", None, origin, info, dtype))
    for name in source.reading.extra:
        info = checkpoint.tensors[name]
        entries.append(entry("dropped", None, Origin((name,)), info, name_of(info.dtype)))
    return ConversionPlan(source, recipe, config, tuple(entries), recipe_name, solving, unsolved_because)


def plan(source: str | Path | None, recipe: str | None = None, overrides: Sequence[str] = ()) -> ConversionPlan:
    """Plan a conversion: headers are read, weights are not.

    Args:
        source: file, folder, Hub id or `asset:NAME`; None: the recipe's.
        recipe: name or path; None: the packaged one for what the source is, or else the defaults.
        overrides: `key=value`, over the recipe.
    """
    if recipe is not None:
        named, beside = _with_beside(resolve(recipe, overrides, source), recipe)
        made = plan_conversion(open_source_of(named.recipe), named.recipe, recipe)
        return replace(made, beside=beside)
    # What of a recipe says how to read it; the rest may be of stages that the defaults have not.
    reading = [one for one in overrides if one.replace("=", ".").split(".")[0].strip() in ("source", "inherit")]
    given = resolve(None, reading, source).recipe
    opened = open_source_of(given)
    beside = companions_of(given.source.path and model_of(given.source.path))
    if beside.recipe is not None and opened.reading.family == "litconvert" and "linear" in opened.config.attention:
        own = _going_on(beside, given, overrides)
        return replace(plan_conversion(opened, own, beside.recipe_name), beside=beside)
    packaged = asset_of(str(given.source.path)).recipe or recipe_of(opened.reading.family, opened.config.values)
    found = beside.taken_into(resolve(packaged, overrides, None if packaged else source), named=None).recipe
    if packaged is not None:
        # Its hints are of the released checkpoint; what this source is was read without them.
        found = found.model_copy(update={"source": _described_as(given.source, found.source)})
    return replace(plan_conversion(opened, found, packaged), beside=beside)


def _with_beside(resolved: ResolvedRecipe, name: str) -> tuple[ResolvedRecipe, Companions]:
    """A recipe that was named with what lies beside its source, and that."""
    path = resolved.recipe.source.path
    beside = companions_of(path and model_of(path))
    return beside.taken_into(resolved, named=name), beside


def _described_as(source: Source, recorded: Source) -> Source:
    """A source with what another recipe says of one like it: its licence, its decoder, its text encoder."""
    return source.model_copy(update={name: getattr(recorded, name) for name in ("license", "vae", "text_encoder")})


def _going_on(beside: Companions, bare: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe to go on with from a student of ours: its own, taught by who taught it."""
    recorded = beside.resolve(None, overrides).recipe
    teacher = recorded.distill.teacher or recorded.source
    return recorded.model_copy(
        update={
            "source": _described_as(bare.source, recorded.source),
            "inherit": bare.inherit,
            "distill": recorded.distill.model_copy(update={"teacher": teacher, "start": None}),
        }
    )


def resolve_for(recipe: str | None, overrides: Sequence[str], source: str | Path | None) -> ResolvedRecipe:
    """The recipe with its source; without one the packaged recipe for what the source is, or else the defaults.

    Raises UsageError when neither is named.
    """
    if recipe is not None:
        return _with_beside(resolve(recipe, overrides, source), recipe)[0]
    if source is None:
        raise UsageError("--recipe or --source says which model the data is for; give one")
    planned = plan(source, None, overrides)
    return ResolvedRecipe(planned.recipe_name or "defaults", planned.recipe, {})
