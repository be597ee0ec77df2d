"""The layer probe: the error of each layer alone, what keeping it costs, and the layers suggested for a budget."""

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import litconvert
from litconvert.data.dataset import open_latents, write_latents
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.layer_costs import choose_layers
from litconvert.evaluation.layer_errors import layer_errors
from litconvert.evaluation.probe import ProbeRequest, probe_inputs
from litconvert.evaluation.probe import probe as measure
from litconvert.evaluation.probe_result import ProbeResult
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import count_macs
from litconvert.recipe.resolve import resolve
from tests.helpers.checkpoint_files import dit_shapes, pixart_shapes, random_state
from tests.helpers.command import command

WIDTH, LAYERS, SIDE, HEADS, CONV = 48, 3, 16, 2, 3
CHANNELS, TOKENS = 20, 7
RECIPE = f"student: {{num_attention_heads: {HEADS}, conv_size: {CONV}}}\nsolve: null\n"


@dataclass(frozen=True)
class Case:
    """A teacher, the student converted from it, and data for both."""

    checkpoint: Path
    recipe: Path
    student: Path
    data: Path

    @property
    def teacher(self) -> LiTTransformer2DModel:
        return litconvert.load(self.checkpoint, recipe=str(self.recipe))

    @property
    def linear(self) -> LiTTransformer2DModel:
        return litconvert.load(self.student)


def latents(count: int = 10) -> Tensor:
    return torch.randn((count, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(5))


def features(count: int = 10) -> list[Tensor]:
    """Captions of different lengths, in float16 as they are stored."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn((1 + n % TOKENS, CHANNELS), generator=generator).half() for n in range(count)]


def write_captions(out: Path, *, text: bool) -> Path:
    from datasets import Array3D, Dataset, Features, Sequence, Value

    columns: dict[str, Any] = {"latent": latents().numpy()}
    kinds: dict[str, Any] = {"latent": Array3D((4, SIDE, SIDE), "float32")}
    if text:
        columns["caption"] = [str(index) for index in range(10)]
        kinds["caption"] = Value("string")
    else:
        columns["caption_features"] = [one.flatten().numpy() for one in features()]
        columns["caption_tokens"] = [len(one) for one in features()]
        kinds |= {"caption_features": Sequence(Value("float16")), "caption_tokens": Value("int64")}
    Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(str(out))
    return out


def make_case(folder: Path, kind: str, state: dict[str, Tensor] | None = None, *sets: str) -> Case:
    """`class`, `velocity` or `caption`; the latter with micro-conditions and a KV-compressed layer."""
    folder.mkdir(exist_ok=True)
    hints = f"num_attention_heads: 4, sample_size: {SIDE}"
    if kind == "caption":
        shapes: dict[str, Any] = {"width": WIDTH, "layers": LAYERS, "sample_size": SIDE, "caption_channels": CHANNELS}
        state = state or random_state(pixart_shapes(**shapes, tokens=TOKENS, micro_conditions=True, kv_compress=(2,)))
        hints += ", family: pixart-alpha, interpolation_scale: 1.0"
        data = write_captions(folder / "data", text=False)
    else:
        state = state or random_state(dit_shapes(width=WIDTH, layers=LAYERS, sample_size=SIDE, rows=6))
        hints += f", family: {'sit' if kind == 'velocity' else 'dit'}"
        data = write_latents(latents(), torch.arange(10) % 5, folder / "data", "random")
    torch.save(state, folder / "teacher.pt")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"source: {{{hints}}}\n{RECIPE}")
    student = litconvert.convert(folder / "teacher.pt", folder / "student", str(recipe), list(sets))
    return Case(folder / "teacher.pt", recipe, student, data)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path / "class", "class")


def gated(layer: int, factor: float) -> dict[str, Tensor]:
    """A DiT in which one layer's attention counts for more, or less: its gate is the third part of its modulation."""
    state = random_state(dit_shapes(width=WIDTH, layers=LAYERS, sample_size=SIDE, rows=6))
    for name in ("weight", "bias"):
        state[f"blocks.{layer}.adaLN_modulation.1.{name}"][2 * WIDTH : 3 * WIDTH] *= factor
    return state


def probe(student: Path, data: Path | None = None, **asked: Any) -> ProbeResult:
    return measure(ProbeRequest(student, data, **asked))


def layers_of(result: ProbeResult) -> list[int]:
    return [row.layer for row in result.rows]


def mark_as_distilled(student: Path, *objectives: str) -> None:
    """Write into a student's record that it went through these stages."""
    record = json.loads((student / "litconvert.json").read_text())
    record["distillation"] = {"stages": [{"objective": objective} for objective in objectives]}
    (student / "litconvert.json").write_text(json.dumps(record))


# Errors


def test_a_layer_that_does_nothing_has_no_error_and_comes_last(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "class", gated(1, 0.0))
    result = probe(case.student, case.data, num_samples=10)
    assert layers_of(result)[-1] == 1
    assert (result.rows[-1].error, result.rows[-1].deviation) == (0.0, 0.0)
    assert all(row.error > 1e-4 for row in result.rows[:-1])


def test_the_layer_that_counts_most_comes_first(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "class", gated(2, 20.0))
    result = probe(case.student, case.data, num_samples=10)
    assert layers_of(result)[0] == 2
    assert [row.error for row in result.rows] == sorted((row.error for row in result.rows), reverse=True)


@pytest.mark.parametrize("kind", ["class", "velocity", "caption"])
def test_errors_are_those_of_hybrids_built_by_hand_in_float64(tmp_path: Path, kind: str) -> None:
    case = make_case(tmp_path / "case", kind)
    result = probe(case.student, case.data, num_samples=12)
    assert sorted(layers_of(result)) == [0, 1, 2]
    teacher, linear = case.teacher.double(), case.linear.double()
    settings = resolve(str(case.student)).recipe
    batches = probe_inputs(open_latents(case.data), ModelConfig.of(linear.config), settings, 12, torch.device("cpu"))
    for row in result.rows:
        kinds = list(teacher.config.attention)
        assert row.keeps == kinds[row.layer]
        kinds[row.layer] = "linear"
        hybrid = LiTTransformer2DModel.from_config({**linear.config, "attention": kinds}).double().eval()
        own = f"blocks.{row.layer}.attn."
        state = {name: value for name, value in teacher.state_dict().items() if not name.startswith(own)}
        state |= {name: value for name, value in linear.state_dict().items() if name.startswith(own)}
        hybrid.load_state_dict(state, strict=True)
        expected = []
        for noisy, timestep, condition in batches:
            with torch.no_grad():
                mine, theirs = (
                    model(noisy.double(), timestep, **condition, return_dict=False)[0] for model in (hybrid, teacher)
                )
            expected += [((a - b).norm() / b.norm()).item() ** 2 for a, b in zip(mine, theirs, strict=True)]
        assert len(expected) == 12
        assert row.error == pytest.approx(sum(expected) / 12, rel=1e-3)
        assert row.deviation == pytest.approx(torch.tensor(expected).std().item(), rel=1e-3)


def test_what_else_the_student_trained_does_not_count(case: Case) -> None:
    """Only its attention modules are taken into the teacher."""
    teacher, linear = case.teacher, case.linear
    batches = [(latents(2), torch.tensor([10, 900]), {"class_labels": torch.tensor([0, 4])})]
    before = layer_errors(teacher, linear, batches)
    for name, parameter in linear.named_parameters():
        if ".attn." not in name:
            parameter.data.zero_()
    after = layer_errors(teacher, linear, batches)
    assert all(torch.equal(before[layer], after[layer]) for layer in range(LAYERS))


def test_the_models_are_left_as_they_were_also_when_measuring_fails(case: Case) -> None:
    teacher, linear = case.teacher, case.linear
    modules = [dict(model.named_modules()) for model in (teacher, linear)]
    batch = (latents(2), torch.tensor([10, 900]), {"class_labels": torch.tensor([0, 4])})
    layer_errors(teacher, linear, [batch])
    broken = (torch.full_like(latents(2), torch.nan), *batch[1:])
    with pytest.raises(LitconvertError, match="NaN"):
        layer_errors(teacher, linear, [broken])
    for model, before in zip((teacher, linear), modules, strict=True):
        now = dict(model.named_modules())
        assert now.keys() == before.keys()
        assert all(now[name] is module for name, module in before.items())
        assert not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("kind", ["class", "velocity"])
def test_what_the_models_see_is_the_data_with_noise_as_in_training(tmp_path: Path, kind: str) -> None:
    """Solved for the noise, every input gives independent standard normal values."""
    case = make_case(tmp_path / "case", kind)
    same = latents(1).expand(4, -1, -1, -1).contiguous()
    data = open_latents(write_latents(same, torch.arange(4), tmp_path / "same", "same"))
    inputs = probe_inputs(
        data, ModelConfig.of(case.linear.config), resolve(str(case.student)).recipe, 64, torch.device("cpu")
    )
    noisy, timestep = torch.cat([one[0] for one in inputs]), torch.cat([one[1] for one in inputs])
    if kind == "class":
        assert timestep.dtype == torch.int64
        assert timestep.max() > 800
        schedule = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
        kept = schedule.alphas_cumprod[timestep].sqrt()
        spread = (1 - schedule.alphas_cumprod[timestep]).sqrt()
    else:
        assert 0 <= timestep.min() < 0.1
        assert 0.9 < timestep.max() < 1
        kept, spread = timestep, 1 - timestep
    noise = (noisy - kept.view(-1, 1, 1, 1) * latents(1)) / spread.view(-1, 1, 1, 1)
    certain = noise[spread > 0.05]
    assert abs(certain.mean()) < 0.01
    assert abs(certain.std() - 1) < 0.01
    assert abs(torch.corrcoef(certain.flatten(1)) - torch.eye(len(certain))).max() < 0.2
    labels = torch.cat([one[2]["class_labels"] for one in inputs])
    assert torch.bincount(labels, minlength=5).tolist() == [16, 16, 16, 16, 0]  # none dropped to the null class


def test_more_samples_begin_with_the_same_ones(case: Case) -> None:
    settings, data = resolve(str(case.student)).recipe, open_latents(case.data)
    few, many = (
        probe_inputs(data, ModelConfig.of(case.linear.config), settings, n, torch.device("cpu")) for n in (8, 16)
    )
    assert torch.equal(few[0][0], many[0][0])
    assert probe(case.student, case.data, num_samples=8) == probe(case.student, case.data, num_samples=8)
    other = probe(case.student, case.data, num_samples=8, overrides=["seed=1"])
    assert other.rows != probe(case.student, case.data, num_samples=8).rows


def test_captions_kept_as_text_are_encoded_by_the_recipe_s_t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path / "case", "caption")

    def load_encode(recipe: Any, tokens: int, device: Any) -> Any:
        assert tokens == TOKENS

        def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
            chosen = [features()[int(text)].float() for text in texts]
            padded = [torch.nn.functional.pad(one, (0, 0, 0, tokens - len(one))) for one in chosen]
            mask = torch.tensor([[1] * len(one) + [0] * (tokens - len(one)) for one in chosen])
            return torch.stack(padded), mask

        return encode

    monkeypatch.setattr("litconvert.evaluation.probe.load_encode", load_encode)
    text = probe(case.student, write_captions(tmp_path / "text", text=True), num_samples=10)
    assert text == probe(case.student, case.data, num_samples=10)


# Costs and choice


def test_keeping_a_layer_costs_what_its_core_costs_more(case: Case) -> None:
    """At 512 pixels, 1024 tokens: T D (2 T - 2 d - k^2) a layer, d the width of a linear head."""
    result = probe(case.student, case.data, num_samples=4, image_size=512)
    more = 1024 * WIDTH * (2 * 1024 - 2 * WIDTH // HEADS - CONV**2)
    linear = count_macs(ModelConfig.of(case.linear.config), 64)
    assert (result.tokens, result.linear_macs) == (1024, linear)
    assert [row.macs for row in result.rows] == [more] * LAYERS
    assert [row.macs_ratio for row in result.rows] == pytest.approx([1 + n * more / linear for n in (1, 2, 3)])
    assert count_macs(ModelConfig.of(case.teacher.config), 64) == linear + LAYERS * more


@pytest.mark.parametrize("count", range(LAYERS + 1))
def test_a_budget_keeps_the_layers_of_largest_error_that_fit(case: Case, count: int) -> None:
    free = probe(case.student, case.data, num_samples=4, image_size=512)
    budget = 1 + (count + 0.5) * free.rows[0].macs / free.linear_macs
    result = probe(case.student, case.data, num_samples=4, image_size=512, budget=budget)
    assert result.softmax_layers == tuple(sorted(layers_of(free)[:count]))
    assert [row.suggested for row in result.rows] == [True] * count + [False] * (LAYERS - count)
    kinds = ["softmax" if layer in result.softmax_layers else "linear" for layer in range(LAYERS)]
    assert any("no layer fits" in note for note in result.notes) == (count == 0)
    hybrid = count_macs(ModelConfig.of({**case.linear.config, "attention": kinds}), 64)
    assert hybrid <= budget * free.linear_macs < hybrid + free.rows[0].macs


def test_without_a_budget_nothing_is_suggested(case: Case) -> None:
    result = probe(case.student, case.data, num_samples=4)
    assert (result.softmax_layers, result.recipe, result.linear_milliseconds) == (None, None, None)


def subsets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    return [chosen for size in range(len(layers) + 1) for chosen in itertools.combinations(layers, size)]


@pytest.mark.parametrize("kinds", [[3.0], [3.0, 1.0], [5.0, 2.0, -1.0]], ids=["one", "two", "with a free one"])
def test_the_choice_is_the_best_of_all(kinds: list[float]) -> None:
    draw = random.Random(0)
    for _ in range(50):
        costs = {layer: draw.choice(kinds) for layer in range(8)}
        errors = {layer: draw.random() for layer in range(8)}
        free = sum(cost for cost in costs.values() if cost < 0)
        spare = free + draw.random() * 12
        chosen = choose_layers(errors, costs, spare)
        left = [
            sum(errors[layer] for layer in errors if layer not in kept)
            for kept in subsets(range(8))
            if sum(costs[layer] for layer in kept) <= spare
        ]
        assert sum(costs[layer] for layer in chosen) <= spare
        assert sum(errors[layer] for layer in errors if layer not in chosen) == pytest.approx(min(left))


def test_nothing_is_paid_for_a_layer_without_error() -> None:
    assert choose_layers({0: 0.0, 1: 0.1}, {0: 1.0, 1: 1.0}, 5.0) == [1]


def test_where_softmax_is_not_dearer_it_is_kept_and_said(case: Case) -> None:
    """At 32 pixels there are 4 tokens: linear attention takes the softmax order, and has a convolution besides."""
    result = probe(case.student, case.data, num_samples=4, image_size=32, budget=1.0)
    assert all(row.macs < 0 for row in result.rows)
    assert result.softmax_layers == (0, 1, 2)
    assert any("at 32 pixels softmax attention needs no more" in note for note in result.notes)


def test_kept_layers_stay_kept_and_count(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "class", None, "student.softmax_layers=[1]")
    free = probe(case.student, case.data, num_samples=4, image_size=512)
    assert (free.kept, sorted(layers_of(free))) == ((1,), [0, 2])
    one = free.rows[0].macs / free.linear_macs
    assert free.rows[0].macs_ratio == pytest.approx(1 + 2 * one)
    result = probe(case.student, case.data, num_samples=4, image_size=512, budget=1 + 2.5 * one)
    assert result.softmax_layers == tuple(sorted((1, layers_of(free)[0])))
    with pytest.raises(UsageError, match=r"--budget 1\.01 cannot be met: .* comes to "):
        probe(case.student, case.data, num_samples=4, image_size=512, budget=1.01)


def test_a_kv_compressed_layer_is_kept_as_it_is_and_costs_less(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "caption")
    result = probe(case.student, case.data, num_samples=4, image_size=512)
    rows = {row.layer: row for row in result.rows}
    assert [rows[layer].keeps for layer in range(LAYERS)] == ["softmax", "softmax", "kv_compress"]
    # Cores of 2 T^2 D and 2 T (T / 4) D, and the windows of K and V.
    assert rows[0].macs - rows[2].macs == 2 * 1024 * 768 * WIDTH - 2 * 256 * WIDTH * 4


@pytest.mark.slow
def test_milliseconds_are_measured(case: Case) -> None:
    result = probe(case.student, case.data, num_samples=2, budget_ms=1e6)
    assert result.linear_milliseconds is not None
    assert result.linear_milliseconds > 0
    more = {row.milliseconds for row in result.rows}
    assert len(more) == 1  # layers of a kind have the same shapes, and one time
    extra = more.pop()
    assert extra is not None
    assert result.rows[-1].total_milliseconds == pytest.approx(result.linear_milliseconds + LAYERS * extra)


def test_milliseconds_are_spent(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"linear": 1.0, "softmax": 3.0}
    monkeypatch.setattr("litconvert.evaluation.probe.milliseconds_by_kind", lambda *arguments: times)
    for budget, kept in ((1e6, 3), (8.0, 2), (4.0, 0)):
        result = probe(case.student, case.data, num_samples=2, budget_ms=budget)
        assert result.softmax_layers is not None
        assert len(result.softmax_layers) == kept
        assert {row.milliseconds for row in result.rows} == {2.0}
    with pytest.raises(UsageError, match="--budget-ms 1e-06 cannot be met"):
        probe(case.student, case.data, num_samples=2, budget_ms=1e-6)


# What is written and said


def test_the_written_recipe_converts_to_a_student_with_those_layers(tmp_path: Path, case: Case) -> None:
    out = tmp_path / "new" / "hybrid.yaml"
    result = probe(case.student, case.data, num_samples=4, image_size=512, budget=2.5, write=out)
    assert result.softmax_layers
    assert command("recipes", "validate", out).code == 0
    recorded = resolve(str(case.student)).recipe
    shape = recorded.student.model_copy(update={"softmax_layers": result.softmax_layers})
    assert resolve(str(out)).recipe == result.recipe == recorded.model_copy(update={"student": shape})
    hybrid = litconvert.load(litconvert.convert(None, tmp_path / "hybrid", str(out)))
    kinds = ["softmax" if layer in result.softmax_layers else "linear" for layer in range(LAYERS)]
    assert hybrid.config.attention == kinds
    assert count_macs(ModelConfig.of(hybrid.config), 64) <= 2.5 * result.linear_macs


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path, case: Case) -> None:
    out = tmp_path / "hybrid.yaml"
    out.write_text("mine")
    settings: dict[str, Any] = {"num_samples": 2, "image_size": 512, "budget": 2.5, "write": out}
    with pytest.raises(LitconvertError, match="--force"):
        probe(case.student, case.data, **settings)
    assert out.read_text() == "mine"
    probe(case.student, case.data, force=True, **settings)
    assert resolve(str(out)).recipe.student.softmax_layers


def test_a_solved_student_s_layers_are_solved_for_themselves(tmp_path: Path) -> None:
    """As a walk leaves them, those that repair would seem worse than they are."""
    solving = "solve={states: 48, held_out: 8, drawing_steps: 2, local_steps: 0}"
    case, unsolved = make_case(tmp_path / "solved", "class", None, solving), make_case(tmp_path / "unsolved", "class")
    result = probe(case.student, case.data, num_samples=10)
    found = {row.layer: row.error for row in result.rows}
    unsolved_errors = {row.layer: row.error for row in probe(unsolved.student, unsolved.data, num_samples=10).rows}
    assert all(found[layer] < 0.5 * unsolved_errors[layer] for layer in found)
    assert "each layer was solved once more" in " ".join(result.notes)
    # What a later layer of the walk does in the teacher, where there is nothing to repair.
    settings, device = resolve(str(case.recipe)).recipe, torch.device("cpu")
    inputs = probe_inputs(open_latents(case.data), ModelConfig.of(case.linear.config), settings, 10, device)
    as_it_is = layer_errors(case.teacher, case.linear, inputs)
    assert float(as_it_is[LAYERS - 1].mean()) > 1.1 * found[LAYERS - 1]


def test_an_untrained_student_and_one_trained_as_a_whole_are_noted(case: Case) -> None:
    def notes() -> str:
        return " ".join(probe(case.student, case.data, num_samples=2).notes)

    assert "its linear attention is random" in notes()
    mark_as_distilled(case.student, "hybrid")
    assert "trained more than attention" in notes()


def test_a_run_directory_stands_for_its_model(tmp_path: Path, case: Case) -> None:
    run = tmp_path / "run"
    run.mkdir()
    case.student.rename(run / "model")
    assert probe(run, case.data, num_samples=4).rows == probe(run / "model", case.data, num_samples=4).rows


def test_the_command_prints_the_table_and_the_setting(case: Case) -> None:
    sizes = ("--data", case.data, "-n", 4, "--at", 512, "--budget", 2.5)
    outcome = command("probe", case.student, *sizes)
    assert outcome.code == 0
    expected = probe(case.student, case.data, num_samples=4, image_size=512, budget=2.5)
    assert f"--set 'student.softmax_layers=[{', '.join(map(str, expected.softmax_layers or ()))}]'" in outcome.out
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if line[:1].strip().isdigit() or line.lstrip()[:1].isdigit()]
    assert [int(row[0]) for row in rows if row[1] != "samples;"] == layers_of(expected)
    assert "its linear attention is random" in outcome.err
    as_json = command("probe", case.student, *sizes, "--json", "-q")
    assert json.loads(as_json.out) == json.loads(json.dumps(expected.to_json()))
    assert as_json.err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.05, "budget_ms": 3.0}, "give one of them"),
        ({"num_samples": 1}, "two at least"),
        ({"write": "hybrid.yaml"}, "give --budget or --budget-ms"),
        ({"image_size": 100}, "multiples of 16 pixels"),
        ({"budget": 0.5, "image_size": 512}, r"--budget 0\.5 cannot be met: .* comes to 1; give at least that"),
        ({"data": None}, "no data set is named: give --data"),
    ],
)
def test_what_cannot_be_meant_is_refused(case: Case, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probe(case.student, **{"data": case.data, "num_samples": 2, **settings})


def test_data_of_another_model_is_refused(tmp_path: Path, case: Case) -> None:
    with pytest.raises(UsageError, match="captions"):
        probe(case.student, write_captions(tmp_path / "captions", text=False))


def test_a_student_that_is_the_teacher_has_nothing_to_probe(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "class", None, "student.softmax_layers=[0, 1, 2]")
    with pytest.raises(UsageError, match="nothing to probe"):
        probe(case.student, case.data)


def test_a_source_that_changed_is_refused(case: Case) -> None:
    torch.save(gated(0, 2.0), case.checkpoint)
    with pytest.raises(LitconvertError, match="has changed since"):
        probe(case.student, case.data)
