"""Which files of others may not stay beside what is pushed: the names, and that stock loaders do take such files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.publishing.layout import prepare
from litconvert.publishing.loaders import in_the_way
from litconvert.publishing.publication import Publication
from tests.helpers.hub import Picos

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = ("README.md", "config.json", WEIGHTS, "litconvert.json", "modeling_lit.py", "recipe.yaml")
SHARDED = (
    *(path for path in PLAIN if path != WEIGHTS),
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00002-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
PIPELINE = (
    *(path for path in PLAIN if path not in ("config.json", WEIGHTS)),
    "model_index.json",
    "pipeline_lit.py",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    f"transformer/{WEIGHTS}",
    "vae/config.json",
    f"vae/{WEIGHTS}",
)
WITH_T5 = (*PIPELINE, "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/spiece.model")

# They look like names that loaders know.
NOT_TAKEN = (
    "diffusion_flax_model.msgpack",
    "flax_model.msgpack",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
    "model.fp16.safetensors.index.json",
)


@pytest.mark.parametrize(
    ("ours", "path", "why"),
    [
        (PLAIN, "diffusion_pytorch_model.safetensors.index.json", "diffusers loads its shards first"),
        (PLAIN, "diffusion_pytorch_model.bin.index.json", "use_safetensors=False"),
        (PLAIN, "diffusion_pytorch_model-00002-of-00003.safetensors", "a shard of other weights"),
        (PLAIN, "diffusion_pytorch_model.bin", "use_safetensors=False"),
        (PLAIN, "diffusion_pytorch_model.fp16.safetensors", "variant='fp16'"),
        (PLAIN, "diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "variant='fp16'"),
        (PLAIN, "diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "variant='fp16'"),
        (PLAIN, "diffusion_pytorch_model.safetensors.index.fp16.json", "variant='fp16'"),
        (PLAIN, "diffusion_pytorch_model.safetensors.bf16.index.json", "variant='bf16'"),
        (PLAIN, "diffusion_pytorch_model.non_ema.bin", "variant='non_ema'"),
        (PLAIN, "model.safetensors", "other weights"),
        (PLAIN, "pytorch_model.bin", "other weights"),
        (PLAIN, "model_index.json", "DiffusionPipeline would load"),
        (PLAIN, "transformer/config.json", "read before the root"),
        (PLAIN, f"transformer/{WEIGHTS}", "read before the root"),
        (PLAIN, "config.json/notes.txt", "a file and a folder of one name"),
        (SHARDED, WEIGHTS, "other weights"),
        (SHARDED, "diffusion_pytorch_model-00001-of-00003.safetensors", "a shard of other weights"),
        (PIPELINE, "config.json", "without a subfolder"),
        (PIPELINE, WEIGHTS, "other weights"),
        (PIPELINE, "transformer/diffusion_pytorch_model.safetensors.index.json", "diffusers loads its shards first"),
        (PIPELINE, "vae/diffusion_pytorch_model.fp16.safetensors", "variant='fp16'"),
        (PIPELINE, "text_encoder/pytorch_model.bin", "other weights"),
        (PIPELINE, "vae/vae-ft-mse-840000-ema-pruned.ckpt", "other weights in vae/"),
        (PIPELINE, "scheduler/diffusers.py", "would run it"),
        (PIPELINE, "vae", "a file and a folder of one name"),
        (WITH_T5, "text_encoder/model.safetensors.index.json", "diffusers loads its shards first"),
        (WITH_T5, "text_encoder/adapter_config.json", "adapter"),
        (WITH_T5, "tokenizer/tokenizer.json", "every file of its folder"),
    ],
)
def test_what_a_loader_would_take_is_in_the_way(ours: tuple[str, ...], path: str, why: str) -> None:
    found = in_the_way(ours, [path, "LICENSE"])
    assert list(found) == [path]
    assert why in found[path]


@pytest.mark.parametrize(
    ("ours", "path"),
    [
        *((PLAIN, path) for path in ("vae/config.json", f"vae/{WEIGHTS}", "run/model/config.json", "lora.safetensors")),
        *((PLAIN, path) for path in ("model_card.pdf", "modelling.safetensors", "transformer/notes.md", "DiT-XL-2.pt")),
        *((PIPELINE, path) for path in ("vae/notes.txt", "text_encoder/config.json", "tokenizer/tokenizer.json")),
        *((PIPELINE, path) for path in ("unet/diffusion_pytorch_model.bin", "samples/a.png", "lora/model.safetensors")),
        *((PLAIN, path) for path in NOT_TAKEN),
        *((PIPELINE, f"transformer/{path}") for path in NOT_TAKEN),
        *((WITH_T5, f"text_encoder/{path}") for path in NOT_TAKEN),
    ],
)
def test_what_no_loader_would_take_stays(ours: tuple[str, ...], path: str) -> None:
    assert in_the_way(ours, [path, ".gitattributes", "LICENSE", "images/mine.png"]) == {}


def laid_out(model: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """What is pushed of a model, as real files in a folder; returns the weights."""
    prepare(Publication(model, "tester/m", **options), folder)
    for link in [path for path in folder.rglob("*") if path.is_symlink()]:
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content)
    return load_file(folder / ("transformer" if options else ".") / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_pytorch_model.bin", {"use_safetensors": False}),
        ("diffusion_pytorch_model.fp16.safetensors", {"variant": "fp16"}),
        ("diffusion_pytorch_model.safetensors.index.json", {}),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", {"variant": "fp16"}),
    ],
)
def test_stock_diffusers_does_take_them(picos: Picos, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """The names that are refused are those that diffusers reads: it loads what lies under them."""
    ours = laid_out(picos.pixels, tmp_path)
    theirs = {key: torch.zeros_like(value) for key, value in ours.items()}
    if name.endswith(".json"):
        shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
        save_file(theirs, tmp_path / shard)
        index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(theirs, shard)}
        (tmp_path / name).write_text(json.dumps(index))
    elif name.endswith(".bin"):
        torch.save(theirs, tmp_path / name)
    else:
        save_file(theirs, tmp_path / name)
    loaded = LiTTransformer2DModel.from_pretrained(tmp_path, **options).state_dict()
    assert not any(loaded[key].any() for key in theirs)
    assert name in in_the_way(PLAIN, [name])
    for path in tmp_path.glob("diffusion_pytorch_model*"):
        if path.name != WEIGHTS:
            path.unlink()
    loaded = LiTTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.items())


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_stock_loaders_do_not_take_what_stays(picos: Picos, tmp_path: Path, name: str) -> None:
    """Alone beside a config it is no model for them, and beside ours it is not looked at."""
    from diffusers.pipelines.pipeline_loading_utils import is_safetensors_compatible, variant_compatible_siblings
    from transformers import T5Config, T5EncoderModel

    ours = laid_out(picos.pixels, tmp_path)
    shard = "model.fp16-00001-of-00001.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in ours.items()}, tmp_path / shard)
    (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(ours, shard)}))
    loaded = LiTTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.items())
    (tmp_path / WEIGHTS).unlink()
    encoder = tmp_path / "encoder"
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8).save_pretrained(encoder)
    for file in (name, shard):
        (encoder / file).write_bytes((tmp_path / file).read_bytes())
    for variant in (None, "fp16"):
        for model, folder in ((LiTTransformer2DModel, tmp_path), (T5EncoderModel, encoder)):
            with pytest.raises(OSError, match="no file named"):
                model.from_pretrained(folder, variant=variant)
    # Nor does a pipeline download it, or load another file because it is there.
    among = [*PIPELINE, f"transformer/{name}", "transformer/diffusion_pytorch_model.fp16.safetensors"]
    for variant in (None, "fp16"):
        assert f"transformer/{name}" not in variant_compatible_siblings(among, variant=variant)[0]
    assert is_safetensors_compatible(among, folder_names=["transformer", "vae"])


def test_a_pickle_in_a_folder_without_a_component_makes_diffusers_leave_safetensors_out() -> None:
    """Why such a folder counts, though model_index.json says that there is nothing in it."""
    from diffusers.pipelines.pipeline_loading_utils import is_safetensors_compatible

    folders = ["transformer", "vae", "text_encoder"]
    assert is_safetensors_compatible(PIPELINE, folder_names=folders)
    assert not is_safetensors_compatible((*PIPELINE, "text_encoder/pytorch_model.bin"), folder_names=folders)
