"""The emoji teacher: which images are rendered, what is refused, that its recipes fit, and the whole line, small.

The font is matplotlib's DejaVu Sans, which has some emoji in black: the colour font is not part of this repository.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from benchmarks.emoji import draw, drawable, load_font, read_table, render, run_small
from litconvert.errors import UsageError
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Hybrid

# In the form of Unicode's emoji-test.txt. DejaVu Sans has no melting face and no glyph for the flag's two letters.
TABLE = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600             ; fully-qualified     # 😀 E1.0 grinning face
1FAE0             ; fully-qualified     # 🫠 E14.0 melting face
1F609             ; fully-qualified     # 😉 E0.6 winking face
263A FE0F         ; fully-qualified     # ☺️ E0.6 smiling face
263A              ; unqualified         # ☺ E0.6 smiling face
# group: Component
1F3FB             ; component           # 🏻 E1.0 light skin tone
# group: Animals & Nature
1F42D             ; fully-qualified     # 🐭 E0.6 mouse face
2618 FE0F         ; fully-qualified     # ☘️ E1.0 shamrock
# group: Flags
1F1E6 1F1E8       ; fully-qualified     # 🇦🇨 E2.0 flag: Ascension Island
# Flags subtotal:   1
"""
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="needs FriBiDi (apt-get install libfribidi0)")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "emoji-test.txt"
    path.write_text(TABLE, encoding="utf-8")
    return path


@pytest.fixture
def font() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def pixels(folder: Path) -> dict[str, NDArray[Any]]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_classes_are_the_groups_of_unicode_s_table_and_hold_the_fully_qualified_emoji(table: Path) -> None:
    assert read_table(table) == {
        "smileys-emotion": ["😀", "🫠", "😉", "☺️"],
        "animals-nature": ["🐭", "☘️"],
        "flags": ["\U0001f1e6\U0001f1e8"],
    }


@needs_raqm
def test_what_the_font_lacks_or_draws_as_several_glyphs_is_left_out(font: Path) -> None:
    assert drawable(load_font(font), ["😀", "🫠", "😀😀", " ", "☘️"]) == ["😀", "☘️"]


@needs_raqm
def test_a_glyph_lies_around_its_center_on_its_background(font: Path) -> None:
    image = np.asarray(draw(load_font(font), "😀", 300, (120, 180), "#ffeecc"))
    assert image[0, 0].tolist() == [255, 238, 204]
    rows, columns = np.nonzero((image != image[0, 0]).any(axis=-1))
    assert abs((rows.min() + rows.max()) / 2 - 180) < 15
    assert abs((columns.min() + columns.max()) / 2 - 120) < 15
    assert 60 < columns.max() - columns.min() < 136


@needs_raqm
def test_every_class_has_as_many_images_its_emoji_in_turn_and_no_two_alike(
    tmp_path: Path, font: Path, table: Path
) -> None:
    assert render(tmp_path / "images", font, table, size=16, per_class=5) == 10
    images = pixels(tmp_path / "images")
    assert list(images) == [
        *(f"animals-nature/0000{i}-{codes}.png" for i, codes in enumerate(["1f42d", "2618-fe0f"] * 2 + ["1f42d"])),
        *(
            f"smileys-emotion/0000{i}-{codes}.png"
            for i, codes in enumerate(["1f600", "1f609", "263a-fe0f"] * 2)
            if i < 5
        ),
    ]
    assert {image.shape for image in images.values()} == {(16, 16, 3)}
    assert len({image.tobytes() for image in images.values()}) == 10
    assert all(image.std() > 5 for image in images.values())


@needs_raqm
def test_the_same_seed_gives_the_same_images_and_another_others(tmp_path: Path, font: Path, table: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        render(tmp_path / name, font, table, size=16, per_class=3, seed=seed)
        drawn.append(pixels(tmp_path / name))
    for name, image in drawn[0].items():
        assert np.array_equal(image, drawn[1][name])
        assert not np.array_equal(image, drawn[2][name])


@pytest.mark.parametrize(
    ("font_name", "table_name", "message"),
    [
        ("none.ttf", None, r"none.ttf: no such font; .*`apt-get install fonts-noto-color-emoji`.* --font"),
        (None, "none.txt", r"none.txt: no such table; .*`apt-get install unicode-data`.* --table"),
        ("broken.ttf", None, r"broken.ttf: cannot be drawn at 109 pixels .*give NotoColorEmoji.ttf"),
        (None, "empty.txt", r"empty.txt: lists no emoji; give Unicode's emoji-test.txt \(--table\)"),
        (None, "flags.txt", r"DejaVuSans.ttf: has none of the emoji in .*flags.txt; give NotoColorEmoji.ttf"),
    ],
)
@needs_raqm
def test_a_font_or_table_that_cannot_serve_is_refused_and_nothing_is_written(
    tmp_path: Path, font: Path, table: Path, font_name: str | None, table_name: str | None, message: str
) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "flags.txt").write_text("# group: Flags\n1F1E6 1F1E8 ; fully-qualified # \n")
    given = tmp_path / font_name if font_name else font, tmp_path / table_name if table_name else table
    with pytest.raises(UsageError, match=message):
        render(tmp_path / "images", *given)
    assert not (tmp_path / "images").exists()


@needs_raqm
def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path, font: Path, table: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match=r"images exists; name another folder"):
        render(tmp_path / "images", font, table)


def test_without_fribidi_the_package_is_named(font: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(UsageError, match=r"`apt-get install libfribidi0`"):
        load_font(font)


def test_the_teacher_is_dit_s_2_with_1024_tokens_trained_without_a_teacher() -> None:
    recipe = resolve("emoji-teacher").recipe
    scratch = recipe.scratch
    assert scratch is not None
    assert (scratch.hidden_size, scratch.num_layers, scratch.num_attention_heads) == (384, 12, 6)
    assert (scratch.sample_size // scratch.patch_size) ** 2 == 1024
    (stage,) = recipe.distill.stages
    assert isinstance(stage, Hybrid)
    assert (stage.noise_weight, stage.variance_weight, stage.feature_weight) == (0, 0, 0)


@pytest.mark.slow
@needs_raqm
def test_the_whole_line_runs_small(tmp_path: Path, font: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(tmp_path / "line", font, table, seed=0)
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("litconvert ")]
    assert [line.split()[1] for line in commands] == ["latents", "train", "convert", "distill", "sample"]
    picture = Image.open(tmp_path / "line" / "samples.png")
    assert picture.mode == "RGB"
    assert np.asarray(picture).std() > 5
