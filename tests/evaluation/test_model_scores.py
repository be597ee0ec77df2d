"""`evaluate MODEL`: against its teacher, pictures and statistics, in features of any network, and in agreement."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from litconvert.cli.terminal import data
from litconvert.common.seeds import permutation
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.drawing import AGREEMENT_IMAGES, EvaluationRequest, recipe_for
from litconvert.evaluation.image_sets import ImageSet
from litconvert.evaluation.metrics import Statistics
from litconvert.evaluation.model_scores import compare, evaluate_model
from litconvert.evaluation.networks import Outputs
from litconvert.sampling.captions import Captions, write_embeddings
from tests.helpers.command import command
from tests.helpers.compiled import counted_passes
from tests.helpers.feature_networks import save_clip, save_dinov2
from tests.helpers.pretrained import CHANNELS, Pretrained
from tests.helpers.processes import Forker

FEW = ("evaluate.num_samples=8", "evaluate.steps=2", "evaluate.seeds=[7]", "evaluate.batch_size=4")


@pytest.fixture
def dinov2(tmp_path: Path) -> str:
    """A feature network that is quick."""
    return str(save_dinov2(tmp_path / "dino"))


def means(report: dict[str, Any], name: str) -> dict[str, float]:
    return {key: score["mean"] for key, score in report["models"][name].items()}


def in_agreement(errors: dict[str, Any]) -> list[float]:
    return [one["error"] for one in (*errors["quantities"].values(), *errors["layers"])]


def test_a_student_is_held_against_its_teachers_samples_and_predictions(
    pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    asked = EvaluationRequest(str(pico_student), teacher=str(pico_checkpoint), features=dinov2, overrides=FEW)
    report = evaluate_model(asked)
    assert report["reference"] == {"name": "the teacher's own samples", "count": 8}
    assert report["features"] == {"name": dinov2, "kind": "dinov2"}
    assert list(report["models"]) == ["teacher", "student"]
    assert set(means(report, "student")) == {"frechet_distance", "kernel_distance", "precision", "recall"}
    # The teacher's other samples lie nearer to its own than those of a student that learned nothing.
    teacher, student = (means(report, name)["frechet_distance"] for name in ("teacher", "student"))
    assert 0 < teacher < student
    assert min(in_agreement(report["agreement"]["student"])) > max(in_agreement(report["agreement"]["precision"])) > 0
    assert json.loads(json.dumps(report)) == report
    assert report["settings"]["precision"] == "float32"

    itself = evaluate_model(
        EvaluationRequest(
            str(pico_checkpoint), str(pico_checkpoint), features=dinov2, overrides=FEW, num_attention_heads=2
        )
    )
    assert means(itself, "student") == means(itself, "teacher")
    assert in_agreement(itself["agreement"]["student"]) == [0.0] * 5


def test_the_same_pictures_are_at_no_distance_whichever_way_they_come(
    tmp_path: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    classes = ",".join(str(int(label)) for label in permutation(0, "classes", 4))
    drawn = (
        "--num-attention-heads",
        2,
        "--num",
        8,
        "--seed",
        7,
        "--steps",
        2,
        "--scheduler",
        "ddim",
        "--classes",
        classes,
    )
    npz = tmp_path / "samples.npz"
    sampled = command("sample", pico_checkpoint, *drawn, "--npz", npz, "-o", tmp_path / "sheet.png")
    assert sampled.code == 0, sampled.err
    (tmp_path / "pictures").mkdir()
    with np.load(npz) as arrays:
        for index, image in enumerate(arrays["arr_0"]):
            Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{index:02d}.png")
    places: list[dict[str, Any]] = [{"reference": npz}, {"images": tmp_path / "pictures"}]
    for place in places:
        asked = EvaluationRequest(str(pico_checkpoint), features=dinov2, overrides=FEW, num_attention_heads=2, **place)
        report = evaluate_model(asked)
        scores = means(report, "model")
        assert report["reference"]["count"] == 8
        assert scores["frechet_distance"] == pytest.approx(0, abs=1e-4)
        assert (scores["precision"], scores["recall"]) == (1.0, 1.0)
        assert report["agreement"] is None

    files = evaluate_model(EvaluationRequest(str(npz), images=tmp_path / "pictures", features=dinov2))
    assert means(files, "model")["frechet_distance"] == pytest.approx(0, abs=1e-4)
    other = EvaluationRequest(
        str(pico_checkpoint),
        reference=npz,
        features=dinov2,
        overrides=(*FEW, "evaluate.seeds=[8]"),
        num_attention_heads=2,
    )
    assert means(evaluate_model(other), "model")["frechet_distance"] > 1e-3


def test_stored_statistics_give_the_distance_of_the_pictures_they_are_of(
    tmp_path: Path, pico_checkpoint: Path, pico_student: Path, dinov2: str
) -> None:
    model, stored = str(pico_student), tmp_path / "statistics.npz"
    first = EvaluationRequest(model, str(pico_checkpoint), features=dinov2, overrides=FEW, save_statistics=stored)
    again = EvaluationRequest(model, reference=stored, features=dinov2, overrides=(*FEW, "evaluate.batch_size=3"))
    by_pictures, by_statistics = means(evaluate_model(first), "student"), means(evaluate_model(again), "model")
    assert set(by_statistics) == {"frechet_distance"}  # the others need the pictures
    # Drawn three at a time in place of four: pixels may differ by one of 256.
    assert by_statistics["frechet_distance"] == pytest.approx(by_pictures["frechet_distance"], rel=1e-3)
    with pytest.raises(
        UsageError, match="holds statistics of dinov2, and the features asked for are efficientnet-lite0"
    ):
        evaluate_model(EvaluationRequest(model, reference=stored, overrides=FEW))


def test_more_seeds_give_a_spread_and_efficientnet_knows_classes(pico_checkpoint: Path, pico_student: Path) -> None:
    several = (*FEW, "evaluate.seeds=[7, 8]", "evaluate.num_samples=4")
    report = evaluate_model(EvaluationRequest(str(pico_student), str(pico_checkpoint), overrides=several))
    assert report["features"]["kind"] == "efficientnet-lite0"
    score = report["models"]["student"]["inception_score"]
    assert len(set(score["values"])) == 2
    assert score["standard_deviation"] > 0
    assert all(1 <= value <= 4 for value in score["values"])


def test_captions_are_drawn_and_pictures_scored_by_them(tmp_path: Path, pretrained: Pretrained, dinov2: str) -> None:
    recipe = pretrained.recipe(tmp_path / "recipe.yaml")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe sea\ntwo birds by the house\n")
    model = str(pretrained.folder / "sigma")
    asked: dict[str, Any] = {"teacher": model, "features": dinov2, "recipe": str(recipe), "overrides": FEW}
    clip = str(save_clip(tmp_path / "clip"))
    report = evaluate_model(EvaluationRequest(model, prompts=tmp_path / "prompts.txt", clip=clip, **asked))
    scores = means(report, "student")
    assert 0 <= scores["clip_score"] <= 100
    # What `evaluate` leaves at its default is as in `sample`.
    assert (report["settings"]["scheduler"], report["settings"]["guidance"]) == ("dpm-solver++", 3.0)
    assert max(in_agreement(report["agreement"]["student"])) == 0

    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe a fox")
    with pytest.raises(UsageError, match=r"bad\.txt: not a text file of prompts .*; name one with --prompts$"):
        evaluate_model(EvaluationRequest(model, prompts=tmp_path / "bad.txt", **asked))

    captions = Captions(torch.randn((3, 4, CHANNELS)), torch.ones(3, 4, dtype=torch.int64))
    write_embeddings(captions, tmp_path / "captions.safetensors")
    asked["overrides"] = (*FEW, "evaluate.guidance=1.0")
    encoded = evaluate_model(EvaluationRequest(model, embeddings=tmp_path / "captions.safetensors", **asked))
    assert encoded["settings"]["guidance"] == 1.0
    assert means(encoded, "student")["frechet_distance"] != scores["frechet_distance"]


def test_the_dit_protocol_is_the_papers_and_what_is_set_wins(pico_checkpoint: Path) -> None:
    asked = EvaluationRequest(
        str(pico_checkpoint),
        images=Path("x"),
        protocol="dit",
        overrides=("evaluate.guidance=1.0",),
        num_attention_heads=2,
    )
    settings = recipe_for(asked).evaluate
    assert (settings.scheduler, settings.steps, settings.num_samples, settings.seeds) == ("ddpm", 250, 50_000, (0,))
    assert (settings.guidance, settings.guidance_channels) == (1.0, 3)
    assert recipe_for(EvaluationRequest("asset:dit-digits", images=Path("x"))).evaluate.steps == 8  # its own recipe's


def test_the_command_begins_with_the_result_and_ends_with_the_next_step(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    few = [part for one in FEW for part in ("--set", one)]
    done = command("evaluate", pico_student, "--teacher", pico_checkpoint, "--features", dinov2, *few)
    assert done.code == 0, done.err
    assert done.out.startswith("Fréchet distance of the student to the teacher's own samples: ")
    assert f"in the features of {dinov2}." in done.out.splitlines()[0]
    for header in ("kernel distance", "precision", "noise, bfloat16 alone", "900 to 1000", "8 samples a seed"):
        assert header in done.out
    assert done.err.splitlines()[-1] == f"next: litconvert sample {pico_student} --teacher {pico_checkpoint}"

    alone = command("evaluate", pico_student, "--teacher", pico_checkpoint, "--agreement", *few)
    assert alone.code == 0, alone.err
    assert alone.out.startswith("The student's noise differs from its teacher's by ")
    assert "Fréchet" not in alone.out
    assert f"on {10 * AGREEMENT_IMAGES} inputs of {AGREEMENT_IMAGES} images" in alone.out
    as_json = command("evaluate", pico_student, "--teacher", pico_checkpoint, "--agreement", "--json", *few)
    assert json.loads(as_json.out)["models"] is None


def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    teacher = ("--teacher", pico_checkpoint)
    np.savez(tmp_path / "some.npz", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "prompts.txt").write_text("a fox")
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3))
    npz, prompts = tmp_path / "some.npz", tmp_path / "prompts.txt"
    for words, message in {
        (pico_student, "--features", dinov2): "--features says how a model is held against another",
        (pico_student, *teacher, "--force"): "--force measures a run again",
        (pico_student, *teacher, "--set", "evaluate.num_samples=3"): "3 samples are too few to be measured: draw 4",
        (pico_student, "--images", tmp_path, "--reference", npz): "give one of them",
        (pico_student, "--reference", npz, "--agreement"): "name it with --teacher",
        (pico_student, *teacher, "--agreement", "--features", dinov2): "--agreement alone measures no pictures",
        (pico_student, *teacher, "--prompts", prompts): "is a model of classes and reads no captions",
        (pico_student, *teacher, "--clip", "clip"): "draws classes",
        (npz, *teacher): "holds samples: give --images or --reference",
        (npz, "--reference", npz, "--num-samples", 4): "all of which are measured: leave --set and --num-samples out",
        (npz, "--reference", npz, "--prompts", prompts): "all of which are measured: leave --prompts out",
        (statistics, "--reference", npz): "holds no pictures (arr_0",
        (pico_student, *teacher, "--set", "evaluate.seeds=[]"): "evaluate.seeds",
        (pico_student, *teacher, "--features", "inceptoin"): "did you mean 'inception'",
        (pico_student, *teacher, "--set", "evaluate.scheduler=flow-euler"): "predicts noise",
        (pico_student, "--reference", prompts): "not a whole NPZ file",
        (pico_student, "--geneval", prompts): "--geneval FILE says which prompts are drawn and --out DIR where",
        (pico_student, *teacher, "--geneval", prompts, "--out", tmp_path / "out"): "leave --teacher out",
        (pico_student, "--geneval", prompts, "--out", tmp_path / "out"): "not an entry of GenEval's",
    }.items():
        refused = command("evaluate", *words)
        assert refused.code in (1, 2), words
        assert message in refused.err, words
        assert len(refused.err.splitlines()) <= 2, words
    with pytest.raises(LitconvertError, match="nothing to be held against"):
        evaluate_model(EvaluationRequest(str(pico_student)))


def test_statistics_are_written_over_nothing_but_what_force_lets_go(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    few = [part for one in FEW for part in ("--set", one)]
    reference, notes, stored = tmp_path / "reference.npz", tmp_path / "notes.npz", tmp_path / "new" / "stored.npz"
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    notes.write_text("mine")
    before = reference.read_bytes()
    words = ("evaluate", pico_student, "--reference", reference, "--features", dinov2, *few)
    weights = pico_student / "diffusion_pytorch_model.safetensors"
    for place, message in {
        reference: "is the source itself",
        weights: "is the source itself",
        notes / "statistics.npz": "a part of the path is a file",
    }.items():
        for force in ((), ("--force",)):
            refused = command(*words, "--save-statistics", place, *force)
            assert refused.code in (1, 2)
            if place != weights or force:
                assert message in refused.err
            assert "samples are drawn" not in refused.err
    assert reference.read_bytes() == before
    refused = command(*words, "--save-statistics", notes)
    assert (refused.code, notes.read_text()) == (1, "mine")
    assert "replace it with --force" in refused.err
    for place, force in ((stored, ()), (notes, ("--force",))):
        done = command(*words, "--save-statistics", place, *force)
        assert done.code == 0, done.err
    with np.load(stored) as first, np.load(notes) as second:
        assert set(first) == {"mu", "sigma", "features"}
        assert np.array_equal(first["mu"], second["mu"])


def test_a_bad_reference_is_refused_before_anything_is_drawn(
    tmp_path: Path, pico_checkpoint: Path, dinov2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.new("L", (16, 16), index).save(tmp_path / "pictures" / f"{index}.png")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3), features=np.array("dinov2"))
    asked = EvaluationRequest(str(pico_checkpoint), features=dinov2, overrides=FEW, num_attention_heads=2)
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.evaluation.drawing.draw", None)
        with pytest.raises(UsageError, match="too few pictures to be held against: give 4 at least"):
            evaluate_model(replace(asked, images=tmp_path / "pictures"))
        with pytest.raises(UsageError, match="its statistics are of 3 features, and"):
            evaluate_model(replace(asked, reference=tmp_path / "wide.npz"))
    Image.new("L", (16, 16), 3).save(tmp_path / "pictures" / "3.png")
    assert evaluate_model(replace(asked, images=tmp_path / "pictures"))["reference"]["count"] == 4


def test_a_distance_that_is_no_number_is_refused_and_json_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ImageSet.of("samples", Outputs(torch.arange(8.0).reshape(4, 2)))
    far = ImageSet(
        "far", None, None, Statistics(torch.tensor([1e200, 0.0], dtype=torch.float64), torch.eye(2).double())
    )
    near = ImageSet("near", None, None, Statistics(torch.zeros(2).double(), torch.eye(2).double()))
    with pytest.raises(LitconvertError, match="the frechet distance of samples to far is inf"):
        compare(some, far)
    assert compare(some, near)["frechet_distance"] > 0
    data({"distance": float("nan"), "several": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"distance": None, "several": [1.5, None]}


def test_models_are_compiled_for_as_many_passes_as_are_drawn(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    blocks = (*FEW, "evaluate.seeds=[7, 8]", "evaluate.guidance=1.0", "sampling.compile=blocks")
    asked = EvaluationRequest(str(pico_student), str(pico_checkpoint), features=dinov2, overrides=blocks)
    stored, kept = tmp_path / "stored.npz", tmp_path / "kept"
    with counted_passes("litconvert.evaluation.model_scores") as found:
        evaluate_model(replace(asked, samples=kept, save_statistics=stored))
    teacher, student = found
    # Agreement is measured on ten tenths of the timesteps, in as many batches as it is drawn in; the teacher's in bf16,
    # too.
    of_agreement = 10 * AGREEMENT_IMAGES // 4
    assert [teacher[0], student[0]] == [(3 * 2 + AGREEMENT_IMAGES // 4) * 2, 2 * 2 * 2]
    assert [teacher[1] - teacher[0], student[1] - student[0]] == [2 * of_agreement, of_agreement]
    alone = replace(asked, teacher=None, reference=stored)
    with counted_passes("litconvert.evaluation.model_scores") as found:
        evaluate_model(alone)
    assert found == [[2 * 2 * 2] * 2]
    with counted_passes("litconvert.evaluation.model_scores") as found:
        evaluate_model(replace(asked, agreement_only=True, features=None))
    assert [passes for passes, _ in found] == [AGREEMENT_IMAGES // 4 * 2, 0]
    with counted_passes("litconvert.evaluation.model_scores") as found:
        evaluate_model(replace(asked, samples=kept))  # which are drawn
    assert [passes for passes, _ in found] == [AGREEMENT_IMAGES // 4 * 2, 0]


@pytest.mark.parametrize("bf16", [False, True])
def test_what_drawing_costs_is_told_for_its_precision(
    bf16: bool, pico_student: Path, pico_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[torch.dtype] = []

    def rate(device: str, dtype: torch.dtype) -> float:
        timed.append(dtype)
        return 1e9

    monkeypatch.setattr("litconvert.evaluation.model_scores.rate_of", rate)
    overrides = (*FEW, f"sampling.mixed_precision={'bf16' if bf16 else 'no'}")
    evaluate_model(EvaluationRequest(str(pico_student), str(pico_checkpoint), overrides=overrides, agreement_only=True))
    assert timed == [torch.bfloat16 if bf16 else torch.float32]


def test_samples_that_are_kept_are_drawn_once_and_measured_the_same(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = EvaluationRequest(str(pico_student), str(pico_checkpoint), features=dinov2, overrides=FEW)
    apart = evaluate_model(asked)
    kept = replace(asked, samples=tmp_path / "samples")
    report = evaluate_model(kept)
    for name in ("teacher", "student"):
        assert means(report, name) == pytest.approx(means(apart, name), rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"{name}.{ending}" for name in ("student-7", "teacher-7", "teacher-99") for ending in ("json", "npz")
    ]
    with monkeypatch.context() as patch:
        patch.setattr("litconvert.sampling.picture_set.draw", None)  # nothing is drawn again
        assert evaluate_model(kept)["models"] == report["models"]
    with pytest.raises(LitconvertError, match=r"teacher-99\.npz is there and holds other samples"):
        evaluate_model(replace(kept, overrides=[*FEW, "evaluate.steps=3"]))
    with pytest.raises(UsageError, match="leave it out"):
        evaluate_model(replace(kept, agreement_only=True, features=None))
    before = (tmp_path / "samples" / "student-7.npz").read_bytes()
    with pytest.raises(UsageError, match="is the source itself"):
        evaluate_model(replace(kept, save_statistics=tmp_path / "samples" / "student-7.npz", force=True))
    assert (tmp_path / "samples" / "student-7.npz").read_bytes() == before


@pytest.mark.slow
def test_two_processes_draw_what_is_measured(
    tmp_path: Path, pico_student: Path, pico_checkpoint: Path, dinov2: str
) -> None:
    options = ["--teacher", pico_checkpoint, "--features", dinov2, "--json", "--set", "sampling.shard_size=2"]
    options += [part for one in FEW for part in ("--set", one)]
    command_line = [str(part) for part in ("evaluate", pico_student, *options)]
    alone = json.loads(command(*command_line, "-q").out)
    with Forker() as forker:
        both = [*command_line, "--samples", str(tmp_path / "samples")]
        workers = forker.launch(both, tmp_path / "log", processes=2)
        assert workers.wait() == [0, 0], workers.log.read_text()
        workers = forker.launch(command_line, tmp_path / "refused", processes=2)
        assert workers.wait() == [2, 2]
    said = (tmp_path / "log").read_text()
    report = json.loads(said[said.index("\n{") :])
    assert means(report, "student") == pytest.approx(means(alone, "student"), rel=1e-4)
    assert "--samples DIR" in (tmp_path / "refused").read_text()
