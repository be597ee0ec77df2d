"""The plan of a conversion, tensor by tensor, and carrying it out."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from litconvert.checkpoints import (
    Checkpoint,
    TensorInfo,
    digest_of,
    open_checkpoint,
    read_json,
    require_space,
    whole_directory,
    write_safetensors,
)
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families import Origin, Reading, recognise
from litconvert.modeling_lit import LiTTransformer2DModel, count_macs, sincos_position_embedding
from litconvert.recipe import Recipe, ResolvedRecipe, Source, resolve

FORMAT_VERSION = 1
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Fate = Literal["inherited", "fresh", "recomputed", "dropped"]
FATES: tuple[Fate, ...] = ("inherited", "fresh", "recomputed", "dropped")


def empty_model(config: Mapping[str, Any]) -> LiTTransformer2DModel:
    """The model on the meta device: shapes, no memory.

    Raises UsageError for a config that the model refuses.
    """
    try:
        with torch.device("meta"):
            model: LiTTransformer2DModel = LiTTransformer2DModel(**config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return model


def model_tensors(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    """Name and shape of every tensor the model of this config stores."""
    return {name: TensorInfo(tuple(value.shape), dtype) for name, value in empty_model(config).state_dict().items()}


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the model's defaults filled in, and the kind of every layer named."""
    full = {key: value for key, value in dict(empty_model(config).config).items() if not key.startswith("_")}
    return {**full, "attention": list(full["attention"] or ["softmax"] * full["num_layers"])}


@dataclass(frozen=True)
class OpenSource:
    """A recognised checkpoint: its headers and what they mean."""

    checkpoint: Checkpoint
    reading: Reading

    def values(self, name: str) -> Tensor:
        """A model tensor's values from the source, checked: finite, and copies equal.

        Raises LitconvertError when they are not.
        """
        origin = self.reading.origins[name]
        first = self.checkpoint.read(origin.names[0])
        rows = first.shape[0] // origin.parts
        value = first[origin.part * rows : (origin.part + 1) * rows]
        if not torch.isfinite(value).all():
            raise LitconvertError(
                f"{self.checkpoint.source}: {origin.names[0]} holds NaN or infinite values; "
                "the checkpoint is broken: use another one (or another weights= set)"
            )
        for name_of_copy in origin.names[1:]:
            copy = self.checkpoint.read(name_of_copy)
            if copy.dtype != first.dtype or not torch.equal(copy, first):
                raise LitconvertError(
                    f"{self.checkpoint.source}: {origin.names[0]} and {name_of_copy} differ. The layout stores one "
                    "embedder in every block, so they must be equal; a model fine-tuned with separate copies cannot be "
                    "read as DiT"
                )
        return value

    def check_recomputed(self) -> None:
        """Refuse a stored position embedding that the formula does not give: dropping it would change the function."""
        for name in self.reading.recomputed:
            stored = self.checkpoint.read(name).float()
            config = self.reading.config
            side = config["sample_size"] // config["patch_size"]
            formula = sincos_position_embedding(config["hidden_size"], (side, side), side, torch.device("cpu"))
            difference = (stored - formula).abs().max().item() if stored.shape == formula.shape else float("inf")
            if not difference < 4e-3:  # bfloat16 rounding of values up to 1
                raise LitconvertError(
                    f"{self.checkpoint.source}: {name} differs from the fixed sine-cosine embedding by "
                    f"{difference:.2g}; a trained one is not supported: use a checkpoint with the fixed one"
                )

    def dtype(self) -> torch.dtype:
        """The one dtype that holds every weight."""
        result = None
        for origin in self.reading.origins.values():
            found = self.checkpoint.tensors[origin.names[0]].dtype
            result = found if result is None else torch.promote_types(result, found)
        assert result is not None
        return result


def open_source(source: Source, weights: str = "auto") -> OpenSource:
    """Open and recognise a recipe's source: headers only."""
    if source.path is None:
        raise UsageError("no source is named: give SRC, or source.path in the recipe")
    checkpoint = open_checkpoint(source.path, file=source.file, weights=weights)
    reading = recognise(checkpoint, source)
    return OpenSource(checkpoint, Reading(**{**reading.__dict__, "config": full_config(reading.config)}))


def read_model(source: OpenSource, dtype: torch.dtype | None = None) -> LiTTransformer2DModel:
    """The source's own model with its weights, in eval mode."""
    source.check_recomputed()
    dtype = dtype or source.dtype()
    model = empty_model(source.reading.config)
    state = {name: source.values(name).to(dtype) for name in source.reading.origins}
    # Values mapped from disk are cloned: the file may change or vanish while the model lives.
    model.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    model.eval().requires_grad_(True)
    return model


def check_values(source: OpenSource) -> list[str]:
    """Read every value: finite, embedder copies equal, position embedding as the formula; and what looks odd.

    Raises LitconvertError for what cannot be used.
    """
    source.check_recomputed()
    zero = [name for name in source.reading.origins if not source.values(name).any()]
    facts = ["every value is finite, copies are equal, the position embedding is the fixed one"]
    if zero:
        facts.append(f"{len(zero)} tensors are all zero ({', '.join(zero[:3])}): is the model trained?")
    return facts


def describe(source: OpenSource, facts: Sequence[str] = ()) -> dict[str, Any]:
    """What a checkpoint is, as plain data."""
    checkpoint, reading = source.checkpoint, source.reading
    return {
        "path": checkpoint.source,
        "family": reading.family,
        "layout": reading.layout,
        "because": reading.because,
        "weights": checkpoint.weights,
        "sets": list(checkpoint.sets),
        "revision": checkpoint.revision,
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "parameters": sum(info.numel for info in model_tensors(reading.config).values()),
        "dtype": str(source.dtype()).removeprefix("torch."),
        "config": reading.config,
        "unsure": list(reading.unsure),
        "values": list(facts),
    }


def load(
    source: str | Path, *, recipe: str | None = None, weights: str | None = None, **hints: Any
) -> LiTTransformer2DModel:
    """Load any recognised checkpoint as it is: softmax layers stay softmax.

    Args:
        source: file, folder, Hub id or `asset:NAME`.
        recipe: name or path of a recipe whose `source` section carries hints.
        weights: `ema` or `model` of a training checkpoint; None: EMA if present, else the only set.
        hints: keys of a recipe's `source` section, such as num_attention_heads=6.

    Returns: the model in eval mode, in the dtype of the source.

    Raises UsageError when a hint is missing or unknown, LitconvertError when the checkpoint cannot be read whole.
    """
    resolved = resolve(recipe).recipe if recipe else Recipe()
    known = [name for name in Source.model_fields if name != "path"]
    for name in hints:
        if name not in known:
            raise UsageError(f"unknown hint {name!r}{did_you_mean(name, known)}; hints are {', '.join(known)}")
    try:
        merged = Source.model_validate({**resolved.source.model_dump(), **hints, "path": str(source)}, strict=True)
    except ValidationError as error:
        problems = "; ".join(f"hint {problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise UsageError(f"{source}: {problems}") from error
    return read_model(open_source(merged, weights or resolved.inherit.weights))


@dataclass(frozen=True)
class Entry:
    """One tensor's fate.

    Attributes:
        target: tensor of the student, None when dropped.
        source: tensor of the source, None when fresh.
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
    """What becomes of every tensor, and what it means in parameters, bytes and multiply-accumulates."""

    source: OpenSource
    recipe: Recipe
    config: dict[str, Any]
    entries: tuple[Entry, ...]

    @cached_property
    def groups(self) -> dict[str, dict[str, int]]:
        """For each fate: tensors of the source and of the student, parameters and bytes.

        A fused source tensor of which a part is inherited counts as inherited on the source's side; its dropped rows
        are in the dropped parameters and bytes. Every source tensor is counted once, and every student tensor once.
        """
        fate_of_source: dict[str, str] = {}
        for entry in self.entries:
            for name in entry.copies:
                if fate_of_source.get(name) != "inherited":
                    fate_of_source[name] = entry.fate
        groups: dict[str, dict[str, int]] = {}
        for fate in FATES:
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
        student = sum(entry.numel for entry in self.entries if entry.fate in ("inherited", "fresh"))
        teacher = sum(info.numel for info in model_tensors(self.source.reading.config).values())
        return {
            "source_tensors": len(self.source.checkpoint.tensors),
            "student_tensors": sum(entry.target is not None for entry in self.entries),
            "student_tensors_stored": sum(entry.fate in ("inherited", "fresh") for entry in self.entries),
            "source_parameters": teacher,
            "source_parameters_with_pos_embed": teacher + fixed,
            "student_parameters": student,
            "student_parameters_with_pos_embed": student + fixed,
            "student_bytes": sum(entry.nbytes for entry in self.entries if entry.fate in ("inherited", "fresh")),
        }

    @cached_property
    def macs(self) -> list[dict[str, int | float]]:
        """Multiply-accumulates of a forward pass before and after, by image size.

        Latent models (a VAE of factor 8) at 256, 512, 1024 and 2048 pixels; pixel-space models at 1, 2, 4 and 8 times
        their own size.
        """
        native = self.config["sample_size"]
        pixel_space = self.config["in_channels"] in (1, 3)
        sizes = [native * factor for factor in (1, 2, 4, 8)] if pixel_space else [32, 64, 128, 256]
        rows: list[dict[str, int | float]] = []
        for size in sizes:
            before, after = count_macs(self.source.reading.config, size), count_macs(self.config, size)
            rows.append(
                {
                    "image_size": size if pixel_space else size * 8,
                    "tokens": (size // self.config["patch_size"]) ** 2,
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
            "student_config": self.config,
            "groups": self.groups,
            "totals": self.totals,
            "macs": self.macs,
            "tensors": [{**asdict(entry), "parameters": entry.numel, "bytes": entry.nbytes} for entry in self.entries],
        }


def student_config(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The source's config with its attention replaced as the recipe says.

    Raises UsageError for layers that do not exist and heads that do not divide the width.
    """
    student, num_layers = recipe.student, config["num_layers"]
    if "linear" in config["attention"]:
        raise UsageError("the source has linear layers already; convert starts from a softmax model")
    missing = [layer for layer in student.softmax_layers if layer >= num_layers]
    if missing:
        raise UsageError(
            f"student.softmax_layers names layer {missing[0]}, but the source has layers 0 to {num_layers - 1}"
        )
    kinds = ["softmax" if layer in student.softmax_layers else "linear" for layer in range(num_layers)]
    if "linear" in kinds and config["hidden_size"] % student.num_attention_heads:
        raise UsageError(
            f"student.num_attention_heads={student.num_attention_heads} does not divide the width "
            f"{config['hidden_size']}; set one that does (--set student.num_attention_heads=N)"
        )
    return {
        **config,
        "attention": kinds,
        "linear_num_heads": student.num_attention_heads,
        "linear_kernel": student.kernel,
        "linear_conv_size": student.conv_size,
        "linear_eps": student.eps,
    }


def _inherits(name: str, kinds: Sequence[str], inherited: Sequence[str]) -> bool:
    """Whether a student tensor that the source has is taken over."""
    if ".attn." not in name:
        return True
    _, layer, _, projection, _ = name.split(".")
    return (
        kinds[int(layer)] == "softmax"
        or {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}[projection] in inherited
    )


def plan_conversion(source: OpenSource, recipe: Recipe) -> ConversionPlan:
    """The plan, from headers alone."""
    config = student_config(source.reading.config, recipe)
    kinds, checkpoint = config["attention"], source.checkpoint
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
        if origin is not None and _inherits(name, kinds, recipe.inherit.attention):
            taken.add(name)
            dtype = wanted or name_of(checkpoint.tensors[origin.names[0]].dtype)
            if dtype not in DTYPES:
                raise UsageError(f"{checkpoint.source}: {origin.names[0]} is {dtype}; set student.dtype=float32")
            entries.append(entry("inherited", name, origin, info, dtype))
        else:
            entries.append(entry("fresh", name, None, info, wanted or own_dtype))
    side = config["sample_size"] // config["patch_size"]
    stored = next(iter(source.reading.recomputed), None)
    fixed = TensorInfo((1, side * side, config["hidden_size"]), torch.float32)
    entries.append(entry("recomputed", "pos_embed", Origin((stored,)) if stored else None, fixed, "float32"))
    for name, info in model_tensors(source.reading.config).items():
        if name not in taken:
            origin = source.reading.origins[name]
            dtype = name_of(checkpoint.tensors[origin.names[0]].dtype)
            entries.append(entry("dropped", None, origin, info, dtype))
    return ConversionPlan(source, recipe, config, tuple(entries))


def plan(source: str | Path | None, recipe: str, overrides: Sequence[str] = ()) -> ConversionPlan:
    """Plan a conversion: headers are read, weights are not.

    Args:
        source: file, folder, Hub id or `asset:NAME`; None: the recipe's.
        recipe: name or path.
        overrides: `key=value`, over the recipe.
    """
    resolved = with_source(resolve(recipe, overrides), source)
    return plan_conversion(open_source(resolved.recipe.source, resolved.recipe.inherit.weights), resolved.recipe)


def with_source(resolved: ResolvedRecipe, source: str | Path | None) -> ResolvedRecipe:
    """The recipe with a positional source in the place of its path."""
    if source is None:
        return resolved
    path = str(source)
    recipe = resolved.recipe.model_copy(update={"source": resolved.recipe.source.model_copy(update={"path": path})})
    return ResolvedRecipe(resolved.name, recipe, {**resolved.origins, "source.path": "SRC"})


def fresh_tensor(name: str, info: TensorInfo, seed: int, conv_size: int) -> Tensor:
    """Initial values of a new tensor, float32, a function of the seed and the name alone.

    Projections: Xavier-uniform weights, zero bias. Convolution: Conv2d's default, which for a depth-wise k x k is
    U(-1/k, 1/k), bias included.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    tensor = torch.empty(info.shape)
    if ".dwc." in name:
        return tensor.uniform_(-1 / conv_size, 1 / conv_size, generator=generator)
    if tensor.dim() == 1:
        return tensor.zero_()
    return nn.init.xavier_uniform_(tensor, generator=generator)


def versions() -> dict[str, str]:
    """What the result was made with."""
    packages = {name: version(name) for name in ("litconvert", "torch", "diffusers", "safetensors")}
    return {"python": platform.python_version(), **packages}


def write_model_directory(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    recipe: Recipe,
    provenance: Mapping[str, Any],
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Fill a (temporary) folder as a model directory: config, weights, the model's source, recipe and provenance."""
    header = {
        "_class_name": "LiTTransformer2DModel",
        "_diffusers_version": version("diffusers"),
        "auto_map": {"AutoModel": "modeling_lit.LiTTransformer2DModel"},
    }
    (folder / "config.json").write_text(json.dumps({**header, **config}, indent=2) + "\n")
    model_source = Path(__file__).with_name("modeling_lit.py").read_text()
    (folder / "modeling_lit.py").write_text(model_source)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "litconvert.json").write_text(json.dumps(provenance, indent=2) + "\n")
    metadata = {"format": "pt", "litconvert": str(provenance["digest"])}
    write_safetensors(folder / WEIGHTS_NAME, tensors, produce, metadata, on_tensor=on_tensor)


def read_provenance(folder: Path) -> dict[str, Any]:
    """litconvert.json of a model directory.

    Raises UsageError when the folder is none.
    """
    path = folder / "litconvert.json"
    if not path.is_file():
        raise UsageError(
            f"{folder}: not a model directory of litconvert (no litconvert.json); convert a checkpoint first"
        )
    data = read_json(path)
    if data.get("format") != FORMAT_VERSION:
        raise LitconvertError(
            f"{path}: format {data.get('format')}, this litconvert reads {FORMAT_VERSION}; upgrade it"
        )
    return data


def already_done(out: Path, digest: str, *, force: bool) -> bool:
    """Whether `out` is the result of these very inputs. Raises when it is something else and is not to be replaced."""
    if force or not out.exists():
        return False
    try:
        found = read_provenance(out).get("digest") if out.is_dir() else None
    except LitconvertError:
        found = None
    if found == digest:
        if not all((out / name).is_file() for name in (WEIGHTS_NAME, "config.json", "modeling_lit.py", "recipe.yaml")):
            raise LitconvertError(f"{out} is incomplete: a file was taken out of it; make it again with --force")
        return True
    if out.is_dir() and not any(out.iterdir()):
        return False
    what = "was made from other inputs" if found else "is not a result of litconvert"
    raise LitconvertError(f"{out} exists and {what}; choose another path, or replace it with --force")


def conversion_digest(plan: ConversionPlan, sha256: str) -> str:
    """Digest of what determines the result."""
    recipe = plan.recipe
    inputs = {
        "format": FORMAT_VERSION,
        "source": sha256,
        "weights": plan.source.checkpoint.weights,
        "source_config": plan.source.reading.config,
        # Recorded with the result, and read again by distill and push: the licence, the decoder, the hints.
        "recorded": recipe.source.model_dump(mode="json", exclude={"path"}),
        "student": recipe.student.model_dump(mode="json"),
        "inherit": recipe.inherit.attention,
        "license": recipe.source.license.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    return digest_of(inputs)


def convert(
    source: str | Path | None,
    out: str | Path,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Path:
    """Convert a checkpoint to a linear model directory, written whole or not at all.

    Args:
        source: file, folder, Hub id or `asset:NAME`; None: the recipe's.
        out: the model directory. One made from the same inputs is left as it is.
        recipe, overrides: as for `plan`.
        force: replace an `out` that was made from other inputs.
        on_tensor: called with the name of each tensor written.

    Returns: the model directory.
    """
    return carry_out(plan(source, recipe, overrides), Path(out), force=force, on_tensor=on_tensor)


def carry_out(
    plan: ConversionPlan, out: Path, *, force: bool = False, on_tensor: Callable[[str], None] = lambda name: None
) -> Path:
    """Write the student of a plan."""
    place, files = out.resolve(), [file.resolve() for file in plan.source.checkpoint.files]
    if any(place in (file, *file.parents) for file in files):
        raise UsageError(f"{out} is or holds the source itself; choose another path")
    sha256 = plan.source.checkpoint.sha256()
    digest = conversion_digest(plan, sha256)
    if already_done(out, digest, force=force):
        return out
    require_space(out.parent, plan.totals["student_bytes"])
    plan.source.check_recomputed()
    for name in _unread(plan):
        plan.source.values(name)
    written = [entry for entry in plan.entries if entry.fate in ("inherited", "fresh")]
    fates = {entry.target: entry.fate for entry in written}

    tensors = {str(entry.target): TensorInfo(entry.shape, DTYPES[entry.dtype]) for entry in written}

    def produce(name: str) -> Tensor:
        if fates[name] == "inherited":
            return _cast(plan.source.values(name), tensors[name].dtype, name)
        return fresh_tensor(name, tensors[name], plan.recipe.seed, plan.recipe.student.conv_size)

    recipe = _with_absolute_sources(plan.recipe)
    provenance = {
        "format": FORMAT_VERSION,
        "digest": digest,
        "source": {
            "path": recipe.source.path,
            "revision": plan.source.checkpoint.revision,
            "sha256": sha256,
            "family": plan.source.reading.family,
            "layout": plan.source.reading.layout,
            "weights": plan.source.checkpoint.weights,
            "license": recipe.source.license.model_dump(),
        },
        "plan": {"groups": plan.groups, "totals": plan.totals, "macs": plan.macs},
        "versions": versions(),
        "seed": plan.recipe.seed,
        "metrics": {},
    }
    with whole_directory(out) as folder:
        write_model_directory(
            folder,
            config=plan.config,
            tensors=tensors,
            produce=produce,
            recipe=recipe,
            provenance=provenance,
            on_tensor=on_tensor,
        )
    return out


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The value in another dtype. Raises LitconvertError where that turns a finite number into infinity."""
    result = value.to(dtype)
    if dtype != value.dtype and not torch.isfinite(result).all():
        raise LitconvertError(
            f"{name} holds values up to {value.abs().max().item():.3g}, beyond {str(dtype).removeprefix('torch.')}; "
            "set student.dtype=bfloat16 or float32"
        )
    return result


def _unread(plan: ConversionPlan) -> Iterator[str]:
    """Model tensors of the source that are dropped: their values are checked all the same."""
    taken = {entry.target for entry in plan.entries if entry.fate == "inherited"}
    return (name for name in plan.source.reading.origins if name not in taken)


def _with_absolute_sources(recipe: Recipe) -> Recipe:
    """Local paths made absolute, so that distillation finds the teachers from any folder."""

    def absolute(source: Source) -> Source:
        if source.path is None or not Path(source.path).exists():
            return source
        return source.model_copy(update={"path": str(Path(source.path).resolve())})

    teacher = recipe.distill.teacher and absolute(recipe.distill.teacher)
    distill = recipe.distill.model_copy(update={"teacher": teacher})
    return recipe.model_copy(update={"source": absolute(recipe.source), "distill": distill})
