"""Recipes: what is packaged, which value wins and from where, and that nothing misspelt or coerced gets through."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.packaged import packaged_recipes, summary
from litconvert.recipe.resolve import find_recipe, json_schema, read_recorded, resolve, resolve_data
from litconvert.recipe.schema import Hybrid, Recipe, Source, Vae
from tests.helpers.checkpoint_files import dit_shapes, pixart_shapes, write_hollow
from tests.helpers.command import command

NAMES = sorted(packaged_recipes())
PAPERS = [name for name in NAMES if name.endswith("-paper")]
# Ours, the default for a source of their size.
OURS = [name.removesuffix("-paper") for name in PAPERS] + ["pixart-alpha-256", "pixart-alpha-sam-256"]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error that a recipe of this text gives, its path cut down to `recipe.yaml`."""
    with pytest.raises(UsageError) as caught:
        resolve(str(write(folder, text)), overrides)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "recipe.yaml").splitlines()


def attention_of(value: Any) -> tuple[str, ...]:
    return resolve_data({"inherit": {"attention": value}}, (), "test").recipe.inherit.attention


# What is packaged


def test_the_promised_recipes_are_packaged() -> None:
    dit = {f"dit-{size}-2-256" for size in ("s", "b", "l", "xl")} | {"dit-xl-2-512", "sit-xl-2-256"}
    pixart = {f"pixart-sigma-{size}" for size in ("512", "1024", "2k")} | {"pixart-alpha-512", "pixart-alpha-1024"}
    both = dit | pixart | {"digits", "emoji", "emoji-32"}
    alone = {
        "pixart-alpha-256",
        "pixart-alpha-sam-256",
        "digits-teacher",
        "emoji-teacher",
        "emoji-32-teacher",
    }
    assert both | {f"{name}-paper" for name in both} | alone == set(NAMES)


PUBLISHED = [name for name in OURS if not name.startswith(("digits", "emoji", "pixart-alpha-sam"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_source_without_a_recipe_finds_its_own(tmp_path: Path, name: str) -> None:
    """Each packaged recipe is the one for a checkpoint of its size, and its hints fit that checkpoint."""
    settings = resolve(name).recipe.source
    size = settings.sample_size or 32
    if name.startswith("pixart"):
        shapes = pixart_shapes(
            sample_size=size, tokens=120 if "alpha" in name else 300, micro_conditions=name == "pixart-alpha-1024"
        )
    else:
        width, layers = {"s": (384, 12), "b": (768, 12), "l": (1024, 24)}.get(name.split("-")[1], (1152, 28))
        shapes = dit_shapes(width=width, layers=layers, sample_size=size)
    path = write_hollow(tmp_path / "source.safetensors", shapes)
    overrides = ["source.family=sit"] if name.startswith("sit") else []
    plan = litconvert.plan(path, None, overrides)
    assert plan.recipe.distill == resolve(name).recipe.distill
    assert plan.config.linear_num_heads == resolve(name).recipe.student.num_attention_heads


@pytest.mark.parametrize(("name", "steps", "batch_size"), [("512", 106_000, 384), ("1024", 155_000, 96)])
def test_the_paper_s_text_to_image_runs_have_the_paper_s_numbers(name: str, steps: int, batch_size: int) -> None:
    recipe = resolve(f"pixart-sigma-{name}-paper").recipe
    (stage,) = recipe.distill.stages
    assert isinstance(stage, Hybrid)
    assert (stage.steps, stage.batch_size, stage.learning_rate, stage.warmup_steps) == (steps, batch_size, 2e-5, 1000)
    assert (stage.max_grad_norm, stage.weight_decay) == (0.01, 0.0)
    assert (stage.noise_weight, stage.variance_weight) == (1.0, 0.05)
    assert (recipe.distill.teacher is not None) == (name == "1024")  # whose source is the 512px student


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_is_valid_and_opens_with_its_command_schema_and_summary(name: str) -> None:
    first, second = packaged_recipes()[name].read_text().splitlines()[:2]
    # The form that editors look for: the modeline opens the comment, and the schema's name ends at a space.
    assert re.match(r"# yaml-language-server: \$schema=recipe\.schema\.json ", first)
    # What needs a data set of its own is not one command: it opens with the plan, or with the training.
    commands = rf"run {name}( --source \S+)?|plan (\S+ )?--recipe {name}|train \S+ --recipe {name} --data \S+"
    assert re.search(rf"litconvert ({commands})$", first)
    assert second.startswith("# ")
    assert summary(packaged_recipes()[name]) == second[2:]
    assert command("recipes", "validate", name).out == f"{name}: valid\n"


@pytest.mark.parametrize(
    ("name", "heads", "sample_size", "steps", "batch_size", "guidance"),
    [
        ("dit-s-2-256", 2, 32, 100_000, 256, 1.0),
        ("dit-b-2-256", 3, 32, 100_000, 256, 1.0),
        ("dit-l-2-256", 4, 32, 100_000, 256, 1.0),
        ("dit-xl-2-256", 4, 32, 1_400_000, 256, 1.5),
        ("dit-xl-2-512", 4, 64, 700_000, 128, 1.5),
    ],
)
def test_the_paper_s_recipes_have_the_paper_s_numbers(
    name: str, heads: int, sample_size: int, steps: int, batch_size: int, guidance: float
) -> None:
    recipe = resolve(f"{name}-paper").recipe
    student = recipe.student
    assert (student.num_attention_heads, student.kernel, student.conv_size, student.eps) == (heads, "relu", 5, 1e-6)
    assert recipe.inherit.attention == ()
    (stage,) = recipe.distill.stages
    assert stage.objective == "hybrid"
    assert (stage.steps, stage.batch_size, stage.learning_rate, stage.schedule) == (steps, batch_size, 1e-4, "constant")
    assert (stage.weight_decay, stage.ema_decay, stage.condition_dropout) == (0.0, 0.9999, 0.1)
    assert (stage.noise_weight, stage.variance_weight, stage.variational_bound) == (0.5, 0.05, True)
    sample = recipe.sample
    assert (sample.scheduler, sample.steps, sample.guidance_channels) == ("ddpm", 250, 3)
    assert sample.guidance == guidance
    assert recipe.source.sample_size == sample_size
    # Its config.json says nothing of a scaling, so it is Stable Diffusion's 0.18215, diffusers' default.
    assert recipe.source.vae == Vae(path="stabilityai/sd-vae-ft-ema")
    size = "-".join(name.split("-")[1:3])
    if size == "xl-2":
        assert recipe.source.path == f"facebook/DiT-XL-2-{8 * sample_size}"
        assert recipe.source.license.id == "cc-by-nc-4.0"
        assert recipe.distill.teacher is None
    else:
        assert recipe.source.path is None
        assert recipe.distill.teacher is not None
        assert recipe.distill.teacher.path == "facebook/DiT-XL-2-256"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dit-")])
def test_each_number_of_a_recipe_for_a_published_size_says_where_it_is_from(name: str) -> None:
    text = packaged_recipes()[name].read_text()
    method = text[text.index("student:") : text.index("data:")] + text[text.index("distill:") :]
    numbers = [line for line in method.splitlines() if re.search(r":\s+[\d.]+", line.partition("#")[0])]
    assert len(numbers) > 10
    marks = r"\[(paper|slides|page|listing|audit|calc)\]|page\]|ours|open|likewise"
    assert [line for line in numbers if not re.search(marks, line.partition("#")[2])] == []


@pytest.mark.parametrize("name", OURS)
def test_ours_is_the_paper_s_with_one_short_stage_at_a_small_rate_and_a_strong_teacher(name: str) -> None:
    paper = f"{name}-paper" if f"{name}-paper" in PAPERS else "pixart-alpha-512-paper"
    mine, theirs = (resolve(one).recipe for one in (name, paper))
    assert theirs.solve is None
    parts = {"distill": theirs.distill, "source": theirs.source, "solve": None}
    if name in ("digits", "emoji-32"):  # for two cores: the teacher's heads, and less to wait for
        parts |= {key: getattr(theirs, key) for key in ("student", "inherit", "data", "evaluate")}
    assert mine.model_copy(update=parts) == theirs
    assert mine.solve is not None
    assert mine.distill.teacher == theirs.distill.teacher
    if paper == f"{name}-paper" and name != "pixart-sigma-1024":  # which goes on from its own 512px student
        assert mine.source == theirs.source
    (stage,), (long,) = mine.distill.stages, theirs.distill.stages
    assert stage.schedule == "cosine"
    measured = {"digits": (100, 16, 5e-5), "emoji-32": (500, 16, 5e-4)}
    if name in measured:
        assert (stage.steps, stage.batch_size, stage.learning_rate) == measured[name]
    else:
        images = 6.4e6 if name.startswith("pixart") else {"emoji": 153_600}.get(name, 12.8e6)
        assert 0 <= images - stage.steps * stage.batch_size < stage.batch_size
        assert stage.learning_rate == pytest.approx(0.3 * long.learning_rate)
        # The paper has no 2048px run: how long one would be is open in both.
        assert name == "pixart-sigma-2k" or stage.steps * stage.batch_size < long.steps * long.batch_size
    if isinstance(stage, Hybrid):
        assert (stage.noise_weight, stage.variance_weight) == (10, 1)
    else:
        assert stage.velocity_weight == 10
    text = packaged_recipes()[name].read_text()
    assert ("open: not run on a GPU yet" in text) == (name not in ("digits", "emoji-32"))
    assert "was best" in text


def test_the_digits_recipe_of_the_paper_starts_fresh_and_trains_800_small_steps() -> None:
    recipe = resolve("digits-paper").recipe
    (stage,) = recipe.distill.stages
    assert isinstance(stage, Hybrid)
    assert recipe.inherit.attention == ()
    assert (stage.steps, stage.batch_size, stage.learning_rate) == (800, 16, 1e-3)
    assert (stage.schedule, stage.ema_decay, stage.noise_weight, stage.variance_weight) == ("cosine", 0.99, 0.5, 0.05)


# Which value wins


def test_defaults_lose_to_the_recipe_and_the_recipe_to_overrides_and_each_origin_is_shown(tmp_path: Path) -> None:
    text = "# a comment\nstudent:\n  kernel: gelu\n  conv_size: 3\n"
    path = write(tmp_path, text)
    resolved = resolve(str(path), ["student.conv_size=7"])
    rows = {key: (value, origin) for key, value, origin in resolved.rows()}
    assert rows["student.num_attention_heads"] == (4, "default")
    assert rows["student.kernel"] == ("gelu", f"{path}:3")
    assert rows["student.conv_size"] == (7, "--set")
    assert [key for key in rows if not key.startswith("student.")] != []
    assert resolve(str(path)).recipe.student.conv_size == 3


def test_origins_go_down_to_the_keys_of_each_stage() -> None:
    rows = {key: origin for key, _, origin in resolve("digits", ["distill.stages.0.steps=5"]).rows()}
    lines = packaged_recipes()["digits"].read_text().splitlines()
    assert rows["distill.stages.0.steps"] == "--set"
    place = rows["distill.stages.0.schedule"].removeprefix("digits:")
    assert lines[int(place) - 1].strip() == "schedule: cosine"
    assert rows["distill.stages.0.weight_decay"] == "default"


def test_an_override_of_a_whole_section_is_the_origin_of_every_key_in_it() -> None:
    rows = resolve("digits", ["distill.stages=[{objective: hybrid, steps: 3}]"]).rows()
    stages = {key: origin for key, _, origin in rows if key.startswith("distill.stages.")}
    assert stages["distill.stages.0.steps"] == "--set"
    assert {origin for origin in stages.values()} == {"--set", "default"}


def test_recipes_show_prints_every_key_with_its_origin() -> None:
    shown = command("recipes", "show", "digits", "--set", "student.conv_size=3", "--json")
    assert shown.code == 0
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(shown.out)}
    assert rows["student.conv_size"] == (3, "--set")
    assert set(rows) == {key for key, _, _ in resolve("digits").rows()}
    assert "--set" in command("recipes", "show", "digits", "--set", "student.conv_size=3").out


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("evaluate.seeds=[1, 2]", "evaluate.seeds", [1, 2]),
        ("distill.stages.0.steps=7", "distill.stages.0.steps", 7),
        ("data.path=null", "data.path", None),
        ("data.path=", "data.path", None),
        ("data.path=a=b", "data.path", "a=b"),
        ("distill.stages.0.learning_rate=1e-3", "distill.stages.0.learning_rate", 1e-3),
        ("distill.stages.0.learning_rate=1", "distill.stages.0.learning_rate", 1.0),
        ("distill.teacher.path=big.pt", "distill.teacher.path", "big.pt"),
        ("distill.mixed_precision=no", "distill.mixed_precision", "no"),
        ("publish.private=true", "publish.private", True),
        (" student.conv_size = 3", "student.conv_size", 3),
    ],
)
def test_set_takes_yaml_values_and_indices(assignment: str, key: str, value: object) -> None:
    rows = {row[0]: row[1:] for row in resolve("digits", [assignment]).rows()}
    assert rows[key] == (value, "--set")


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("student.conv_size", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("student.conv_siz=3", "student.conv_siz: unknown key (did you mean 'conv_size'?)"),
        ("studnt.conv_size=3", "studnt: unknown key (did you mean 'student'?)"),
        ("distill.stages.0.stepz=3", "distill.stages.0.stepz: unknown key (did you mean 'steps'?)"),
        ("distill.stages.7.steps=3", "distill.stages is a list that holds 0 to 0, not '7'"),
        ("distill.stages.first.steps=3", "distill.stages is a list that holds 0 to 0, not 'first'"),
        ("seed.x=3", "seed is a value, not a section"),
        ("evaluate.seeds=[1, -2]", "--set: evaluate.seeds.1: input should be greater than or equal to 0, got -2"),
        ("source=[", "not valid YAML"),
        ("student.kernel=rleu", "--set: student.kernel: input should be 'relu', 'gelu' or 'focused', got 'rleu'"),
    ],
)
def test_a_wrong_override_is_refused_with_its_reason(assignment: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        resolve("digits", [assignment])


# What is refused


def test_every_problem_is_listed_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
studnt: {}
student:
  conv_siz: 3
  kernel: rleu
distill:
  stages:
    - objective: hybird
      steps: 3
    - objective: hybrid
      stepz: 3
    - steps: 3
    - {objective: attention_transfer, steps: 3}
evaluate: {seeds: [99]}
"""
    lines = refusal(tmp_path, text, "seed=-1")
    assert sorted(lines) == sorted(
        [
            "recipe.yaml:1: studnt: unknown key (did you mean 'student'?)",
            "recipe.yaml:3: student.conv_siz: unknown key (did you mean 'conv_size'?)",
            "recipe.yaml:4: student.kernel: input should be 'relu', 'gelu' or 'focused', got 'rleu'",
            "recipe.yaml:7: distill.stages.0: unknown objective 'hybird' (did you mean 'hybrid'?); "
            "there are hybrid and flow_matching",
            "recipe.yaml:9: distill.stages.1.steps: is missing",
            "recipe.yaml:10: distill.stages.1.stepz: unknown key (did you mean 'steps'?)",
            "recipe.yaml:11: distill.stages.2: objective is missing; there are hybrid and flow_matching",
            "recipe.yaml:12: distill.stages.3: `convert` solves the attention now, there is no attention_transfer: "
            "leave the stage out",
            "recipe.yaml:13: evaluate: reference_seed 99 is one of seeds: reference and samples share noise",
            "--set: seed: input should be greater than or equal to 0, got -1",
        ]
    )


def test_validate_lists_the_problems_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sed: 1\n")
    (tmp_path / "b.yaml").write_text("seed: 1\nstuden: {}\n")
    outcome = command("recipes", "validate", "digits", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert (outcome.code, outcome.out) == (2, "digits: valid\n")
    assert f"{tmp_path / 'a.yaml'}:1: sed: unknown key (did you mean 'seed'?)" in outcome.err
    assert f"{tmp_path / 'b.yaml'}:2: studen: unknown key (did you mean 'student'?)" in outcome.err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nstudent: {}\nseed: 2\n", "recipe.yaml:3: 'seed' is given twice; remove one"),
        (
            "student:\n  conv_size: 3\n  conv_size: 5\n",
            "recipe.yaml:3: 'conv_size' is given twice; remove one",
        ),
        ("seed: 1\nstudent: [\n", "recipe.yaml:3: not valid YAML: "),
        ("seed: 1\n\tstudent: 3\n", "recipe.yaml:2: not valid YAML: "),
        ("seed: !!python/object/apply:os.system [ls]\n", "recipe.yaml:1: not valid YAML: "),
        ("seed: &a 1\nsample: {seed: *a}\n", "recipe.yaml:2: not valid YAML: aliases (*name) are not read"),
        ("- seed\n", "recipe.yaml:1: a recipe is a mapping of sections, not a list"),
        ("just words\n", "recipe.yaml:1: a recipe is a mapping of sections, not a str"),
        ("a: " + "[" * 900 + "]" * 900, "recipe.yaml: nested too deeply"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    assert refusal(tmp_path, text)[0].startswith(line)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="not a text file"):
        resolve(str(tmp_path / "recipe.yaml"))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert resolve(str(write(tmp_path, ""))).recipe == Recipe()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("student: {num_attention_heads: 4}", 'student: {num_attention_heads: "4"}'),
        ("seed: 1", "seed: yes"),
        ("seed: 1", "seed: true"),
        ("seed: 1", "seed: 1.5"),
        ("seed: 1", "seed: 1.0"),
        ("seed: 10", "seed: 010"),
        ("publish: {private: true}", "publish: {private: yes}"),
        ("publish: {private: false}", "publish: {private: 0}"),
        ("student: {eps: 1e-6}", 'student: {eps: "1e-6"}'),
        ("student: {eps: 1e-6}", "student: {eps: .inf}"),
        ("student: {eps: 1e-6}", "student: {eps: .nan}"),
        ('source: {path: "7"}', "source: {path: 7}"),
        ("evaluate: {seeds: [1]}", "evaluate: {seeds: 1}"),
        ("student: {softmax_layers: [0]}", "student: {softmax_layers: {0: 1}}"),
        ("student: {softmax_layers: [0]}", "student: {softmax_layers: [true]}"),
        ("sample: {}", "sample: 3"),
        ("distill: {mixed_precision: no}", "distill: {mixed_precision: false}"),
    ],
)
def test_no_value_is_coerced_into_another_type(tmp_path: Path, good: str, bad: str) -> None:
    resolve(str(write(tmp_path, good)))
    assert len(refusal(tmp_path, bad)) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", ""),
        ([], ""),
        ("q", "q"),
        ("o", "o"),
        ("k+v", "kv"),
        ("v + k", "kv"),
        ("q, k", "qk"),
        (["o", "q"], "qo"),
        (["q", "q"], "q"),
        ("q+k+v+o", "qkvo"),
        ("all", "qkvo"),
    ],
)
def test_inherit_attention_takes_none_all_and_every_combination(value: object, expected: str) -> None:
    assert attention_of(value) == tuple(expected)


@pytest.mark.parametrize("value", ["qk", "some", "q+w", ["all"], ["q", 3], 3, None, True, {"q": 1}, ""])
def test_inherit_attention_refuses_anything_else(value: object) -> None:
    with pytest.raises(UsageError, match=r"inherit\.attention: must be none, all, or a combination of q, k, v and o"):
        attention_of(value)


def test_the_reference_seed_may_not_be_one_of_the_seeds() -> None:
    resolve("digits", ["evaluate.reference_seed=7", "evaluate.seeds=[1, 2]"])
    with pytest.raises(UsageError, match=r"--set: evaluate: reference_seed 2 is one of seeds"):
        resolve("digits", ["evaluate.reference_seed=2", "evaluate.seeds=[1, 2]"])


# Finding one


def test_a_recipe_is_found_by_name_by_path_and_in_a_model_directory(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 5\n")
    assert find_recipe("digits") == packaged_recipes()["digits"]
    assert find_recipe(str(path)) == find_recipe(str(tmp_path)) == path
    assert read_recorded(path).seed == 5
    with pytest.raises(LitconvertError, match="missing"):
        read_recorded(tmp_path / "other" / "recipe.yaml")


@pytest.mark.parametrize("name", ["digts", "no/such/recipe.yaml", "recipe.yml"])
def test_an_unknown_recipe_is_refused_with_the_command_that_lists_them(name: str) -> None:
    with pytest.raises(UsageError, match=r"no recipe .*`litconvert recipes ls` lists") as caught:
        find_recipe(name)
    assert ("did you mean 'digits'?" in str(caught.value)) == (name == "digts")


# Written down


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_written_down_is_read_as_the_same(tmp_path: Path, name: str) -> None:
    recipe = resolve(name, ["distill.mixed_precision=no"]).recipe
    text = recipe.to_yaml()
    assert resolve(str(write(tmp_path, text))).recipe == recipe
    # In either version of YAML.
    assert yaml.safe_load(text) == recipe.model_dump(mode="json")


@pytest.mark.parametrize(
    "path", ["no", "null", "~", "1e5", "1e-3", "010", "12:30", "2001-01-01", "0x1f", "a: b", "1_0"]
)
def test_a_string_that_looks_like_something_else_stays_a_string(tmp_path: Path, path: str) -> None:
    recipe = Recipe(source=Source(path=path))
    assert resolve(str(write(tmp_path, recipe.to_yaml()))).recipe == recipe
    assert yaml.safe_load(recipe.to_yaml())["source"]["path"] == path


# The JSON schema


def fits(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a JSON schema accepts a value: the keywords that ours uses, and no other."""
    known = {"$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum"}
    known |= {
        "discriminator",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "oneOf",
    }
    known |= {"pattern", "prefixItems", "properties", "required", "title", "type"}
    assert set(schema) <= known
    if "$ref" in schema and not fits(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root):
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    if kind == "number" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        return False
    if kind in kinds and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if "anyOf" in schema and not any(fits(option, value, root) for option in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(option, value, root) for option in schema["oneOf"]) != 1:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        within = value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
        above = value > schema.get("exclusiveMinimum", value - 1)
        if not within or not above or value >= schema.get("exclusiveMaximum", value + 1):
            return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        prefix = schema.get("prefixItems", [])
        pairs = [*zip(prefix, value, strict=False), *((schema.get("items", {}), one) for one in value[len(prefix) :])]
        return all(fits(inner, one, root) for inner, one in pairs)
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        if set(schema.get("required", ())) - set(value) or (
            schema["additionalProperties"] is False and set(value) - set(properties)
        ):
            return False
        return all(fits(properties[key], one, root) for key, one in value.items())
    return True


STAGE = {"objective": "hybrid", "steps": 1}


@pytest.mark.parametrize(
    "data",
    [
        {},
        *(
            {"inherit": {"attention": value}}
            for value in ("none", "all", "k+v", "q , o", ["q", "k"], [], "qk", ["w"], 3)
        ),
        {"distill": {"stages": [STAGE, {"objective": "flow_matching", "steps": 1}]}},
        {"distill": {"stages": [{"objective": "attention_transfer", "steps": 1}]}},
        {"distill": {"stages": [{**STAGE, "betas": [0.9, 0.95]}]}},
        {"distill": {"stages": [{**STAGE, "betas": [0.9]}]}},
        {"distill": {"stages": [{"objective": "hybrid"}]}},
        {"distill": {"stages": [{"steps": 1}]}},
        {"distill": {"stages": [{"objective": "flow_matching", "steps": 1, "noise_weight": 1}]}},
        {"distill": {"teacher": None}},
        {"distill": {"teacher": {"path": "x"}}},
        {"distill": {"mixed_precision": "no"}},
        {"distill": {"mixed_precision": False}},
        {"student": {"conv_size": 5}},
        {"student": {"conv_size": 4}},
        {"student": {"eps": 0}},
        {"student": {"eps": 1}},
        {"seed": -1},
        {"seed": 2**32 - 1},
        {"seed": 2**32},
        {"seed": "1"},
        {"seed": True},
        {"source": {"vae": None}},
        {"source": {"vae": {}}},
        {"sample": {"guidance": 0.5}},
        {"unknown": 1},
    ],
    ids=json.dumps,
)
def test_the_json_schema_accepts_what_the_recipe_accepts(data: dict[str, Any]) -> None:
    schema = json_schema()
    try:
        resolve_data(data, (), "test")
        accepted = True
    except UsageError:
        accepted = False
    assert fits(schema, data, schema) == accepted


@pytest.mark.parametrize("name", NAMES)
def test_the_json_schema_accepts_the_packaged_recipes_as_written_and_as_resolved(name: str) -> None:
    schema = json_schema()
    assert fits(schema, yaml.safe_load(packaged_recipes()[name].read_text()), schema)
    assert fits(schema, resolve(name).recipe.model_dump(mode="json"), schema)


def test_recipes_schema_prints_it_and_every_key_is_described_or_plain() -> None:
    printed = json.loads(command("recipes", "schema").out)
    assert printed == json.loads(json.dumps(json_schema()))
    assert printed["$schema"].startswith("https://json-schema.org/")
    assert "none | all" in printed["$defs"]["Inherit"]["properties"]["attention"]["description"]
