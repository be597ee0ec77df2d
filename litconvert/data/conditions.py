"""What a drawn batch is conditioned on, as the model's arguments: classes or captions, some of them dropped."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litconvert.data.batches import Batch
from litconvert.data.dataset import LatentDataset
from litconvert.errors import UsageError
from litconvert.model.config import ModelConfig
from litconvert.model.modeling_lit import CaptionConditioning, LiTTransformer2DModel
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.recipe.schema import Recipe, TextEncoder

# Texts to their features (N, L, C) and mask (N, L).
EncodeTexts = Callable[[list[str]], tuple[Tensor, Tensor]]


class Conditioner:
    """Turns a batch's conditions into the arguments that teacher and student both get.

    A dropped class is the null class. A dropped caption is the null caption: the model's own stands behind the mask of
    the caption it replaces, as in PixArt's code; the encoded empty prompt behind its own mask.

    Args:
        config: of the student; the teacher's conditions are the same.
        own_null: features (L, C) that the model stores for a dropped caption.
        empty_prompt: features (L, C) and mask (L,) of the empty prompt, where the model stores none.
        encode: encodes captions that the data holds as text.
        device: of the arguments; text features are float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        own_null: Tensor | None = None,
        empty_prompt: tuple[Tensor, Tensor] | None = None,
        encode: EncodeTexts | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.encode, self.device = config, encode, device
        self.null: tuple[Tensor, Tensor | None] | None = None
        if own_null is not None:
            self.null = (self._pad(own_null), None)
        elif empty_prompt is not None:
            self.null = (self._pad(empty_prompt[0]), F.pad(empty_prompt[1], (0, self.tokens - len(empty_prompt[1]))))

    @property
    def tokens(self) -> int:
        """Every caption's length."""
        return self.config.caption_tokens

    def _pad(self, features: Tensor) -> Tensor:
        return F.pad(features.float(), (0, 0, 0, self.tokens - len(features)))

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments for a batch, on the device."""
        if not self.config.reads_captions:
            labels = batch.samples.class_labels
            assert labels is not None
            labels = torch.where(batch.dropped, torch.full_like(labels, self.config.classes), labels)
            return {"class_labels": labels.to(self.device)}
        features, mask = self._captions(batch)
        if bool(batch.dropped.any()):
            assert self.null is not None
            null_features, null_mask = self.null
            features[batch.dropped] = null_features.to(features)
            if null_mask is not None:
                mask[batch.dropped] = null_mask.to(mask)
        arguments: dict[str, Any] = {
            "encoder_hidden_states": features.to(self.device),
            "encoder_attention_mask": mask.to(self.device),
        }
        if self.config.micro_conditions:
            height, width = (side * VAE_FACTOR for side in batch.noise.shape[-2:])
            count = len(features)
            arguments["added_cond_kwargs"] = {
                "resolution": torch.tensor([[float(height), float(width)]]).repeat(count, 1).to(self.device),
                "aspect_ratio": torch.tensor([[height / width]]).repeat(count, 1).to(self.device),
            }
        return arguments

    def _captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (N, L, C) and mask (N, L), padded to the model's length."""
        if batch.samples.texts is not None:
            assert self.encode is not None
            features, mask = self.encode(batch.samples.texts)
            return features.float(), mask
        captions = batch.samples.captions
        assert captions is not None
        lengths = torch.tensor([len(one) for one in captions])
        mask = (torch.arange(self.tokens) < lengths[:, None]).long()
        return torch.stack([self._pad(one) for one in captions]), mask


def check_captions(config: ModelConfig, data: LatentDataset, recipe: Recipe) -> None:
    """Raises UsageError for texts that nothing encodes, and for captions that are to be dropped where there is no null
    caption."""
    if data.condition == "text":
        _text_encoder(recipe)
    drops = any(stage.condition_dropout for stage in recipe.distill.stages)
    at_hand = config.null_caption or data.condition == "text" or data.null_caption is not None
    if config.reads_captions and drops and not at_hand:
        raise UsageError(
            "dropping captions needs the null caption, and neither the model nor the data set holds one: encode the "
            "data with `litconvert latents encode`, or set condition_dropout to 0"
        )


def _text_encoder(recipe: Recipe) -> TextEncoder:
    if recipe.source.text_encoder is None:
        raise UsageError(
            "the data set holds captions as text, and no text encoder is named: set source.text_encoder.path, or "
            "encode the data with data.encode.captions=embeddings"
        )
    return recipe.source.text_encoder


def make_conditioner(
    model: LiTTransformer2DModel, data: LatentDataset, recipe: Recipe, device: torch.device
) -> Conditioner:
    """What turns the data's conditions into the model's arguments; loads T5 where the data holds texts.

    Raises UsageError as `check_captions` does.
    """
    check_captions(ModelConfig.of(model.config), data, recipe)
    own = model.conditioning.null_caption if isinstance(model.conditioning, CaptionConditioning) else None
    empty, encode = data.null_caption, None
    if data.condition == "text":
        encode = load_encode(recipe, int(model.config.caption_tokens), device)
        if own is None:
            features, mask = encode([""])
            empty = (features[0], mask[0])
    return Conditioner(ModelConfig.of(model.config), own_null=own, empty_prompt=empty, encode=encode, device=device)


def load_encode(recipe: Recipe, tokens: int, device: torch.device) -> EncodeTexts:
    """T5, kept loaded, for captions that are encoded on the fly."""
    from litconvert.sampling.captions import encode_texts, load_text_encoder

    tokenizer, encoder = load_text_encoder(_text_encoder(recipe))
    return partial(encode_texts, tokenizer, encoder.to(device), tokens=tokens)
