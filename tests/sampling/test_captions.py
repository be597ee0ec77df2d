"""Text to image: diffusers' pipelines with our transformer, T5 and what it leaves behind, embeddings, and guidance."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import read_model
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import CaptionConditioning, LiTTransformer2DModel
from litconvert.model.pipeline_lit_text import LiTAlphaPipeline, LiTSigmaPipeline
from litconvert.publishing.layout import prepare
from litconvert.publishing.pipeline import pipeline_class
from litconvert.publishing.publication import Publication
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Recipe, TextEncoder
from litconvert.sampling import captions as captions_module
from litconvert.sampling.captions import Captions, encode, read_embeddings, write_embeddings
from litconvert.sampling.draw import make_scheduler, noise_of, sample
from litconvert.sampling.pictures import SampleSheet, to_images
from litconvert.sampling.request import SampleRequest, sample_to_files
from litconvert.sampling.sheets import GAP
from tests.helpers.command import command
from tests.helpers.hub import TOKEN, card_of, enter, planned_files, sent
from tests.helpers.hub_server import HubServer
from tests.helpers.pretrained import CHANNELS, SIDE, Pretrained, pixart
from tests.helpers.processes import Forker

# Of huggingface_hub's own upload of large files, and of diffusers' own call of huggingface_hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ["A red fox in the snow ", "two birds by the sea"]

# Runs in a process of its own: litconvert is blocked, the Hub is the stand-in, nothing is cached.
STRANGER = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "litconvert":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

folder = Path(sys.argv[1])
given = load_file(folder / "inputs.safetensors")
request = json.loads((folder / "request.json").read_text())
outputs = {}
for name, t5 in request["pipelines"].items():
    parts = {}
    if t5 is not None:
        parts["text_encoder"] = T5EncoderModel.from_pretrained(t5, subfolder="text_encoder")
        parts["tokenizer"] = T5Tokenizer.from_pretrained(t5, subfolder="tokenizer")
    pipeline = DiffusionPipeline.from_pretrained(f"tester/{name}", **parts, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=3, guidance_scale=3.0, latents=given["noise"], clean_caption=False)
    for kind in ("latent", "pt"):
        outputs[f"{name}_{kind}"] = pipeline(request["prompts"], output_type=kind, **settings).images
model = AutoModel.from_pretrained("tester/plain", trust_remote_code=True)
inside = AutoModel.from_pretrained("tester/sigma", subfolder="transformer", trust_remote_code=True)
for name, one in (("plain", model), ("inside", inside)):
    with torch.no_grad():
        outputs[name] = one(given["noise"], torch.tensor(7), encoder_hidden_states=given["captions"]).sample
assert not any(name.partition(".")[0] == "litconvert" for name in sys.modules)
save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")
"""


@pytest.fixture
def alpha(pretrained: Pretrained) -> LiTTransformer2DModel:
    """With micro-conditions, captions of 120 tokens."""
    return litconvert.load(pretrained.folder / "alpha")


@pytest.fixture
def sigma(pretrained: Pretrained) -> LiTTransformer2DModel:
    """Captions of 300 tokens."""
    return litconvert.load(pretrained.folder / "sigma")


def noise(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn((count, 4, side, side), generator=torch.Generator().manual_seed(1))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same(drawn: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, which the solver's steps add up."""
    assert drawn.shape == expected.shape
    assert expected.abs().max() > 0.1
    assert (drawn - expected).abs().max() <= 1e-4 * expected.abs().max()


def encoded(pretrained: Pretrained, model: LiTTransformer2DModel, negative: str | None = "") -> Captions:
    return encode(pretrained.text_encoder, PROMPTS, negative, tokens=model.config.caption_tokens)


def drawn_by(pipeline: Any, output_type: str = "latent", **settings: Any) -> Any:
    usual = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise(), "clean_caption": False}
    return quiet(pipeline)(PROMPTS, output_type=output_type, **usual | settings).images


# The same function at another nominal size: positions are base / interpolation, 4 / 1 = 64 / 16.
DIFFUSERS_ALPHA: dict[str, Any] = {"sample_size": 128, "interpolation_scale": 16.0}


def test_a_pixart_alpha_draws_in_our_pipeline_what_it_draws_in_diffusers(
    pretrained: Pretrained, alpha: LiTTransformer2DModel
) -> None:
    # diffusers gives micro-conditions at a nominal size of 128 only.
    theirs = pixart(micro=True, **DIFFUSERS_ALPHA)
    square: dict[str, Any] = {"height": 8 * SIDE, "width": 8 * SIDE, "use_resolution_binning": False}
    expected = drawn_by(
        PixArtAlphaPipeline(*pretrained.t5(), pretrained.vae(), theirs, make_scheduler("dpm-solver++")), **square
    )
    drawn = drawn_by(LiTAlphaPipeline(*pretrained.t5(), pretrained.vae(), alpha, make_scheduler("dpm-solver++")))
    assert_same(drawn, expected)


def test_a_pixart_sigma_draws_in_our_pipeline_what_it_draws_in_diffusers(
    pretrained: Pretrained, sigma: LiTTransformer2DModel
) -> None:
    parts = (*pretrained.t5(), pretrained.vae())
    theirs = PixArtSigmaPipeline(*parts, pixart(micro=False), make_scheduler("dpm-solver++"))
    ours = LiTSigmaPipeline(*parts, sigma, make_scheduler("dpm-solver++"))
    for kind in ("latent", "pt"):
        expected = drawn_by(theirs, kind, use_resolution_binning=False)
        assert_same(drawn_by(ours, kind), expected)
    assert drawn_by(ours, "pil")[0].size == (64, 64)


def test_micro_conditions_are_the_pictures_size_in_the_pipeline_and_in_sampling(
    pretrained: Pretrained, alpha: LiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    embed = CaptionConditioning.embed_size

    def spy(self: CaptionConditioning, count: int, micro: dict[str, Tensor]) -> Tensor:
        seen.append(micro)
        return embed(self, count, micro)

    monkeypatch.setattr(CaptionConditioning, "embed_size", spy)
    pipeline = LiTAlphaPipeline(*pretrained.t5(), pretrained.vae(), alpha, make_scheduler("ddim"))
    wide = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(2))
    drawn = drawn_by(pipeline, latents=wide, height=64, width=96, num_inference_steps=2)
    assert_same(sample(alpha, noise=wide, captions=encoded(pretrained, alpha), steps=2, guidance=3.0), drawn)
    assert len(seen) == 4
    for micro in seen:
        assert micro["resolution"].tolist() == [[64.0, 96.0]]
        assert micro["aspect_ratio"].item() == pytest.approx(2 / 3)
    # The pipeline leaves nothing behind in the model.
    with pytest.raises(ValueError, match="this model has micro-conditions"):
        alpha(wide, torch.tensor(1), encoder_hidden_states=torch.zeros(2, 3, CHANNELS))


def test_resolution_binning_is_off_where_there_are_no_bins_and_refused_when_asked_for(
    pretrained: Pretrained, sigma: LiTTransformer2DModel
) -> None:
    pipeline = LiTSigmaPipeline(*pretrained.t5(), pretrained.vae(), sigma, make_scheduler("ddim"))
    with pytest.raises(ValueError, match=r"no resolution bins for a latent of side 8, only for 32, 64, 128, 256"):
        drawn_by(pipeline, use_resolution_binning=True, num_inference_steps=1)
    assert drawn_by(pipeline, num_inference_steps=1).shape == (2, 4, 8, 8)
    sigma.register_to_config(sample_size=32)
    near: dict[str, Any] = {"latents": None, "height": 224, "width": 256, "num_inference_steps": 1}
    assert drawn_by(pipeline, **near).shape[2:] == (30, 34)  # the bin of 240 x 272 pixels
    assert drawn_by(pipeline, **near, use_resolution_binning=False).shape[2:] == (28, 32)


def test_the_pipelines_need_no_t5_when_given_embeddings(pretrained: Pretrained, sigma: LiTTransformer2DModel) -> None:
    captions = encoded(pretrained, sigma)
    whole = LiTSigmaPipeline(*pretrained.t5(), pretrained.vae(), sigma, make_scheduler("dpm-solver++"))
    bare = LiTSigmaPipeline(None, None, pretrained.vae(), sigma, make_scheduler("dpm-solver++"))
    assert captions.null_features is not None
    assert captions.null_mask is not None
    images = quiet(bare)(
        prompt_embeds=captions.features,
        prompt_attention_mask=captions.mask,
        negative_prompt=None,
        negative_prompt_embeds=captions.null_features.expand(2, -1, -1),
        negative_prompt_attention_mask=captions.null_mask.expand(2, -1),
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise(),
        output_type="latent",
    ).images
    assert_same(images, drawn_by(whole))


def test_prompts_are_encoded_as_diffusers_encodes_them(pretrained: Pretrained, sigma: LiTTransformer2DModel) -> None:
    captions = encode(pretrained.text_encoder, PROMPTS, "Blurry ugly", tokens=300, batch_size=1)
    pipeline = LiTSigmaPipeline(*pretrained.t5(), pretrained.vae(), sigma, make_scheduler("ddim"))
    with torch.no_grad():
        expected = pipeline.encode_prompt(PROMPTS, negative_prompt="Blurry ugly")
    features, mask, null_features, null_mask = expected
    torch.testing.assert_close(captions.features, features)
    assert torch.equal(captions.mask, mask)
    assert captions.mask.sum(dim=1).tolist() == [7, 6]  # words and the end token
    torch.testing.assert_close(captions.null_features, null_features[:1])
    assert captions.null_mask is not None
    assert torch.equal(captions.null_mask, null_mask[:1])
    assert not captions.features.requires_grad
    assert not captions.features.is_inference()  # fit to train on


@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_sampling_draws_what_the_pipeline_draws(pretrained: Pretrained, kind: str) -> None:
    model = litconvert.load(pretrained.folder / kind)
    pipeline = {"alpha": LiTAlphaPipeline, "sigma": LiTSigmaPipeline}[kind]
    parts = (*pretrained.t5(), pretrained.vae(), model)
    captions = encoded(pretrained, model)
    for scheduler in ("dpm-solver++", "ddim"):
        for guidance in (1.0, 3.0):
            usual: dict[str, Any] = {"noise": noise(), "captions": captions, "steps": 4, "guidance": guidance}
            drawn = litconvert.sample(model, **usual, scheduler=scheduler)
            expected = drawn_by(pipeline(*parts, make_scheduler(scheduler)), guidance_scale=guidance)
            assert_same(drawn, expected)


def test_t5_is_gone_before_the_transformer_is_read(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load = captions_module.load_text_encoder

    def watched_load(*arguments: Any, **options: Any) -> Any:
        tokenizer, encoder = load(*arguments, **options)
        events.append("loaded")
        weakref.finalize(encoder, events.append, "freed")
        return tokenizer, encoder

    def watched_read(*arguments: Any) -> Any:
        events.append("read")
        return read_model(*arguments)

    monkeypatch.setattr(captions_module, "load_text_encoder", watched_load)
    monkeypatch.setattr("litconvert.sampling.request.read_model", watched_read)
    recipe = pretrained.recipe(tmp_path / "recipe.yaml")
    gc.disable()
    try:
        asked = SampleRequest(str(pretrained.folder / "sigma"), tmp_path / "out.png", recipe=str(recipe))
        sample_to_files(asked)
    finally:
        gc.enable()
    assert events == ["loaded", "freed", "read"]


@pytest.mark.slow
def test_sample_draws_one_picture_a_prompt_and_embeddings_draw_the_same_without_a_t5(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    model, recipe = pretrained.folder / "sigma", pretrained.recipe(tmp_path / "recipe.yaml")
    options = ("sample", model, "-q", "--recipe", recipe, "--set", "sampling.mixed_precision=no")
    prompts = ("--prompt", "A red fox", "--prompt", "two birds", "--negative-prompt", "blurry: ugly")
    first = command(
        *options, *prompts, "-o", tmp_path / "a.png", "--save-embeddings", tmp_path / "captions.safetensors"
    )
    assert (first.code, first.err) == (0, "")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 2 * (8 * 64 + GAP) + GAP
        assert picture.height > 8 * 64 + 2 * GAP, "a title and the prompts"

    stored = load_file(tmp_path / "captions.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "features": (2, 300, CHANNELS),
        "mask": (2, 300),
        "null_features": (1, 300, CHANNELS),
        "null_mask": (1, 300),
    }
    no_t5 = ("--set", "source.text_encoder=null", "--embeddings", tmp_path / "captions.safetensors")
    second = command(*options, *no_t5, "-o", tmp_path / "b.png")
    assert (second.code, second.err) == (0, "")
    labelled, plain = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert len(labelled) > len(plain), "of embeddings nobody knows the prompts"
    assert (labelled[: len(plain) - GAP] == plain[:-GAP]).all()

    # The recipe's prompts, cycled; decoded as the pipeline decodes.
    third = command(*options, "-n", 3, "--npz", tmp_path / "c.npz", "-o", tmp_path / "c.png")
    assert (third.code, third.err) == (0, "")
    with np.load(tmp_path / "c.npz") as arrays:
        assert arrays.files == ["arr_0"]
        images = arrays["arr_0"]
    captions = encode(pretrained.text_encoder, ["a cat", "a house", "a cat"], "", tokens=300)
    start = torch.stack([noise_of(0, index, (4, SIDE, SIDE)) for index in range(3)])
    latents = sample(
        litconvert.load(model), noise=start, captions=captions, scheduler="dpm-solver++", steps=3, guidance=3.0
    )
    expected = to_images(latents, pretrained.vae())
    assert np.abs(images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["sheet", "latents", "npz"])
def test_stopped_while_drawing_a_command_that_writes_its_captions_goes_on(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recipe, captions = pretrained.recipe(tmp_path / "recipe.yaml"), tmp_path / "captions.safetensors"
    asked: list[object] = ["sample", pretrained.folder / "sigma", "--recipe", recipe, "--save-embeddings", captions]
    asked += [] if kind == "sheet" else [f"--{kind}", tmp_path / "x"]
    asked += [] if kind == "latents" else ["-o", tmp_path / "x.png"]
    with monkeypatch.context() as patch:
        patch.setattr(f"litconvert.sampling.{'picture_set' if kind == 'npz' else 'request'}.draw", stop)
        assert command(*asked).code != 0
    assert captions.exists() == (kind == "npz"), "whose parts know that it is theirs"
    outcome = command(*asked)
    assert outcome.code == 0, outcome.err
    assert len(read_embeddings(captions)) == 2
    assert "exist" in command(*asked).err


@pytest.mark.slow
def test_several_processes_write_the_captions_once(pretrained: Pretrained, tmp_path: Path) -> None:
    asked = ["sample", pretrained.folder / "sigma", "--recipe", pretrained.recipe(tmp_path / "recipe.yaml")]
    with Forker() as forker:
        for name, more in (("few", []), ("many", ["--npz", tmp_path / "x.npz"])):
            captions = tmp_path / f"{name}.safetensors"
            line = [*asked, "-o", tmp_path / f"{name}.png", "--save-embeddings", captions, *more]
            workers = forker.launch([str(one) for one in line], tmp_path / name, processes=2)
            assert workers.wait() == [0, 0], workers.log.read_text()
            assert len(read_embeddings(captions)) == 2


def test_a_sheet_is_labelled_with_the_prompts_that_were_drawn(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []
    monkeypatch.setattr(
        "litconvert.sampling.request.save_sheet", lambda path, parts, **_: labels.append(list(parts[0].labels))
    )
    asked = ("sample", pretrained.folder / "sigma", "--recipe", pretrained.recipe(tmp_path / "recipe.yaml"))
    for more in ((), ("--prompt", "A red fox")):
        assert command(*asked, "-n", 2, "-o", tmp_path / "x.png", *more).code == 0
    assert labels == [["a cat", "a house"], ["A red fox", "A red fox"]]


@pytest.mark.slow
def test_each_way_of_asking_is_refused_where_it_means_nothing(
    pretrained: Pretrained, tmp_path: Path, pico_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = pretrained.recipe(tmp_path / "recipe.yaml")
    classes: tuple[Any, ...] = ("sample", pico_checkpoint, "-q", "--num-attention-heads", 2, "--steps", 2)
    captions: tuple[Any, ...] = ("sample", pretrained.folder / "sigma", "-q", "--recipe", recipe, "--steps", 2)
    write_embeddings(encode(pretrained.text_encoder, ["a cat"], "", tokens=20), tmp_path / "e.safetensors")
    wide = Captions(torch.zeros(1, 5, 99), torch.ones(1, 5).long())
    write_embeddings(wide, tmp_path / "wide.safetensors")
    no_t5 = ("--set", "source.text_encoder=null")

    for wrong, right, message in (
        ((*classes, "--prompt", "a cat"), (*classes, "--classes", "1"), "is a model of classes and reads no captions"),
        ((*captions, "--classes", "1"), (*captions, "--prompt", "a cat"), "has no classes: choose with --prompt"),
        (
            (*captions, *no_t5),
            (*captions, *no_t5, "--embeddings", "e.safetensors"),
            "--set source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS",
        ),
        (
            (*captions, "--embeddings", "e.safetensors", "--prompt", "a cat"),
            (*captions, "--embeddings", "e.safetensors"),
            "leave --prompt and --negative-prompt out",
        ),
        (
            (*captions, "--embeddings", "wide.safetensors"),
            (*captions, "--embeddings", "e.safetensors"),
            "the captions have features of width 99, the model reads 16",
        ),
        (
            (*captions, "--embeddings", "none.safetensors"),
            (*captions, "--embeddings", "e.safetensors"),
            "none.safetensors: no such file",
        ),
        (
            (*captions, "--set", f"source.text_encoder.path={tmp_path}"),
            captions,
            "source.text_encoder",
        ),
    ):
        refused = command(*wrong)
        assert refused.code in (1, 2)
        assert message in refused.err
        assert refused.err.count("\n") == 1
        accepted = command(*right)
        assert (accepted.code, accepted.err) == (0, "")


def test_a_file_of_other_tensors_is_no_captions(pretrained: Pretrained, tmp_path: Path) -> None:
    path = tmp_path / "captions.safetensors"
    for tensors, message in (
        ({"features": torch.zeros(1, 3, 4)}, r"embeddings are the tensors features \(N, L, C\).*holds features"),
        ({"features": torch.zeros(1, 3, 4), "mask": torch.ones(1, 2)}, r"got \(1, 3, 4\) and \(1, 2\)"),
        (
            {"features": torch.zeros(1, 3, 4), "mask": torch.ones(1, 3), "null_features": torch.zeros(1, 3, 4)},
            "belong together",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(UsageError, match=message):
            read_embeddings(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        read_embeddings(path)
    captions = encode(pretrained.text_encoder, PROMPTS, "", tokens=9)
    write_embeddings(captions, path)
    assert all(torch.equal(getattr(read_embeddings(path), name), getattr(captions, name)) for name in vars(captions))


def test_padding_a_caption_changes_nothing_and_a_longer_one_is_refused(
    pretrained: Pretrained, sigma: LiTTransformer2DModel
) -> None:
    usual: dict[str, Any] = {"noise": noise(), "steps": 2, "guidance": 2.0}
    whole = encode(pretrained.text_encoder, PROMPTS, "", tokens=300)
    short = encode(pretrained.text_encoder, PROMPTS, "", tokens=12)
    assert_same(sample(sigma, captions=short, **usual), sample(sigma, captions=whole, **usual))
    with pytest.raises(UsageError, match="longer than the 300 tokens"):
        sample(sigma, captions=encode(pretrained.text_encoder, PROMPTS, "", tokens=301), **usual)


def test_guidance_leads_away_from_the_negative_prompt_or_the_models_own_null_caption(
    pretrained: Pretrained, sigma: LiTTransformer2DModel
) -> None:
    usual: dict[str, Any] = {"noise": noise(), "steps": 1, "guidance": 3.0}
    bare = encoded(pretrained, sigma, negative=None)
    with pytest.raises(UsageError, match="keeps no null caption and the captions come without one"):
        sample(sigma, captions=bare, **usual)
    assert sample(sigma, captions=bare, **{**usual, "guidance": 1.0}).isfinite().all()

    own = LiTTransformer2DModel(**{**sigma.config, "null_caption": True})
    null = torch.randn(300, CHANNELS)
    own.load_state_dict({**sigma.state_dict(), "conditioning.null_caption": null}, strict=True)
    # PixArt's own code leaves the mask of the caption that it replaces.
    replaced = [replace(bare[i : i + 1], null_features=null[None], null_mask=bare.mask[i : i + 1]) for i in (0, 1)]
    expected = [sample(sigma, captions=one, **{**usual, "noise": noise()[i : i + 1]}) for i, one in enumerate(replaced)]
    assert_same(sample(own, captions=bare, **usual), torch.cat(expected))
    # A negative prompt comes first.
    negative = encoded(pretrained, sigma, negative="blurry")
    assert_same(sample(own, captions=negative, **usual), sample(sigma, captions=negative, **usual))
    empty = encoded(pretrained, sigma, negative="")
    assert (sample(sigma, captions=empty, **usual) - sample(sigma, captions=negative, **usual)).abs().max() > 0.01


def test_captions_and_labels_are_not_taken_for_one_another(
    pretrained: Pretrained, sigma: LiTTransformer2DModel, pico_checkpoint: Path
) -> None:
    captions, labels = encoded(pretrained, sigma), torch.tensor([0, 1])
    classes = litconvert.load(pico_checkpoint, num_attention_heads=2)
    pixels = torch.zeros(2, 1, 8, 8)
    both: dict[str, Any] = {"class_labels": labels, "captions": captions}
    for wrong in ({}, both, {"class_labels": labels}):
        with pytest.raises(UsageError, match="conditioned on captions: give captions, and no class_labels"):
            sample(sigma, noise=noise(), steps=1, **wrong)
    for wrong in ({}, both, {"captions": captions}):
        with pytest.raises(UsageError, match="conditioned on classes: give class_labels, and no captions"):
            sample(classes, noise=pixels, steps=1, **wrong)
    with pytest.raises(UsageError, match="captions must be 2, one for each noise, got 1"):
        sample(sigma, noise=noise(), steps=1, captions=captions[:1])
    assert sample(sigma, noise=noise(), steps=1, captions=captions).shape == (2, 4, 8, 8)
    assert sample(classes, noise=pixels, steps=1, class_labels=labels).shape == (2, 1, 8, 8)


def test_without_transformers_the_extra_is_named(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(LitconvertError, match=r'pip install "litconvert\[text\]"'):
            encode(pretrained.text_encoder, PROMPTS, tokens=4)
    assert len(encode(pretrained.text_encoder, PROMPTS, tokens=4)) == 2


def test_a_sentencepiece_tokenizer_as_pixarts_repositories_hold_it_is_read(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    model = io.BytesIO()
    options: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentences = iter(["a red fox in the snow", "two birds by the sea", "a blue house"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=30, hard_vocab_limit=False, **options
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    encoder = TextEncoder(path=str(pretrained.folder), tokenizer="../spiece")
    (pretrained.folder.parent / "spiece").symlink_to(tmp_path, target_is_directory=True)
    captions = encode(encoder, PROMPTS, tokens=40)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    lengths = [len(reference.encode(prompt.lower().strip())) + 1 for prompt in PROMPTS]
    assert captions.mask.sum(dim=1).tolist() == lengths


def test_an_incomplete_t5_is_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    for where, message in (
        ({"subfolder": "nothing"}, "no folder nothing with a config.json"),
        ({"tokenizer": "vae"}, "its tokenizer has 0 pieces of words"),
    ):
        with pytest.raises(LitconvertError, match=message):
            encode(TextEncoder(path=str(pretrained.folder), **where), PROMPTS, tokens=4)
    folder = Path(shutil.copytree(pretrained.folder, tmp_path / "t5"))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "block.1" not in name}, weights, {"format": "pt"})
    with pytest.raises(LitconvertError, match=r"not a complete T5 encoder \(encoder.block.1"):
        encode(TextEncoder(path=str(folder)), PROMPTS, tokens=4)
    assert len(encode(pretrained.text_encoder, PROMPTS, tokens=4)) == 2


def test_a_runs_sheet_draws_the_recipes_prompts_where_they_can_be_encoded(
    pretrained: Pretrained, sigma: LiTTransformer2DModel, tmp_path: Path
) -> None:
    recipe = resolve(str(pretrained.recipe(tmp_path / "recipe.yaml"))).recipe
    sheet = SampleSheet(recipe, ModelConfig.of(sigma.config), tmp_path)
    sheet.draw(sigma, "teacher")
    sheet.draw(sigma, "after")
    assert sheet.images(sigma).shape == (2, 64, 64, 3)
    teacher, after = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("teacher", "after"))
    assert (teacher[-64:] == after[-64:]).all()
    assert teacher.tobytes() != after.tobytes(), "the titles differ"
    without: Recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"text_encoder": None})})
    assert not SampleSheet(without, ModelConfig.of(sigma.config), tmp_path).drawable


@dataclass(frozen=True)
class Pushed:
    """Converted models, what went up of them, and what a process without litconvert made of that."""

    models: dict[str, Path]
    files: dict[str, set[str]]
    cards: dict[str, Any]
    texts: dict[str, bytes]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    said: str


@pytest.fixture(scope="module")
def pushed(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    folder = tmp_path_factory.mktemp("stranger")
    recipe = str(pretrained.recipe(folder / "recipe.yaml"))
    models = {kind: litconvert.convert(pretrained.folder / kind, folder / kind, recipe) for kind in ("alpha", "sigma")}
    inputs = {"noise": noise(), "captions": torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(2))}
    save_file(inputs, folder / "inputs.safetensors")
    pipelines = {"alpha": None, "sigma": str(pretrained.folder)}
    (folder / "request.json").write_text(json.dumps({"pipelines": pipelines, "prompts": PROMPTS}))
    with HubServer(TOKEN) as server, pytest.MonkeyPatch.context() as monkeypatch:
        enter(server, monkeypatch)
        litconvert.push(models["sigma"], "tester/plain")
        litconvert.push(models["sigma"], "tester/sigma", pipeline=True)
        litconvert.push(models["alpha"], "tester/alpha", pipeline=True, text_encoder=True)
        names = ("plain", "sigma", "alpha")
        contents = {name: sent(server, f"tester/{name}") for name in names}
        cards = {name: card_of(server, f"tester/{name}") for name in names}
        environment = {**os.environ, **server.environment(), "HF_HOME": str(folder / "home")}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        process = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
        )
    assert process.returncode == 0, process.stderr

    before: dict[str, Tensor] = {}
    for kind, path in models.items():
        model = litconvert.load(path)
        drawn = sample(
            model,
            noise=noise(),
            captions=encoded(pretrained, model),
            scheduler="dpm-solver++",
            steps=3,
            guidance=3.0,
        )
        with torch.no_grad():
            decoded = pretrained.vae().decode(drawn / 0.5).sample
        before |= {f"{kind}_latent": drawn, f"{kind}_pt": (decoded / 2 + 0.5).clamp(0, 1)}
    with torch.no_grad():
        output = model(inputs["noise"], torch.tensor(7), encoder_hidden_states=inputs["captions"]).sample
    before |= {"plain": output, "inside": output}
    return Pushed(
        models,
        {name: set(files) for name, files in contents.items()},
        cards,
        {f"{name}/{path}": data for name, files in contents.items() for path, data in files.items()},
        before,
        load_file(folder / "outputs.safetensors"),
        process.stderr,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpha_latent", "alpha_pt", "sigma_latent", "sigma_pt", "plain", "inside"])
def test_a_fresh_process_without_litconvert_draws_the_same(pushed: Pushed, name: str) -> None:
    assert_same(pushed.after[name], pushed.before[name])
    assert "Expected types" not in pushed.said


@pytest.mark.slow
def test_the_t5_goes_up_only_when_asked_for(pushed: Pushed) -> None:
    common = {"README.md", "modeling_lit.py", "recipe.yaml", "litconvert.json"}
    pipeline = common | {
        "model_index.json",
        "pipeline_lit_text.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/modeling_lit.py",
        f"transformer/{WEIGHTS}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
    }
    t5 = {
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    assert pushed.files == {"plain": common | {"config.json", WEIGHTS}, "sigma": pipeline, "alpha": pipeline | t5}
    for name, expected in (("sigma", [None, None]), ("alpha", ["transformers", "T5EncoderModel"])):
        index = json.loads(pushed.texts[f"{name}/model_index.json"])
        assert index["text_encoder"] == expected
        assert index["_class_name"] == ["pipeline_lit_text", f"LiT{name.title()}Pipeline"]
        assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]


@pytest.mark.slow
def test_no_local_path_goes_up_with_a_pipeline_of_captions(pushed: Pushed, pretrained: Pretrained) -> None:
    for path, data in pushed.texts.items():
        for secret in (str(pretrained.folder), "/tmp", str(Path.home()) + "/", TOKEN):
            assert secret.encode() not in data, f"{secret} is in {path}"


@pytest.mark.slow
def test_the_card_of_a_model_of_captions_says_so_and_how_to_give_it_a_t5(pushed: Pushed) -> None:
    for card in pushed.cards.values():
        assert card.data.pipeline_tag == "text-to-image"
        assert "class" not in " ".join(card.data.tags)
        assert "A text-to-image diffusion transformer with linear attention in 2 of its 2 layers" in card.text
        assert "class-conditional" not in card.text
        assert "class_labels" not in card.text
    sigma, alpha = pushed.cards["sigma"].text, pushed.cards["alpha"].text
    t5 = 'T5EncoderModel.from_pretrained("PixArt-alpha/PixArt-XL-2-1024-MS", subfolder="text_encoder")'
    assert t5 in sigma
    assert 'tester/sigma", text_encoder=text_encoder, tokenizer=tokenizer, trust_remote_code=True)' in sigma
    assert 'image = pipeline("a cat", num_inference_steps=3, guidance_scale=3.0).images[0]' in sigma
    assert "Made for 64 x 64 pixels and captions of up to 300 tokens" in sigma
    assert "T5EncoderModel" not in alpha
    assert 'DiffusionPipeline.from_pretrained("tester/alpha", trust_remote_code=True)' in alpha
    assert "The text encoder in `text_encoder/` is " in alpha
    for text in (sigma, alpha):
        for code in text.split("```python")[1:]:
            compile(code.split("```")[0], "card", "exec")


@pytest.mark.slow
def test_the_pipelines_class_follows_the_config(pushed: Pushed) -> None:
    for captions, micro, name in ((120, False, "LiTAlphaPipeline"), (300, True, "LiTAlphaPipeline")):
        config = ModelConfig(caption_channels=8, caption_tokens=captions, micro_conditions=micro)
        assert pipeline_class(config) == ("pipeline_lit_text", name)
    config = ModelConfig(caption_channels=8, caption_tokens=300, micro_conditions=False)
    assert pipeline_class(config) == ("pipeline_lit_text", "LiTSigmaPipeline")
    assert pipeline_class(ModelConfig(num_classes=4)) == ("pipeline_lit", "LiTPipeline")


@pytest.mark.slow
def test_a_pipeline_of_captions_takes_no_ddpm_and_no_t5_that_is_not_named(pushed: Pushed, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pushed.models["sigma"], tmp_path / "model"))
    recipe = (model / "recipe.yaml").read_text()
    usual = Publication(model, "tester/m", pipeline=True)
    (model / "recipe.yaml").write_text(recipe.replace("scheduler: dpm-solver++", "scheduler: ddpm"))
    with pytest.raises(UsageError, match="takes no learned variance, which ddpm needs"):
        prepare(usual, tmp_path / "ddpm")
    (model / "recipe.yaml").write_text(recipe.split("  text_encoder:")[0] + "student:" + recipe.split("student:")[1])
    with pytest.raises(UsageError, match=r"name it as source\.text_encoder\.path"):
        prepare(replace(usual, text_encoder=True), tmp_path / "unnamed")
    prepare(usual, tmp_path / "right")


@pytest.mark.slow
def test_push_lists_the_t5_in_a_dry_run(pushed: Pushed) -> None:
    shown = command("push", pushed.models["sigma"], "me/m", "--pipeline", "--text-encoder", "--dry-run", "--json", "-q")
    assert shown.code == 0, shown.err
    listed = {row["path"]: row["bytes"] for row in json.loads(shown.out)}
    assert listed == dict(planned_files(pushed.models["sigma"], "me/m", pipeline=True, text_encoder=True))
    assert "text_encoder/model.safetensors" in listed
