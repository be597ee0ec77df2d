"""Whether a data set and a model speak of the same latents and captions: one VAE with its scaling, one text encoder."""

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

from litconvert.common.files import read_json
from litconvert.common.hub import download, split_revision
from litconvert.data.dataset import LatentDataset
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.schema import Recipe, Section, TextEncoder, Vae

# diffusers' AutoencoderKL where its config.json names none.
DEFAULT_SCALING = 0.18215
# What makes two T5s two: caption features of the one mean nothing to a model of the other.
T5_SIZES = ("d_model", "num_layers", "vocab_size", "d_ff", "num_heads")


def check_same_encoders(data: LatentDataset, recipe: Recipe) -> None:
    """Compare what the data was made with and what the recipe says of the model, where both are known.

    Two names may stand for one VAE, so that scaling and shift decide, and of T5 its sizes.

    Raises UsageError where they differ.
    """
    if data.vae is not None and recipe.source.vae is not None and not data.pixels:
        _check_vae(data, Vae.model_validate(_known(Vae, data.vae)), recipe.source.vae)
    if data.text_encoder is not None and recipe.source.text_encoder is not None:
        theirs = TextEncoder.model_validate(_known(TextEncoder, data.text_encoder))
        _check_text_encoder(theirs, recipe.source.text_encoder)


def check_same_teacher(recipe: Recipe, teacher: Recipe) -> None:
    """Compare what the recipe says of the model with what another model, its teacher, says of itself.

    Raises UsageError where their VAEs scale or shift differently.
    """
    mine, theirs = recipe.source.vae, teacher.source.vae
    if mine is None or theirs is None:
        return
    own, told = scaling_told(mine), scaling_told(theirs)
    if own is not None and told is not None and not all(map(_close, own, told)):
        raise UsageError(
            f"the teacher sees latents of the VAE {theirs.path} (scaling {told[0]:g}, shift {told[1]:g}), and the VAE "
            f"of the model is {mine.path} (scaling {own[0]:g}, shift {own[1]:g}): choose a teacher of the same latents "
            "(--teacher), or name the VAE that the model was trained with (--set source.vae.path=...)"
        )


def _known(section: type[Section], record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record that a section has now: data may be older, or newer."""
    return {key: record[key] for key in section.model_fields if key in record}


def _check_vae(data: LatentDataset, theirs: Vae, mine: Vae) -> None:
    if (mine.path, mine.subfolder) == (theirs.path, theirs.subfolder) and data.kind != "moments":
        return
    told = (data.scaling_factor, data.shift_factor) if data.kind == "moments" else scaling_told(theirs)
    own = scaling_told(mine)
    if told is None or own is None or all(map(_close, told, own)):
        return
    raise UsageError(
        f"the data set holds latents of the VAE {theirs.path} (scaling {told[0]:g}, shift {told[1]:g}), and the VAE of "
        f"the model is {mine.path} (scaling {own[0]:g}, shift {own[1]:g}): encode or draw the data for this model, or "
        "name the VAE that the model was trained with (--set source.vae.path=...)"
    )


def _check_text_encoder(theirs: TextEncoder, mine: TextEncoder) -> None:
    if (theirs.path, theirs.subfolder) == (mine.path, mine.subfolder):
        return
    told, own = (_config(one.path, one.subfolder) for one in (theirs, mine))
    if told is None or own is None:
        return
    for key in T5_SIZES:
        if key in told and key in own and told[key] != own[key]:
            raise UsageError(
                f"the data set's captions were encoded by {theirs.path} ({key} {told[key]}), and the text encoder of "
                f"the model is {mine.path} ({key} {own[key]}): encode the data for this model, or name the T5 that the "
                "model was trained with (--set source.text_encoder.path=...)"
            )


def scaling_told(vae: Vae) -> tuple[float, float] | None:
    """Scaling and shift of a VAE's latents, as the recipe or its config.json says; None: its config is not at hand."""
    config: Mapping[str, Any] | None = {}
    if vae.scaling_factor is None or vae.shift_factor is None:
        config = _config(vae.path, vae.subfolder)
    if config is None and vae.scaling_factor is None:
        return None
    config = config or {}
    scaling = (
        vae.scaling_factor if vae.scaling_factor is not None else (config.get("scaling_factor") or DEFAULT_SCALING)
    )
    shift = vae.shift_factor if vae.shift_factor is not None else config.get("shift_factor")
    return float(scaling), float(shift or 0.0)


def _config(path: str, subfolder: str | None) -> dict[str, Any] | None:
    """The config.json of a folder or a Hub repository; None where it cannot be had."""
    folder = Path(path)
    try:
        if folder.exists():
            return read_json(folder / (subfolder or "") / "config.json")
        name, revision = split_revision(path)
        return read_json(download(name, f"{subfolder}/config.json" if subfolder else "config.json", revision=revision))
    except LitconvertError:
        return None


def _close(one: float, other: float) -> bool:
    return isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
