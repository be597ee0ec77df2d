"""Options that several commands have."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from litconvert.errors import UsageError

SourceArgument = Annotated[
    str | None,
    typer.Argument(metavar="SRC", help="File, folder, Hub id (owner/name) or asset:NAME. Default: the recipe's."),
]
OwnRecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Default: the packaged one for what the source is.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key. May be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output that was made from other inputs.")]
HeadsOption = Annotated[
    int | None, typer.Option("--num-attention-heads", help="Heads of the source, where its width does not tell.")
]
SizeOption = Annotated[
    int | None, typer.Option("--sample-size", help="Side of the latent, where the source does not tell.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cuda, mps (a Mac's GPU), cpu or auto (LITCONVERT_DEVICE).")
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Of a checkpoint of a run: its raw weights, not their moving average.")
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help="Checks begin for so long, the rest is skipped. Default: 5.")
]
ReportOption = Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON to this file too.")]
NoSolveOption = Annotated[
    bool, typer.Option("--no-solve", help="Let what is fresh start at random, as in the paper (solve=null).")
]
SolveDataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Data set to solve on (solve.data). Default: the teacher draws some images."),
]
EmbeddingsOption = Annotated[
    Path | None,
    typer.Option("--embeddings", help="Of a model of captions: encoded captions to solve on (solve.embeddings)."),
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
    """`key=value` of those options that are given."""
    return [f"{key}={value}" for key, value in named.items() if value is not None]


def solve_overrides(no_solve: bool, data: Path | None, embeddings: Path | None) -> list[str]:
    """`--no-solve`, and what is solved on."""
    if no_solve:
        if data is not None or embeddings is not None:
            raise UsageError("--data and --embeddings say what to solve on, and --no-solve solves nothing")
        return ["solve=null"]
    # As JSON, which YAML reads as it is: a path may hold what YAML would make something else of.
    named = {"solve.data": data, "solve.embeddings": embeddings}
    return [f"{key}={json.dumps(str(path))}" for key, path in named.items() if path is not None]


def use_device(name: str | None) -> None:
    """`--device`."""
    if name is not None:
        from litconvert.common.device import choose_device

        choose_device(name)


def is_first() -> bool:
    """Whether this is the one of several launched processes that talks to the user."""
    return os.environ.get("RANK", "0") == "0"
