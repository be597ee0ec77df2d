"""Train the small emoji teacher of the curves, and keep it in float16 in benchmarks/teachers/emoji-32.

    apt-get install fonts-noto-color-emoji unicode-data libfribidi0
    python -m benchmarks.make_emoji_teacher WORK      images, data and the run: what is in WORK is not made again

An hour of two cores, gone on with where it was interrupted. 4,500 steps of 32 images make a young teacher: its emoji
have form and colour, and few can be named. Recipe `emoji-32-teacher` has more steps.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

import litconvert
from benchmarks.curve_rows import EMOJI_TEACHER
from benchmarks.emoji import FONT, TABLE, render
from benchmarks.provenance import provenance

RECIPE = "emoji-32-teacher"
OVERRIDES = ("distill.stages.0.steps=4500", "distill.sample_every=1500")
PAGE = """\
# A small softmax teacher of colour emoji

DiT of 6 layers, width 144 and patches of 2 on 32 x 32 pixels (256 tokens), 9 classes: the groups of Unicode's
emoji-test.txt. `python -m benchmarks.make_emoji_teacher` trained it on pictures of Noto Color Emoji, whose license is
the SIL Open Font License 1.1. The curves of docs/results.md are those of its students.
"""


def trained(work: Path) -> Path:
    """Images, their data set and the teacher, each where it is not there yet; returns the teacher's model."""
    from litconvert.cli.app import app

    if not (work / "images").exists():
        render(work / "images", FONT, TABLE, size=32)
    if not (work / "data").exists():
        arguments = ["latents", "encode", str(work / "images"), str(work / "data"), "--recipe", RECIPE]
        app(arguments, standalone_mode=False)
    litconvert.train(work / "teacher", RECIPE, overrides=OVERRIDES, data=work / "data")
    return work / "teacher" / "model"


def keep(model: Path, out: Path) -> None:
    """The model's weights in float16, its config, and a page that says what it is."""
    out.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(model / "diffusion_pytorch_model.safetensors").items()}
    save_file(halves, out / "diffusion_pytorch_model.safetensors", {"format": "pt", **provenance()})
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    (out / "README.md").write_text(PAGE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for images, data and the run")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    keep(trained(work), EMOJI_TEACHER)
    print(EMOJI_TEACHER)


if __name__ == "__main__":
    main()
