"""What no family reads, told by the names of tensors: each with its own reason and what helps."""

import re

from litconvert.checkpoints.checkpoint import Checkpoint
from litconvert.errors import LitconvertError

# The first name that matches is shown; the order is that of what explains most.
REASONS: tuple[tuple[str, str], ...] = (
    (
        r"\.(lora_\w+|base_layer|hada_w\w+|lokr_w\w+|dora_scale)(\.|$)",
        "holds an adapter that is not merged (LoRA; {name}): merge it into its model first (`merge_and_unload()` of "
        "peft, or the trainer's own tool), and give the merged checkpoint",
    ),
    (
        r"\.(absmax|quant_map|quant_state|nested_absmax|SCB|qweight|qzeros|scale_weight|weight_scale\w*|comfy_quant)(\.|$)",
        "holds quantised weights ({name}): use the checkpoint that they were made from",
    ),
    (
        r"\.(q_norm|k_norm|norm_q|norm_k|query_norm|key_norm)\.",
        "a model with normalised queries and keys ({name}), which litconvert does not read; use one that was trained "
        "without qk_norm",
    ),
    (
        r"^decoder_blocks\.\d+\.",
        "a checkpoint of REPA's first releases, which number the later blocks anew ({name}): rename decoder_blocks.N "
        "to blocks.(E + N), E being the number of blocks before them, as REPA's load_legacy_checkpoints does",
    ),
    (
        r"^blocks\.\d+\.mlp\.(w12|w3|w1)\.",
        "a model whose MLPs are SwiGLU ({name}), as LightningDiT's, which litconvert does not read; it reads DiT's own",
    ),
)


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Raise LitconvertError for a checkpoint that is known to be none of any family, with the reason."""
    for pattern, reason in REASONS:
        found = next(filter(re.compile(pattern).search, checkpoint.tensors), None)
        if found is not None:
            raise LitconvertError(f"{checkpoint.source}: {reason.format(name=found[:120])}")
