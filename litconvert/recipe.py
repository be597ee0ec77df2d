"""Recipes: the schema, finding one by name, path or Hub id, overrides, and where each value came from."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.packaged import packaged_recipes

PROJECTIONS = ("q", "k", "v", "o")
STAGES = ("attention_transfer", "hybrid")
PROMPTS = (
    "a red fox in fresh snow, morning light",
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "a bowl of lemons on a blue table, still life",
    "an old steam train crossing a stone bridge in autumn",
)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SchedulerName = Literal["ddpm", "ddim", "dpm-solver++", "flow-euler"]


class Section(BaseModel):
    """Strict and immutable: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Vae(Section):
    """The image decoder of a latent-space model."""

    path: str
    """Folder or Hub id of a diffusers AutoencoderKL."""
    subfolder: str | None = None
    """Folder inside it."""
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    """Latents are divided by it before decoding. 0.18215 is Stable Diffusion's."""


class TextEncoder(Section):
    """The T5 that encodes captions, as PixArt's diffusers repositories hold it."""

    path: str
    """Folder or Hub id."""
    subfolder: str | None = "text_encoder"
    """Folder of the encoder inside it."""
    tokenizer: str | None = "tokenizer"
    """Folder of the tokenizer inside it."""


class License(Section):
    """The licence of the source's weights, which the result inherits."""

    id: str = "unknown"
    """A licence id of the Hub, or `other`."""
    name: str | None = None
    """For `other`: its name."""
    link: str | None = None
    """For `other`: where it can be read."""


class Source(Section):
    """The checkpoint to start from, and hints for what its shapes cannot tell."""

    path: str | None = None
    """File, folder, Hub id (`owner/name`, `owner/name@revision`) or `asset:NAME`. A positional SRC replaces it."""
    file: str | None = None
    """The file to read where a folder or repository holds several."""
    family: str | None = None
    """dit, sit, pixart-alpha, pixart-sigma, litconvert or that of a plugin, where recognition should not decide."""
    num_attention_heads: Positive | None = None
    """Heads of softmax attention and of cross-attention, where the width does not tell."""
    sample_size: Positive | None = None
    """Side of the latent, where no position embedding or config tells."""
    num_classes: Positive | None = None
    """Classes, not counting the null class. Default: one row of the class table is the null class."""
    interpolation_scale: Annotated[float, Field(gt=0)] | None = None
    """What PixArt's positions are divided by. Default: that of the released checkpoint of this size."""
    linear_num_heads: Positive | None = None
    """Heads of linear layers in LiT's public layout, where no convolution tells."""
    linear_kernel: Literal["relu", "gelu", "focused"] | None = None
    """Kernel of linear layers in LiT's public layout. Default: relu."""
    linear_eps: Annotated[float, Field(gt=0)] | None = None
    """Eps of linear layers in LiT's public layout. Default: 1e-6."""
    data_timestep: Literal[0, 1] | None = None
    """Of a SiT: the end of [0, 1] where x_t is data. Default: 1, as in SiT's own code; REPA's and others' is 0."""
    timestep_freq_shift: float | None = None
    """0 (default): trained with DiT's code. 1: trained with diffusers'."""
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    """1e-6 (default): trained with DiT's code. 1e-5: trained with diffusers'."""
    license: License = License()
    vae: Vae | None = None
    """None: a pixel-space model, values in [-1, 1]."""
    text_encoder: TextEncoder | None = None
    """Of a model of captions; None: captions are given as precomputed embeddings."""


class Student(Section):
    """What the linear model looks like."""

    num_attention_heads: Positive = 4
    """Heads of the linear layers."""
    kernel: Literal["relu", "gelu", "focused"] = "relu"
    conv_size: Literal[0, 3, 5, 7] = 5
    """Side of the depth-wise convolution on V; 0: none."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    softmax_layers: tuple[NonNegative, ...] = ()
    """Layers that keep softmax attention, counted from 0."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the written weights; None: the source's."""
    max_shard_bytes: Positive = 10_000_000_000
    """Weights are written in files of at most so many bytes."""


Combination = Annotated[str, Field(pattern=r"^(none|all|[qkvo](\s*[+,]\s*[qkvo])*)$")]


def _projections(value: Any) -> Any:
    """`none`, `all`, `q`, `k+v`, `[q, k]` to a tuple in the order q, k, v, o."""
    if isinstance(value, str):
        value = {"none": [], "all": list(PROJECTIONS)}.get(value, re.split(r"\s*[+,]\s*", value))
    if not isinstance(value, (list, tuple)) or any(name not in PROJECTIONS for name in value):
        raise ValueError("must be none, all, or a combination of q, k, v and o, such as k+v")
    return tuple(name for name in PROJECTIONS if name in value)


class Inherit(Section):
    """What the student takes over."""

    weights: Literal["auto", "ema", "model"] = "auto"
    """Of a training checkpoint. auto: EMA if present, else the only set."""
    attention: Annotated[
        tuple[Literal["q", "k", "v", "o"], ...],
        BeforeValidator(_projections, json_schema_input_type=Combination | list[Literal["q", "k", "v", "o"]]),
    ] = ()
    """Attention projections to inherit: none | all | any combination of q, k, v, o."""


class Guidance(Section):
    """How samples are drawn."""

    scheduler: SchedulerName = "ddim"
    """flow-euler for a model that predicts velocity (SiT), one of the others for a model that predicts noise."""
    steps: Positive = 25
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1: none."""
    guidance_channels: Positive | None = None
    """Guide the first so many channels only (DiT's protocol: 3); None: all."""


class Synthesize(Guidance):
    """The training set that the teacher draws."""

    num_samples: Positive = 10_000
    batch_size: Positive = 64
    shard_size: Positive = 1_000
    """Samples a shard; a resumed run loses at most one."""
    seed: Seed = 1
    """Of noise and labels. Apart from the evaluation's seeds, so that the two share no noise."""


class Data(Section):
    """The training set: a directory written by `litconvert latents`, or drawn by the teacher."""

    path: str | None = None
    """None: the teacher draws it, as `synthesize` says."""
    synthesize: Synthesize = Synthesize()


class Diffusion(Section):
    """The forward process the source was trained with."""

    num_timesteps: Positive = 1000
    """Linear betas, 1e-4 to 0.02 at 1000 timesteps (scaled by 1000 / num_timesteps otherwise)."""


class Stage(Section):
    """What both kinds of stage share: the length and the schedule."""

    steps: Positive
    batch_size: Positive = 256
    """Samples a step, over all processes and accumulation."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Fraction = 0.9999
    """The EMA starts from the stage's first weights, with decay min(ema_decay, (1 + s) / (10 + s)) at step s."""
    condition_dropout: Fraction = 0.1
    """Share of samples whose condition is dropped, for student and teacher alike."""


class AttentionTransfer(Stage):
    """Each fresh attention learns its teacher layer's output, on the teacher's own activations."""

    objective: Literal["attention_transfer"]


class Hybrid(Stage):
    """The paper's loss: DDPM plus the teacher's noise and variance."""

    objective: Literal["hybrid"]
    variational_bound: bool = True
    """Train the variance with the variational bound too, as DiT does."""
    noise_weight: Annotated[float, Field(ge=0)] = 0.5
    """Of the noise term (lambda1 in the paper)."""
    variance_weight: Annotated[float, Field(ge=0)] = 0.05
    """Of the variance term (lambda2 in the paper)."""


class Distill(Section):
    """The stages, and how they run."""

    teacher: Source | None = None
    """Another, say larger, teacher for the hybrid stage; None: the source."""
    stages: tuple[Annotated[AttentionTransfer | Hybrid, Field(discriminator="objective")], ...] = ()
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 autocast where the device computes it in hardware."""
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    sample_every: Positive | None = None
    """Draw samples every so many steps; None: at the end only."""


class Sample(Guidance):
    """The pictures that are drawn."""

    num_images: Positive | None = None
    """Classes or prompts are cycled to so many. None: 40 of a model of classes, one for each prompt."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = PROMPTS
    """Of a model of captions."""
    negative_prompt: str | None = None
    """What guidance leads away from. None: the model's own null caption where it has one, else the empty prompt."""
    seed: Seed = 0
    batch_size: Positive = 64


class Evaluate(Guidance):
    """The metrics, against the teacher's own samples."""

    features: Literal["digits"] | None = None
    """The classifier whose features and verdicts are used; None: no metrics are known for this data."""
    num_samples: Positive = 1000
    seeds: tuple[Seed, ...] = (100, 101, 102)
    """One evaluation each; the mean and the spread are reported."""
    reference_seed: Seed = 99
    """Of the teacher's reference samples; never one of `seeds`."""
    batch_size: Positive = 250

    @model_validator(mode="after")
    def _independent(self) -> "Evaluate":
        if self.reference_seed in self.seeds:
            raise ValueError(f"reference_seed {self.reference_seed} is one of seeds: reference and samples share noise")
        return self


class Publish(Section):
    """Where `run` pushes the result."""

    repo_id: str | None = None
    private: bool = False
    pipeline: bool = False
    """Lay out a full diffusers pipeline."""


class Recipe(Section):
    """Everything one conversion needs, in the order of the line."""

    seed: Seed = 0
    """Of fresh weights and of every draw in distillation."""
    source: Source = Source()
    diffusion: Diffusion = Diffusion()
    student: Student = Student()
    inherit: Inherit = Inherit()
    data: Data = Data()
    distill: Distill = Distill()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()

    def to_yaml(self) -> str:
        """Every key resolved."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


_NUMBER = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, as editors read them: `no` and `12:30` are strings, `1e-3` is a number.

    Aliases are refused: a recipe may come from the Hub, and a few lines of them can expand to any size.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not read, write the value out"
            mark = cast(yaml.Mark, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than a string."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """YAML as nodes, which know their lines, and as plain data."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and, for every key, where its value came from."""

    name: str
    recipe: Recipe
    origins: dict[str, str] = field(repr=False)

    def rows(self) -> list[tuple[str, Any, str]]:
        """(key, value, origin) of every resolved key, in order."""
        return [
            (key, value, self.origins.get(key, "default"))
            for key, value in flatten(self.recipe.model_dump(mode="json"))
        ]


def flatten(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves with dotted keys; lists of mappings are walked, other lists are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, tree


def find_recipe(name: str) -> Path:
    """A recipe's file, from a packaged name, a path or a Hub id.

    Raises UsageError when there is none, and says what is near.
    """
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists() and path.suffix not in (".yaml", ".yml"):
        from litconvert.hub import download

        return download(name, "recipe.yaml", revision=None)
    raise UsageError(
        f"no recipe {name!r}: neither a packaged recipe nor a file{did_you_mean(name, packaged)}; "
        "`litconvert recipes ls` lists the packaged ones"
    )


@dataclass
class _Tree:
    """A YAML file as plain data, with the line of every key."""

    data: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]


def _read_yaml(path: Path) -> _Tree:
    try:
        node, data = _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file, so not a recipe") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply to be a recipe") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, location: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, key.value)
                if here in lines:
                    raise UsageError(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice; remove one")
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*location, index)] = value.start_mark.line + 1
                walk(value, (*location, index))

    walk(node, ())
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1: a recipe is a mapping of sections, not a {type(data).__name__}")
    return _Tree(data, lines)


def _override(data: dict[str, Any], assignment: str) -> tuple[str, Any]:
    """Set `a.b.0.c=value` in plain data; returns the key and the value."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {assignment!r}: write it as key=value, for example --set student.conv_size=3")
    parts = tuple(key.strip().split("."))
    try:
        _, value = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--set {assignment!r}: the value is not valid YAML") from error
    target: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                known = f"0 to {len(target) - 1}" if target else "nothing"
                raise UsageError(f"--set {key}: {'.'.join(parts[:depth])} is a list that holds {known}, not {part!r}")
            if last:
                target[int(part)] = value
            else:
                target = target[int(part)]
        elif isinstance(target, dict):
            if last:
                target[part] = value
            else:
                if target.get(part) is None:
                    target[part] = {}
                target = target[part]
        else:
            raise UsageError(f"--set {key}: {'.'.join(parts[:depth])} is a value, not a section")
    return ".".join(parts), value


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the section that holds `location`, for did-you-mean."""
    schema = Recipe.model_json_schema()

    def expand(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return expand(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        options = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
        return [deep for option in options for deep in expand(option)] or [node]

    nodes = [schema]
    for part in location[:-1]:
        children = []
        for node in nodes:
            child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
            children += expand(child) if child else []
        nodes = children or nodes  # a discriminator's tag is in pydantic's location, but is no level of the file
    return sorted({key for node in nodes for key in node.get("properties", ())})


def _problems(
    error: ValidationError, source: str, lines: dict[tuple[str | int, ...], int], sets: set[str]
) -> list[str]:
    problems = []
    for detail in error.errors():
        location = tuple(part for part in detail["loc"] if part not in STAGES)
        key = ".".join(str(part) for part in location)
        nearest = location
        while nearest and nearest not in lines:
            nearest = nearest[:-1]
        where = f"{source}:{lines[nearest]}" if nearest else source
        if any(f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.") for given in sets):
            where = "--set"
        if detail["type"] == "extra_forbidden":
            message = f"unknown key{did_you_mean(str(location[-1]), _known_keys(location))}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif detail["type"] == "union_tag_not_found":
            message = f"objective is missing; there are {' and '.join(STAGES)}"
        elif detail["type"] == "union_tag_invalid":
            tag = str(detail["ctx"]["tag"])
            message = f"unknown objective {tag!r}{did_you_mean(tag, STAGES)}; there are {' and '.join(STAGES)}"
        else:
            message = detail["msg"].removeprefix("Value error, ")
            message = message.replace("a valid array", "a list").replace("an object", "a section of key: value")
            message = message[:1].lower() + message[1:]
            if not isinstance(detail["input"], dict):
                message += f", got {detail['input']!r}"
        problems.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
    return problems


def resolve(name: str, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Read a recipe and apply `key=value` overrides: defaults < recipe < overrides.

    Raises UsageError that lists every problem at once, each with its file and line.
    """
    path = find_recipe(name)
    tree = _read_yaml(path)
    return _resolve(tree.data, overrides, label=name if name in packaged_recipes() else str(path), lines=tree.lines)


def resolve_data(data: dict[str, Any], overrides: Sequence[str], label: str) -> ResolvedRecipe:
    """The same for a recipe that is already plain data."""
    return _resolve(json.loads(json.dumps(data)), overrides, label=label, lines={})


def _resolve(
    data: dict[str, Any], overrides: Sequence[str], *, label: str, lines: dict[tuple[str | int, ...], int]
) -> ResolvedRecipe:
    origins = {}
    for location, line in lines.items():
        origins[".".join(str(part) for part in location)] = f"{label}:{line}"
    sets = set()
    for assignment in overrides:
        key, value = _override(data, assignment)
        sets.add(key)
        origins = {old: origin for old, origin in origins.items() if not old.startswith(f"{key}.")}
        origins |= {leaf: "--set" for leaf, _ in flatten(value, key)}
    try:
        # As JSON, in which a list may stand for a tuple: strict, so that nothing is coerced (yes is no integer).
        recipe = Recipe.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems = _problems(error, label, lines, sets)
        raise UsageError("\n".join(problems)) from error
    return ResolvedRecipe(name=label, recipe=recipe, origins=origins)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "litconvert recipe"
    return schema


def read_recorded(path: Path) -> Recipe:
    """The resolved recipe of a model or run directory.

    Raises LitconvertError when it is missing or not ours.
    """
    if not path.is_file():
        raise LitconvertError(f"{path} is missing: {path.parent} was not written by litconvert, or is incomplete")
    return resolve(str(path)).recipe
