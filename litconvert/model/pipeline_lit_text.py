"""LiTAlphaPipeline and LiTSigmaPipeline: diffusers' text-to-image pipelines of PixArt, with a LiTTransformer2DModel.

Shipped beside published weights: it needs torch, diffusers and, as diffusers' own PixArt pipelines do, transformers.
"""

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from transformers import T5EncoderModel, T5Tokenizer


class CaptionPipeline:
    """What diffusers' pipelines guess from the size of the latent is here read from the transformer's config.

    Resolution binning is on where there are bins for the model's own size, micro-conditions are given where the model
    has them, and captions are as long as those it was trained on.
    """

    binned_sizes: tuple[int, ...]
    transformer: Any
    vae_scale_factor: int

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Without auto_map, which is there for AutoModel, and of which diffusers would warn."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **kwargs)  # type: ignore[misc]

    def __call__(self, *args: Any, use_resolution_binning: bool | None = None, **kwargs: Any) -> Any:
        """Draw one image for each prompt; the arguments are those of diffusers' pipeline.

        Args:
            use_resolution_binning: draw at the nearest size that the released models were trained on, and resize; None:
                where there are such sizes.

        Raises ValueError for binning at a size without bins.
        """
        config = self.transformer.config
        binned = config.sample_size in self.binned_sizes
        if use_resolution_binning and not binned:
            raise ValueError(
                f"there are no resolution bins for a latent of side {config.sample_size}, only for "
                f"{', '.join(map(str, self.binned_sizes))}: leave use_resolution_binning out"
            )
        kwargs.setdefault("max_sequence_length", config.caption_tokens)
        kwargs["use_resolution_binning"] = binned if use_resolution_binning is None else use_resolution_binning
        hook = self.transformer.register_forward_pre_hook(self._give_size, with_kwargs=True)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()

    def _give_size(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Micro-conditions from the latent's own size; diffusers gives them at a latent side of 128 only."""
        if not transformer.config.micro_conditions or kwargs["added_cond_kwargs"]["resolution"] is not None:
            return None
        latents = args[0]
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        size = {
            "resolution": latents.new_tensor([[height, width]]),
            "aspect_ratio": latents.new_tensor([[height / width]]),
        }
        return args, {**kwargs, "added_cond_kwargs": size}


class LiTAlphaPipeline(CaptionPipeline, PixArtAlphaPipeline):  # type: ignore[misc]
    """PixArt-alpha: captions of 120 tokens, and at 1024 pixels micro-conditions.

    Args:
        tokenizer, text_encoder: T5; None where prompt embeddings are given instead of prompts.
        vae: decoder.
        transformer: LiTTransformer2DModel of captions.
        scheduler: DPM-Solver++ or DDIM.
    """

    binned_sizes = (32, 64, 128)

    def __init__(
        self,
        tokenizer: T5Tokenizer | None,
        text_encoder: T5EncoderModel | None,
        vae: AutoencoderKL,
        transformer: Any,
        scheduler: DPMSolverMultistepScheduler | DDIMScheduler,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)


class LiTSigmaPipeline(CaptionPipeline, PixArtSigmaPipeline):  # type: ignore[misc]
    """PixArt-Sigma: captions of 300 tokens.

    Args:
        tokenizer, text_encoder: T5; None where prompt embeddings are given instead of prompts.
        vae: decoder.
        transformer: LiTTransformer2DModel of captions.
        scheduler: DPM-Solver++ or DDIM.
    """

    binned_sizes = (32, 64, 128, 256)

    def __init__(
        self,
        tokenizer: T5Tokenizer | None,
        text_encoder: T5EncoderModel | None,
        vae: AutoencoderKL,
        transformer: Any,
        scheduler: DPMSolverMultistepScheduler | DDIMScheduler,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
