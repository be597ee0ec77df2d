"""Bad input gets one sentence that names the fix, exit code 1 or 2, and leaves nothing half-written.

Every refusal stands beside the same command on sound input, so that it is refused for its reason.
"""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from litconvert.data.dataset import write_latents
from tests.helpers.checkpoint_files import dit_state
from tests.helpers.command import Outcome, command

State = dict[str, Tensor]


def contents(folder: Path) -> set[Path]:
    """Everything beneath a folder, hidden and partial files too."""
    return {path.relative_to(folder) for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """One sentence on stderr that has these words, nothing on stdout, this exit code."""
    assert outcome.err.startswith("litconvert: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.err.startswith("litconvert: unexpected")
    for word in words:
        assert word in outcome.err
    assert outcome.code == code
    assert outcome.out == ""


def assert_done(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err


class Bench:
    """A folder in which a source is made, good or bad, and converted."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe

    def convert(self, source: Path, *options: object) -> Outcome:
        return command("convert", source, self.folder / "out", "--recipe", self.recipe, "-q", *options)

    def assert_converts(self, source: Path) -> None:
        assert_done(self.convert(source, "--force"))

    def assert_refuses(self, source: Path, code: int, *words: str) -> None:
        """`convert` refuses the source and leaves nothing; so does `inspect --weights`, after its report."""
        before = contents(self.folder)
        assert_refused(self.convert(source), code, *words)
        assert contents(self.folder) == before
        inspected = command("inspect", source, "--recipe", self.recipe, "--weights")
        assert inspected.out == "" or "looks wrong" in inspected.out
        assert_refused(replace(inspected, out=""), code, *words)


@pytest.fixture
def bench(tmp_path: Path, pico_recipe: Path) -> Bench:
    return Bench(tmp_path, pico_recipe)


def save(state: State, path: Path) -> Path:
    """A state dict, in the format that the suffix says; `.ckpt` is torch's old format."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".ckpt")
    return path


FORMATS = ("pt", "ckpt", "safetensors")


# Broken files


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file(bench: Bench, pico_state: State, suffix: str) -> None:
    path = save(pico_state, bench.folder / f"dit.{suffix}")
    whole = path.read_bytes()
    for size in (0, 1, 7, 100, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        bench.assert_refuses(path, 1, str(path), "download it again")
    path.write_bytes(whole)
    bench.assert_converts(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_corrupt_file(bench: Bench, pico_state: State, suffix: str) -> None:
    path = save(pico_state, bench.folder / f"dit.{suffix}")
    whole = path.read_bytes()
    # The magic number and header; for the zip, whose directory is at its end, that too.
    damaged = [b"\xff" * 64 + whole[64:], b"garbage" * 1000, whole[:2000].replace(b"e", b"\x00") + whole[2000:]]
    if suffix == "pt":
        damaged.append(whole[:-300] + b"\x00" * 300)
    for content in damaged:
        path.write_bytes(content)
        bench.assert_refuses(path, 1, str(path))
    path.write_bytes(whole)
    bench.assert_converts(path)


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(
    bench: Bench, pico_state: State, suffix: str, place: str
) -> None:
    path, marker = bench.folder / f"dit.{suffix}", bench.folder / "marker"
    payload = Payload(marker)
    contents_of = {
        "beside": {"model": pico_state, "args": payload},
        "inside": {**pico_state, "payload": payload},
        "alone": payload,
    }
    torch.save(contents_of[place], path, _use_new_zipfile_serialization=suffix == "pt")
    bench.assert_refuses(path, 1, "holds code or objects (posix.system)", "refused and not run", "torch.save(")
    assert not marker.exists()
    bench.assert_converts(save(pico_state, path))


def test_a_whole_pickled_model_is_refused(bench: Bench, pico_state: State) -> None:
    path = bench.folder / "dit.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    bench.assert_refuses(path, 1, "torch.nn.modules.linear.Linear", "refused and not run")
    bench.assert_converts(save(pico_state, path))


# The wrong tensors


def test_an_unknown_architecture(bench: Bench, pico_state: State) -> None:
    path = save({"encoder.layer.0.weight": torch.zeros(3)}, bench.folder / "bert.pt")
    bench.assert_refuses(
        path, 2, "unknown architecture (keys: encoder.layer.0.weight, ...)", "DiT, SiT, PixArt-alpha, PixArt-Sigma"
    )
    cross = {"blocks.0.cross_attn.proj.weight": torch.zeros(3)}
    path = save(pico_state | cross, bench.folder / "pixart.pt")
    bench.assert_refuses(path, 2, "unknown architecture")
    bench.assert_converts(save(pico_state, path))


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def also(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {key if key != old else new: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias is missing"),
        (without("blocks.0.attn.qkv.weight"), "blocks.0.attn.qkv.weight is missing"),
        (without("x_embedder.proj.weight"), "x_embedder.proj.weight is missing"),
        (without("final_layer.linear.weight"), "final_layer.linear.weight is missing"),
        (also("blocks.1.attn.gate.weight", 32), "blocks.1.attn.gate.weight is not part of this layout"),
        (also("blocks.2.mlp.fc1.bias", 128), "blocks.2.attn.qkv.weight is missing"),
        (also("blocks.999999999.mlp.fc1.bias", 128), "blocks.999999999.mlp.fc1.bias names a layer beyond"),
        (also("blocks.0.mlp.fc1.weight", 128, 31), "blocks.0.mlp.fc1.weight has shape (128, 31), expected (128, 32)"),
        (also("blocks.1.attn.qkv.bias", 95), "blocks.1.attn.qkv.bias has shape (95,), expected (96,)"),
        (also("x_embedder.proj.weight", 32, 4), "x_embedder.proj.weight has shape (32, 4), expected 4 dimensions"),
        (also("x_embedder.proj.weight", 32, 1, 0, 0), "x_embedder.proj.weight has shape (32, 1, 0, 0)"),
        (
            renamed("blocks.0.attn.proj.bias", "blocks.0.attn.porj.bias"),
            "blocks.0.attn.porj.bias is not part of this layout (did you mean 'blocks.0.attn.proj.bias'?)",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors(
    bench: Bench, pico_state: State, change: Callable[[State], State], complaint: str
) -> None:
    path = save(change(pico_state), bench.folder / "dit.safetensors")
    advice = "would be lost" if "gate" in complaint else "use the complete"
    bench.assert_refuses(path, 1, complaint, advice)
    assert_refused(command("plan", path, "--recipe", bench.recipe), 1, complaint)
    bench.assert_converts(save(pico_state, path))


def test_integers_for_weights(bench: Bench, pico_state: State) -> None:
    broken = {**pico_state, "blocks.0.mlp.fc2.bias": torch.zeros(32, dtype=torch.int64)}
    path = save(broken, bench.folder / "dit.pt")
    bench.assert_refuses(path, 1, "blocks.0.mlp.fc2.bias is torch.int64, not floating point")
    bench.assert_converts(save(pico_state, path))


def test_several_problems_are_told_at_once(bench: Bench, pico_state: State) -> None:
    broken = without("blocks.1.mlp.fc1.bias")(also("blocks.0.extra", 1)(also("blocks.0.mlp.fc2.bias", 1)(pico_state)))
    path = save(broken, bench.folder / "dit.pt")
    words = ("blocks.1.mlp.fc1.bias is missing", "blocks.0.extra is not part", "blocks.0.mlp.fc2.bias has shape (1,)")
    bench.assert_refuses(path, 1, *words)


@pytest.mark.parametrize("name", ["../dit.safetensors", "{folder}/dit.safetensors"])
def test_a_shard_index_that_points_outside_its_folder(bench: Bench, pico_state: State, name: str) -> None:
    save(pico_state, bench.folder / "dit.safetensors")
    folder = bench.folder / "shards"
    folder.mkdir()
    save(pico_state, folder / "dit.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    template = '{"weight_map": {"pos_embed": "NAME"}}'
    index.write_text(template.replace("NAME", name.format(folder=bench.folder)))
    bench.assert_refuses(folder, 1, "outside its folder; refused")
    index.write_text(template.replace("NAME", "dit.safetensors"))
    bench.assert_converts(folder)


@pytest.mark.parametrize(
    ("suffix", "name", "value"),
    [
        ("safetensors", "blocks.1.mlp.fc1.weight", float("nan")),
        ("pt", "blocks.1.mlp.fc1.weight", float("nan")),
        ("safetensors", "y_embedder.embedding_table.weight", float("-inf")),
        ("safetensors", "blocks.0.attn.qkv.weight", float("nan")),  # dropped
        ("pt", "blocks.1.attn.proj.bias", float("inf")),  # dropped
        ("safetensors", "pos_embed", float("nan")),  # recomputed
    ],
)
def test_nan_weights(bench: Bench, pico_state: State, suffix: str, name: str, value: float) -> None:
    broken = {**pico_state, name: pico_state[name].clone()}
    broken[name].view(-1)[-1] = value
    path = save(broken, bench.folder / f"dit.{suffix}")
    bench.assert_refuses(path, 1, name, "use ")
    # The headers are sound, so the plan is made.
    assert_done(command("plan", path, "--recipe", bench.recipe))
    bench.assert_converts(save(pico_state, path))


def test_a_source_that_is_not_there(bench: Bench, pico_checkpoint: Path) -> None:
    bench.assert_refuses(bench.folder / "missing.pt", 2, "no such file or folder, and not a Hub id")
    bench.assert_converts(pico_checkpoint)


# Outputs that cannot be written


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SHORT = (
    "--set",
    "distill.stages=[{objective: hybrid, steps: 2, batch_size: 2}]",
    "--set",
    "sample.num_images=2",
    "--set",
    "data.synthesize.num_samples=4",
    "-q",
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six random latents of the pico model."""
    latents = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(7)) * 2 - 1
    return write_latents(latents, torch.arange(6) % 4, tmp_path / "data", "random")


def test_a_full_disk_while_converting(bench: Bench, pico_checkpoint: Path) -> None:
    before = contents(bench.folder)
    with file_size_limit(50_000):
        outcome = bench.convert(pico_checkpoint)
    assert_refused(outcome, 1, f"cannot write {bench.folder / 'out'}", "file-size limit", "write elsewhere")
    assert contents(bench.folder) == before
    bench.assert_converts(pico_checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(place)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up(
    small_disk: Path, pico_checkpoint: Path, pico_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    arguments = ("convert", pico_checkpoint, out, "--recipe", pico_recipe, "-q")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 215_000)
    # Foreseen before the work.
    assert_refused(command(*arguments), 1, "MB are needed", "MB are free; free some space")
    # Not foreseen: another process filled it meanwhile.
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.conversion.convert.require_space", lambda folder, nbytes: None)
        assert_refused(command(*arguments), 1, f"cannot write {out}", "the disk is full; free some space")
    assert contents(small_disk) == {Path("filler")}
    filler.unlink()
    assert_done(command(*arguments))


@pytest.mark.slow
def test_a_full_disk_while_drawing_data(bench: Bench, pico_checkpoint: Path) -> None:
    arguments = ("latents", "synthesize", bench.folder / "out", "--source", pico_checkpoint, "-r", bench.recipe)
    with file_size_limit(1000):
        outcome = command(*arguments, *SHORT)
    assert_refused(outcome, 1, "cannot write", "file-size limit")
    assert not (bench.folder / "out").exists()
    assert_done(command(*arguments, *SHORT))


@pytest.mark.slow
def test_a_full_disk_while_distilling_and_the_same_command_goes_on(
    tmp_path: Path, pico_student: Path, data: Path
) -> None:
    arguments = ("distill", pico_student, tmp_path / "run", "--data", data, *SHORT)
    with file_size_limit(60_000):
        outcome = command(*arguments)
    assert_refused(outcome, 1, "file-size limit")
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").rglob("*partial*"))
    assert_done(command(*arguments))
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_full_disk_while_sampling(tmp_path: Path, pico_student: Path) -> None:
    arguments = ("sample", pico_student, "-o", tmp_path / "a.png", "-q")
    with file_size_limit(10):
        assert_refused(command(*arguments), 1, "file-size limit")
    assert_done(command(*arguments))


@pytest.mark.slow
def test_an_output_beneath_a_file(tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, data: Path) -> None:
    def commands(place: Path) -> list[tuple[object, ...]]:
        return [
            ("convert", pico_checkpoint, place / "student", "--recipe", pico_recipe, "-q"),
            ("latents", "synthesize", place / "data", "--source", pico_checkpoint, "-r", pico_recipe, *SHORT),
            ("distill", place.parent / "good" / "student", place / "run", "--data", data, *SHORT),
            ("sample", place.parent / "good" / "student", "-o", place / "a.png", "-q"),
            ("recipes", "copy", "digits", place / "digits.yaml"),
        ]

    (tmp_path / "good").mkdir()
    (tmp_path / "file").write_text("kept")
    for good, bad in zip(commands(tmp_path / "good"), commands(tmp_path / "file"), strict=True):
        assert_done(command(*good))
        before = contents(tmp_path)
        outcome = command(*bad)
        assert_refused(outcome, 1, str(tmp_path / "file"), "choose another path")
        assert contents(tmp_path) == before
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_an_output_that_is_something_else(
    tmp_path: Path, pico_checkpoint: Path, pico_recipe: Path, pico_student: Path, data: Path
) -> None:
    commands: dict[str, tuple[object, ...]] = {
        "convert": ("convert", pico_checkpoint, "OUT", "--recipe", pico_recipe, "-q"),
        "synthesize": ("latents", "synthesize", "OUT", "--source", pico_checkpoint, "-r", pico_recipe, *SHORT),
        "distill": ("distill", pico_student, "OUT", "--data", data, *SHORT),
    }
    for name, arguments in commands.items():
        for kind in ("file", "folder", "empty"):
            out = tmp_path / f"{name}-{kind}"
            if kind == "file":
                out.write_text("mine")
            else:
                out.mkdir()
            if kind == "folder":
                (out / "photo.jpg").write_text("mine")
            given = [out if argument == "OUT" else argument for argument in arguments]
            if kind == "empty":
                assert_done(command(*given))
                continue
            before = contents(tmp_path)
            code = 2 if kind == "file" else 1
            assert_refused(command(*given), code, str(out), "exists", "choose another path")
            assert contents(tmp_path) == before
            assert (out if kind == "file" else out / "photo.jpg").read_text() == "mine"


# Distillation


def save_data(latents: Tensor, folder: Path) -> Path:
    return write_latents(latents, torch.zeros(len(latents), dtype=torch.int64), folder, "test")


@pytest.mark.slow
def test_an_empty_data_set(tmp_path: Path, pico_student: Path, data: Path) -> None:
    from datasets import Array3D, Dataset, Features, Value

    features = Features({"latent": Array3D((1, 8, 8), "float32"), "class_label": Value("int64")})
    empty = Dataset.from_dict({"latent": [], "class_label": []}, features=features)
    # Without a shard there is no file of rows at all, and `datasets` cannot read back what it wrote.
    for shards, complaint in {1: "the data set is empty", None: "data set"}.items():
        empty.save_to_disk(str(tmp_path / f"empty-{shards}"), num_shards=shards)
        outcome = command("distill", pico_student, tmp_path / "run", "--data", tmp_path / f"empty-{shards}", *SHORT)
        assert_refused(outcome, 2, f"empty-{shards}", complaint, "litconvert latents synthesize")
        assert not (tmp_path / "run").exists()
    assert_done(command("distill", pico_student, tmp_path / "run", "--data", data, *SHORT))


def test_data_that_is_none(tmp_path: Path, pico_student: Path) -> None:
    from datasets import Dataset

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.jpg").write_text("no data set")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    complaints = {"missing": "no such data set", "folder": "not a complete data set", "text": "has text"}
    for name, complaint in complaints.items():
        outcome = command("distill", pico_student, tmp_path / "run", "--data", tmp_path / name, *SHORT)
        assert_refused(outcome, 2, str(tmp_path / name), complaint)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_of_the_wrong_shape(tmp_path: Path, pico_student: Path) -> None:
    for index, shape in enumerate([(4, 2, 8, 8), (4, 1, 7, 8)]):
        wrong = save_data(torch.zeros(shape), tmp_path / f"wrong-{index}")
        outcome = command("distill", pico_student, tmp_path / "run", "--data", wrong, *SHORT)
        assert_refused(outcome, 2, "the data set's latents are", "draw or encode the data for this model")
        assert not (tmp_path / "run").exists()
    right = save_data(torch.zeros(4, 1, 8, 8), tmp_path / "right")
    assert_done(command("distill", pico_student, tmp_path / "run", "--data", right, *SHORT))


@pytest.mark.slow
def test_a_teacher_of_another_latent_or_other_classes(tmp_path: Path, pico_student: Path, data: Path) -> None:
    sound = {"channels": 1, "sample_size": 8, "rows": 5}

    def distill(**changes: int) -> Outcome:
        torch.save(dit_state(width=48, layers=3, seed=4, **(sound | changes)), tmp_path / "teacher.pt")
        heads = ("--set", "distill.teacher.num_attention_heads=2")
        teacher = ("--teacher", tmp_path / "teacher.pt", *heads)
        return command("distill", pico_student, tmp_path / "run", "--data", data, *teacher, *SHORT)

    assert_refused(distill(channels=2), 2, "the teacher's in_channels is 2, the student's is 1", "--teacher")
    assert_refused(distill(sample_size=16), 2, "the teacher's sample_size is 16, the student's is 8", "--teacher")
    assert_refused(distill(rows=7), 2, "the teacher's num_classes is 6, the student's is 4", "--teacher")
    assert not (tmp_path / "run").exists()
    assert_done(distill())


def test_a_student_that_is_none(tmp_path: Path, pico_checkpoint: Path, pico_student: Path, data: Path) -> None:
    for path in (pico_checkpoint, tmp_path / "missing", data):
        outcome = command("distill", path, tmp_path / "run", "--data", data, *SHORT)
        assert_refused(outcome, 2, "not a model directory of litconvert", "convert a checkpoint first")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_student_with_a_broken_file(tmp_path: Path, pico_student: Path, data: Path) -> None:
    arguments = ("distill", pico_student, tmp_path / "run", "--data", data, *SHORT)
    for name in ("config.json", "litconvert.json", "recipe.yaml"):
        whole = (pico_student / name).read_bytes()
        (pico_student / name).write_bytes(b"{")
        assert_refused(command(*arguments), 2 if name == "recipe.yaml" else 1, name)
        assert not (tmp_path / "run").exists()
        (pico_student / name).write_bytes(whole)
    assert_done(command(*arguments))


@pytest.mark.slow
def test_a_source_that_changed_since_the_conversion(
    tmp_path: Path, pico_checkpoint: Path, pico_student: Path, data: Path
) -> None:
    sound = pico_checkpoint.read_bytes()
    torch.save(dit_state(seed=5), pico_checkpoint)
    outcome = command("distill", pico_student, tmp_path / "run", "--data", data, *SHORT)
    assert_refused(outcome, 1, "has changed since", "convert it again, or restore it")
    pico_checkpoint.write_bytes(sound)
    assert_done(command("distill", pico_student, tmp_path / "run", "--data", data, *SHORT))


# The command line and recipes


def test_a_typo_in_a_recipe(bench: Bench, pico_checkpoint: Path) -> None:
    sound = bench.recipe.read_text()
    bench.recipe.write_text(sound.replace("conv_size", "conv_siz"))
    before = contents(bench.folder)
    words = (f"{bench.recipe}:2: student.conv_siz: unknown key", "did you mean 'conv_size'?")
    assert_refused(bench.convert(pico_checkpoint), 2, *words)
    assert contents(bench.folder) == before
    bench.recipe.write_text(sound)
    bench.assert_converts(pico_checkpoint)


@pytest.mark.parametrize(
    ("wrong", "right", "words"),
    [
        (
            ("recipes", "show", "digts"),
            ("recipes", "show", "digits"),
            ("did you mean 'digits'?", "litconvert recipes ls"),
        ),
        (
            ("recipes", "show", "digits", "--set", "sample.scheduler=ddmi"),
            ("recipes", "show", "digits", "--set", "sample.scheduler=ddim"),
            ("--set: sample.scheduler: input should be 'ddpm', 'ddim', 'dpm-solver++' or 'flow-euler', got 'ddmi'",),
        ),
        (
            ("recipes", "show", "digits", "--set", "sample.step=3"),
            ("recipes", "show", "digits", "--set", "sample.steps=3"),
            ("--set: sample.step: unknown key", "did you mean 'steps'?"),
        ),
        (
            ("recipes", "show", "digits", "--set", "sample.steps"),
            ("recipes", "show", "digits", "--set", "sample.steps=3"),
            ("--set 'sample.steps': write it as key=value",),
        ),
        (
            ("recipes", "show", "digits", "--set", "sample.steps=many"),
            ("recipes", "show", "digits", "--set", "sample.steps=3"),
            ("--set: sample.steps: input should be a valid integer, got 'many'",),
        ),
        (
            ("plan", "asset:dit-digit", "-r", "digits"),
            ("plan", "asset:dit-digits", "-r", "digits"),
            ("no such asset; there are", "asset:dit-digits"),
        ),
    ],
)
def test_a_slip_on_the_command_line(wrong: tuple[str, ...], right: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(command(*wrong), 2, *words)
    assert_done(command(*right))


def test_an_unknown_scheduler(tmp_path: Path, pico_student: Path) -> None:
    arguments = ("sample", pico_student, "-o", tmp_path / "a.png", "-q", "--scheduler")
    assert_refused(command(*arguments, "ddmi"), 2, "'ddpm', 'ddim', 'dpm-solver++' or 'flow-euler', got 'ddmi'")
    assert not (tmp_path / "a.png").exists()
    assert_done(command(*arguments, "ddim"))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (("recipes", "ls", "--jsn"), "--json"),
        (("recpes", "ls"), "recipes"),
        (("recipes", "lst"), "ls"),
        (("recipes", "show"), "Missing argument"),
        (("plan", "x", "--sample-size", "big"), "--sample-size"),
    ],
)
def test_an_unknown_option_or_command_says_what_is_near(wrong: tuple[str, ...], word: str) -> None:
    outcome = command(*wrong)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert word in outcome.err.splitlines()[-1]
    assert_done(command("recipes", "ls", "--json"))


def test_a_traceback_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, pico_checkpoint: Path
) -> None:
    monkeypatch.delenv("LITCONVERT_DEBUG", raising=False)
    assert_refused(bench.convert(bench.folder / "missing.pt"), 2, "no such file")
    monkeypatch.setenv("LITCONVERT_DEBUG", "1")
    outcome = bench.convert(bench.folder / "missing.pt")
    assert outcome.code == 2
    assert "Traceback (most recent call last)" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("litconvert: ")
