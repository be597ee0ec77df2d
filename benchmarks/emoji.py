"""Colour emoji as training images: a second teacher, nearer to real size than the digits.

    apt-get install fonts-noto-color-emoji unicode-data libfribidi0
    python -m benchmarks.emoji images/                                    27,000 images in nine class folders, 95 MB:
                                                                          four minutes on one core
    litconvert latents encode images/ data/ --recipe emoji-teacher
    litconvert train teacher/ --recipe emoji-teacher --data data/         wants a GPU
    litconvert convert teacher/model student/ --recipe emoji
    litconvert distill student/ distilled/ --data data/
    litconvert sample distilled/ --teacher teacher/model --out samples.png

    python -m benchmarks.emoji --small OUT                                all of it, far too short, in a minute on a CPU

The packages are Debian's. Without root: `apt-get download fonts-noto-color-emoji unicode-data`, `dpkg-deb -x` of each
into a folder, and --font and --table name the files in it.

Licences: Noto Color Emoji is Google's, under the SIL Open Font License 1.1, which allows redistribution and does not
extend to documents made with the font. emoji-test.txt is Unicode's, under the Unicode License. Neither, nor an image
made of them, is part of this repository.

Classes are the groups of emoji-test.txt, of 85 emoji and more each. Its 99 subgroups would be the finer choice, but
62 of them have fewer than 20 members, and the class then all but names the picture. Every class has as many images:
its emoji in turn, each time at another size, place, angle and background, so that a class of 85 is not learnt by heart.
"""

import argparse
import colorsys
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from PIL.ImageFont import FreeTypeFont

from litconvert.common.outputs import whole_directory
from litconvert.errors import LitconvertError, UsageError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TABLE = Path("/usr/share/unicode/emoji/emoji-test.txt")
INSTALL = "install it with `apt-get install {package}`, or name the file with {option}"
STRIKE = 109  # pixels an em: the one size that the font's bitmaps come in
CELL = 136  # pixels: the width of each of these bitmaps, 128 high
UNASSIGNED = "\U0010ffff"  # no font has it: it is drawn as whatever stands for a missing glyph
SMALL = {
    "scratch.sample_size": 16,
    "scratch.hidden_size": 32,
    "scratch.num_layers": 2,
    "scratch.num_attention_heads": 2,
}
SMALL_RUN = {"data.workers": 0, "sample.steps": 2, "sample.num_images": 9}
SMALL_STAGE = {
    "distill.stages.0.steps": 4,
    "distill.stages.0.batch_size": 8,
    "distill.stages.0.warmup_steps": 0,
}


def read_table(path: Path) -> dict[str, list[str]]:
    """The fully qualified emoji of Unicode's emoji-test.txt, by group; a group's name is made one of a folder.

    Raises UsageError for a file that is missing or holds none.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such table; " + INSTALL.format(package="unicode-data", option="--table"))
    groups: dict[str, list[str]] = {}
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = "-".join(line.partition(":")[2].replace("&", " ").lower().split())
        codes, _, rest = line.partition(";")
        if rest.split("#")[0].strip() == "fully-qualified":
            groups.setdefault(group, []).append("".join(chr(int(code, 16)) for code in codes.split()))
    if not groups:
        raise UsageError(f"{path}: lists no emoji; give Unicode's emoji-test.txt (--table)")
    return groups


def load_font(path: Path) -> FreeTypeFont:
    """A font at the size of Noto Color Emoji's bitmaps.

    Raises UsageError for a font that is missing or of another size, and where Pillow cannot join code points.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such font; " + INSTALL.format(package="fonts-noto-color-emoji", option="--font"))
    if not features.check("raqm"):
        raise UsageError(
            "Pillow finds no FriBiDi, without which it cannot join the code points of one emoji (flags, families): "
            "install it with `apt-get install libfribidi0`"
        )
    try:
        return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise UsageError(f"{path}: cannot be drawn at {STRIKE} pixels ({error}); give NotoColorEmoji.ttf") from error


def draw(font: FreeTypeFont, text: str, side: int, center: tuple[float, float], background: str) -> Image.Image:
    """A square RGB canvas of `side` pixels with one glyph around `center`."""
    canvas = Image.new("RGB", (side, side), background)
    ImageDraw.Draw(canvas).text(center, text, fill="black", font=font, anchor="mm", embedded_color=True)
    return canvas


def drawable(font: FreeTypeFont, emoji: Sequence[str]) -> list[str]:
    """Those that the font has, each as one glyph: neither blank, nor the missing glyph, nor several side by side."""

    def plain(text: str) -> bytes:
        return draw(font, text, 2 * CELL, (CELL, CELL), "white").tobytes()

    def is_joined(text: str) -> bool:
        return font.getlength(text) <= max(font.getlength(point) for point in text)

    other = (plain(""), plain(UNASSIGNED))
    return [text for text in emoji if is_joined(text) and plain(text) not in other]


def vary(font: FreeTypeFont, text: str, size: int, dice: random.Random) -> Image.Image:
    """One emoji, RGB, `size` pixels: 70 to 95 % of the width, anywhere, turned by up to 12 degrees, on white or a tint.

    Drawn whole at the font's own size, then reduced: a coloured glyph is blended with its background once.
    """
    side = round(CELL / dice.uniform(0.7, 0.95))
    room = (side - CELL) / 2
    center = (side / 2 + dice.uniform(-room, room), side / 2 + dice.uniform(-room, room))
    background = "#ffffff"
    if dice.random() < 0.5:
        tint = colorsys.hsv_to_rgb(dice.random(), dice.uniform(0.1, 0.3), 1.0)
        background = "#" + "".join(f"{round(255 * part):02x}" for part in tint)
    canvas = draw(font, text, side, center, background)
    turned = canvas.rotate(dice.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=background)
    return turned.resize((size, size), Image.Resampling.LANCZOS)


def render(out: Path, font_path: Path, table: Path, *, size: int = 64, per_class: int = 3000, seed: int = 0) -> int:
    """Write OUT/GROUP/NUMBER-CODEPOINTS.png, whole or not at all. The same arguments give the same images.

    Returns: how many images there are.

    Raises UsageError for an `out` that exists, and a font or table that is missing or cannot serve.
    """
    if out.exists():
        raise UsageError(f"{out} exists; name another folder, or remove it")
    font, groups = load_font(font_path), read_table(table)
    found = {group: drawable(font, emoji) for group, emoji in groups.items()}
    classes = {group: emoji for group, emoji in found.items() if emoji}
    if not classes:
        raise UsageError(f"{font_path}: has none of the emoji in {table}; give NotoColorEmoji.ttf (--font)")
    with whole_directory(out) as folder:
        for group, emoji in classes.items():
            (folder / group).mkdir()
            for number in range(per_class):
                text = emoji[number % len(emoji)]
                image = vary(font, text, size, random.Random(f"{seed}/{group}/{number}"))
                codes = "-".join(f"{ord(point):x}" for point in text)
                image.save(folder / group / f"{number:05d}-{codes}.png")
    return per_class * len(classes)


def small_commands(out: Path) -> list[list[str]]:
    """The commands of the docstring, cut down to a pico model and a few steps, on the images in OUT/images."""
    images, data, teacher, student, distilled = (
        str(out / name) for name in ("images", "data", "teacher", "student", "distilled")
    )

    def sets(values: Mapping[str, object]) -> list[str]:
        return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]

    stages = sets({**SMALL_RUN, **SMALL_STAGE})
    return [
        ["latents", "encode", images, data, "--recipe", "emoji-teacher", *sets(SMALL)],
        ["train", teacher, "--recipe", "emoji-teacher", "--data", data, *sets(SMALL), *stages],
        ["convert", f"{teacher}/model", student, "--recipe", "emoji", *stages],
        ["distill", student, distilled, "--data", data],
        ["sample", distilled, "--teacher", f"{teacher}/model", "--out", str(out / "samples.png")],
    ]


def run_small(out: Path, font: Path, table: Path, seed: int) -> None:
    """The whole line on a few dozen images of 16 x 16: that it runs, not what it can do. Each command is printed."""
    from litconvert.cli.app import app

    if not (out / "images").exists():
        render(out / "images", font, table, size=16, per_class=6, seed=seed)
    for arguments in small_commands(out):
        print("litconvert", *arguments, flush=True)
        app([*arguments, "--quiet"], standalone_mode=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the images to; with --small, everything")
    parser.add_argument("--small", action="store_true", help="the whole line, small")
    parser.add_argument("--font", type=Path, default=FONT, help=f"default: {FONT}")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"emoji-test.txt; default: {TABLE}")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels (default 64)")
    parser.add_argument("--per-class", type=int, default=3000, help="images of each class (default 3000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        if given.small:
            run_small(given.out, given.font, given.table, given.seed)
        else:
            count = render(
                given.out, given.font, given.table, size=given.size, per_class=given.per_class, seed=given.seed
            )
            print(f"{count:,} images: {given.out}")
    except LitconvertError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
