"""Captions as a text-to-image model reads them: encoded by T5, which is then freed, or kept in a file."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.device import default_device, has_gpu
from litconvert.common.files import require_utf8, whole_file
from litconvert.common.hub import hub_errors, split_revision
from litconvert.common.versions import is_installed
from litconvert.errors import LitconvertError, UsageError
from litconvert.model.config import ModelConfig
from litconvert.recipe.schema import Recipe, TextEncoder

INSTALL = 'install what text-to-image needs: pip install "litconvert[text]"'
# What a file of embeddings may hold; the first two it must.
TENSORS = ("features", "mask", "null_features", "null_mask")


@dataclass(frozen=True)
class Captions:
    """Encoded captions, and the one that guidance leads away from.

    Attributes:
        features: text features (N, L, C).
        mask: (N, L) int64, 1 where a token counts.
        null_features: of the negative prompt, for all samples, (1, L, C); None: the model's own null caption.
        null_mask: (1, L); None with null_features.

    Raises UsageError for shapes that do not belong together.
    """

    features: Tensor
    mask: Tensor
    null_features: Tensor | None = None
    null_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.dim() != 3 or self.mask.shape != self.features.shape[:2]:
            raise UsageError(
                "captions are features (N, L, C) and a mask (N, L) of the same captions and tokens, got "
                f"{tuple(self.features.shape)} and {tuple(self.mask.shape)}"
            )
        if (self.null_features is None) != (self.null_mask is None):
            raise UsageError("null_features and null_mask belong together: give both or neither")
        if self.null_features is not None and self.null_mask is not None:
            shape, width = self.null_features.shape, self.features.shape[2]
            if len(shape) != 3 or shape[::2] != (1, width) or self.null_mask.shape != shape[:2]:
                raise UsageError(
                    f"the null caption is null_features (1, L, {width}) and null_mask (1, L), got {tuple(shape)} and "
                    f"{tuple(self.null_mask.shape)}"
                )

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Tensor) -> "Captions":
        """Some of the captions; the null caption stays."""
        return replace(self, features=self.features[index], mask=self.mask[index])

    def padded(self, tokens: int, channels: int) -> "Captions":
        """Every caption `tokens` long, with tokens that do not count.

        Raises UsageError for features of another width, and for longer captions.
        """
        _, length, width = self.features.shape
        if width != channels:
            raise UsageError(
                f"the captions have features of width {width}, the model reads {channels}: encode them with the T5 "
                "that the model was trained with"
            )
        if max(length, 0 if self.null_features is None else self.null_features.shape[1]) > tokens:
            raise UsageError(f"the captions are longer than the {tokens} tokens that the model reads: encode them anew")

        def pad(features: Tensor) -> Tensor:
            return F.pad(features, (0, 0, 0, tokens - features.shape[1]))

        def pad_mask(mask: Tensor) -> Tensor:
            return F.pad(mask, (0, tokens - mask.shape[1]))

        return Captions(
            pad(self.features),
            pad_mask(self.mask),
            None if self.null_features is None else pad(self.null_features),
            None if self.null_mask is None else pad_mask(self.null_mask),
        )


def text_packages() -> None:
    """Raise UsageError where a package that T5 and its tokenizer need is missing."""
    for module in ("transformers", "sentencepiece", "google.protobuf"):
        if not is_installed(module):
            raise UsageError(f"{module.removeprefix('google.')} is not installed; {INSTALL}")


def load_text_encoder(where: TextEncoder, *, offline: bool = False) -> tuple[Any, Any]:
    """T5's tokenizer and encoder, in eval mode and in the dtype they are stored in.

    Args:
        where: folder or Hub id.
        offline: from the Hub's cache only.

    Raises LitconvertError when transformers is not installed, and for what is not a T5, whole.
    """
    text_packages()
    from transformers import T5EncoderModel, T5Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # our own is the one on screen

    path, revision = split_revision(where.path)

    def options(subfolder: str | None) -> dict[str, Any]:
        return {"subfolder": subfolder or "", "revision": revision or "main", "local_files_only": offline}

    advice = "set source.text_encoder.path to a repository like PixArt-alpha/PixArt-XL-2-1024-MS"
    if Path(where.path).exists() and not (Path(where.path) / (where.subfolder or "") / "config.json").is_file():
        raise LitconvertError(f"{where.path}: no folder {where.subfolder} with a config.json in it; {advice}")
    try:
        with hub_errors(where.path):
            tokenizer = T5Tokenizer.from_pretrained(path, **options(where.tokenizer))
            encoder, loaded = T5EncoderModel.from_pretrained(
                path, **options(where.subfolder), dtype="auto", output_loading_info=True
            )
    except (ImportError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, ImportError) or "tiktoken" in str(error):  # a missing sentencepiece leads there
            raise LitconvertError(f"{where.path}: its tokenizer cannot be read; {INSTALL}") from error
        reason = str(error).strip().splitlines()[0]
        raise LitconvertError(f"{where.path}: not a T5 encoder with its tokenizer ({reason}); {advice}") from error
    # transformers fills what is missing with random values, and says so in a log alone.
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]
    if wrong:
        raise LitconvertError(
            f"{where.path}: not a complete T5 encoder ({wrong[0]}, and {len(wrong) - 1} more, do not fit); {advice}"
        )
    # Without its file transformers makes a tokenizer up, of special tokens alone.
    words = [token for token in tokenizer.get_vocab() if token != "▁" and not token.startswith("<")]
    if not words or len(tokenizer) > encoder.config.vocab_size:
        raise LitconvertError(
            f"{where.path}: its tokenizer has {len(words):,} pieces of words and {len(tokenizer):,} tokens, the "
            f"encoder {encoder.config.vocab_size:,}: a file is missing, or they do not belong together; set "
            "source.text_encoder.tokenizer to the tokenizer's folder"
        )
    return tokenizer, encoder.eval().requires_grad_(False)


def free_memory() -> None:
    """Give back what a network that was just dropped took: T5-XXL is many times the size of what comes next."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()


def _encode_batch(
    tokenizer: Any, encoder: Any, texts: Sequence[str], tokens: int, padding: str
) -> tuple[Tensor, Tensor]:
    """Features (N, L, C) and mask (N, L) of a few texts, on the encoder's device.

    As diffusers' PixArt pipelines do without `clean_caption`: lower case, no white space around.
    """
    some = tokenizer(
        [text.lower().strip() for text in texts],
        padding=padding,
        max_length=tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(encoder.device)
    return encoder(some.input_ids, attention_mask=some.attention_mask).last_hidden_state, some.attention_mask


@torch.no_grad()
def encode_texts(
    tokenizer: Any, encoder: Any, texts: Sequence[str], tokens: int, batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Encode texts with a T5 that is loaded, as `encode` does.

    Args:
        tokenizer, encoder: of `load_text_encoder`.
        texts: one for each caption.
        tokens: length that a caption is cut or padded to.
        batch_size: texts at a time.

    Returns: features (N, tokens, C) in the encoder's dtype and mask (N, tokens) int64, on the encoder's device.
    """
    starts = range(0, len(texts), batch_size)
    parts = [
        _encode_batch(tokenizer, encoder, texts[start : start + batch_size], tokens, "max_length") for start in starts
    ]
    return torch.cat([features for features, _ in parts]), torch.cat([mask for _, mask in parts])


@torch.no_grad()
def encode_to_store(
    tokenizer: Any, encoder: Any, texts: Sequence[str], tokens: int, batch_size: int = 8
) -> list[Tensor]:
    """Encode texts for a data set: float16, and of each caption its own tokens alone.

    Texts of like length are encoded together, so that little is computed for padding, which is most of the 120 or 300
    tokens that a caption may have. T5 masks it, so the features are those of `encode`.

    Returns: features (L_i, C) of each text, on the CPU.

    Raises LitconvertError for features beyond float16.
    """
    features: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        encoded, mask = _encode_batch(tokenizer, encoder, [texts[index] for index in some], tokens, "longest")
        for index, one, length in zip(some, encoded.cpu(), mask.sum(dim=1).tolist(), strict=True):
            features[index] = one[:length].to(torch.float16, copy=True)
            if not features[index].isfinite().all():
                raise LitconvertError(
                    f"the features of the caption {texts[index]!r} reach {one[:length].abs().max():.3g}, beyond the "
                    "float16 they are stored in; use another text encoder, or keep the captions as text "
                    "(data.encode.captions=text)"
                )
    return [features[index] for index in range(len(texts))]


def encode(
    where: TextEncoder, prompts: Sequence[str], negative_prompt: str | None = None, *, tokens: int, batch_size: int = 8
) -> Captions:
    """Encode prompts with a T5 that is loaded for it and freed before this returns.

    As diffusers' PixArt pipelines do without `clean_caption`: lower case, no white space around, cut or padded to
    `tokens`.

    Args:
        where: folder or Hub id of encoder and tokenizer.
        prompts: one for each caption.
        negative_prompt: what guidance leads away from; None: no null caption is encoded.
        tokens: length of a caption (`config.caption_tokens`).
        batch_size: prompts at a time.

    Returns: captions on the CPU, in the encoder's dtype.
    """
    texts = [*prompts, *([] if negative_prompt is None else [negative_prompt])]
    tokenizer, encoder = load_text_encoder(where)
    encoder.to(default_device())
    features, mask = (part.cpu() for part in encode_texts(tokenizer, encoder, texts, tokens, batch_size))
    del encoder
    free_memory()
    count = len(prompts)
    if negative_prompt is None:
        return Captions(features, mask)
    return Captions(features[:count], mask[:count], features[count:], mask[count:])


def write_embeddings(captions: Captions, path: Path) -> None:
    """Write captions as safetensors: features, mask and, where there is one, null_features and null_mask."""
    tensors = {name: value for name in TENSORS if (value := getattr(captions, name)) is not None}
    with whole_file(path) as temporary:
        write_safetensors(temporary, LazyTensors.of(tensors), {"format": "pt"})


def read_embeddings(path: Path) -> Captions:
    """Captions that `write_embeddings` or another program wrote.

    Raises UsageError for a file that holds none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"{path}: no such file; `litconvert sample MODEL --save-embeddings {path.name}` writes one")
    require_utf8(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path}: not a complete safetensors file ({error}); write it again") from error
    extra = [name for name in tensors if name not in TENSORS]
    if extra or not {"features", "mask"} <= set(tensors):
        raise UsageError(
            f"{path}: embeddings are the tensors features (N, L, C) and mask (N, L), and for guidance null_features "
            f"and null_mask; this file holds {', '.join(tensors) or 'nothing'}"
        )
    try:
        return Captions(**tensors)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def encode_prompts(
    recipe: Recipe, config: ModelConfig, prompts: Sequence[str] = (), negative_prompt: str | None = None
) -> Captions:
    """Captions for a model of captions, from a recipe's T5, which is freed before this returns.

    Args:
        recipe: its `source.text_encoder` and, where nothing else is given, its prompts and its negative prompt.
        config: the model's.

    Raises UsageError when the recipe names no T5.
    """
    if recipe.source.text_encoder is None:
        raise UsageError(
            "this model draws captions, and no text encoder is named: give one "
            "(--set source.text_encoder.path=PixArt-alpha/PixArt-XL-2-1024-MS), or precomputed captions "
            "(--embeddings FILE)"
        )
    negative = recipe.sample.negative_prompt if negative_prompt is None else negative_prompt
    if negative is None and not config.null_caption:
        negative = ""
    return encode(recipe.source.text_encoder, prompts or recipe.sample.prompts, negative, tokens=config.caption_tokens)
