"""litconvert's own model directories: the keys are the model's, config.json says the rest."""

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families.family import Family, Reading
from litconvert.families.headers import LINEAR_HINTS
from litconvert.families.layout import Origin
from litconvert.model.config import CONFIG_DEFAULTS, RESIZABLE, ModelConfig
from litconvert.model.shapes import model_tensors
from litconvert.recipe.schema import Source

# A key that is None where the model has no such thing.
OPTIONAL_SIZES = ("num_classes", "caption_channels")

SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "linear_num_heads",
    "kv_compress_factor",
    *OPTIONAL_SIZES,
)
# What config.json says, so that no hint may differ. The size and the interpolation of positions may change: so a
# student goes on at another resolution.
FIXED = ("num_attention_heads", "num_classes", "data_timestep", "timestep_freq_shift", "norm_eps", *LINEAR_HINTS)


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    """A directory whose config.json names LiTTransformer2DModel, or None."""
    config = checkpoint.config or {}
    if config.get("_class_name") != "LiTTransformer2DModel":
        return None
    values = {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}
    for name in FIXED:
        hint, known = getattr(hints, name), values.get(name, CONFIG_DEFAULTS.get(name))
        if hint is not None and hint != known:
            raise UsageError(
                f"{checkpoint.source}: config.json says {name}={known}, not {hint}; leave {name} out, or set "
                f"source.{name}=null where it is the recipe's"
            )
    resized = {key: getattr(hints, key) for key in RESIZABLE if getattr(hints, key) is not None}
    values |= resized
    for key in values:
        if key not in CONFIG_DEFAULTS:
            raise LitconvertError(
                f"{checkpoint.source}: config.json has an unknown key {key!r}{did_you_mean(key, CONFIG_DEFAULTS)}; "
                "it may be of a newer litconvert"
            )
    for key in SIZES:
        value = values.get(key, 1)
        if value is None and key in OPTIONAL_SIZES:
            continue
        # More layers than tensors: the model alone would take for ever to lay out.
        if type(value) is not int or value < 1 or (key == "num_layers" and value > len(checkpoint.tensors)):
            raise LitconvertError(
                f"{checkpoint.source}: config.json has {key}={value!r}, which cannot be; restore it, or convert again"
            )
    try:
        names = list(model_tensors(ModelConfig.of(values)))
    except (LitconvertError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise LitconvertError(f"{checkpoint.source}: config.json: {reason}; restore it, or convert again") from error
    return Reading(
        family="litconvert",
        layout="litconvert",
        because="config.json names LiTTransformer2DModel"
        + (f", at {', '.join(f'{key}={value:g}' for key, value in resized.items())} as told" if resized else ""),
        config=values,
        origins={name: Origin((name,)) for name in names},
        recomputed={},
        unsure=(),
    )


LITCONVERT = Family("litconvert", "litconvert's own model directories", recognise)
