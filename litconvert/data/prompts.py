"""Prompts that a training set is drawn from: read from a file, encoded once, and kept beside the shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.device import default_device
from litconvert.common.files import whole_file
from litconvert.data.dataset import NULL_CAPTION
from litconvert.errors import UsageError
from litconvert.recipe.schema import Recipe
from litconvert.sampling.captions import Captions, encode_to_store, free_memory, load_text_encoder, write_embeddings

PACKAGED = Path(__file__).parents[1] / "assets" / "prompts.txt"


def read_prompts(path: str | None, advice: str = "set data.synthesize.prompts to one") -> list[str]:
    """Prompts of a text file, one a line; None: the list that ships with litconvert.

    Args:
        advice: how the caller's user names another file.

    Raises UsageError for a file that cannot be read or holds none.
    """
    file = PACKAGED if path is None else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not a text file of prompts ({error}); {advice}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{file}: holds no prompt; write one a line")
    return prompts


def store_prompts(path: Path, recipe: Recipe, prompts: Sequence[str], tokens: int) -> None:
    """Encode prompts and, last, the empty one with the recipe's T5, which is freed before this returns."""
    assert recipe.source.text_encoder is not None
    tokenizer, encoder = load_text_encoder(recipe.source.text_encoder)
    encoder.to(default_device())
    features = encode_to_store(tokenizer, encoder, [*prompts, ""], tokens)
    del encoder
    free_memory()
    tensors = {"features": torch.cat(features), "lengths": torch.tensor([len(one) for one in features])}
    with whole_file(path) as temporary:
        write_safetensors(temporary, LazyTensors.of(tensors), {"format": "pt"})


class StoredPrompts:
    """Encoded prompts, read as they are needed. Sample i has prompt i modulo their number.

    Args:
        path: file of `store_prompts`.
        prompts: their texts.
    """

    def __init__(self, path: Path, prompts: Sequence[str]) -> None:
        from safetensors import safe_open

        self.prompts = prompts
        self._file = safe_open(str(path), framework="pt")
        self._features = self._file.get_slice("features")
        self._ends = [0, *self._file.get_tensor("lengths").cumsum(0).tolist()]

    def _encoded(self, index: int) -> Any:
        """Features (L, C); index -1 is the empty prompt."""
        index %= len(self._ends) - 1
        return self._features[self._ends[index] : self._ends[index + 1]]

    def captions(self, samples: range, *, null: bool) -> Captions:
        """Captions of some samples; with `null`, the empty prompt is what guidance leads away from."""
        features = [self._encoded(index % len(self.prompts)) for index in samples]
        longest = max(map(len, features))
        mask = torch.tensor([[int(place < len(one)) for place in range(longest)] for one in features])
        padded = torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in features])
        empty = self._encoded(-1)[None]
        return Captions(
            padded,
            mask,
            empty if null else None,
            torch.ones(empty.shape[:2], dtype=torch.int64) if null else None,
        )

    def columns(self, samples: range) -> dict[str, list[Any]]:
        """The columns of some samples."""
        features = [self._encoded(index % len(self.prompts)) for index in samples]
        return {
            "caption": [self.prompts[index % len(self.prompts)] for index in samples],
            "caption_features": [one.numpy().reshape(-1) for one in features],
            "caption_tokens": [len(one) for one in features],
        }

    def write_null(self, folder: Path) -> None:
        """Write the empty prompt into a data set's folder."""
        features = self._encoded(-1)[None]
        write_embeddings(Captions(features, torch.ones(features.shape[:2], dtype=torch.int64)), folder / NULL_CAPTION)
