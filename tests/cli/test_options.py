"""Arguments: mistakes are told before torch is imported, and what is given reaches the recipe as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from litconvert.cli.options import assignments
from litconvert.recipe.resolve import resolve
from tests.helpers.mistakes import MISTAKES, make_place

SCRIPT = """
import contextlib, io, json, sys
from litconvert.cli.app import main

heavy = {"torch", "diffusers", "numpy", "datasets", "accelerate", "transformers"}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["litconvert", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        from litconvert.cli import terminal
        terminal.err.file = err
        try:
            main()
        except SystemExit as end:
            code = end.code
    found = sorted(heavy & set(sys.modules))
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": found}))
"""


def test_mistakes_are_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    make_place(tmp_path)
    asked = json.dumps([arguments for arguments, _ in MISTAKES])
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [
        (" ".join(arguments), said, one)
        for (arguments, said), one in zip(MISTAKES, told, strict=True)
        if one["code"] != 2 or said not in " ".join(one["err"].split()) or one["out"] or one["heavy"]
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder", "model"], "nothing was written"


@pytest.mark.parametrize(
    "text", ["a # b", "a: b", "007", "1e3", "null", "yes", "[a", '"quoted"', "ä/ö", "- x", "@x", "%"]
)
def test_an_option_that_is_no_set_is_plain_text(text: str) -> None:
    vae = resolve(None, assignments({"source.vae.path": text})).recipe.source.vae
    assert vae is not None
    assert vae.path == text
