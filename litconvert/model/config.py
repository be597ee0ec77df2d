"""The config of a model, typed: what LiTTransformer2DModel is built with, and what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from litconvert.errors import UsageError, did_you_mean

KINDS = ("linear", "softmax", "kv_compress")
CHOICES: dict[str, tuple[Any, ...]] = {
    "linear_kernel": ("relu", "gelu", "focused"),
    "linear_conv_size": (0, 3, 5, 7),
    "prediction": ("noise", "velocity"),
    "data_timestep": (1, 0),
}
# Keys of which a model may be given other values than it was made with.
RESIZABLE = ("sample_size", "interpolation_scale")
# More positions than any image has: their embedding alone would not fit into memory.
MAX_SAMPLE_SIZE = 1 << 14


def is_pixel_space(channels: int) -> bool:
    """Whether a model of so many channels sees images, grey or RGB; others see a VAE's latents."""
    return channels in (1, 3)


@dataclass(frozen=True)
class ModelConfig:
    """LiTTransformer2DModel's arguments, with its own defaults, which are those of a config.json without a key.

    `ModelConfig.of` makes one of plain data and checks it; `values` is plain data again.

    Attributes:
        sample_size: height and width of its own latents (or images), H = W.
        patch_size: a token is so many by so many of them.
        in_channels, out_channels: C, and twice that where the variance is learned.
        hidden_size: D.
        attention: the kind of each layer, one of KINDS; softmax where none is named.
        num_attention_heads, linear_num_heads: of softmax (and KV-compressed, and cross-attention), of linear layers.
        linear_kernel, linear_conv_size, linear_eps: phi, k of the depth-wise convolution (0: none), and eps.
        num_classes, null_class: classes, and whether one more stands for none; None: the model reads captions.
        caption_channels, caption_tokens: of encoded captions, at most so many tokens; None: it reads classes.
        null_caption: the model stores the caption that stands for none.
        micro_conditions: it is told resolution and aspect ratio.
        interpolation_scale: positions are divided by it.
        kv_compress_factor: keys and values are merged so many by so many.
        prediction: `noise` or `velocity`.
        data_timestep: of a velocity, the end of [0, 1] where x_t is data.
    """

    sample_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    hidden_size: int = 1152
    num_layers: int = 28
    num_attention_heads: int = 16
    attention: tuple[str, ...] = ()
    linear_num_heads: int = 4
    linear_kernel: str = "relu"
    linear_conv_size: int = 5
    linear_eps: float = 1e-6
    num_classes: int | None = 1000
    null_class: bool = True
    mlp_ratio: float = 4.0
    timestep_freq_shift: float = 0.0
    norm_eps: float = 1e-6
    caption_channels: int | None = None
    caption_tokens: int = 0
    null_caption: bool = False
    micro_conditions: bool = False
    interpolation_scale: float = 1.0
    kv_compress_factor: int = 2
    prediction: str = "noise"
    data_timestep: int = 1

    def __post_init__(self) -> None:
        if not self.attention:
            object.__setattr__(self, "attention", ("softmax",) * self.num_layers)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The config of these values, the model's defaults filled in.

        What diffusers and transformers keep beside them (`_class_name`, `auto_map`) is left out.

        Raises UsageError for keys that the model has not, for kinds of attention that do not exist or are not one a
        layer, and for heads that do not divide the width.
        """
        known = {name: value for name, value in values.items() if not name.startswith("_") and name != "auto_map"}
        if unknown := next((name for name in known if name not in CONFIG_DEFAULTS), None):
            raise UsageError(f"the model's config has no key {unknown!r}{did_you_mean(unknown, CONFIG_DEFAULTS)}")
        full = {**CONFIG_DEFAULTS, **known}
        kinds = list(full["attention"] or ["softmax"] * full["num_layers"])
        if len(kinds) != full["num_layers"] or set(kinds) - set(KINDS):
            raise UsageError(f"attention must name one of {KINDS} for each of {full['num_layers']} layers, got {kinds}")
        for key, choices in CHOICES.items():
            if full[key] not in choices:
                raise UsageError(f"{key} must be one of {choices}, got {full[key]!r}")
        width = full["hidden_size"]
        if full["sample_size"] > MAX_SAMPLE_SIZE:
            raise UsageError(f"sample_size must be at most {MAX_SAMPLE_SIZE}, got {full['sample_size']}")
        if width % 4:
            raise UsageError(f"hidden_size must be a multiple of 4, got {width}")
        if (full["num_classes"] is None) == (full["caption_channels"] is None):
            raise UsageError("a model has classes or captions: give one of num_classes and caption_channels")
        heads = ["linear_num_heads"] * ("linear" in kinds)
        heads += ["num_attention_heads"] * (full["caption_channels"] is not None or bool(set(kinds) - {"linear"}))
        for name in heads:
            if full[name] < 1 or width % full[name]:
                raise UsageError(f"{name} must divide hidden_size {width}, got {full[name]}")
        return cls(**{**full, "attention": tuple(kinds)})

    @property
    def values(self) -> dict[str, Any]:
        """Plain data, every key."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**found, "attention": list(self.attention)}

    @property
    def given(self) -> dict[str, Any]:
        """The keys that differ from the defaults; the kinds of layers always do."""
        return {key: value for key, value in self.values.items() if CONFIG_DEFAULTS[key] != value}

    @property
    def reads_captions(self) -> bool:
        """Whether it is conditioned on captions, and not on classes."""
        return self.caption_channels is not None

    @property
    def classes(self) -> int:
        """How many classes there are beside the null class; none of a model that reads captions."""
        return self.num_classes or 0

    @property
    def caption_width(self) -> int:
        """Channels of its captions; none of a model that reads classes."""
        return self.caption_channels or 0

    @property
    def predicts_velocity(self) -> bool:
        """Whether it is trained by flow matching."""
        return self.prediction == "velocity"

    @property
    def learns_variance(self) -> bool:
        """Whether its output holds a variance beside what it predicts; of a velocity that half is not used."""
        return self.out_channels == 2 * self.in_channels

    @property
    def is_pixel_space(self) -> bool:
        """Whether it sees images, and not a VAE's latents."""
        return is_pixel_space(self.in_channels)

    @property
    def tokens(self) -> int:
        """T at its own size."""
        return (self.sample_size // self.patch_size) ** 2


# LiTTransformer2DModel's own defaults, for a config.json that was written before a key existed.
CONFIG_DEFAULTS: dict[str, Any] = {**{one.name: one.default for one in fields(ModelConfig)}, "attention": None}
