"""Small feature networks as transformers saves them, and a stand-in for torch-fidelity's Inception."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 28


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 of random weights, with its image processor."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    _write_processor(folder, "BitImageProcessor")
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP of random weights, with its image processor and a tokenizer that knows letters."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**small, **ends, "vocab_size": len(words), "max_position_embeddings": 12}
    vision = {**small, "image_size": SIDE, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    _write_processor(folder, "CLIPImageProcessor")
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    settings |= {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _write_processor(folder: Path, name: str) -> None:
    processor = {
        **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "image_processor_type": name,
        "crop_size": {"height": SIDE, "width": SIDE},
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


class InceptionStandIn(nn.Module):
    """Takes and gives what torch-fidelity's extractor does, of so few weights that each can be foretold."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        if feature_extractor_weights_path is None:
            raise OSError("no network")
        self.convolution = nn.Conv2d(3, 9, 1, bias=False)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = self.convolution
        self.fc = nn.Linear(9, 4)
        weights: dict[str, Any] = torch.load(feature_extractor_weights_path, weights_only=True)
        self.convolution.weight.data = weights["Mixed_6d.branch1x1.conv.weight"]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        maps = self.convolution(images.float())  # (N, 9, H, W)
        pooled = maps.mean(dim=(2, 3))
        return pooled, pooled @ self.fc.weight.T
