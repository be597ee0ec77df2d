"""A text-to-image repository on disk, tiny: T5, its tokenizer, a decoder and two PixArts, all random."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from litconvert.recipe.schema import TextEncoder

WORDS = ["a", "red", "fox", "in", "the", "snow", "cat", "blue", "house", "by", "sea", "blurry", "ugly", "two", "birds"]
CHANNELS, SIDE = 16, 8


@dataclass(frozen=True)
class Pretrained:
    """What a PixArt repository holds, tiny: text encoder, tokenizer and decoder, and transformers without them."""

    folder: Path

    @property
    def text_encoder(self) -> TextEncoder:
        return TextEncoder(path=str(self.folder))

    def t5(self) -> tuple[Any, Any]:
        return (
            T5Tokenizer.from_pretrained(self.folder / "tokenizer"),
            T5EncoderModel.from_pretrained(self.folder / "text_encoder").eval(),
        )

    def vae(self) -> Any:
        return AutoencoderKL.from_pretrained(self.folder / "vae").eval()

    def recipe(self, path: Path, more: str = "") -> Path:
        """A recipe that names this decoder and this T5."""
        vae = f"vae: {{path: {self.folder}, subfolder: vae}}"
        path.write_text(
            f"source: {{{vae}, text_encoder: {{path: {self.folder}}}}}\n"
            "student: {num_attention_heads: 2, conv_size: 3}\n"
            f"sample: {{scheduler: dpm-solver++, steps: 3, guidance: 3.0, prompts: [a cat, a house]{more}}}\n"
        )
        return path


def pixart(*, micro: bool, sample_size: int = SIDE, interpolation_scale: float = 1.0) -> Any:
    """A random diffusers PixArt, every tensor non-zero; the same weights whatever the size."""
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=CHANNELS,
        sample_size=sample_size,
        interpolation_scale=interpolation_scale,
        use_additional_conditions=micro,
    )
    generator = torch.Generator().manual_seed(4)
    for _, value in sorted(model.named_parameters()):
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model.eval()


def write_pretrained(folder: Path) -> Pretrained:
    """Write the parts of such a repository, and `alpha` (micro-conditions) and `sigma` without them."""
    torch.manual_seed(0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = T5Config(vocab_size=40, d_model=CHANNELS, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    decoder = AutoencoderKL(**blocks, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2)
    decoder.register_to_config(scaling_factor=0.5)
    decoder.save_pretrained(folder / "vae")
    pixart(micro=True).save_pretrained(folder / "alpha")
    pixart(micro=False).save_pretrained(folder / "sigma")
    return Pretrained(folder)


def write_pipeline(pretrained: Pretrained, folder: Path, kind: str = "sigma", **scheduler: Any) -> Path:
    """The same parts as the diffusers pipeline that PixArt's repositories are, with a scheduler of these settings."""
    shutil.copytree(pretrained.folder / kind, folder / "transformer")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(pretrained.folder / part, folder / part)
    settings = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, **scheduler}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = {
        "_class_name": "PixArtSigmaPipeline" if kind == "sigma" else "PixArtAlphaPipeline",
        "scheduler": ["diffusers", settings["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
