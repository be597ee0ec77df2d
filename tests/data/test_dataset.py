"""Training data: read as it was written, drawn by the teacher, or made of images, whole and resumable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor

import litconvert
from litconvert.data import synthesize as synthesis
from litconvert.data.dataset import open_latents, read_record, write_latents
from litconvert.data.prompts import read_prompts
from litconvert.data.synthesize import synthesize
from litconvert.errors import LitconvertError, UsageError
from litconvert.families import sources
from litconvert.recipe.schema import TextEncoder
from litconvert.sampling import captions as captions_module
from litconvert.sampling.captions import encode, encode_texts, encode_to_store, load_text_encoder
from litconvert.sampling.draw import noise_of
from litconvert.sampling.pictures import to_images
from tests.helpers.arrow import everything
from tests.helpers.compiled import counted_passes
from tests.helpers.listener import Hearing
from tests.helpers.pretrained import CHANNELS, Pretrained
from tests.helpers.processes import kept_by_another_process

CAPTIONS = ["a red fox", "two birds by the sea", "a blue house in the snow", "a cat", "red snow"]


def write_record(folder: Path, **facts: Any) -> None:
    (folder / "litconvert-latents.json").write_text(json.dumps({"format": 2, "digest": "d", **facts}))


def save(columns: dict[str, Any], folder: Path, shape: tuple[int, ...] = (1, 4, 4), dtype: str = "float32") -> Path:
    """A data set made with `datasets` alone."""
    kinds = {"latent": Array3D(shape, dtype), "latent_flipped": Array3D(shape, dtype), "class_label": Value("int64")}
    kinds |= {"caption": Value("string")}
    Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns})).save_to_disk(str(folder))
    return folder


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


# Reading


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    latents = random(2500, 1, 4, 4)  # several record batches
    data = open_latents(write_latents(latents, torch.arange(2500), tmp_path / "data", "x"))
    indices = [2499, 0, 1000, 999, 1, 2000]
    samples = data.read(0, indices)
    assert torch.equal(samples.clean, latents[indices])
    assert samples.class_labels is not None
    assert samples.class_labels.tolist() == indices
    assert (data.labels, data.condition, data.kind, data.digest) == ((0, 2499), "class", "latents", "x")


def test_moments_are_drawn_from_as_diffusers_does(tmp_path: Path) -> None:
    moments = 3 * random(6, 4, 4, 4)
    moments[:, 2:] *= 20  # log variances beyond both of diffusers' bounds
    folder = save({"latent": moments.numpy(), "class_label": [0] * 6}, tmp_path / "data", (4, 4, 4))
    write_record(folder, kind="moments", scaling_factor=0.5)
    data, noise = open_latents(folder), random(6, 2, 4, 4)
    posterior = DiagonalGaussianDistribution(moments)
    assert data.buckets[0].shape == (2, 4, 4)
    torch.testing.assert_close(
        data.read(0, range(6), noise=noise).clean, 0.5 * (posterior.mean + posterior.std * noise)
    )


def test_the_stored_posterior_of_the_mirrored_image_is_read(tmp_path: Path) -> None:
    columns = {"latent": torch.zeros(3, 2, 4, 4).numpy(), "latent_flipped": torch.ones(3, 2, 4, 4).numpy()}
    folder = save({**columns, "class_label": [0] * 3}, tmp_path / "data", (2, 4, 4))
    write_record(folder, kind="moments")
    clean = open_latents(folder).read(0, [0, 1, 2], noise=torch.zeros(3, 1, 4, 4), flip=torch.tensor([1, 0, 1]) > 0)
    assert clean.clean[:, 0, 0, 0].tolist() == [1, 0, 1]
    plain = save({"latent": columns["latent"], "class_label": [0] * 3}, tmp_path / "plain", (2, 4, 4))
    write_record(plain, kind="moments")
    with pytest.raises(UsageError, match=r"no mirrored latents.*data\.flip=true"):
        open_latents(plain).read(0, [0], noise=torch.zeros(1, 1, 4, 4), flip=torch.tensor([True]))


def test_pixels_come_back_to_the_bit_and_are_mirrored_at_reading(tmp_path: Path) -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    data = open_latents(save({"latent": images, "class_label": [0]}, tmp_path / "data", (1, 16, 16), "uint8"))
    clean = data.read(0, [0]).clean
    assert [clean.min().item(), clean.max().item()] == [-1, 1]
    assert np.array_equal(to_images(clean, None)[..., 0], images[:, 0])
    assert torch.equal(data.read(0, [0], flip=torch.tensor([True])).clean, clean.flip(-1))


def test_data_of_several_shapes_is_one_folder_of_them(tmp_path: Path) -> None:
    save({"latent": random(3, 1, 4, 4).numpy(), "class_label": [1, 2, 3]}, tmp_path / "4x4")
    save({"latent": random(2, 1, 4, 8).numpy(), "class_label": [0, 5]}, tmp_path / "4x8", (1, 4, 8))
    write_record(tmp_path, buckets=["4x4", "4x8"])
    data = open_latents(tmp_path)
    assert [bucket.shape for bucket in data.buckets] == [(1, 4, 4), (1, 4, 8)]
    assert (len(data), data.labels) == (5, (0, 5))
    assert torch.equal(data.read(1, [1, 0]).clean, random(2, 1, 4, 8).flip(0))


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="not a complete data set"):
        open_latents(tmp_path)
    labelless = save({"latent": random(3, 1, 4, 4).numpy()}, tmp_path / "labelless")
    with pytest.raises(UsageError, match=r"needs the columns latent .* class_label or caption, has latent"):
        open_latents(labelless)
    gap = save({"latent": random(2, 1, 4, 4).numpy(), "class_label": [None, 1]}, tmp_path / "gap")
    with pytest.raises(UsageError, match="class_label has rows without a value"):
        open_latents(gap)
    write_record(save({"latent": random(1, 1, 4, 4).numpy(), "class_label": [1]}, tmp_path / "later"), format=9)
    with pytest.raises(UsageError, match="a later litconvert"):
        open_latents(tmp_path / "later")


# Captions


def test_texts_are_stored_as_the_same_features_without_padding(pretrained: Pretrained) -> None:
    tokenizer, encoder = load_text_encoder(pretrained.text_encoder)
    texts = [*CAPTIONS, ""]
    stored = encode_to_store(tokenizer, encoder, texts, tokens=7, batch_size=2)
    features, mask = encode_texts(tokenizer, encoder, texts, tokens=7, batch_size=4)
    expected = encode(pretrained.text_encoder, texts, tokens=7)
    torch.testing.assert_close(features, expected.features)
    assert torch.equal(mask, expected.mask)
    assert [len(one) for one in stored] == mask.sum(dim=1).tolist() == [4, 6, 7, 3, 3, 1]
    for one, whole, length in zip(stored, features, mask.sum(dim=1).tolist(), strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one.float(), whole[:length], atol=2e-3, rtol=2e-3)


def test_features_beyond_float16_are_refused_with_their_caption(pretrained: Pretrained) -> None:
    tokenizer, encoder = load_text_encoder(pretrained.text_encoder)
    encoder.encoder.final_layer_norm.weight.data *= 1e6
    with pytest.raises(LitconvertError, match=r"'a red fox' reach .* beyond the float16.*captions=text"):
        encode_to_store(tokenizer, encoder, ["a red fox"], tokens=7)


# Drawn by the teacher


def test_synthesis_resumes_after_a_crash_to_the_same_data(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(pico_recipe)
    whole = open_latents(synthesize(pico_checkpoint, tmp_path / "whole", recipe))

    def crash(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(pico_checkpoint, tmp_path / "data", recipe, listener=Hearing(task=crash))
    assert not (tmp_path / "data").exists()
    assert len(list(tmp_path.glob(".data.shards-*"))) == 1
    monkeypatch.setattr("litconvert.common.files.OUTPUT_SECONDS", 0.2)
    kept = kept_by_another_process(tmp_path, ".data.partial-lock")
    with kept, pytest.raises(LitconvertError, match="another process is at work"):
        synthesize(pico_checkpoint, tmp_path / "data", recipe)
    drawn: list[int] = []
    hearing = Hearing(task=lambda done, total: drawn.append(done))
    synthesize(pico_checkpoint, tmp_path / "data", recipe, listener=hearing)
    assert drawn[0] == 6  # the first shard was kept
    resumed = open_latents(tmp_path / "data")
    assert torch.equal(everything(whole), everything(resumed))
    first, second = (data.read(0, range(12)).class_labels for data in (whole, resumed))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert not list(tmp_path.glob(".data*"))


def test_a_set_is_drawn_in_one_precision(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    def crash(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    recipe, place = str(pico_recipe), tmp_path / "data"
    whole, single = (
        open_latents(synthesize(pico_checkpoint, tmp_path / one, recipe, [f"sampling.mixed_precision={one}"]))
        for one in ("bf16", "no")
    )
    assert not torch.equal(everything(whole), everything(single))
    bf16 = ["sampling.mixed_precision=bf16"]
    with pytest.raises(KeyboardInterrupt):
        synthesize(pico_checkpoint, place, recipe, bf16, listener=Hearing(task=crash))
    notes: list[str] = []
    for _ in range(2):
        listener = Hearing(note=notes.append)
        synthesize(pico_checkpoint, place, recipe, ["sampling.mixed_precision=no"], listener=listener)
    assert torch.equal(everything(open_latents(place)), everything(whole))
    assert read_record(place)["precision"] == "bf16"
    assert sum("goes on in bf16, as it was begun" in note for note in notes) == 1
    assert notes[-1] == "it was drawn in bf16, not in float32; remove it to draw it again"


def test_the_teacher_is_compiled_for_as_many_passes_as_are_left(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    blocks = ["sampling.compile=blocks", "data.synthesize.guidance=1.0"]
    place, recipe = tmp_path / "data", str(pico_recipe)
    with (
        pytest.raises(KeyboardInterrupt),
        counted_passes("litconvert.data.synthesize") as whole,
    ):
        synthesize(pico_checkpoint, place, recipe, blocks, listener=Hearing(task=stop))
    with counted_passes("litconvert.data.synthesize") as rest:
        synthesize(pico_checkpoint, place, recipe, blocks)
    assert rest[0][0] == rest[0][1] > 0
    assert whole[0][0] == 2 * rest[0][0]  # half of it was kept


def test_synthesis_of_other_inputs_is_refused_beside_the_same_ones(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    recipe, other = str(pico_recipe), ["data.synthesize.seed=5"]
    synthesize(pico_checkpoint, tmp_path / "data", recipe)
    before = open_latents(tmp_path / "data")
    synthesize(pico_checkpoint, tmp_path / "data", recipe)
    with pytest.raises(LitconvertError, match=r"other inputs \(data.synthesize.seed was the default and is 5\)"):
        synthesize(pico_checkpoint, tmp_path / "data", recipe, other)
    synthesize(pico_checkpoint, tmp_path / "data", recipe, other, force=True)
    assert not torch.equal(everything(before), everything(open_latents(tmp_path / "data")))


def test_prompts_are_drawn_as_sampling_draws_them(
    tmp_path: Path,
    pretrained: Pretrained,
    text_recipe: Path,
) -> None:
    data = open_latents(synthesize(None, tmp_path / "data", str(text_recipe)))
    texts = ["a red fox", "two birds by the sea", "a cat", "a red fox", "two birds by the sea"]
    assert data.buckets[0].data["caption"][:] == texts
    assert (data.condition, data.caption_channels, data.caption_tokens) == ("caption", CHANNELS, 6)
    encoded = encode(pretrained.text_encoder, texts, "", tokens=300)
    samples = data.read(0, range(5))
    assert samples.captions is not None
    for stored, features, mask in zip(samples.captions, encoded.features, encoded.mask, strict=True):
        torch.testing.assert_close(stored.float(), features[mask > 0], atol=2e-3, rtol=2e-3)
    assert data.null_caption is not None
    assert encoded.null_features is not None
    torch.testing.assert_close(data.null_caption[0].float(), encoded.null_features[0, :1], atol=2e-3, rtol=2e-3)
    assert data.null_caption[1].tolist() == [1]
    model = litconvert.load(pretrained.folder / "sigma")
    noise = torch.stack([noise_of(1, index, (4, 8, 8)) for index in range(5)])
    drawn = litconvert.sample(model, noise=noise, captions=encoded, steps=2, guidance=2.0)
    torch.testing.assert_close(samples.clean, drawn, atol=0.02, rtol=0.02)  # the stored features are float16


def test_prompts_are_encoded_once_and_t5_is_gone_before_the_teacher_is_read(
    tmp_path: Path, text_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from litconvert.data import prompts as prompts_module

    events: list[str] = []
    load, read = captions_module.load_text_encoder, sources.read_model

    def watched_load(where: TextEncoder) -> Any:
        tokenizer, encoder = load(where)
        events.append("loaded")
        weakref.finalize(encoder, events.append, "freed")
        return tokenizer, encoder

    def watched_read(*arguments: Any) -> Any:
        events.append("read")
        return read(*arguments)

    monkeypatch.setattr(prompts_module, "load_text_encoder", watched_load)
    monkeypatch.setattr(synthesis, "read_model", watched_read)

    def crash(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(None, tmp_path / "data", str(text_recipe), listener=Hearing(task=crash))
    assert events == ["loaded", "freed", "read"]
    synthesize(None, tmp_path / "data", str(text_recipe))
    assert events == ["loaded", "freed", "read", "read"]


def test_columns_that_nobody_asked_for_are_left_alone(tmp_path: Path) -> None:
    columns = {"latent": np.zeros((3, 1, 8, 8), np.float32).tolist(), "class_label": [0, 1, 2]}
    kinds = {"latent": Array3D((1, 8, 8), "float32"), "class_label": Value("int64"), "file_name": Value("string")}
    named = {**columns, "file_name": ["a.png", "b.png", "c.png"]}
    Dataset.from_dict(named, features=Features(kinds)).save_to_disk(str(tmp_path / "named"))
    labels = open_latents(tmp_path / "named").read(0, range(3)).class_labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]


def test_a_list_of_prompts_ships_with_litconvert() -> None:
    prompts = read_prompts(None)
    assert len(prompts) == len(set(prompts)) >= 190
    assert all(prompt == prompt.strip() for prompt in prompts)
    assert max(map(len, prompts)) > 100  # long ones, as people write them, beside short ones
    assert min(map(len, prompts)) < 10


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path, text_recipe: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for path, message in (("empty.txt", "holds no prompt"), ("missing.txt", "not a text file of prompts")):
        with pytest.raises(UsageError, match=message):
            synthesize(None, tmp_path / "data", str(text_recipe), [f"data.synthesize.prompts={tmp_path / path}"])
    with pytest.raises(UsageError, match=r"no text encoder is named.*source\.text_encoder\.path"):
        synthesize(None, tmp_path / "data", str(text_recipe), ["source.text_encoder=null"])


def test_a_sit_draws_with_its_own_scheduler(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    sets = ["source.family=sit", "data.synthesize.scheduler=flow-euler"]
    data = open_latents(synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe), sets))
    model = litconvert.load(pico_checkpoint, family="sit", num_attention_heads=2)
    labels = data.read(0, range(12)).class_labels
    noise = torch.stack([noise_of(1, index, (1, 8, 8)) for index in range(12)])
    drawn = litconvert.sample(model, noise=noise, class_labels=labels, scheduler="flow-euler", steps=2)
    torch.testing.assert_close(everything(data), drawn)
    with pytest.raises(UsageError, match="velocity"):
        synthesize(pico_checkpoint, tmp_path / "other", str(pico_recipe), sets[:1])
