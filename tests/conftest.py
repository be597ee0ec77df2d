"""Checkpoints made on disk, and a recipe for them: small enough that a test is a moment's work."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.helpers.checkpoint_files import dit_state

if TYPE_CHECKING:
    from tests.helpers.pretrained import Pretrained

# Beside other workers of pytest-xdist each has one thread: two busy threads on one core wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

PICO_RECIPE = """\
source: {num_attention_heads: 2}
student: {num_attention_heads: 2, conv_size: 3}
solve: null
data:
  synthesize: {num_samples: 12, scheduler: ddim, steps: 2, batch_size: 4, shard_size: 6}
distill:
  checkpoint_every: 2
  mixed_precision: "no"
  stages:
    - {objective: hybrid, steps: 3, batch_size: 4, learning_rate: 1.0e-3, schedule: cosine, feature_weight: 0.5}
    - {objective: hybrid, steps: 5, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 2, ema_decay: 0.9}
sampling: {mixed_precision: "no"}
sample: {scheduler: ddim, steps: 2, num_images: 4}
"""


@pytest.fixture(autouse=True)
def not_quiet() -> Iterator[None]:
    """A command that was given -q in this process is no reason for the next test to hear nothing."""
    yield
    if "litconvert.cli.terminal" in sys.modules:
        sys.modules["litconvert.cli.terminal"].be_quiet(False)


@pytest.fixture
def pico_state() -> dict[str, Tensor]:
    """The state dict of a pico DiT: width 32, 2 layers, 1x8x8, 4 classes and the null class."""
    return dit_state()


@pytest.fixture
def pico_checkpoint(tmp_path: Path, pico_state: dict[str, Tensor]) -> Path:
    """A plain pico state dict on disk."""
    path = tmp_path / "pico.pt"
    torch.save(pico_state, path)
    return path


@pytest.fixture
def training_checkpoint(tmp_path: Path) -> Path:
    """A pico training checkpoint: model, ema, opt and args, as DiT's train.py writes."""
    path = tmp_path / "training.pt"
    content = {
        "model": dit_state(seed=1),
        "ema": dit_state(seed=2),
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-pico/2"),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def pico_recipe(tmp_path: Path) -> Path:
    """A recipe for the pico checkpoint."""
    path = tmp_path / "pico.yaml"
    path.write_text(PICO_RECIPE)
    return path


@pytest.fixture
def shared() -> Path:
    """The real checkpoint and its oracle, beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "checkpoints"
    if not path.is_dir():
        pytest.skip("needs ../shared/checkpoints")
    return path


@pytest.fixture
def pico_student(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> Path:
    """A converted pico student."""
    import litconvert

    return litconvert.convert(pico_checkpoint, tmp_path / "student", str(pico_recipe))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> "Pretrained":
    """A tiny text-to-image repository; nobody writes into it."""
    from tests.helpers.pretrained import write_pretrained

    return write_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def text_recipe(tmp_path: Path, pretrained: "Pretrained") -> Path:
    """A recipe for the tiny PixArt-Sigma, whose data it draws for a list of prompts."""
    (tmp_path / "prompts.txt").write_text("a red fox\n\n  two birds by the sea \na cat\n")
    path = tmp_path / "text.yaml"
    path.write_text(
        f"source: {{path: {pretrained.folder / 'sigma'}, text_encoder: {{path: {pretrained.folder}}}, "
        f"vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        "sampling: {mixed_precision: 'no'}\n"
        f"data: {{synthesize: {{prompts: {tmp_path / 'prompts.txt'}, num_samples: 5, batch_size: 2, shard_size: 3, "
        "steps: 2, guidance: 2.0}}\n"
    )
    return path


@pytest.fixture
def latent_recipe(tmp_path: Path, pretrained: "Pretrained") -> Path:
    """A recipe for a model of four classes that sees the tiny VAE's latents of 64 pixels."""
    torch.save(dit_state(channels=4), tmp_path / "latent.pt")
    path = tmp_path / "latent.yaml"
    path.write_text(
        f"source: {{path: {tmp_path / 'latent.pt'}, num_attention_heads: 2, "
        f"vae: {{path: {pretrained.folder}, subfolder: vae}}}}\n"
        "data: {encode: {batch_size: 2, shard_size: 2}}\n"
    )
    return path
