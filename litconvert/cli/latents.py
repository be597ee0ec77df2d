"""`litconvert latents`: training data."""

from pathlib import Path
from typing import Annotated

import typer

from litconvert.cli import terminal as console
from litconvert.cli.options import (
    DeviceOption,
    ForceOption,
    HeadsOption,
    JsonOption,
    OwnRecipeOption,
    QuietOption,
    ReplaceOption,
    SetOption,
    a_data_set,
    a_new_folder,
    a_picture,
    a_recipe,
    a_source,
    assignments,
    check_overrides,
    complete_recipe,
    is_first,
    overrides_of,
    use_device,
)
from litconvert.common.files import refuse_existing
from litconvert.common.hub import path_of
from litconvert.errors import UsageError

OutArgument = Annotated[Path, typer.Argument(help="The dataset folder to write.", callback=a_new_folder)]


def _require_model(recipe: str | None, source: str | None) -> None:
    if recipe is None and source is None:
        raise UsageError("--recipe or --source says which model the data is for; give one")


def _show(out: Path, *, as_json: bool) -> None:
    """What was made."""
    from litconvert.cli.reports import show_data
    from litconvert.data.report import classes_remark, describe_data

    facts = {"out": str(out), **describe_data(out)}
    if remark := classes_remark(facts):
        console.note(f"note: {remark}")
    if as_json:
        console.data(facts)
        return
    console.line(f"{facts['samples']:,} samples: {out}")
    show_data(facts)
    console.next_step("distill", "STUDENT", "RUN", "--data", out)


def latents_synthesize(
    out: OutArgument,
    source: Annotated[
        str | None, typer.Option("--source", help="The teacher. Default: the recipe's source.", callback=a_source)
    ] = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let the teacher draw the training set, for classes or prompts. Interrupted, the same command goes on.

    Several processes share the work: accelerate launch -m litconvert latents synthesize ...

    Example: litconvert latents synthesize latents/ --recipe digits
    """
    given = overrides_of(sets, num_attention_heads)
    check_overrides(recipe, given, source)
    _require_model(recipe, source)
    from litconvert.cli.live import screen
    from litconvert.data.synthesize import synthesize

    console.be_quiet(quiet or not is_first())
    use_device(device)
    synthesize(source, out, recipe, given, force=force, listener=screen())
    if is_first():
        _show(out, as_json=as_json)


def latents_encode(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, webdataset shards (*.tar), parquet files, or images with a metadata.jsonl; "
            "or a Hub data set (owner/name)."
        ),
    ],
    out: OutArgument,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="The model that the data is for. Default: the recipe's source.", callback=a_source
        ),
    ] = None,
    recipe: OwnRecipeOption = None,
    sets: SetOption = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="Folder or Hub id of an AutoencoderKL (source.vae.path).")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Store mirrored latents too (data.flip).")] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave images out that cannot be read, and count them.")
    ] = False,
    num_attention_heads: HeadsOption = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make training data of images. Interrupted, the same command goes on.

    Several processes share the work: accelerate launch -m litconvert latents encode ...

    Example: litconvert latents encode imagenet/train latents/ --recipe dit-xl-2-256 --source DiT-XL-2-256x256.pt --flip
    """
    given = overrides_of(sets, num_attention_heads)
    given += assignments({"source.vae.path": vae, "data.flip": flip or None})
    check_overrides(recipe, given, source)
    _require_model(recipe, source)
    path_of(images)
    from litconvert.cli.live import screen
    from litconvert.conversion.plan import resolve_for
    from litconvert.encoding.encode import encode_images

    console.be_quiet(quiet or not is_first())
    use_device(device)
    resolved = resolve_for(recipe, given, source)
    encode_images(images, out, resolved, force=force, skip_broken=skip_broken, listener=screen())
    if is_first():
        _show(out, as_json=as_json)


def latents_show(
    data: Annotated[Path, typer.Argument(help="A dataset folder.", callback=a_data_set)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Sheet of samples to draw: .png, .jpg or .webp.", callback=a_picture),
    ] = None,
    count: Annotated[int, typer.Option("--num", "-n", min=1, help="Samples on the sheet.")] = 32,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Whose VAE decodes. Default: the one recorded with DATA.",
            callback=a_recipe,
            autocompletion=complete_recipe,
        ),
    ] = None,
    sets: SetOption = None,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what a data set holds, and draw a sheet of it.

    Example: litconvert latents show latents/ --out sheet.png
    """
    check_overrides(recipe, sets or [])
    refuse_existing(out, force=force)
    from litconvert.cli.reports import show_data
    from litconvert.data.report import describe_data, write_sheet
    from litconvert.recipe.resolve import resolve

    console.be_quiet(quiet)
    facts = describe_data(data)
    if out is not None:
        resolved = resolve(recipe, sets or [])
        write_sheet(data, out, vae=resolved.recipe.source.vae, count=count)
        console.note(f"written: {out}")
    if as_json:
        console.data(facts)
    else:
        show_data(facts)
