"""The ranking of a feature network: what is worse is farther, and a network that is blind is told of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import feature_ranking
from benchmarks.feature_ranking import blurred, damaged, measured, noised, photographs, wrong_pairs
from litconvert.evaluation.networks import FeatureNetwork, Outputs


def looking(offset: float) -> FeatureNetwork:
    """How bright and how rough a picture is; with an offset on its own noise instead, so that it sees nothing."""

    def extract(images: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(images).double().flatten(1)
        rough = torch.from_numpy(images).double().diff(dim=2).flatten(1).std(1)
        return Outputs(torch.stack([pixels.mean(1), rough], 1) * (1 - offset) + offset)

    return FeatureNetwork("looking", "looking", extract)


def test_what_is_worse_is_farther_and_what_is_not_is_named() -> None:
    pytest.importorskip("sklearn")
    chains = damaged(photographs(12, 0), photographs(12, 1))
    assert list(chains["blur"])[:2] == list(chains["noise"])[:2] == ["reference", "clean"]
    noise = measured(chains["noise"], looking(0))
    assert noise["frechet_distance_wrong"] == []
    assert list(noise["sets"])[-1] == "noise alone"
    blind = measured(chains["noise"], looking(1))
    assert len(blind["frechet_distance_wrong"]) == len(noise["sets"]) - 1
    rows = {"a": {"x": 1.0}, "b": {"x": 3.0}, "c": {"x": 2.0}}
    assert wrong_pairs(rows, "x") == [["b", "c"]]


def test_pictures_are_damaged_as_they_are_called() -> None:
    pictures = np.full((3, 8, 8, 3), 128, dtype=np.uint8)
    pictures[:, 4:] = 0
    assert np.abs(blurred(pictures, 1.0).astype(int) - pictures).max() > 10
    assert 6 < (noised(pictures, 8)[:, :4].astype(float) - 128).std() < 10


def test_the_committed_figures_are_of_the_default_network() -> None:
    stored = json.loads(feature_ranking.RESULTS.read_text())
    named = {key for key in stored["chains"] if key.endswith("in efficientnet-lite0")}
    assert {"photographs, blur, in efficientnet-lite0", "digits, steps, in efficientnet-lite0"} <= named
    for key in named:
        chain = stored["chains"][key]
        assert wrong_pairs(chain["sets"], "frechet_distance") == chain["frechet_distance_wrong"]


def test_the_script_writes_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(feature_ranking, "FONT", tmp_path / "none")
    monkeypatch.setattr(feature_ranking, "STEPS", (2, 1))
    monkeypatch.setattr(feature_ranking, "MANY", 3)
    monkeypatch.setattr(feature_ranking, "open_network", lambda name: looking(0))
    feature_ranking.main(["--count", "10", "--out", str(tmp_path / "ranking.json")])
    written = json.loads((tmp_path / "ranking.json").read_text())
    assert written["count"] == 10
    assert list(written["chains"]["digits, steps, in looking"]["sets"]) == ["2 steps", "1 steps"]
