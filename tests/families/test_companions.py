"""What lies beside a model's weights: found wherever the model is, and taken where nobody says otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import litconvert
from litconvert.common.hub import split_revision
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.companions import NOTHING, companions_of, local_model
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import TextEncoder, Vae
from tests.helpers.command import command
from tests.helpers.pretrained import Pretrained, write_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(pretrained: Pretrained, tmp_path: Path) -> Path:
    return write_pipeline(pretrained, tmp_path / "pipeline")


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("inner", [".", "transformer", f"transformer/{WEIGHTS}"])
def test_a_pipeline_is_known_from_each_way_to_name_its_transformer(pipeline: Path, inner: str) -> None:
    found = companions_of(pipeline / inner)
    assert found.vae == Vae(path=str(pipeline), subfolder="vae")
    assert found.text_encoder == TextEncoder(path=str(pipeline))
    assert (found.scheduler, found.num_timesteps, found.remarks, found.other_process) == (
        "dpm-solver++",
        1000,
        (),
        None,
    )
    assert (found.recipe, found.published) == (None, False)


def test_the_transformer_is_named_from_within_its_folder(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pipeline / "transformer")
    assert companions_of(".").vae == Vae(path=str(pipeline), subfolder="vae")


def test_a_model_alone_has_nothing_beside_it(pretrained: Pretrained, pico_checkpoint: Path) -> None:
    for source in (pretrained.folder / "sigma", pico_checkpoint, "asset:dit-digits", "no such thing", None):
        found = companions_of(source)
        assert (found.recipe, found.vae, found.text_encoder, found.scheduler, found.facts) == (
            None,
            None,
            None,
            None,
            [],
        )


def test_a_packaged_recipe_that_nobody_chose_gives_way_and_a_flag_does_not(pipeline: Path) -> None:
    beside = companions_of(pipeline)
    for overrides, vae, scheduler in (
        ((), str(pipeline), "dpm-solver++"),
        (("source.vae.path=mine",), "mine", "dpm-solver++"),
        (("sample.scheduler=ddim",), str(pipeline), "ddim"),
    ):
        recipe = beside.taken_into(resolve("dit-xl-2-256", overrides), named=None).recipe
        assert recipe.source.vae is not None
        assert (recipe.source.vae.path, recipe.sample.scheduler) == (vae, scheduler)
        assert recipe.sample.steps == 250, "the rest is the recipe's"
    untouched = NOTHING.taken_into(resolve("dit-xl-2-256"), named=None).recipe
    assert untouched == resolve("dit-xl-2-256").recipe


def test_a_packaged_recipe_that_is_named_keeps_its_scheduler_and_a_file_of_the_users_all(
    pipeline: Path, tmp_path: Path
) -> None:
    beside = companions_of(pipeline)
    named = beside.taken_into(resolve("dit-xl-2-256"), named="dit-xl-2-256").recipe
    assert named.source.vae == Vae(path=str(pipeline), subfolder="vae")
    assert named.sample.scheduler == "ddpm"
    mine = tmp_path / "mine.yaml"
    mine.write_text("source: {vae: {path: mine}}\nsample: {scheduler: ddim}\n")
    recipe = beside.taken_into(resolve(str(mine)), named=str(mine)).recipe
    assert (recipe.source.vae, recipe.sample.scheduler) == (Vae(path="mine"), "ddim")
    assert recipe.source.text_encoder == TextEncoder(path=str(pipeline)), "which the file does not name"
    mine.write_text("source: {vae: null}\n")
    assert beside.taken_into(resolve(str(mine)), named=str(mine)).recipe.source.vae is None


def test_what_is_taken_says_where_it_came_from(pipeline: Path) -> None:
    rows = {
        key: origin
        for key, _, origin in companions_of(pipeline).taken_into(resolve(None, ["seed=3"]), named=None).rows()
    }
    assert rows["seed"] == "--set"
    assert rows["sample.steps"] == "default"
    assert rows["source.vae.path"] == rows["source.text_encoder.path"] == rows["sample.scheduler"] == str(pipeline)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            "scaled_linear betas from 0.00085",
        ),
        ({"beta_end": 0.03}, "linear betas from 0.0001 to 0.03"),
        ({"beta_end": "0.02"}, "linear betas from 0.0001 to nan"),
        ({"trained_betas": ["a", None]}, "linear betas from nan"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2 betas"),
        ({"num_train_timesteps": 500}, "linear betas from 0.0001 to 0.02"),
        ({"trained_betas": [0.0001 + 0.0199 * (i / 999) ** 2 for i in range(1000)]}, "betas"),
        ({"rescale_betas_zero_snr": True}, "rescales the betas"),
        ({"prediction_type": "v_prediction"}, "predicts v_prediction"),
    ],
)
def test_another_forward_process_is_refused_and_inspect_says_so(
    pipeline: Path, settings: dict[str, Any], said: str
) -> None:
    changed(pipeline / "scheduler" / "scheduler_config.json", **settings)
    assert said in str(companions_of(pipeline).other_process)
    with pytest.raises(UsageError, match="litconvert knows linear betas from"):
        litconvert.plan(pipeline, None, ["solve=null", "student.num_attention_heads=2"])
    shown = command("inspect", pipeline, "--json")
    assert shown.code == 0, shown.err
    assert any(said in text for text in json.loads(shown.out)["beside"]["not_used"])
    told = ["solve=null", "student.num_attention_heads=2", "diffusion.num_timesteps=1000"]
    assert litconvert.plan(pipeline, None, told).recipe.diffusion.num_timesteps == 1000


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None},
        {"num_train_timesteps": 500, "beta_start": 0.0002, "beta_end": 0.04},
        {"trained_betas": torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64).tolist()},
        {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        {"trained_betas": [], "prediction_type": None},
    ],
)
def test_the_forward_process_that_litconvert_knows_is_taken(pipeline: Path, settings: dict[str, Any]) -> None:
    changed(pipeline / "scheduler" / "scheduler_config.json", **settings)
    recipe = litconvert.plan(pipeline, None, ["solve=null", "student.num_attention_heads=2"]).recipe
    assert recipe.diffusion.num_timesteps == settings.get("num_train_timesteps", 1000)
    assert recipe.sample.scheduler == ("ddim" if "_class_name" in settings else "dpm-solver++")


@pytest.mark.parametrize(
    ("part", "entry", "said"),
    [
        ("vae", ["diffusers", "AutoencoderDC"], "its VAE: AutoencoderDC is no AutoencoderKL"),
        ("vae", ["diffusers", "AutoencoderTiny"], "its VAE: AutoencoderTiny is no AutoencoderKL"),
        ("text_encoder", ["transformers", "CLIPTextModel"], "its text encoder: CLIPTextModel is no T5"),
        ("tokenizer", [None, None], "its text encoder: T5EncoderModel is no T5 with a tokenizer"),
    ],
)
def test_what_cannot_be_used_is_said_and_left(pipeline: Path, part: str, entry: list[Any], said: str) -> None:
    changed(pipeline / "model_index.json", **{part: entry})
    found = companions_of(pipeline)
    assert any(text.startswith(said) for text in found.remarks)
    assert (found.vae if part == "vae" else found.text_encoder) is None
    assert (found.text_encoder if part == "vae" else found.vae) is not None


def test_a_part_that_is_named_and_not_there_a_scheduler_of_another_kind_and_an_index_that_is_none(
    pipeline: Path,
) -> None:
    (pipeline / "vae" / "config.json").unlink()
    changed(pipeline / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    found = companions_of(pipeline)
    assert (found.vae, found.scheduler) == (None, None)
    assert [text.split(":")[0] for text in found.remarks] == ["its VAE", "its scheduler"]
    for content in ("{", "[]", "\xff", '{"vae": ["diffusers"], "text_encoder": 5, "tokenizer": {}, "scheduler": []}'):
        (pipeline / "model_index.json").write_bytes(content.encode("latin-1"))
        assert companions_of(pipeline).vae is None
        assert {word for word, _ in companions_of(pipeline).facts} == {"not used"}
    assert litconvert.load(pipeline).config.caption_channels, "the transformer is read all the same"


def test_a_pipeline_without_a_part_has_none(pipeline: Path) -> None:
    changed(pipeline / "model_index.json", vae=[None, None], text_encoder=[None, None], tokenizer=[None, None])
    found = companions_of(pipeline)
    assert (found.vae, found.text_encoder, found.remarks) == (None, None, ())


def test_a_published_recipe_is_taken_without_what_was_its_owners(tmp_path: Path) -> None:
    (tmp_path / "litconvert.json").write_text('{"format": 1}')
    recipe = """
source:
  vae: {path: decoder}
  text_encoder: {path: owner/t5}
data: {path: latents}
distill: {start: {path: first-run}, trackers: [wandb]}
sample: {steps: 7}
publish: {repo_id: owner/name, backup_every: 30}
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    mine = companions_of(tmp_path).resolve(None, []).recipe
    assert mine.source.vae == Vae(path="decoder")
    assert (mine.publish.repo_id, mine.data.path) == ("owner/name", "latents")
    assert companions_of(tmp_path).left_out() == ()
    (tmp_path / "README.md").write_text("notes of whoever made it")
    assert companions_of(tmp_path).resolve(None, []).recipe == mine
    changed(tmp_path / "litconvert.json", pushed={"recipe.yaml": ["a", "b"]})
    (tmp_path / "README.md").unlink()
    found = companions_of(tmp_path)
    assert found.published
    theirs = found.resolve(None, []).recipe
    assert theirs.source.vae is None, "a folder of whoever pushed it"
    assert theirs.source.text_encoder == TextEncoder(path="owner/t5")
    assert (theirs.publish.repo_id, theirs.publish.backup_every, theirs.distill.start) == (None, None, None)
    assert (theirs.distill.trackers, theirs.data.path) == ((), None)
    gone = ("its data set, latents", "its VAE, decoder", "the run that it started from, first-run")
    assert found.left_out() == gone
    assert theirs.sample.steps == 7
    told = found.resolve(None, ["source.vae.path=here", "publish.repo_id=me/mine"]).recipe
    assert (told.source.vae, told.publish.repo_id) == (Vae(path="here"), "me/mine")


def test_a_recipe_of_another_program_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\n")
    assert companions_of(tmp_path).recipe is None


def test_inspect_and_plan_say_what_is_taken(pipeline: Path) -> None:
    shown = command("inspect", pipeline)
    assert shown.code == 0, shown.err
    for text in ("its own, vae/", "its own, text_encoder/ and tokenizer/", "its own, dpm-solver++"):
        assert text in shown.out
    planned = command(
        "plan", pipeline, "--no-solve", "--set", "student.num_attention_heads=2", "--set", "source.vae.path=x/y"
    )
    assert planned.code == 0, planned.err
    assert "VAE: x/y, as told; not its own, vae/" in planned.out
    assert "text encoder: its own, text_encoder/ and tokenizer/" in planned.out


def test_a_revision_is_of_ids_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_revision("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    assert split_revision("owner/name") == ("owner/name", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name@5").mkdir()
    assert split_revision("owner/name@5") == ("owner/name@5", None)
    assert split_revision("/a/b@5") == ("/a/b@5", None)


def test_a_model_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert companions_of("nobody/nothing").facts == []
    with pytest.raises(LitconvertError, match="the Hub cannot be reached"):
        local_model("nobody/nothing")
    assert local_model(tmp_path) == tmp_path
