"""Whatever a file holds, it is read or refused in a sentence: truncated, flipped and rewritten files, by the thousand.

The cases run in a process of their own with little memory, so that a crash or a file that unpacks to gigabytes is found
out, and its case named.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import litconvert
from litconvert.encoding.image_sources import open_images
from litconvert.errors import LitconvertError
from litconvert.families.sources import open_source
from litconvert.recipe.schema import Encode, Source
from tests.helpers.damage import (
    CONVERTED,
    Form,
    all_cases,
    files_of,
    flipped,
    rewritten_tar,
    sound_forms,
    truncated,
)
from tests.helpers.images import encoded, png, write_tar

pytestmark = pytest.mark.slow

SEED = 11
# What a case may take: far more than any of these files should need, far less than a file can claim.
MEMORY_BYTES = 512 << 20
SECONDS = 10
MESSAGE_CHARACTERS = 1500


def as_others_read(path: Path) -> dict[str, torch.Tensor] | None:
    """The same file through torch or safetensors alone; None where they refuse it."""
    try:
        if path.suffix in (".safetensors", ".bin"):
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            # Mapped: torch's other way leaves memory as it was where a zip's directory lies about sizes.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if path.suffix == ".ckpt":
            parameters = {str(index): one for index, one in enumerate(content["ema_state"]["shadow_params"])}
            return {**parameters, "pos_embed": content["state_dict"]["model.diffusion_model.pos_embed"]}
        return dict(content.get("ema", content))
    except Exception:
        return None


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def read_all(path: Path, heads: int | None, *, compare: bool) -> None:
    """Open, recognise and read every tensor, as values and as bytes; they are what others read."""
    opened = open_source(Source(path=str(path), num_attention_heads=heads))
    checkpoint = opened.checkpoint
    values = {name: bytes_of(checkpoint.read(name)) for name in checkpoint.tensors}
    for name, value in values.items():
        if extent := checkpoint.extent(name):
            with extent.path.open("rb") as file:
                file.seek(extent.offset)
                assert file.read(extent.nbytes) == value, name
    for name in opened.reading.origins:
        opened.extent(name)
    others = as_others_read(path) if compare and path.is_file() else None
    if others is not None:
        assert sorted(values.values()) == sorted(map(bytes_of, others.values()))


def convert(path: Path, heads: int | None, out: Path) -> None:
    hints = ["student.num_attention_heads=2", "solve=null"]
    hints += [] if heads is None else [f"source.num_attention_heads={heads}"]
    litconvert.convert(path, out, None, hints)


def attempt(work: Callable[[], None]) -> tuple[str, str]:
    """`read`, `refused`, or what went wrong; and what it said."""

    def too_long(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        work()
    except LitconvertError as error:
        message = str(error)
        if len(message) > MESSAGE_CHARACTERS:
            return "failed", f"a message of {len(message)} characters: {message[:300]}"
        if isinstance(error.__cause__, TimeoutError):
            return "failed", f"more than {SECONDS} s: {message[:300]}"
        return "refused", message
    except BaseException:
        return "failed", traceback.format_exc(limit=-4)[-1500:]
    finally:
        signal.alarm(0)
    return "read", ""


def peak_kilobytes() -> int:
    """The most memory this process ever had; getrusage counts what it had before it became this program, too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def run_cases(folder: Path, part: int, parts: int) -> dict[str, Any]:
    """Every case of this part; stops the memory where it is now, and a little above."""
    torch.set_num_threads(1)
    forms = sound_forms(folder / "sound")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    peak = peak_kilobytes()
    outcomes, failures, slowest = Counter[str](), list[tuple[str, str]](), (0.0, "")
    place, outs = folder / "files", folder / "outs"
    for number, (name, form) in enumerate(all_cases(forms, random.Random(SEED))):
        if number % parts != part:
            continue
        (folder / "case").write_text(name)  # to be found when this process dies
        for each in (place, outs):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir()
        for file, content in form.files.items():
            (place / file).write_bytes(content)
        path, began, sound = place / form.entry, time.monotonic(), name.endswith(": sound")
        outcome, message = attempt(partial(read_all, path, form.heads, compare=form.one_set))
        outcomes["cases"] += 1
        outcomes[outcome] += 1
        # What lacks its end is never read.
        wrong = outcome != "read" if sound else outcome == "read" and ("truncated" in name or "byte short" in name)
        if outcome == "failed" or wrong:
            failures.append((name, f"{outcome} {message}"))
        if sound or outcomes["cases"] % CONVERTED == 0:
            outcome, message = attempt(partial(convert, path, form.heads, outs / "out"))
            outcomes["conversions"] += 1
            outcomes[f"conversion {outcome}"] += 1
            left = sorted(each.name for each in outs.iterdir())
            whole = left == (["out"] if outcome == "read" else [])
            if outcome == "failed" or not whole or (sound and outcome != "read"):
                failures.append((f"{name}, converted", f"left {left} {message}"))
        slowest = max(slowest, (round(time.monotonic() - began, 2), name))
    assert threading.active_count() == 1
    megabytes = (peak_kilobytes() - peak) >> 10
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest, "megabytes": megabytes}


@pytest.mark.timeout(300)
def test_every_damaged_checkpoint_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.whole.test_fuzz", str(tmp_path), "0", "1"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
    )
    case = (tmp_path / "case").read_text() if (tmp_path / "case").exists() else "before the first case"
    assert outcome.returncode == 0, f"{case}: exit {outcome.returncode}\n{outcome.stderr[-3000:]}"
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result.pop("failures") == []
    print(result, f"{time.monotonic() - began:.0f} s")
    # What a file claims may be asked of the system, but is never written to.
    assert result["megabytes"] < 300
    assert result["outcomes"]["cases"] >= 2000
    assert result["outcomes"]["read"] > 100
    assert result["outcomes"]["refused"] > 1000


@pytest.mark.timeout(300)
def test_every_damaged_archive_of_images_is_read_or_refused_in_a_sentence(tmp_path: Path, latent_recipe: Path) -> None:
    samples = [(f"{number:02d}", {"png": png((number, 0, 0)), "cls": b"%d" % (number % 4)}) for number in range(6)]
    write_tar(tmp_path / "sound" / "0.tar", samples)
    form, draw, outcomes = Form(files_of(tmp_path / "sound"), "", "0.tar"), random.Random(SEED), Counter[str]()
    place = tmp_path / "shards"
    place.mkdir()

    def read() -> None:
        source = open_images(str(place), Encode(), captions=False)
        for part in range(source.parts):
            for sample in source.read(part):
                assert sample.fault is None or len(sample.fault) < MESSAGE_CHARACTERS

    def encode(out: Path) -> None:
        encoded(place, out, str(latent_recipe), skip_broken=True)

    cases = [("sound", form), *truncated(form), *flipped(form, draw, 600), *rewritten_tar(form, draw)]
    for number, (name, case) in enumerate(cases):
        (place / "0.tar").write_bytes(case.content)
        outcome, message = attempt(read)
        assert outcome != "failed", f"{name}: {message}"
        # Zeros at its end are all that an archive can lose.
        short = "truncated" in name and int(name.split()[2]) < 60
        assert outcome == "refused" if short else outcome == "read" or name != "sound", f"{name}: {outcome}"
        outcomes[outcome] += 1
        if number % 60 == 0:
            made = tmp_path / "made"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            outcome, message = attempt(partial(encode, made / "data"))
            assert outcome != "failed", f"{name}, encoded: {message}"
            # What was made before it stopped is kept for the next try, which goes on with it.
            left = [one.name for one in made.iterdir() if not one.name.startswith(".data.shards-")]
            assert left == (["data"] if outcome == "read" else []), name
    assert outcomes["read"] > 50
    assert outcomes["refused"] > 150


if __name__ == "__main__":
    print(json.dumps(run_cases(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
