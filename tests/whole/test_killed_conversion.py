"""A conversion that is killed leaves nothing or the whole result, and the same command makes it good.

The kills are real (SIGKILL) and come at random moments of 50 conversions. One process imports litconvert and forks a
child for each, so that the moments fall into the conversion and not into its imports. A walk that solves is killed as
each of its layers has just been kept, and at random moments.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import litconvert
from litconvert.errors import LitconvertError
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import command

pytestmark = pytest.mark.slow

# Of 21 MB, in one file and in shards of at most 8 MB; the last kind replaces an older result.
KINDS = {"one file": 20, "shards": 20, "replacing": 10}
HINTS = ["source.num_attention_heads=4", "student.num_attention_heads=4", "solve=null"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def overrides_of(kind: str) -> list[str]:
    return [*HINTS, "student.max_shard_bytes=8000000"] if kind == "shards" else HINTS


def converting(source: Path, out: Path, kind: str, *overrides: str) -> Callable[[], None]:
    def convert() -> None:
        litconvert.convert(source, out, None, overrides_of(kind) + list(overrides), force=kind == "replacing")

    return convert


def forked(work: Callable[[], None]) -> int:
    """Start work in a child; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def finished(child: int) -> bool:
    """Wait for a child. Whether it ended well, and not by the signal."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return not os.WIFSIGNALED(status)


def run_alone(what: str, folder: Path) -> dict[str, Any]:
    """One of `WHAT` in a process of one thread; returns what it saw."""
    began = time.monotonic()
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.whole.test_killed_conversion", what, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    seen: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    print(seen, f"{time.monotonic() - began:.1f} s")
    return seen


def kept_layers(out: Path) -> list[Path]:
    """What a walk to `out` has kept."""
    return list(out.parent.glob(f".{out.name}.solving-*/walk-*.safetensors"))


def ended(child: int) -> bool:
    """Whether a child is over; it is still to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)


def assert_loads_whole_or_not_at_all(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """A folder that is loaded has every weight of the result, bit for bit. Whether it was."""
    try:
        state = litconvert.load(folder).state_dict()
    except LitconvertError:
        return False
    assert state.keys() == expected.keys(), folder
    assert all(torch.equal(state[name], value) for name, value in expected.items()), folder
    return True


def kill_conversions(folder: Path, seed: int) -> dict[str, object]:
    """Kill 50 conversions; assert what each left, and that the next run ends well. Returns what happened, counted."""
    torch.set_num_threads(1)
    source, draw = folder / "source.pt", random.Random(seed)
    torch.save(dit_state(width=256, layers=4), source)
    # Here, so that no child has to import what is imported late.
    converting(source, folder / "older", "one file", "seed=1")()
    older = contents(folder / "older")
    references: dict[str, dict[str, bytes]] = {}
    durations: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def unkilled(out: Path, kind: str) -> None:
        began = time.monotonic()
        assert finished(forked(converting(source, out, kind))), out
        durations[kind].append(time.monotonic() - began)

    for kind in KINDS:
        for number in range(2):
            unkilled(folder / f"reference {number}" / kind, kind)
        references[kind] = contents(folder / "reference 0" / kind)
        assert references[kind] == contents(folder / "reference 1" / kind)
        assert references[kind] != older
    expected = litconvert.load(folder / "reference 0" / "one file").state_dict()
    assert all(assert_loads_whole_or_not_at_all(folder / "reference 0" / kind, expected) for kind in KINDS)
    seen = {"kills": 0, "before it ended": 0, "left a partial folder": 0, "left the result": 0, "left the older": 0}
    for number, kind in enumerate(kind for kind, count in KINDS.items() for _ in range(count)):
        place = folder / str(number)
        out = place / "out"
        place.mkdir()
        if kind == "replacing":
            shutil.copytree(folder / "older", out)
        # The last runs tell how long one takes now, whatever else the machine does.
        duration = statistics.median(durations[kind][-3:])
        child = forked(converting(source, out, kind))
        time.sleep(draw.uniform(0, 1.1 * duration))
        kill(child)
        seen["kills"] += 1
        seen["before it ended"] += not finished(child)
        left = sorted(path.name for path in place.iterdir())
        partial = [name for name in left if name.startswith(".out.partial-")]
        assert set(left) <= {"out", *partial}, (number, left)
        if out.exists():
            found = contents(out)
            assert found == references[kind] or (kind == "replacing" and found == older), (number, sorted(found))
            seen["left the older" if found == older else "left the result"] += 1
        for name in partial:
            seen["left a partial folder"] += 1
            if not name.endswith("-old"):
                assert_loads_whole_or_not_at_all(place / name, expected)
        unkilled(out, kind)
        assert sorted(path.name for path in place.iterdir()) == ["out"], number
        assert contents(out) == references[kind], number
        shutil.rmtree(place)
    return {**seen, "seconds of a run": [round(min(each), 3) for each in durations.values()]}


def kill_walks(folder: Path, seed: int) -> dict[str, object]:
    """Kill a conversion that solves after each layer and at random moments, in turn, until it is done."""
    torch.set_num_threads(1)
    source, draw = folder / "source.pt", random.Random(seed)
    torch.save(dit_state(width=64, layers=4), source)
    walk = (
        "solve={states: 32, held_out: 8, drawing_steps: 2, local_steps: 20, local_batch_size: 8, walks: 2}",
        "inherit.attention=q+k+v",
    )
    heads = [one for one in HINTS if not one.startswith("solve")]

    def convert(out: Path) -> Callable[[], None]:
        return lambda: print(litconvert.convert(source, out, None, [*heads, *walk]), file=sys.stderr)

    convert(folder / "whole")()  # imports what is imported late
    began = time.monotonic()
    convert(folder / "again")()
    duration = time.monotonic() - began
    expected = contents(folder / "whole")["diffusion_pytorch_model.safetensors"]
    kills = 0
    for number in range(5):
        out = folder / str(number) / "out"
        out.parent.mkdir()
        for layers in range(1, 9 if number == 0 else 3):
            child = forked(convert(out))
            if number == 0:
                while len(kept_layers(out)) < layers and not ended(child):
                    time.sleep(0.001)
            else:
                time.sleep(draw.uniform(0, duration))
            kill(child)
            kills += not finished(child)
            assert number > 0 or out.exists() or len(kept_layers(out)) >= layers
        assert finished(forked(convert(out)))
        assert contents(out)["diffusion_pytorch_model.safetensors"] == expected
        assert not list(out.parent.glob(".out.*")), "the kept layers are removed"
    return {"kills": kills}


@pytest.mark.timeout(300)
def test_a_walk_that_is_killed_at_any_layer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    assert run_alone("walks", tmp_path)["kills"] >= 10


@pytest.mark.timeout(300)
def test_a_conversion_killed_at_any_moment_leaves_nothing_or_the_whole_result(tmp_path: Path) -> None:
    seen = run_alone("conversions", tmp_path)
    assert seen["kills"] == 50
    # Most kills must come before the end, or nothing was tested.
    assert seen["before it ended"] > 25
    assert seen["left a partial folder"] > 10


def test_a_full_disk_is_reported_before_the_copy_begins(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("convert", pico_checkpoint, tmp_path / "parent" / "out", "--recipe", pico_recipe, "-q")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr("litconvert.common.files.shutil.disk_usage", lambda folder: usage)
        patch.setattr("litconvert.conversion.convert.write_model_directory", None)  # not reached
        outcome = command(*arguments)
    assert outcome.code == 1
    assert "MB are needed and 0.0 MB are free; free some space, or write elsewhere" in outcome.err
    assert not (tmp_path / "parent").exists()
    assert command(*arguments).code == 0


WHAT = {"conversions": kill_conversions, "walks": kill_walks}


if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](Path(sys.argv[2]), 65)))
