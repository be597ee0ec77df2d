"""Training data: read as it was written, drawn by the teacher, or made of images, whole and resumable."""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

import litconvert
from litconvert.conversion.plan import resolve_for
from litconvert.data import synthesize as synthesis
from litconvert.data.dataset import LatentDataset, open_latents, write_latents
from litconvert.data.encode import encode_images
from litconvert.data.image_sources import StreamedImages
from litconvert.data.images import BrokenSample, ImageSample, center_crop, nearest_size, read_image
from litconvert.data.prompts import read_prompts
from litconvert.data.synthesize import synthesize
from litconvert.errors import LitconvertError, UsageError
from litconvert.families import sources
from litconvert.recipe.schema import Encode, TextEncoder
from litconvert.sampling import captions as captions_module
from litconvert.sampling.captions import encode, encode_texts, encode_to_store, load_text_encoder
from litconvert.sampling.draw import noise_of
from litconvert.sampling.pictures import to_images
from litconvert.sampling.sheets import GAP
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command
from tests.helpers.listener import Hearing
from tests.helpers.pretrained import CHANNELS, Pretrained
from tests.helpers.processes import Forker, kept_by_another_process

COLOURS = {"green": (0, 200, 0), "blue": (0, 0, 200), "red": (200, 0, 0)}
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


def everything(data: LatentDataset, bucket: int = 0) -> Tensor:
    indices = range(len(data.buckets[bucket]))
    return data.read(bucket, indices, noise=torch.zeros(len(indices), *data.buckets[bucket].shape)).clean


def encoded(
    images: Path | str,
    out: Path,
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    source: Path | None = None,
    **options: Any,
) -> Path:
    """A data set made of images for a recipe that is to be resolved, as the command makes it."""
    return encode_images(images, out, resolve_for(recipe, overrides, source), **options)


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


@pytest.fixture
def text_recipe(tmp_path: Path, pretrained: Pretrained) -> Path:
    """A recipe for the tiny PixArt-Sigma, whose data it draws for a list of prompts."""
    (tmp_path / "prompts.txt").write_text("a red fox\n\n  two birds by the sea \na cat\n")
    path = tmp_path / "text.yaml"
    path.write_text(
        f"source: {{path: {pretrained.folder / 'sigma'}, text_encoder: {{path: {pretrained.folder}}}, "
        f"vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        f"data: {{synthesize: {{prompts: {tmp_path / 'prompts.txt'}, num_samples: 5, batch_size: 2, shard_size: 3, "
        "steps: 2, guidance: 2.0}}\n"
    )
    return path


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


# Made of images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in three class folders, of several sizes and modes."""
    folder = tmp_path / "photos"
    sizes = [("green", "1.png", (20, 30)), ("green", "2.jpg", (64, 40)), ("blue", "1.png", (9, 9))]
    for name, file, size in [*sizes, ("red", "deep/1.png", (33, 16)), ("red", "2.png", (8, 8))]:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, COLOURS[name]).save(path)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "thumb.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def latent_recipe(tmp_path: Path, pretrained: Pretrained) -> Path:
    """A recipe for a model of four classes that sees the tiny VAE's latents of 64 pixels."""
    torch.save(dit_state(channels=4), tmp_path / "latent.pt")
    path = tmp_path / "latent.yaml"
    path.write_text(
        f"source: {{path: {tmp_path / 'latent.pt'}, num_attention_heads: 2, "
        f"vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        "data: {encode: {batch_size: 2, shard_size: 2}}\n"
    )
    return path


def png(colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def gradient(height: int, width: int) -> Image.Image:
    down, across = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return Image.fromarray(np.stack([down, across, 0 * down], -1).astype(np.uint8))


def adm_center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """guided-diffusion's center_crop_arr, as DiT's train.py has it."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(
        (round(image.size[0] * scale), round(image.size[1] * scale)), resample=Image.Resampling.BICUBIC
    )
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (16, 16), (300, 33), (10, 12), (129, 128)])
def test_a_square_is_cropped_as_adm_and_dit_crop_it(size: tuple[int, int]) -> None:
    image = gradient(*size)
    assert np.array_equal(np.asarray(center_crop(image, 16, 16)), adm_center_crop(image, 16))


@pytest.mark.parametrize("size", [(40, 64), (7, 300), (31, 47), (97, 89)])
def test_any_shape_is_covered_by_the_centre_of_the_image(size: tuple[int, int]) -> None:
    cropped = np.asarray(center_crop(gradient(*size), 16, 24)).astype(float)
    assert cropped.shape == (16, 24, 3)
    assert cropped[..., :2].mean(axis=(0, 1)) == pytest.approx([127.5, 127.5], abs=6)


def test_the_nearest_size_is_nearest_by_factor() -> None:
    sizes = [(64, 64), (128, 128), (48, 96), (96, 48)]
    assert nearest_size((500, 500), sizes) == (64, 64)
    assert nearest_size((100, 140), sizes) == (64, 64)
    assert nearest_size((100, 142), sizes) == (48, 96)  # beyond the square root of 2
    assert nearest_size((142, 100), sizes) == (96, 48)


def test_class_folders_become_the_pixels_of_a_pixel_space_model(
    tmp_path: Path, photos: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    data = open_latents(encoded(photos, tmp_path / "data", str(pico_recipe), source=pico_checkpoint))
    assert (data.pixels, data.kind, data.buckets[0].shape) == (True, "latents", (1, 8, 8))
    samples = data.read(0, range(5))
    assert samples.class_labels is not None
    assert samples.class_labels.tolist() == [0, 1, 1, 2, 2]  # of the sorted names blue, green, red
    grey = [Image.new("RGB", (1, 1), COLOURS[name]).convert("L").getpixel((0, 0)) for name in ("blue", "red")]
    drawn = to_images(samples.clean, None)
    assert (drawn[0].min(), drawn[0].max(), drawn[3].min(), drawn[4].max()) == (grey[0], grey[0], grey[1], grey[1])


def test_an_image_is_read_as_its_viewer_shows_it(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "clear.png")  # black that nobody sees
    turned = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 16, 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(folder / "turned.png", exif=exif)
    recipe = tmp_path / "colour.yaml"
    recipe.write_text(
        "scratch: {sample_size: 16, in_channels: 3, hidden_size: 32, num_layers: 1, num_attention_heads: 2, "
        "num_classes: 2}\n"
    )
    data = open_latents(encoded(tmp_path / "images", tmp_path / "data", str(recipe)))
    clear, shown = to_images(everything(data), None)
    assert (clear == 255).all()
    assert np.array_equal(shown[..., 0], np.asarray(turned)[::-1].T)


def test_latents_are_the_posteriors_of_the_vae_and_of_the_mirrored_image(
    tmp_path: Path,
    pretrained: Pretrained,
    latent_recipe: Path,
) -> None:
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    image = gradient(64, 64)
    image.save(folder / "1.png")
    outcome = command("latents", "encode", tmp_path / "images", tmp_path / "data", "-r", latent_recipe, "--flip", "-q")
    assert outcome.code == 0, outcome.err
    data = open_latents(tmp_path / "data")
    assert (data.kind, data.flipped, data.pixels, data.scaling_factor) == ("moments", True, False, 0.5)
    vae = AutoencoderKL.from_pretrained(pretrained.folder / "vae").eval()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = random(1, 4, 8, 8)
    for flip in (False, True):
        with torch.no_grad():
            posterior = vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
        expected = 0.5 * (posterior.mean + posterior.std * noise)
        drawn = data.read(0, [0], noise=noise, flip=torch.tensor([flip])).clean
        torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=2e-3)  # stored as float16


def test_each_image_goes_to_the_size_of_the_nearest_aspect_ratio(
    tmp_path: Path, photos: Path, latent_recipe: Path
) -> None:
    sets = ["data.encode.sizes=[[64, 64], [48, 96], [96, 48]]"]
    data = open_latents(encoded(photos, tmp_path / "data", str(latent_recipe), sets))
    assert [(bucket.shape, len(bucket)) for bucket in data.buckets] == [
        ((4, 6, 12), 2),
        ((4, 8, 8), 2),
        ((4, 12, 6), 1),
    ]
    labels = [
        data.read(index, range(len(bucket)), noise=torch.zeros(len(bucket), *bucket.shape)).class_labels
        for index, bucket in enumerate(data.buckets)
    ]
    assert [one.tolist() for one in labels if one is not None] == [[1, 2], [0, 2], [1]]
    outcome = command("latents", "show", tmp_path / "data", "--out", tmp_path / "sheet.png")
    assert outcome.code == 0, outcome.err
    assert "4x6x12 (2), 4x8x8 (2), 4x12x6 (1)" in outcome.out.replace("\n", " ")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 5 * (96 + GAP) + GAP
        assert 96 < sheet.height < 2 * 96


def test_encoding_resumes_to_the_same_data(tmp_path: Path, photos: Path, latent_recipe: Path) -> None:
    whole = open_latents(encoded(photos, tmp_path / "whole", str(latent_recipe)))

    def crash(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(photos, tmp_path / "data", str(latent_recipe), listener=Hearing(task=crash))
    assert not (tmp_path / "data").exists()
    seen: list[int] = []
    hearing = Hearing(task=lambda done, total: seen.append(done))
    resumed = encoded(photos, tmp_path / "data", str(latent_recipe), listener=hearing)
    assert seen == [2, 3]
    assert torch.equal(everything(whole), everything(open_latents(resumed)))
    encoded(photos, tmp_path / "data", str(latent_recipe), ["data.encode.batch_size=1"])  # nothing to do
    Image.new("RGB", (8, 8)).save(photos / "red" / "new.png")
    with pytest.raises(LitconvertError, match=r"other inputs \(the images\)"):
        encoded(photos, tmp_path / "data", str(latent_recipe))
    assert not list(tmp_path.glob(".data*"))


@pytest.mark.slow
def test_several_processes_make_the_same_data_as_one(
    tmp_path: Path, photos: Path, latent_recipe: Path, text_recipe: Path
) -> None:
    alone = [
        encoded(photos, tmp_path / "encoded", str(latent_recipe)),
        synthesize(None, tmp_path / "drawn", str(text_recipe)),
    ]
    commands = [
        ["latents", "encode", str(photos), str(tmp_path / "encoded-2"), "-r", str(latent_recipe)],
        ["latents", "synthesize", str(tmp_path / "drawn-2"), "-r", str(text_recipe)],
    ]
    with Forker() as forker:
        launched = [forker.launch(one, tmp_path / f"{one[1]}.log", processes=2) for one in commands]
        for workers in launched:
            assert workers.wait() == [0, 0], workers.log.read_text()
    for one in alone:
        mine, theirs = open_latents(one), open_latents(f"{one}-2")
        assert mine.digest == theirs.digest
        torch.testing.assert_close(everything(mine), everything(theirs), atol=1e-3, rtol=0)  # threads change rounding
        columns = [data.buckets[0].data.remove_columns("latent")[:] for data in (mine, theirs)]
        assert columns[0].keys() == columns[1].keys()
        assert columns[0].get("class_label") == columns[1].get("class_label")
        assert columns[0].get("caption") == columns[1].get("caption")
    assert not list(tmp_path.glob(".*shards*"))
    said = (tmp_path / "encode.log").read_text()
    assert said.count("next: litconvert distill") == 1  # one of them talks


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, content in fields.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three webdataset shards of images, captions and classes."""
    for part, some in enumerate(([0, 1], [2, 3], [4])):
        samples = [
            (
                f"{index:04d}",
                {"png": png((50 * index, 0, 0)), "txt": CAPTIONS[index].encode(), "cls": b"%d" % (index % 4)},
            )
            for index in some
        ]
        write_tar(tmp_path / "shards" / f"{part:05d}.tar", samples)
    return tmp_path / "shards"


def test_webdataset_shards_with_captions_are_encoded_once(
    tmp_path: Path,
    shards: Path,
    pretrained: Pretrained,
    text_recipe: Path,
) -> None:
    data = open_latents(encoded(shards, tmp_path / "data", str(text_recipe)))
    assert (data.condition, data.kind, len(data)) == ("caption", "moments", 5)
    samples = data.read(0, range(5), noise=torch.zeros(5, 4, 8, 8))
    assert samples.captions is not None
    encoder = T5EncoderModel.from_pretrained(pretrained.folder / "text_encoder").eval()
    tokenizer = pretrained.t5()[0]
    for stored, text in zip(samples.captions, CAPTIONS, strict=True):
        with torch.no_grad():
            expected = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(stored.float(), expected, atol=2e-3, rtol=2e-3)
    assert data.null_caption is not None
    assert data.null_caption[0].shape == (1, CHANNELS)


def test_captions_may_stay_text_and_need_no_t5(tmp_path: Path, shards: Path, text_recipe: Path) -> None:
    sets = ["data.encode.captions=text", "source.text_encoder=null", "data.encode.num_samples=3"]
    data = open_latents(encoded(shards, tmp_path / "data", str(text_recipe), sets))
    assert (data.condition, data.null_caption) == ("text", None)
    samples = data.read(0, [2, 0], noise=torch.zeros(2, 4, 8, 8))
    assert samples.texts == [CAPTIONS[2], CAPTIONS[0]]
    assert len(data) == 3


def test_webdataset_shards_with_classes(tmp_path: Path, shards: Path, latent_recipe: Path) -> None:
    data = open_latents(encoded(shards, tmp_path / "data", str(latent_recipe)))
    labels = data.read(0, range(5), noise=torch.zeros(5, 4, 8, 8)).class_labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_tables_are_read_by_column(tmp_path: Path, latent_recipe: Path, form: str) -> None:
    features = Features({"photo": ImageFeature(), "kind": ClassLabel(names=["a", "b", "c"])})
    rows = {"photo": [{"bytes": png((0, 60 * index, 0)), "path": None} for index in range(5)], "kind": [2, 1, 0, 1, 2]}
    table = Dataset.from_dict(rows, features=features)
    (tmp_path / "table").mkdir()
    if form == "parquet":
        table.select([0, 1, 2]).to_parquet(tmp_path / "table" / "train-0.parquet")
        table.select([3, 4]).to_parquet(tmp_path / "table" / "train-1.parquet")
    else:
        table.save_to_disk(str(tmp_path / "table"))
    with pytest.raises(
        UsageError, match=r"no column 'label' of classes; its columns are photo, kind: set .*label_column"
    ):
        encoded(tmp_path / "table", tmp_path / "data", str(latent_recipe))
    sets = ["data.encode.label_column=kind"]
    data = open_latents(encoded(tmp_path / "table", tmp_path / "data", str(latent_recipe), sets))
    labels = data.read(0, range(5), noise=torch.zeros(5, 4, 8, 8)).class_labels
    assert labels is not None
    assert labels.tolist() == [2, 1, 0, 1, 2]
    assert len({tuple(row.flatten().tolist()) for row in everything(data)}) == 5


def test_a_hub_data_set_is_streamed_at_one_revision(
    tmp_path: Path, latent_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import HfApi

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    rows = {"image": [{"bytes": png((9, 9, index)), "path": None} for index in range(3)], "label": [0, 1, 3]}
    table = Dataset.from_dict(rows, features=features)
    hub, asked = {"revision": "a" * 40}, []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return table.to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision: SimpleNamespace(sha=hub["revision"]))
    sets = ["data.encode.split=test"]
    data = open_latents(encoded("owner/name@v1", tmp_path / "data", str(latent_recipe), sets))
    assert asked == [("owner/name", {"split": "test", "revision": "a" * 40, "streaming": True})]
    assert data.labels == (0, 3)
    encoded("owner/name", tmp_path / "data", str(latent_recipe), sets)  # the same revision
    hub["revision"] = "b" * 40
    with pytest.raises(LitconvertError, match=r"other inputs \(the images\)"):
        encoded("owner/name", tmp_path / "data", str(latent_recipe), sets)


def test_a_counted_stream_is_read_once_however_many_parts(tmp_path: Path) -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(20):
            read.append(index)
            yield {"image": {"bytes": png((9, 9, index)), "path": None}, "label": index}

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    stream = IterableDataset.from_generator(rows, features=features)
    settings = Encode(num_samples=11, shard_size=3)

    def labels(images: StreamedImages, *parts: int) -> list[int | str]:
        return [sample.condition for part in parts for sample in images.read(part)]

    images = StreamedImages("stream", stream, [], settings, captions=False)
    assert labels(images, *range(images.parts)) == list(range(11))
    assert read == list(range(len(read)))  # once, and not far beyond what is asked for
    assert len(read) <= 12
    # Two processes' parts, one that is interrupted, and one that is asked for again.
    assert labels(StreamedImages("stream", stream, [], settings, captions=False), 1, 3) == [3, 4, 5, 9, 10]
    assert next(images.read(2)).condition == 6
    assert labels(images, 2, 0) == [6, 7, 8, 0, 1, 2]


def test_a_folder_of_images_with_a_list_of_captions(tmp_path: Path, text_recipe: Path) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for index, text in enumerate(CAPTIONS[:2]):
        (folder / f"{index}.png").write_bytes(png((0, 0, 90 * index)))
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = open_latents(encoded(folder, tmp_path / "data", str(text_recipe), ["data.encode.captions=text"]))
    assert data.read(0, [0, 1], noise=torch.zeros(2, 4, 8, 8)).texts == CAPTIONS[:2]


def test_a_broken_image_is_named_or_left_out(tmp_path: Path, photos: Path, latent_recipe: Path) -> None:
    broken = photos / "green" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = ("latents", "encode", photos, tmp_path / "data", "-r", latent_recipe)
    outcome = command(*arguments)
    assert outcome.code == 1
    assert f"{broken}: not a whole image" in outcome.err.replace("\n", "")
    assert "--skip-broken" in outcome.err
    assert not (tmp_path / "data").exists()
    assert command(*arguments, "--skip-broken", "-q").code == 0
    shown = command("latents", "show", tmp_path / "data", "--json")
    facts = json.loads(shown.out)
    assert (facts["samples"], facts["skipped"], facts["classes"]) == (4, 1, {"0": 1, "1": 1, "2": 2})


def test_a_broken_image_in_a_shard_is_named(tmp_path: Path, shards: Path, text_recipe: Path) -> None:
    write_tar(shards / "00001.tar", [("0007", {"png": b"no image", "txt": b"a cat", "cls": b"0"})])
    with pytest.raises(LitconvertError, match=r"file 1, row 0 \(0007\.png\): not a whole image"):
        encoded(shards, tmp_path / "data", str(text_recipe))


def test_what_does_not_fit_is_refused_before_the_work(
    tmp_path: Path, photos: Path, latent_recipe: Path, text_recipe: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    def refusal(images: Path | str, recipe: Path, *sets: str, **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            encoded(images, tmp_path / "data", str(recipe), sets, **options)
        assert not (tmp_path / "data").exists()
        return str(caught.value)

    assert "no such folder" in refusal("./missing", latent_recipe)
    assert "class folders hold no captions" in refusal(photos, text_recipe)
    assert "no VAE is named" in refusal(photos, latent_recipe, "source.vae=null")
    assert "no text encoder is named" in refusal(photos, text_recipe, "source.text_encoder=null")
    assert "63x64 must be multiples of 16 pixels" in refusal(photos, latent_recipe, "data.encode.sizes=[[63, 64]]")
    torch.save(dit_state(rows=3), tmp_path / "two.pt")
    assert "has 3 classes, the model has 2" in refusal(photos, pico_recipe, source=tmp_path / "two.pt")
    assert "class folders" in refusal(photos / "red" / "deep", pico_recipe, source=pico_checkpoint)


def test_greyscale_of_sixteen_bits_keeps_its_tones(tmp_path: Path) -> None:
    tones = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[:, None], 16, 1)
    Image.fromarray(tones.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    sample = ImageSample("deep", tmp_path / "deep.png", 0)
    assert np.array_equal(read_image(sample, "L", [(16, 16)])[0], tones)
    Image.fromarray(tones.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(BrokenSample, match=r"float: .*its mode F"):
        read_image(ImageSample("float", tmp_path / "float.tiff", 0), "L", [(16, 16)])


def test_an_image_in_a_zip_is_read_by_its_address(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("red.png", png(COLOURS["red"], (8, 8)))
    read = read_image(ImageSample("red", f"zip://red.png::{tmp_path / 'images.zip'}", 0), "RGB", [(8, 8)])
    assert read[:, 0, 0].tolist() == list(COLOURS["red"])


def test_shards_may_mix_image_extensions(tmp_path: Path, latent_recipe: Path) -> None:
    fields = [{"png": png((40, 0, 0)), "cls": b"1"}, {"jpg": png((0, 40, 0)), "cls": b"2"}]
    write_tar(tmp_path / "mixed" / "0.tar", [(f"{index:04d}", one) for index, one in enumerate(fields)])
    write_tar(tmp_path / "mixed" / "1.tar", [("0002", {"webp": png((0, 0, 40)), "cls": b"3"})])
    data = open_latents(encoded(tmp_path / "mixed", tmp_path / "data", str(latent_recipe)))
    assert (len(data), data.labels) == (3, (1, 3))


def test_an_edited_list_of_captions_is_noticed(tmp_path: Path, text_recipe: Path) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    (folder / "0.png").write_bytes(png((0, 0, 90)))
    sets = ["data.encode.captions=text"]
    for text in ("a cat", "a dog"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": text}))
        if text == "a cat":
            encoded(folder, tmp_path / "data", str(text_recipe), sets)
    with pytest.raises(LitconvertError, match=r"other inputs \(the images\)"):
        encoded(folder, tmp_path / "data", str(text_recipe), sets)


def test_class_folders_are_named_and_none_is_empty(tmp_path: Path, photos: Path, latent_recipe: Path) -> None:
    arguments = ("latents", "encode", photos, tmp_path / "data")
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "--recipe or --source" in outcome.err
    (tmp_path / f".data.shards-{12 * 'a'}").mkdir()  # an interrupted run of other inputs
    outcome = command(*arguments, "-r", latent_recipe)
    assert "3 classes, the model has 4" in outcome.err.replace("\n", " ")
    assert not list(tmp_path.glob(".data.shards*"))
    shown = command("latents", "show", tmp_path / "data").out
    assert "blue, green, red" in shown
    assert "0.0 MB" not in shown
    (photos / "amber").mkdir()
    with pytest.raises(UsageError, match=r"amber: .*remove it, or fill it"):
        encoded(photos, tmp_path / "other", str(latent_recipe))
    (photos / "amber" / "1.png").symlink_to(photos / "nowhere.png")
    with pytest.raises(UsageError, match=r"amber/1\.png: cannot be read"):
        encoded(photos, tmp_path / "other", str(latent_recipe))


def test_captions_must_be_texts(tmp_path: Path, shards: Path, text_recipe: Path) -> None:
    with pytest.raises(UsageError, match="column cls does not hold texts"):
        encoded(shards, tmp_path / "data", str(text_recipe), ["data.encode.caption_column=cls"])
