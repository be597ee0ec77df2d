"""litconvert's own model directories: the keys are the model's, config.json says the rest."""

import inspect

from litconvert.checkpoints import Checkpoint
from litconvert.errors import LitconvertError, UsageError, did_you_mean
from litconvert.families import Origin, Reading
from litconvert.recipe import Source

SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "linear_num_heads",
    "num_classes",
)


def recognise(checkpoint: Checkpoint, hints: Source) -> Reading | None:
    """A directory whose config.json names LiTTransformer2DModel, or None."""
    config = checkpoint.config or {}
    if config.get("_class_name") != "LiTTransformer2DModel":
        return None
    from litconvert.modeling_lit import LiTTransformer2DModel
    from litconvert.shapes import model_tensors

    given = [name for name in ("num_attention_heads", "sample_size", "num_classes") if getattr(hints, name) is not None]
    if given:
        raise UsageError(f"{checkpoint.source}: config.json says it all; leave {', '.join(given)} out")
    parameters = inspect.signature(LiTTransformer2DModel.__init__).parameters
    values = {key: value for key, value in config.items() if not key.startswith("_") and key != "auto_map"}
    for key in values:
        if key not in parameters:
            raise LitconvertError(
                f"{checkpoint.source}: config.json has an unknown key {key!r}{did_you_mean(key, parameters)}; "
                "it may be of a newer litconvert"
            )
    for key in SIZES:
        value = values.get(key, 1)
        # More layers than tensors: the model alone would take for ever to lay out.
        if type(value) is not int or value < 1 or (key == "num_layers" and value > len(checkpoint.tensors)):
            raise LitconvertError(
                f"{checkpoint.source}: config.json has {key}={value!r}, which cannot be; restore it, or convert again"
            )
    try:
        names = list(model_tensors(values))
    except (LitconvertError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise LitconvertError(f"{checkpoint.source}: config.json: {reason}; restore it, or convert again") from error
    return Reading(
        family="litconvert",
        layout="litconvert",
        because="config.json names LiTTransformer2DModel",
        config=values,
        origins={name: Origin((name,)) for name in names},
        recomputed={},
        unsure=(),
    )
