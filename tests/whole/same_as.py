"""Whether this checkout does what another one does: `python -m tests.whole.same_as OLD_CHECKOUT`.

For changes that move code and are to change nothing else. Both checkouts do the same work in folders that are laid out
the same way, on random checkpoints that are made here, and what they write and print is compared, bit for bit but for
what VOLATILE names. Exits 1 when anything differs, 2 when the two cannot be compared.

Everything goes through the command line, and nothing of litconvert is imported, so that code may move as it likes. The
packages that both import, and litconvert's own version, are those of the Python that runs this.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# What may differ between two runs of the same code, with the reason: of a file by its name, of a command's JSON by the
# command's; then each key, places in a list left out. "*" is all of it. A name that excepts nothing is an error.
VOLATILE: dict[str, dict[str, str]] = {
    "metrics.csv": dict.fromkeys(("seconds", "images_per_second", "memory_bytes"), "measured"),
    "usage.json": {"*": "seconds and memory of the stages, measured"},
    ".metadata": {"*": "torch's index of a checkpoint, with an id of its own each time; the tensors are compared"},
    "state.json": {"_fingerprint": "drawn by `datasets` for each data set that it writes"},
    "plan": {
        **dict.fromkeys(("step_seconds", "seconds"), "blocks are timed (--stage)"),
        "available": "memory that is free just now",
        "memory.interpreter and libraries": "measured, and the order of imports may change it",
        "peak": "has the interpreter and the libraries in it",
    },
    "env": {
        "verdict": "says how long the check took",
        **dict.fromkeys(("seconds", "checks.seconds"), "measured"),
        **dict.fromkeys(("checks.summary", "checks.figures"), "free memory and speed, measured"),
    },
}
# How files of text are read; all others are compared as bytes.
PARSERS: dict[str, Callable[[str], Any]] = {".json": json.loads, ".yaml": str, ".py": str}
PARSERS[".csv"] = lambda text: list(csv.DictReader(text.splitlines()))
ENVIRONMENT = {"LITCONVERT_DEVICE": "cpu", "LITCONVERT_BF16": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "LITCONVERT_DEBUG": "0"}
CONVERSIONS = ["asset:dit-digits digits --recipe digits", "dit.pt dit --recipe dit.yaml"]
CONVERSIONS += ["sit.pt sit --recipe sit.yaml", "pixart.pth pixart --recipe pixart.yaml"]
# A question for every command that has --json, of what is there when all is converted and distilled.
QUESTIONS = (
    ("inspect", "dit.pt --recipe dit.yaml"),
    ("inspect", "pixart.pth --recipe pixart.yaml --weights"),
    ("plan", "sit.pt --recipe sit.yaml --set inherit.attention=k+v --set student.softmax_layers=[0]"),
    ("plan", "dit.pt --recipe dit.yaml --stage all"),
    ("convert", "pixart.pth again --recipe pixart.yaml --seed 7"),
    ("convert", "sit.pt sit.safetensors --recipe sit.yaml --to original"),
    ("latents show", "run-latents"),
    ("probe", "run --data run-latents --num-samples 4 --budget 1.0"),
    ("evaluate", "digits --set evaluate.num_samples=8 --set evaluate.steps=2 --set evaluate.seeds=[100]"),
    ("push", "run nobody/nothing --pipeline --dry-run"),
    ("env", ""),
    ("env", "--check --minutes 0.01"),  # the first check begins, the names of all are printed
    ("recipes ls", ""),
    ("recipes show", "digits --set student.conv_size=3"),
)
# What people read, and how a command ends: tables, and refusals of each kind.
TEXTS = (
    "inspect dit.pt --recipe dit.yaml",
    "plan dit.pt --recipe dit.yaml --tensors",
    "recipes show pixart-sigma-512",
    "recipes schema",
    "recipes validate digits wrong.yaml",
    "inspect dit.pt",
    "inspect nothing.pt",
    "convert sit.pt run --recipe sit.yaml",
)
RECIPE = """\
source: {{num_attention_heads: 2, sample_size: 8{hint}}}
student: {{num_attention_heads: 2}}
data: {{synthesize: {{num_samples: 12, scheduler: ddim, steps: 2, batch_size: 4, shard_size: 6}}}}
distill:
  checkpoint_every: 10
  sample_every: 10
  stages:
    - {{objective: hybrid, steps: 8, batch_size: 4, learning_rate: 1.0e-3, schedule: cosine, noise_weight: 2.0}}
    - {{objective: hybrid, steps: 12, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 2, feature_weight: 0.1}}
sample: {{scheduler: {scheduler}, steps: 2, num_images: 4, guidance: 2.0}}
"""


def random_model(channels: int, seed: int, *, captions: bool = False) -> dict[str, Tensor]:
    """A DiT or SiT in the original layout; with captions a PixArt-Sigma, whose second layer has KV compression."""
    tables: dict[str, tuple[int, ...]] = {"y_embedder.embedding_table.weight": (5, 32)}
    linears: dict[str, tuple[int, ...]] = {"x_embedder.proj": (32, channels, 2, 2), "t_embedder.mlp.0": (32, 256)}
    linears |= {"t_embedder.mlp.2": (32, 32), "final_layer.linear": (8 * channels, 32)}
    block = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
    if captions:
        tables = {f"blocks.{layer}.scale_shift_table": (6, 32) for layer in range(2)}
        tables |= {"y_embedder.y_embedding": (300, 16), "final_layer.scale_shift_table": (2, 32)}
        linears |= {"y_embedder.y_proj.fc1": (32, 16), "y_embedder.y_proj.fc2": (32, 32), "t_block.1": (192, 32)}
        linears |= {"blocks.1.attn.sr": (32, 1, 2, 2), "blocks.1.attn.norm": (32,)}
        block |= {"cross_attn.q_linear": (32, 32), "cross_attn.kv_linear": (64, 32), "cross_attn.proj": (32, 32)}
    else:
        linears["final_layer.adaLN_modulation.1"] = (64, 32)
        block["adaLN_modulation.1"] = (192, 32)
    linears |= {f"blocks.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    for name, shape in linears.items():
        tables |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in tables.items()}


def make_inputs(folder: Path) -> None:
    """Checkpoints, recipes and encoded captions."""
    folder.mkdir()
    torch.save(random_model(1, seed=0), folder / "dit.pt")
    torch.save({"model": random_model(4, seed=1), "ema": random_model(4, seed=2)}, folder / "sit.pt")
    torch.save({"state_dict": random_model(4, seed=3, captions=True)}, folder / "pixart.pth")
    for name, hint, scheduler in (("dit", "", "ddim"), ("sit", ", family: sit", "flow-euler"), ("pixart", "", "ddpm")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(hint=hint, scheduler=scheduler))
    (folder / "wrong.yaml").write_text("student: {num_heads: 4}\n")
    captions = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
    save_file({"features": captions, "mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}, folder / "captions.safetensors")


Ended = subprocess.CompletedProcess[str]


class Side(NamedTuple):
    """A checkout, and the folder that it works in."""

    checkout: Path
    folder: Path

    def python(self, *arguments: str) -> Ended:
        """Run Python with this checkout's package."""
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.checkout)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        done.stdout, done.stderr = self.anonymous(done.stdout), self.anonymous(done.stderr)
        return done

    def anonymous(self, text: str) -> str:
        """A text without the names of this side's folders."""
        return text.replace(str(self.folder), "FOLDER").replace(str(self.checkout), "CHECKOUT")


class Comparison:
    """Both sides, and what was found so far."""

    def __init__(self, old: Side, new: Side) -> None:
        self.sides = (old, new)
        self.checks = self.failed = 0
        self.excepted: set[tuple[str, str]] = set()

    def run(self, command: str) -> tuple[Ended, Ended]:
        """`litconvert COMMAND`, on both sides at once."""
        with ThreadPoolExecutor(2) as pool:
            old, new = pool.map(lambda side: side.python("-m", "litconvert", *shlex.split(command)), self.sides)
        return old, new

    def report(self, name: str, problems: Iterable[str]) -> None:
        """One line for a check."""
        found = list(dict.fromkeys(problems))
        self.checks, self.failed = self.checks + 1, self.failed + bool(found)
        shown = "; ".join([*found[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])])
        print(f"DIFFERS  {name}: {shown}" if found else f"same     {name}", flush=True)

    def data(self, what: str, old: Any, new: Any, key: str = "") -> Iterator[str]:
        """Where plain data differs, but for the keys of VOLATILE[what]."""
        if key in VOLATILE.get(what, {}):
            self.excepted.add((what, key))
        elif isinstance(old, dict) and isinstance(new, dict):
            for name in {**old, **new}:
                inner = f"{key}.{name}".lstrip(".")
                yield from self.data(what, old.get(name, ...), new.get(name, ...), inner)  # JSON has no ellipsis
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for one, other in zip(old, new, strict=True):
                yield from self.data(what, one, other, key)
        elif repr(old) != repr(new):  # repr knows NaN, and 1 from 1.0 and True
            yield f"{key or 'the whole'} was {str(old)[:80]} and is {str(new)[:80]}"

    def files(self, name: str) -> Iterator[str]:
        """Where a file or a folder that both sides wrote differs."""
        old, new = (side.folder / name for side in self.sides)
        if old.is_dir() and new.is_dir():
            for inner in sorted({path.name for path in (*old.iterdir(), *new.iterdir())}):
                yield from self.files(f"{name}/{inner}")
        elif not (old.is_file() and new.is_file()):
            yield f"{name} is in {'neither' if not (old.exists() or new.exists()) else 'one alone'}"
        elif "*" in VOLATILE.get(old.name, {}):
            self.excepted.add((old.name, "*"))
        elif old.suffix in PARSERS:
            parse = PARSERS[old.suffix]
            one, other = (parse(side.anonymous((side.folder / name).read_text())) for side in self.sides)
            found = lines(one, other) if isinstance(one, str) else self.data(old.name, one, other)
            yield from (f"{name}: {text}" for text in found)
        elif old.read_bytes() != new.read_bytes():
            yield f"{name}: {tensors(old, new) if old.suffix == '.safetensors' else 'other bytes'}"


def lines(old: str, new: str) -> Iterator[str]:
    """The first line in which two texts differ."""
    numbered = enumerate(zip_longest(old.split("\n"), new.split("\n")), 1)
    yield from islice((f"line {n} was {one!r} and is {other!r}" for n, (one, other) in numbered if one != other), 1)


def tensors(old: Path, new: Path) -> str:
    """Which tensors of two files that differ are others."""
    one, other = load_file(old), load_file(new)
    common = [name for name in one if name in other and one[name].dtype == other[name].dtype]
    differing = sorted({*one, *other} - {name for name in common if torch.equal(one[name], other[name])})
    return f"{len(differing)} tensors, {', '.join(differing[:3])}" if differing else "only its header or layout"


def failures(answers: tuple[Ended, Ended]) -> list[str]:
    """That a command which is to succeed does not: where both fail alike, nothing would be compared."""
    ends = zip(("old", "new"), answers, strict=True)
    return [
        f"the {which} one ends with {one.returncode}: {one.stderr[-300:]!r}" for which, one in ends if one.returncode
    ]


def compare_helps(both: Comparison) -> set[str]:
    """Every help, from the program's own on; returns the commands that have --json."""
    waiting, answering = [""], set()
    for command in waiting:  # grows while commands with commands of their own are met
        old, new = both.run(f"{command} --help")
        both.report(f"help: litconvert {command}".rstrip(), failures((old, new)) or lines(old.stdout, new.stdout))
        listed = old.stdout.partition("\nCommands:\n")[2]
        waiting += [f"{command} {name}".lstrip() for name in re.findall(r"^  ([\w-]+)", listed, re.MULTILINE)]
        if re.search(r"^  --json\b", old.stdout, re.MULTILINE):
            answering.add(command)
    return answering


def compare_made(both: Comparison, name: str, commands: Iterable[str], *made: str) -> None:
    """What these commands write."""
    failed = [problem for command in commands for problem in failures(both.run(command))]
    for path in made:
        both.report(f"{name}: {path}", failed or both.files(path))


def compare(both: Comparison) -> None:
    """All checks."""
    answering = compare_helps(both)
    for arguments in CONVERSIONS:
        compare_made(both, "conversion", [f"convert {arguments}"], arguments.split()[1])
    raw = "convert run@20 raw.safetensors --to original --set inherit.weights=model"
    made = ("run/model", "raw.safetensors", "run/metrics.csv", "run", "run-latents")
    compare_made(both, "20 steps of distillation", ["distill dit run", raw], *made)
    compare_made(both, "samples", ["sample sit --latents flow.safetensors"], "flow.safetensors")
    captioned = "sample pixart --embeddings captions.safetensors --latents drawn.safetensors"
    compare_made(both, "samples", [captioned], "drawn.safetensors")
    for command, arguments in QUESTIONS:
        old, new = both.run(f"{command} {arguments} --json")
        problems = failures((old, new)) or both.data(command, *(json.loads(one.stdout) for one in (old, new)))
        both.report(f"JSON: litconvert {command} {arguments}".rstrip(), problems)
    unlike = sorted({command for command, _ in QUESTIONS} ^ answering)
    both.report("every command with --json is asked", (f"{command} is not, or has none" for command in unlike))
    for command in TEXTS:
        old, new = both.run(command)
        texts = (f"{one.stdout}{one.stderr}exit code {one.returncode}" for one in (old, new))
        both.report(f"text: litconvert {command}", lines(*texts))
    unused = sorted({(what, key) for what, keys in VOLATILE.items() for key in keys} - both.excepted)
    both.report("every exception is needed", (f"{what} has no {key}" for what, key in unused))


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.whole.same_as", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old_checkout", type=Path, help="of the commit to compare with: git worktree add OLD COMMIT")
    checkouts = {"old": parser.parse_args().old_checkout.resolve(), "new": Path(__file__).resolve().parents[2]}
    began = time.monotonic()
    with TemporaryDirectory(prefix="litconvert-same-") as temporary:
        # Their names are of one length: a file that holds a path would be of another size.
        sides = [Side(checkout, Path(temporary).resolve() / name) for name, checkout in checkouts.items()]
        for side in sides:
            make_inputs(side.folder)
            imported = side.python("-c", "import litconvert; print(litconvert.__file__)")
            if imported.stdout.strip() != "CHECKOUT/litconvert/__init__.py":
                print(f"{side.checkout}: its package is not what this Python imports: {imported.stdout.strip()}")
                return 2
        both = Comparison(*sides)
        compare(both)
    print(f"{both.checks} checks in {time.monotonic() - began:.0f} s, {both.failed} differ")
    return 1 if both.failed else 0


if __name__ == "__main__":
    sys.exit(main())
