"""Data, a model and its teacher of one VAE and one text encoder, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from litconvert.data.dataset import open_latents
from litconvert.errors import UsageError
from litconvert.recipe.schema import Recipe, Vae
from litconvert.training.same_encoders import check_same_encoders, check_same_teacher, scaling_told
from tests.helpers.images import encoded, png


def folder(path: Path, **config: Any) -> str:
    """A VAE or a T5 as far as its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def recipe(**source: Any) -> Recipe:
    return Recipe.model_validate({"source": source})


@pytest.fixture
def latents(tmp_path: Path, latent_recipe: Path) -> Path:
    """Data of the tiny VAE, whose scaling is 0.5."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(png((9, 0, 0)))
    return encoded(tmp_path / "photos", tmp_path / "data", str(latent_recipe))


def test_latents_of_another_scaling_or_shift_are_refused(tmp_path: Path, latents: Path) -> None:
    data = open_latents(latents)
    check_same_encoders(data, recipe(vae={"path": folder(tmp_path / "same", scaling_factor=0.5)}))
    for config in ({"scaling_factor": 0.13025}, {"scaling_factor": 0.5, "shift_factor": 0.1}, {}):
        with pytest.raises(UsageError, match=r"scaling 0\.5, shift 0\).*other.*source\.vae\.path"):
            check_same_encoders(data, recipe(vae={"path": folder(tmp_path / "other", **config)}))
    # What a recipe says of the model's own VAE counts, too.
    with pytest.raises(UsageError, match=r"scaling 0\.3"):
        check_same_encoders(data, recipe(vae={"path": "nobody/nothing", "scaling_factor": 0.3}))


def test_what_is_not_known_is_not_compared(tmp_path: Path, latents: Path) -> None:
    data = open_latents(latents)
    check_same_encoders(data, recipe())
    check_same_encoders(data, recipe(vae={"path": str(tmp_path / "gone")}))
    record = json.loads((latents / "litconvert-latents.json").read_text())
    record["vae"] = None
    (latents / "litconvert-latents.json").write_text(json.dumps(record))
    check_same_encoders(open_latents(latents), recipe(vae={"path": folder(tmp_path / "other", scaling_factor=0.3)}))


def test_a_scaling_is_what_the_recipe_says_or_else_the_vae(tmp_path: Path) -> None:
    place = folder(tmp_path / "pipeline" / "vae", scaling_factor=0.3, shift_factor=0.2)
    inner = {"path": str(Path(place).parent), "subfolder": "vae"}
    assert scaling_told(Vae(path=place)) == scaling_told(Vae.model_validate(inner)) == (0.3, 0.2)
    assert scaling_told(Vae(path=folder(tmp_path / "plain"))) == (0.18215, 0.0)
    assert scaling_told(Vae(path=str(tmp_path / "gone"))) is None


def test_captions_of_another_t5_are_refused(tmp_path: Path, latents: Path) -> None:
    record = json.loads((latents / "litconvert-latents.json").read_text())
    theirs = folder(tmp_path / "theirs" / "text_encoder", d_model=32, num_layers=2)
    record["text_encoder"] = {"path": str(Path(theirs).parent), "subfolder": "text_encoder", "added": 1}
    (latents / "litconvert-latents.json").write_text(json.dumps(record))
    data = open_latents(latents)
    for name, layers in (("same", 2), ("other", 4)):
        folder(tmp_path / name / "text_encoder", d_model=32, num_layers=layers)
    check_same_encoders(data, recipe(text_encoder={"path": str(tmp_path / "same")}))
    with pytest.raises(UsageError, match=r"theirs \(num_layers 2\).*other \(num_layers 4\)"):
        check_same_encoders(data, recipe(text_encoder={"path": str(tmp_path / "other")}))


def test_a_teacher_of_other_latents_is_refused(tmp_path: Path) -> None:
    mine = recipe(vae={"path": folder(tmp_path / "mine", scaling_factor=0.18215)})
    check_same_teacher(mine, recipe())
    check_same_teacher(recipe(), mine)
    check_same_teacher(mine, recipe(vae={"path": folder(tmp_path / "copy", scaling_factor=0.18215)}))
    for config in ({"scaling_factor": 0.13025}, {"scaling_factor": 0.18215, "shift_factor": 0.06}):
        with pytest.raises(UsageError, match=r"the teacher sees latents of the VAE .*other"):
            check_same_teacher(mine, recipe(vae={"path": folder(tmp_path / "other", **config)}))


def test_a_revision_of_a_repository_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Path(folder(tmp_path / "vae", scaling_factor=None)) / "config.json"
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, revision: str | None) -> Path:
        asked.append((*arguments, revision))
        return place

    monkeypatch.setattr("litconvert.training.same_encoders.download", download)
    assert scaling_told(Vae(path="owner/name@abc", subfolder="vae")) == (0.18215, 0.0)
    assert asked == [("owner/name", "vae/config.json", "abc")]
