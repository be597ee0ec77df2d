"""Options that several commands have."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from litconvert.common.files import picture_format, require_file_name
from litconvert.common.hub import is_hub_id, path_of
from litconvert.common.outputs import refuse_unfinished
from litconvert.errors import UsageError
from litconvert.runs.directory import model_of

# What is wrong with an argument is said before torch is imported, by the functions that typer calls with its value.


def a_source(source: str | None) -> str | None:
    """A checkpoint or a run: it is there, or may be on the Hub."""
    if source is not None:
        path = path_of(model_of(source))
        if path is not None:
            refuse_unfinished(path)
    return source


def a_recipe(name: str | None) -> str | None:
    """A recipe: it is there, or may be on the Hub."""
    if name is not None:
        from litconvert.recipe.packaged import local_recipe

        local_recipe(name)
    return name


def complete_recipe(incomplete: str) -> list[str]:
    """Packaged recipes that begin so, for the shell's completion."""
    from litconvert.recipe.packaged import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(incomplete)]


def a_folder(path: Path | None) -> Path | None:
    """A folder to read."""
    if path is not None and not path.is_dir():
        what = " is a file, and a folder is asked for" if path.exists() else ": no such folder"
        raise UsageError(f"{path}{what}")
    if path is not None:
        refuse_unfinished(path)
    return path


def _is_hub_model(path: Path) -> bool:
    """Whether this may be a model on the Hub, `owner/name[@revision]`, and nothing of this name is here."""
    return is_hub_id(path.as_posix()) and not path.parent.exists()


def a_student(path: Path) -> Path:
    """A model directory, or one on the Hub."""
    if not path.is_dir() and not _is_hub_model(path):
        raise UsageError(
            f"{path}: not a model directory of litconvert; convert a checkpoint first (`litconvert convert`)"
        )
    refuse_unfinished(path)
    return path


def a_data_set(path: Path | None) -> Path | None:
    """A data set to read."""
    if path is not None and not path.is_dir():
        what = "is a file, and no data set" if path.exists() else "no such data set"
        raise UsageError(
            f"{path}: {what}; draw one with `litconvert latents synthesize`, or make one of images with `litconvert "
            "latents encode`"
        )
    if path is not None:
        refuse_unfinished(path)
    return path


def a_run(path: Path) -> Path:
    """A model or run directory, or RUN@STEP."""
    a_folder(Path(model_of(str(path))))
    return path


def a_run_or_id(path: Path) -> Path:
    """A model or run directory, RUN@STEP, or a model on the Hub."""
    return path if _is_hub_model(path) else a_run(path)


def a_file(path: Path | None) -> Path | None:
    """A file to read."""
    if path is not None and not path.is_file():
        what = " is a folder, and a file is asked for" if path.is_dir() else ": no such file"
        raise UsageError(f"{path}{what}")
    return path


def a_new_folder(path: Path | None) -> Path | None:
    """A folder to write."""
    if path is not None and path.is_file():
        raise UsageError(f"{path} exists and is a file, and a folder is written: choose another path")
    return path


def a_new_file(path: Path | None) -> Path | None:
    """A file to write."""
    if path is not None:
        require_file_name(path)
    return path


def a_picture(path: Path | None) -> Path | None:
    """A picture to write."""
    if path is not None:
        a_new_file(path)
        picture_format(path)
    return path


NamedSource = Annotated[
    str, typer.Argument(metavar="SRC", help="File, folder, Hub id or asset:NAME.", callback=a_source)
]
SourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="SRC",
        help="File, folder, Hub id (owner/name) or asset:NAME. Default: the recipe's.",
        callback=a_source,
    ),
]
OwnRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Default: the packaged one for what the source is.",
        callback=a_recipe,
        autocompletion=complete_recipe,
    ),
]
RecordedRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Default: the one recorded with the model.",
        callback=a_recipe,
        autocompletion=complete_recipe,
    ),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Dataset folder. Default: the recipe's.", callback=a_data_set)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key. May be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that was made from other inputs.")]
ReplaceOption = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
HeadsOption = Annotated[
    int | None, typer.Option("--num-attention-heads", help="Heads of the source, where its width does not tell.")
]
SizeOption = Annotated[
    int | None, typer.Option("--sample-size", help="Side of the latent, where the source does not tell.")
]
DeviceOption = Annotated[
    Literal["cuda", "mps", "cpu", "auto"] | None,
    typer.Option("--device", case_sensitive=False, help="cuda, mps (a Mac's GPU), cpu or auto (LITCONVERT_DEVICE)."),
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Of a checkpoint of a run: its raw weights, not their moving average.")
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help="Checks begin for so long, the rest is skipped. Default: 5.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the JSON to this file too.", callback=a_new_file)
]
NoSolveOption = Annotated[
    bool, typer.Option("--no-solve", help="Let what is fresh start at random, as in the paper (solve=null).")
]
SolveDataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Data set to solve on (solve.data). Default: the teacher draws some images.", callback=a_data_set
    ),
]
EmbeddingsOption = Annotated[
    Path | None,
    typer.Option(
        "--embeddings",
        help="Of a model of captions: encoded captions to solve on (solve.embeddings).",
        callback=a_file,
    ),
]
InheritOption = Annotated[
    str | None,
    typer.Option(
        "--inherit",
        metavar="PROJECTIONS",
        help="Attention to inherit: none, all, or some of q, k, v, o, as in q,k,v (inherit.attention).",
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of fresh weights and of every draw (seed).")]


def overrides_of(
    sets: list[str] | None,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    seed: int | None = None,
    inherit: str | None = None,
) -> list[str]:
    """--set and the options that stand for a key."""
    named = {
        "source.num_attention_heads": num_attention_heads,
        "source.sample_size": sample_size,
        "seed": seed,
        "inherit.attention": inherit,
    }
    return [*(sets or []), *assignments(named)]


def assignments(named: Mapping[str, object]) -> list[str]:
    """`key=value` of those options that are given.

    As JSON, which YAML reads as it is: of plain text, such as a path, it might make something else.
    """
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in named.items()}
    return [f"{key}={json.dumps(value)}" for key, value in texts.items() if value is not None]


def check_overrides(recipe: str | None, overrides: Sequence[str], source: str | None = None) -> None:
    """Refuse a recipe or an override that cannot be, where the recipe is known without reading the source."""
    from litconvert.recipe.packaged import asset_of, local_recipe

    known = recipe or asset_of(source or "").recipe
    if known is not None and local_recipe(known) is not None:
        from litconvert.recipe.resolve import resolve

        resolve(known, overrides)
    elif overrides:
        from litconvert.recipe.resolve import check_sections

        check_sections(overrides)


def recorded_recipe(model: Path | str) -> str | None:
    """The recipe that is recorded with a model directory; None where there is none."""
    return str(model) if os.path.isfile(os.path.join(model, "recipe.yaml")) else None


def solve_overrides(no_solve: bool, data: Path | None, embeddings: Path | None) -> list[str]:
    """`--no-solve`, and what is solved on."""
    if no_solve:
        if data is not None or embeddings is not None:
            raise UsageError("--data and --embeddings say what to solve on, and --no-solve solves nothing")
        return ["solve=null"]
    return assignments({"solve.data": data, "solve.embeddings": embeddings})


def use_device(name: str | None) -> None:
    """`--device`."""
    if name is not None:
        from litconvert.common.device import choose_device

        choose_device(name)


def is_first() -> bool:
    """Whether this is the one of several launched processes that talks to the user."""
    return os.environ.get("RANK", "0") == "0"
