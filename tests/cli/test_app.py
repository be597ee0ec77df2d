"""The command line as its users meet it: start-up, help, and the whole line."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import litconvert
from litconvert.errors import UsageError
from litconvert.recipe.packaged import packaged_recipes
from litconvert.recipe.resolve import resolve
from litconvert.workflow import run_line
from tests.helpers.command import command
from tests.helpers.listener import Hearing

ROOT = Path(__file__).parents[2]
COMMANDS = ["inspect", "plan", "convert", "distill", "sample", "evaluate", "push", "run", "demo", "env", "latents"]
COMMANDS += ["latents-synthesize", "latents-encode", "latents-show", "probe", "train", "recipes"]
COMMANDS += [f"recipes-{verb}" for verb in ("ls", "show", "copy", "validate", "schema")]


@pytest.mark.slow
def test_converting_does_not_import_diffusers(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    """Seconds and a hundred megabytes, of which inspecting, planning and converting need nothing."""
    script = (
        "import sys\n"
        "from litconvert.cli import app as cli\n"
        "again = ['convert', sys.argv[3], '--to', 'original']\n"
        "for command in (['inspect'], ['plan'], ['convert', sys.argv[2]], again):\n"
        "    arguments = [command[0], sys.argv[1], *command[1:], '--recipe', sys.argv[4]]\n"
        "    cli.app(arguments, standalone_mode=False)\n"
        "heavy = {'diffusers', 'accelerate', 'transformers', 'litconvert.model.modeling_lit'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    arguments = [pico_checkpoint, tmp_path / "student", tmp_path / "again.pt", pico_recipe]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, capture_output=True)
    assert (tmp_path / "student" / "config.json").is_file()
    assert (tmp_path / "again.pt").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "ls"], ["convert", "--help"]])
def test_help_and_the_list_of_recipes_do_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from litconvert.cli.app import main\n"
        f"sys.argv = ['litconvert', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'datasets', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = command(*name.split("-"), "--help")
    assert result.code == 0
    assert "Usage:" in result.out
    assert "Example: litconvert" in result.out
    assert command(*name.split("-"), "-h").out == result.out


def test_the_list_of_commands_is_whole_in_80_columns() -> None:
    listed = command("--help").out
    assert "..." not in listed.partition("Commands:")[2]
    assert max(map(len, listed.splitlines())) <= 80
    assert "Example: litconvert" in listed


def test_the_version_is_told() -> None:
    assert command("--version").out == command("-V").out == f"litconvert {litconvert.__version__}\n"


@pytest.mark.parametrize(("line", "found"), [("litconvert run dig", "digits-paper"), ("litconvert conv", "convert")])
def test_the_shell_completes_commands_and_recipes(line: str, found: str) -> None:
    variables = {"_LITCONVERT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("litconvert"))],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert found in done.stdout.split(), done


PRODUCING = [name for name in COMMANDS if name not in ("latents", "recipes", "recipes-schema")]


@pytest.mark.parametrize("name", PRODUCING)
def test_every_command_that_produces_something_says_it_as_json(name: str) -> None:
    assert "--json" in command(*name.split("-"), "--help").out


@pytest.mark.slow
def test_the_wheel_carries_recipes_and_assets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run(
        [*build, str(tmp_path), str(ROOT)], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"litconvert/recipes/{name}.yaml" for name in packaged_recipes()} <= names
    assets = ("dit-digits.safetensors", "dit-digits.json", "digits-classifier.safetensors")
    assert {f"litconvert/assets/{name}" for name in assets} <= names
    assert "litconvert/py.typed" in names


def test_data_goes_to_stdout_and_the_rest_to_stderr(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    out = tmp_path / "student"
    result = command("convert", str(pico_checkpoint), str(out), "--recipe", str(pico_recipe), "--json")
    assert result.code == 0
    assert json.loads(result.out)["groups"]["inherited"]["student_tensors"] > 0
    assert "writing" in result.err
    quiet = command("convert", str(pico_checkpoint), str(out), "--recipe", str(pico_recipe), "--json", "-q")
    assert quiet.err == ""


def test_a_dry_run_writes_nothing(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = command("convert", str(pico_checkpoint), str(tmp_path / "x"), "--recipe", str(pico_recipe), "--dry-run")
    assert result.code == 0
    assert sorted(tmp_path.iterdir()) == before


def test_sampling_draws_teacher_and_student_on_the_same_noise(
    tmp_path: Path, pico_checkpoint: Path, pico_student: Path
) -> None:
    picture, npz = tmp_path / "grid.png", tmp_path / "images.npz"
    result = command(
        *("sample", str(pico_student), "--teacher", str(pico_checkpoint), "--out", str(picture), "--npz", str(npz)),
        *("--num", "6", "--classes", "0,3", "--scheduler", "ddpm", "--steps", "3", "--guidance", "1.5"),
    )
    assert result.code == 0, result.err
    assert result.out.split() == [str(picture), str(npz)]
    assert picture.stat().st_size > 0


@pytest.mark.slow
def test_the_whole_line_runs_and_a_second_run_skips_what_is_done(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    first = run_line(str(pico_recipe), tmp_path / "out", source=str(pico_checkpoint))
    assert first.scores is None
    assert (first.run / "comparison.png").is_file()

    def weights() -> dict[Path, int]:
        files = [path for kind in ("safetensors", "distcp") for path in (tmp_path / "out").rglob(f"*.{kind}")]
        return {path: path.stat().st_mtime_ns for path in files}

    written = weights()
    assert len(written) == 2 + 2  # student, model and two checkpoints
    run_line(str(pico_recipe), tmp_path / "out", source=str(pico_checkpoint))
    assert weights() == written


def test_a_line_says_when_its_student_is_not_solved(text_recipe: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def stop(note: str) -> None:
        notes.append(note)
        if note.startswith("not solved: no captions are at hand"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_line(str(text_recipe), tmp_path / "line", listener=Hearing(note=stop))
    assert "give --data DATA or --embeddings FILE" in notes[-1]


@pytest.mark.slow
def test_the_whole_line_of_a_source_takes_its_own_recipe_or_the_one_that_is_named(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    named = command("run", pico_checkpoint, "--recipe", pico_recipe, "--inherit", "q,k", "-o", tmp_path / "named")
    assert named.code == 0, named.err
    assert f"recipe: {pico_recipe}" in named.err
    inherit = resolve(str(tmp_path / "named" / "distilled" / "recipe.yaml")).recipe.inherit
    assert inherit.attention == ("q", "k")
    # The student goes on by its own recipe, whose teacher is the one that it had.
    again = command("run", tmp_path / "named" / "distilled", "-o", tmp_path / "again", "--set", "seed=1")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "distilled" / "comparison.png").is_file()
    asset = command(
        *("run", "asset:dit-digits", "--out", tmp_path / "asset", "--set", "distill.stages.0.steps=1"),
        *("--set", "data.synthesize={num_samples: 8, steps: 1}", "--set", "evaluate.features=null"),
        *("--set", "sample.steps=1", "--set", "distill.stages.0.batch_size=4", "--set", "solve=null"),
    )
    assert asset.code == 0, asset.err
    assert "recipe: digits\n" in asset.err
    recorded = resolve(str(tmp_path / "asset" / "distilled" / "recipe.yaml")).recipe
    assert recorded.distill.stages[0].learning_rate == resolve("digits").recipe.distill.stages[0].learning_rate
    assert recorded.source.license.id == "bsd-3-clause"


@pytest.mark.parametrize(
    ("arguments", "recipe", "source", "folder"),
    [
        (["digits"], "digits", None, "digits"),
        (["dit-xl-2-256", "--source", "x.pt"], "dit-xl-2-256", "x.pt", "dit-xl-2-256"),
        (["my/own.yaml"], "my/own.yaml", None, "own"),
        (["own.yml"], "own.yml", None, "own"),
        (["asset:dit-digits"], None, "asset:dit-digits", "dit-digits"),
        (["sub/DiT-XL-2-256x256.pt"], None, "sub/DiT-XL-2-256x256.pt", "DiT-XL-2-256x256"),
        (["facebook/DiT-XL-2-256"], None, "facebook/DiT-XL-2-256", "DiT-XL-2-256"),
        (["me/lit-v1.5@main"], None, "me/lit-v1.5@main", "lit-v1.5"),
        (["folder/"], None, "folder/", "folder"),
        (["digits", "-r", "mine.yaml"], "mine.yaml", "digits", "digits"),
        (["x.pt", "-r", "dit-xl-2-256"], "dit-xl-2-256", "x.pt", "x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_takes_a_recipe_by_its_name_or_ending_and_all_else_as_a_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    recipe: str | None,
    source: str | None,
    folder: str,
) -> None:
    asked: list[object] = []

    def run_line(recipe: str | None, out: Path, *, source: str | None, **options: object) -> None:
        asked.extend((recipe, source, out))
        raise UsageError("asked")

    monkeypatch.setattr("litconvert.workflow.run_line", run_line)
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "digits", "my", "sub"):
        (tmp_path / name).mkdir()
    for name in ("my/own.yaml", "own.yml", "mine.yaml", "x.pt", "sub/DiT-XL-2-256x256.pt"):
        (tmp_path / name).touch()
    assert "litconvert: asked" in command("run", *arguments).err
    assert asked == [recipe, source, Path("runs") / folder]


def test_run_refuses_what_is_neither_recipe_nor_source_and_what_it_would_write_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, reason in (
        (["digts"], "digts: neither a packaged recipe (did you mean 'digits'?) nor a file or folder"),
        ([pico_checkpoint, "--source", "x.pt"], "--source is of a recipe"),
        (["x.pt", "-r", "digits", "--source", "y.pt"], "--source is of a recipe"),
        (["none.pt"], "none.pt: no such file or folder"),
    ):
        refused = command("run", *arguments)
        assert (refused.code, refused.out) == (2, "")
        assert reason in refused.err
    unknown = command("run", pico_checkpoint, "--num-attention-heads", 2)
    assert unknown.code == 2
    assert "no packaged recipe for what it is; name a recipe that says how to train it (--recipe NAME;" in unknown.err
    (tmp_path / "runs" / "lit").mkdir(parents=True)
    for source in ("runs/lit", "runs/lit/"):
        refused = command("run", source)
        assert refused.code == 2
        assert "name another folder (--out)" in refused.err
    assert not list((tmp_path / "runs" / "lit").iterdir())


def test_inherit_is_the_recipe_s_key_by_a_shorter_name(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    asked = ("plan", pico_checkpoint, "--recipe", pico_recipe, "--json")
    for given, value in (("q,k,v", "[q, k, v]"), ("k+v", "[k, v]"), ("none", "[]"), ("all", "[q, k, v, o]")):
        plans = [command(*asked, *way).out for way in (("--inherit", given), ("--set", f"inherit.attention={value}"))]
        assert json.loads(plans[0]) == json.loads(plans[1])
        assert json.loads(plans[0])["groups"]["fresh"]["student_tensors"] > 0
    assert command(*asked, "--inherit", "q,w").code == 2
    out = tmp_path / "student"
    made = command("convert", pico_checkpoint, out, "--recipe", pico_recipe, "--inherit", "q,k,v")
    assert made.code == 0, made.err
    assert resolve(str(out)).recipe.inherit.attention == ("q", "k", "v")
    again = command("convert", pico_checkpoint, tmp_path / "x.pt", "--to", "original", "--inherit", "all")
    assert again.code == 2
    assert "--inherit means nothing there" in again.err


def test_the_whole_line_is_of_one_process(pico_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("run", pico_recipe, "--out", tmp_path / "out")
    assert result.code == 2
    assert "then launch `latents synthesize` and `distill`" in result.err
    assert not (tmp_path / "out").exists()


def test_out_of_memory_anywhere_names_the_batch_sizes(
    pico_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("litconvert.data.synthesize.read_model", full)
    result = command(
        "latents", "synthesize", tmp_path / "data", "--source", pico_checkpoint, "--num-attention-heads", 2
    )
    assert result.code == 1
    assert "out of memory; lower the batch size" in result.err
    assert "data.synthesize.batch_size" in result.err


def test_drawing_needs_a_model(tmp_path: Path) -> None:
    result = command("latents", "synthesize", tmp_path / "data")
    assert result.code == 2
    assert "--recipe or --source" in result.err


@pytest.mark.slow
def test_the_embedded_line_converts_distils_and_scores(tmp_path: Path) -> None:
    sets = [
        "solve={states: 64, held_out: 16, drawing_steps: 2, local_steps: 3}",
        "data.synthesize.num_samples=16",
        "data.synthesize.steps=2",
        "distill.stages.0.steps=1",
        "distill.stages.0.batch_size=4",
        "sample.num_images=10",
        "sample.steps=2",
        "evaluate.num_samples=70",
        "evaluate.steps=2",
        "evaluate.seeds=[100, 101]",
    ]
    given = [part for one in sets for part in ("--set", one)]
    result = command("demo", "--out", str(tmp_path / "digits"), *given)
    assert result.code == 0, result.err
    counts = "47 inherited, 0 fresh, 60 solved, 1 recomputed, 24 dropped"
    for text in (counts, "4,163,720 before, 4,168,712 after", "2 seeds"):
        assert text in result.out
    scores = json.loads((tmp_path / "digits" / "distilled" / "evaluation.json").read_text())
    student, floor = scores["models"]["student"], scores["models"]["teacher against itself"]
    assert len(student["frechet_distance"]["values"]) == 2
    # So short a walk leaves the student at some distance from the teacher, and the teacher is near itself.
    assert student["frechet_distance"]["mean"] > floor["frechet_distance"]["mean"]
    recorded = json.loads((tmp_path / "digits" / "distilled" / "model" / "litconvert.json").read_text())
    assert recorded["metrics"]["frechet_distance"]["num_samples"] == 70


def test_evaluate_of_a_model_without_a_known_metric_says_so(tmp_path: Path, pico_student: Path) -> None:
    result = command("evaluate", str(pico_student))
    assert result.code == 2
    assert "scores of a run are for the digits" in result.err
    assert "--teacher, --images or --reference" in result.err
    result = command("evaluate", str(tmp_path))
    assert result.code == 2
    assert "not a run of `litconvert distill`, nor a model that one wrote" in result.err


def test_the_schema_that_recipes_name_is_the_one_printed() -> None:
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json.loads(
        command("recipes", "schema").out
    )


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path
) -> None:
    arguments = ("latents", "synthesize", tmp_path / "data", "--source", pico_checkpoint, "--recipe", pico_recipe)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        result = command(*arguments)
    assert result.code == 1
    assert "datasets is not installed, which litconvert needs" in result.err
    assert not (tmp_path / "data").exists()
    assert command(*arguments).code == 0


def test_env_has_what_a_bug_report_needs_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    outcome = command("env", "--json")
    facts = json.loads(outcome.out)
    assert facts["torch"].startswith("2.")
    needed = {
        "litconvert",
        "python",
        "diffusers",
        "system",
        "processor",
        "cores",
        "memory",
        "CUDA of PyTorch",
        "devices",
    }
    assert {*needed, "device used", "bf16 in hardware", "transformers", "HF_ENDPOINT"} <= facts.keys()
    assert "hf_secret" not in outcome.out
    plain = command("env").out
    assert all(str(name) in plain for name in facts)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    started = [
        sys.executable,
        "-m",
        "litconvert",
        "convert",
        "asset:dit-digits",
        tmp_path / "student",
        "--device",
        "cpu",
    ]
    # Where the tests run in the background, a shell has Ctrl-C ignored, and a new Python would leave it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(list(map(str, started)), stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("solve: 0/"):
                running.send_signal(signal.SIGINT)
                break
        rest = running.stderr.read()
        assert running.wait() == 130
    assert rest.splitlines()[-1].startswith("litconvert: interrupted; the same command goes on with what is finished")
    assert "Traceback" not in rest
    assert not (tmp_path / "student").exists()
