"""A checkpoint of a run is a model: for Python, sample, evaluate, convert, inspect and push."""

import errno
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

import litconvert
from litconvert.common.files import read_json
from litconvert.common.listener import StepReport
from litconvert.data.synthesize import synthesize
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.sources import open_source
from litconvert.publishing.layout import find_model, prepare
from litconvert.publishing.publication import Publication
from litconvert.recipe.schema import Source
from litconvert.runs.directory import RunDirectory, is_run, model_of
from tests.helpers.command import command
from tests.helpers.hub import enter
from tests.helpers.hub_server import HubServer
from tests.helpers.listener import Hearing
from tests.helpers.processes import Forker, patience

STAGES = (
    "distill.stages=[{objective: hybrid, steps: 3, batch_size: 4, learning_rate: 1.0e-3, ema_decay: 0.5,"
    " frozen: ['*.ff.*']},"
    "{objective: hybrid, steps: 7, batch_size: 4, learning_rate: 1.0e-3, ema_decay: 0.5}]"
)
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


class Stop(Exception):
    """Ends a run as a kill does."""


@pytest.fixture
def run(tmp_path: Path, pico_student: Path, pico_checkpoint: Path, pico_recipe: Path) -> Path:
    """A run of ten steps that ended in its seventh, with checkpoints of steps 2, 4, 6 and of a stage's end, 3."""
    data = synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe))

    def stop(report: StepReport) -> None:
        if report.global_step == 7:
            raise Stop

    sets = [STAGES, "distill.keep_checkpoints=9"]
    with pytest.raises(Stop):
        litconvert.distill(pico_student, tmp_path / "run", data=data, overrides=sets, listener=Hearing(stop))
    return tmp_path / "run"


def finish(run: Path) -> None:
    """Run the same command again."""
    data = run.parent / "data"
    sets = [STAGES, "distill.keep_checkpoints=9"]
    litconvert.distill(run.parent / "student", run, data=data, overrides=sets)


def stored(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors as torch's own converter reads them."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    out = folder.parent / f"{folder.name}.pt"
    dcp_to_torch_save(folder, out)
    found: dict[str, Tensor] = torch.load(out, weights_only=True)
    out.unlink()
    return found


@pytest.mark.parametrize("step", [2, 6], ids=["where some is frozen", "where all is trained"])
def test_a_checkpoint_loads_as_its_average_or_its_raw_weights(run: Path, step: int) -> None:
    found = stored(run / "checkpoints" / f"step-{step:08d}")
    average, raw = litconvert.load(f"{run}@{step}"), litconvert.load(f"{run}@{step}", weights="model")
    different = 0
    for name, value in raw.state_dict().items():
        assert torch.equal(value, found[f"model/{name}"])
        # What a stage leaves alone has no average.
        expected = found.get(f"ema/{name}", value)
        assert torch.equal(average.state_dict()[name], expected)
        different += not torch.equal(expected, value)
    assert different > 0


def test_a_run_stands_for_its_newest_model(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert model_of(str(run)) == str(checkpoints / "step-00000006")
    assert model_of(f"{run}@4") == model_of(f"{run}@4/") == str(checkpoints / "step-00000004")
    assert model_of(str(checkpoints / "step-00000002")) == str(checkpoints / "step-00000002")
    with pytest.raises(UsageError, match=r"run@5: no checkpoint .* keeps those of steps 2, 3, 4, 6"):
        model_of(f"{run}@5")
    finish(run)
    assert model_of(str(run)) == model_of(str(run / "model")) == str(run / "model")
    assert model_of(f"{run}@10") == str(checkpoints / "step-00000010")
    shutil.rmtree(checkpoints)
    assert model_of(f"{run}@10") == str(run / "model")
    assert model_of("owner/name@main") == "owner/name@main"


def test_raw_weights_are_those_of_a_checkpoint(run: Path) -> None:
    finish(run)
    assert model_of(str(run), raw=True) == str(run / "checkpoints" / "step-00000010")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match="holds the moving average alone, and no checkpoint is kept"):
        model_of(str(run), raw=True)
    with pytest.raises(UsageError, match="run@10: no checkpoint"):
        model_of(f"{run}@10", raw=True)


def test_a_folder_of_other_tables_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    assert not is_run(tmp_path)
    assert model_of(str(tmp_path)) == str(tmp_path)


def test_a_checkpoint_that_somebody_reads_does_not_end_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if target.name.startswith(".dropped-"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    litconvert.distill(run.parent / "student", run, data=run.parent / "data", overrides=[STAGES])
    assert RunDirectory(run).finished_steps() == 10
    assert 2 in RunDirectory(run).kept_steps()


def test_a_run_that_has_nothing_yet_says_so(tmp_path: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match="the run has no model and no checkpoint yet; run the same command again"):
        litconvert.load(run)
    with pytest.raises(UsageError, match="the run keeps none"):
        litconvert.load(f"{run}@4")


def test_inspect_says_which_set_it_is(run: Path) -> None:
    facts = json.loads(command("inspect", f"{run}@6", "--weights", "--json").out)
    assert (facts["weights"], facts["sets"], facts["dtype"]) == ("ema", ["ema", "model"], "float32")
    assert facts["config"]["attention"] == ["linear", "linear"]
    assert facts["values"]["broken"] == []
    assert json.loads(command("inspect", run, "--set", "inherit.weights=model", "--json").out)["weights"] == "model"
    refused = command("inspect", run, "--set", "inherit.weights=best")
    assert refused.code == 2


def test_a_checkpoint_samples(tmp_path: Path, run: Path) -> None:
    drawn = {}
    ways: dict[str, list[object]] = {"latest": [run], "step 2": [f"{run}@2"], "raw": [run, "--raw"]}
    for name, arguments in ways.items():
        out = tmp_path / f"{name}.safetensors"
        outcome = command("sample", *arguments, "--latents", out)
        assert outcome.code == 0, outcome.err
        drawn[name] = load_file(out)["latents"]
    assert "drawn from the checkpoint" in outcome.err
    assert len({value.sum().item() for value in drawn.values()}) == 3
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1])
    once = litconvert.sample(litconvert.load(run), noise=noise, class_labels=labels, steps=2)
    finish(run)
    again = litconvert.sample(litconvert.load(f"{run}@6"), noise=noise, class_labels=labels, steps=2)
    assert torch.equal(once, again)


def test_a_checkpoint_converts_to_a_model_directory_that_its_teacher_teaches_on(tmp_path: Path, run: Path) -> None:
    out = litconvert.convert(f"{run}@6", tmp_path / "out")
    expected = litconvert.load(f"{run}@6").state_dict()
    found = load_file(out / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    raw = litconvert.convert(f"{run}@6", tmp_path / "raw", overrides=["inherit.weights=model"])
    assert any(not torch.equal(value, found[name]) for name, value in load_file(raw / WEIGHTS).items())
    further = litconvert.distill(
        out, tmp_path / "further", data=tmp_path / "data", overrides=["distill.stages=[{objective: hybrid, steps: 1}]"]
    )
    assert read_json(further / "model" / "litconvert.json")["distillation"]["teacher"]["path"].endswith("pico.pt")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A run of the embedded model that ended in the middle."""

    def stop(report: StepReport) -> None:
        if report.global_step == 3:
            raise Stop

    stages = "distill.stages=[{objective: hybrid, steps: 4, batch_size: 4, learning_rate: 1.0e-4}]"
    few = ["solve=null", "evaluate.num_samples=20", "evaluate.seeds=[100]", "evaluate.steps=2", "sample.num_images=1"]
    student = litconvert.convert(None, tmp_path / "student", "digits", few)
    latents = torch.zeros((4, 1, 16, 16))
    from litconvert.data.dataset import write_latents

    data = write_latents(latents, torch.arange(4), tmp_path / "data", "zeros")
    sets = [stages, *few, "distill.checkpoint_every=2"]
    with pytest.raises(Stop):
        litconvert.distill(student, tmp_path / "run", data=data, overrides=sets, listener=Hearing(stop))
    return tmp_path / "run"


def test_a_checkpoint_is_evaluated_and_keeps_its_scores(tmp_path: Path, digits: Path) -> None:
    outcome = command("evaluate", digits, "--json")
    assert outcome.code == 0, outcome.err
    scores = json.loads(outcome.out)
    folder = digits / "checkpoints" / "step-00000002"
    kept = read_json(folder / "litconvert.json")
    assert kept["metrics"]["frechet_distance"]["mean"] == scores["models"]["student"]["frechet_distance"]["mean"]
    assert read_json(folder / "evaluation.json")["digest"] == scores["digest"]
    raw = json.loads(command("evaluate", f"{digits}@2", "--raw", "--json").out)
    assert raw["models"]["student"] != scores["models"]["student"]
    assert read_json(folder / "litconvert.json")["metrics"] == kept["metrics"]  # those of its average

    for weights, expected in (("auto", kept["metrics"]), ("model", {})):
        out = tmp_path / weights
        out.mkdir()
        prepare(Publication(Path(f"{digits}@2"), "tester/digits", weights=weights), out)
        assert read_json(out / "litconvert.json")["metrics"] == expected


def test_a_checkpoint_is_pushed_with_the_pictures_of_its_own_steps(tmp_path: Path, run: Path) -> None:
    names = ["teacher", "before", *(f"step-{step:08d}" for step in (2, 4, 6)), "after"]
    for name in names:
        (run / "samples" / f"{name}.png").parent.mkdir(exist_ok=True)
        (run / "samples" / f"{name}.png").write_bytes(b"")
    _, pictures = find_model(Path(f"{run}@4"))
    assert sorted(picture.stem for picture in pictures) == ["before", "step-00000002", "step-00000004", "teacher"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for one test, which this process is logged in to."""
    with HubServer(os.environ.get("HF_TOKEN", "hf_secretSecretSecret")) as server:
        enter(server, monkeypatch)
        yield server


def test_a_run_killed_at_60_percent_samples_and_pushes(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, pico_recipe: Path, hub: HubServer
) -> None:
    data, run = synthesize(pico_checkpoint, tmp_path / "data", str(pico_recipe)), tmp_path / "run"
    stages = "distill.stages=[{objective: hybrid, steps: 200, batch_size: 4, learning_rate: 1.0e-3}]"
    arguments = ["distill", str(pico_student), str(run), "--data", str(data), "-q"]
    with Forker() as forker, patience(200):
        sets = ["--set", stages, "--set", "distill.checkpoint_every=20"]
        workers = forker.launch([*arguments, *sets], tmp_path / "log")
        while 120 not in RunDirectory(run).kept_steps():
            time.sleep(0.002)
        workers.kill(signal.SIGKILL)
        assert workers.wait() == [-signal.SIGKILL]
    step = RunDirectory(run).kept_steps()[-1]
    assert 120 <= step < 200
    assert not (run / "model").exists()
    assert command("sample", run, "--out", tmp_path / "grid.png").code == 0
    assert (tmp_path / "grid.png").is_file()

    pushed = command("push", run, "tester/early")
    assert pushed.code == 0, pushed.err
    files = hub.files("tester/early")
    card = files["README.md"].decode()
    assert f"| Distilled for | {step} of 200 steps: a checkpoint in the middle of a run, its moving average |" in card
    assert json.loads(files["litconvert.json"])["distillation"]["steps"] == step
    assert not any(name.endswith((".distcp", ".metadata")) for name in files)
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    expected = litconvert.load(run).state_dict()
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    folder = huggingface_hub.snapshot_download("tester/early")
    assert litconvert.load(folder).config == litconvert.load(run).config

    raw = command("push", f"{run}@{step}", "tester/raw", "--raw", "--pipeline")
    assert raw.code == 0, raw.err
    assert "middle of a run, raw weights" in hub.files("tester/raw")["README.md"].decode()


def test_code_in_a_checkpoints_index_is_refused_and_not_run(run: Path, tmp_path: Path) -> None:
    folder, proof = run / "checkpoints" / "step-00000006", tmp_path / "proof"

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {proof}",)

    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    for use in (lambda: litconvert.load(run), lambda: finish(run)):
        with pytest.raises(LitconvertError, match=r"holds code or objects \(posix.system\).*refused and not run"):
            use()
    assert not proof.exists()
    (folder / ".metadata").write_bytes(index)
    litconvert.load(run)


def test_an_index_cannot_change_what_paths_mean(run: Path) -> None:
    """BUILD sets attributes, of a class too: with such a PosixPath.name any path would look like a plain name."""
    folder = run / "checkpoints" / "step-00000006"
    names = [name for name in vars(Path(".").__class__)]
    attack = b"\x80\x04cpathlib\nPosixPath\nN}\x8c\x04evilK\x01s\x86b."
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(LitconvertError, match=r"changes <class 'pathlib.PosixPath'>, not only an index; refused"):
        litconvert.load(run)
    assert list(vars(Path(".").__class__)) == names


@pytest.mark.parametrize("table", ["storage_data", "state_dict_metadata"])
def test_an_index_of_other_shape_is_refused_in_a_sentence(run: Path, table: str) -> None:
    index = run / "checkpoints" / "step-00000006" / ".metadata"
    found: Metadata = pickle.loads(index.read_bytes())
    setattr(found, table, [1])
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(LitconvertError, match="not the index of a checkpoint"):
        litconvert.load(run)
    found.storage_data, found.state_dict_metadata = {"name": 1}, {}
    index.write_bytes(pickle.dumps(found))
    with pytest.raises(LitconvertError, match="not the index of a checkpoint"):
        litconvert.load(run)


@pytest.mark.parametrize("place", ["../outside.distcp", "/etc/passwd", "weights.pt"])
def test_an_index_that_names_files_outside_its_folder_is_refused(run: Path, place: str) -> None:
    folder = run / "checkpoints" / "step-00000006"
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert index.storage_data is not None
    next(iter(index.storage_data.values())).relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(LitconvertError, match=r"which is no part of it; refused"):
        litconvert.load(run)


@pytest.mark.parametrize(
    "damage", ["index cut", "index empty", "index garbage", "tensors cut", "tensors gone", "shape"]
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(run: Path, damage: str) -> None:
    folder = run / "checkpoints" / "step-00000006"
    index, tensors = folder / ".metadata", next(folder.glob("*.distcp"))
    if damage == "index cut":
        index.write_bytes(index.read_bytes()[:-100])
    elif damage == "index empty":
        index.write_bytes(b"")
    elif damage == "index garbage":
        index.write_bytes(b"\x80\x04garbage")
    elif damage == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "tensors gone":
        tensors.unlink()
    else:
        found: Metadata = pickle.loads(index.read_bytes())
        for name, info in found.state_dict_metadata.items():
            if name == "model/x_embedder.proj.bias":
                info.size = torch.Size([1 << 40])  # type: ignore[union-attr]
        index.write_bytes(pickle.dumps(found))
    with pytest.raises(LitconvertError, match=r"step-00000006.*(cannot be read|config.json)"):
        litconvert.load(run)
    # The one before it is whole.
    assert litconvert.load(f"{run}@4") is not None


def test_a_distributed_checkpoint_of_another_program_is_named_as_such(tmp_path: Path) -> None:
    from litconvert.checkpoints.distributed import write_tensors

    folder = tmp_path / "foreign"
    write_tensors(folder, {"weight": torch.zeros(2)}, alone=True)
    (folder / "config.json").write_text('{"_class_name": "LiTTransformer2DModel"}')
    with pytest.raises(LitconvertError, match="a distributed checkpoint of another program"):
        open_source(Source(path=str(folder)))
