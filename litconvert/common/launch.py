"""What a launcher (`accelerate launch`, torchrun) set up: the group of processes, and settings that are not ours."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from litconvert.common.device import default_device, is_set, uses_bf16
from litconvert.errors import UsageError

# The main process draws samples and scores while the others wait: longer than the ten minutes NCCL allows.
GROUP_TIMEOUT = timedelta(hours=2)

# What `accelerate launch --use_fsdp` says of itself, and what is carried out here: its own defaults, which it always
# writes down, and what `fully_shard` by blocks does anyway. None: only a default that is not written down.
FSDP_SETTINGS: dict[str, tuple[str, ...]] = {
    "FSDP_VERSION": ("1", "2"),
    "FSDP_SHARDING_STRATEGY": ("full_shard", "1"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_MIN_NUM_PARAMS": ("100000000",),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap",),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("block",),
    "FSDP_BACKWARD_PREFETCH": ("backward_pre",),
    "FSDP_STATE_DICT_TYPE": ("sharded_state_dict",),
    "FSDP_FORWARD_PREFETCH": ("false",),
    "FSDP_USE_ORIG_PARAMS": ("true",),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("true", "false"),  # of transformers' loader, which is not used
    "FSDP_SYNC_MODULE_STATES": ("true", "false"),  # every process reads the same files
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
}
# What takes the place of some of them.
FSDP_ADVICE = {
    "FSDP_OFFLOAD_PARAMS": "; distill.teacher_placement=offloaded keeps the teacher in main memory",
    "FSDP_ACTIVATION_CHECKPOINTING": "; set distill.gradient_checkpointing=1 in its place",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "; set distill.gradient_checkpointing=1 in its place",
}


def launched_processes() -> int:
    """How many processes a launcher started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding_asked() -> bool:
    """Whether `accelerate launch --use_fsdp`, or who launches without it, asks for split states."""
    return is_set("ACCELERATE_USE_FSDP")


def join_group() -> PartialState:
    """The group of launched processes, joined; this process alone where nothing was launched.

    Raises UsageError when this process was launched as one of several but is in no group.
    """
    # accelerate keeps the group for as long as Python runs: a second call finds it.
    state = PartialState(cpu=default_device().type == "cpu", timeout=GROUP_TIMEOUT)
    if launched_processes() != state.num_processes:
        raise UsageError(
            f"this is one of {launched_processes()} launched processes, but they are in no process group, so each "
            "would do all of the work and overwrite the others; launch with `accelerate launch -m litconvert ...`"
        )
    return state


def device_of(state: PartialState) -> torch.device:
    """This process's device: of one among several its own, of one alone the one that is chosen now."""
    device: torch.device = state.device
    if state.num_processes > 1:
        return device
    chosen = default_device()
    return device if device.type == chosen.type else torch.empty(0, device=chosen).device


def refuse_launcher_settings(mixed_precision: str, key: str = "distill.mixed_precision") -> None:
    """Raise UsageError for what a launcher was told and what would not happen here, by its name.

    Args:
        mixed_precision: the recipe's distill.mixed_precision.
    """
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "DeepSpeed keeps its states in a format of its own, which no other number of processes could resume; "
            "shard them with `accelerate launch --use_fsdp --fsdp_version 2` instead"
        )
    for variable, option in (
        ("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "--use_parallelism_config"),
    ):
        if is_set(variable):
            raise UsageError(
                f"the launcher's {option} ({variable}) is not carried out; launch without it, with --multi_gpu or "
                "--use_fsdp --fsdp_version 2"
            )
    _refuse_precision(mixed_precision, key)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no"):
        raise UsageError(
            f"the launcher's --dynamo_backend {backend} (ACCELERATE_DYNAMO_BACKEND) is not carried out; leave it out, "
            "and set distill.compile=blocks"
        )
    if sharding_asked():
        _refuse_fsdp_settings()


def _refuse_precision(mixed_precision: str, key: str) -> None:
    # The launcher always writes one down, `no` where nobody said any: that one contradicts nothing.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched in ("", "no") or (launched == "bf16" and uses_bf16(mixed_precision)):
        return
    told = f"the launcher's --mixed_precision {launched} (ACCELERATE_MIXED_PRECISION)"
    if launched != "bf16":
        raise UsageError(f"{told} is not carried out: there are bf16 and no; leave it out, and say it in the recipe")
    here = f"{mixed_precision}, which is float32 here" if mixed_precision == "auto" else mixed_precision
    raise UsageError(f"{told} contradicts the recipe's {key}={here}; leave it out, or set {key}=bf16")


def _refuse_fsdp_settings() -> None:
    for variable in sorted(name for name in os.environ if name.startswith("FSDP_")):
        value = os.environ[variable]
        if value.lower() in ("", "none", *FSDP_SETTINGS.get(variable, ())):
            continue
        option = f"--{variable.lower()}"
        if variable == "FSDP_TRANSFORMER_CLS_TO_WRAP":
            option = "--fsdp_transformer_layer_cls_to_wrap"
        raise UsageError(
            f"the launcher's {option} {value} ({variable}) is not carried out: states are split by `fully_shard`, "
            f"block by block; leave it out{FSDP_ADVICE.get(variable, '')}"
        )
