"""What samples are held against: folders, reference batches of the ADM evaluator, stored statistics."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation import image_sets
from litconvert.evaluation.image_sets import (
    ImageSet,
    NpzFile,
    check_reference,
    folder_of_pictures,
    read_npz,
    read_pictures,
    seen,
    write_statistics,
)
from litconvert.evaluation.metrics import Statistics, frechet_distance
from litconvert.evaluation.networks import FeatureNetwork, Outputs
from litconvert.sampling.picture_set import save_npz


def pictures(count: int, side: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def network(kind: str = "corner", *, spatial: bool = False) -> FeatureNetwork:
    """The first three rows of pixels are its features."""

    def extract(images: NDArray[np.uint8]) -> Outputs:
        flat = torch.from_numpy(images).float().flatten(1)
        return Outputs(flat[:, :5], spatial=flat[:, 5:9] if spatial else None)

    return FeatureNetwork(kind, kind, extract)


def numpy_statistics(values: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = values.astype(np.float64)
    return rows.mean(0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize("compressed", [False, True])
def test_pictures_of_a_reference_batch_come_piece_by_piece(
    compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sets, "BATCH_SIZE", 4)
    images = pictures(11)
    path = tmp_path / "batch.npz"
    (np.savez_compressed if compressed else np.savez)(path, images, np.arange(11))
    batches = list(NpzFile(path).pictures())
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert np.array_equal(np.concatenate(batches), images)
    mean, covariance = numpy_statistics(images.reshape(11, -1)[:, :5])
    found = read_npz(path, network())
    assert found.count == 11
    assert found.outputs is not None
    assert found.spatial is None
    np.testing.assert_allclose(found.pooled.mean, mean)
    np.testing.assert_allclose(found.pooled.covariance, covariance)


def test_what_save_npz_writes_is_read_back(tmp_path: Path) -> None:
    images = pictures(5)
    save_npz(images, torch.arange(5), tmp_path / "samples.npz")
    assert np.array_equal(next(NpzFile(tmp_path / "samples.npz").pictures()), images)
    save_npz(images[..., :1], None, tmp_path / "grey.npz")
    assert np.array_equal(next(NpzFile(tmp_path / "grey.npz").pictures()), images[..., :1].repeat(3, axis=-1))


def test_adms_statistics_count_for_inception_and_its_pictures_for_any_other_network(tmp_path: Path) -> None:
    images, mean = pictures(6), np.arange(5.0)
    covariance, spatial = np.diag(np.arange(1.0, 6.0)), np.eye(4)
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=images, mu=mean, sigma=covariance, mu_s=mean[:4], sigma_s=spatial)
    theirs = read_npz(path, network("inception", spatial=True))
    assert np.array_equal(theirs.pooled.covariance, covariance)
    assert theirs.spatial is not None
    assert np.array_equal(theirs.spatial.mean, mean[:4])
    assert theirs.outputs is not None
    assert theirs.outputs.features.shape == (6, 5)
    own = read_npz(path, network())
    np.testing.assert_allclose(own.pooled.mean, numpy_statistics(images.reshape(6, -1)[:, :5])[0])

    np.savez(path, mu=mean, sigma=covariance)
    alone = read_npz(path, network("inception"))
    assert (alone.count, alone.outputs, alone.spatial) == (None, None, None)
    assert frechet_distance(alone.pooled, Statistics(torch.arange(5.0).double() + 1, alone.pooled.covariance)) == (
        pytest.approx(5)
    )
    with pytest.raises(UsageError, match="holds statistics of inception, and the features asked for are corner"):
        read_npz(path, network())


def test_statistics_that_are_written_are_read_for_the_same_network_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "statistics.npz"
    images = ImageSet.of("some", seen([pictures(4), pictures(3, seed=1)], network(spatial=True)))
    write_statistics(images, network(), path)
    found = read_npz(path, network())
    for mine, theirs in ((found.pooled, images.pooled), (found.spatial, images.spatial)):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.covariance, theirs.covariance)
    with pytest.raises(UsageError, match="statistics of corner, and the features asked for are other"):
        read_npz(path, network("other"))


@pytest.mark.parametrize("features", [np.array([{}], dtype=object), np.arange(9.0), np.array(["corner"])])
def test_what_others_call_features_is_no_network(features: NDArray[Any], tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.arange(5.0), sigma=np.eye(5), features=features)
    assert NpzFile(path).features() is None
    assert read_npz(path, network("inception")).count is None
    with pytest.raises(UsageError, match="holds statistics of inception, and"):
        read_npz(path, network())


def test_a_reference_that_samples_cannot_be_held_against_is_known_before_they_are_drawn(tmp_path: Path) -> None:
    few, enough = (ImageSet.of("pictures", seen([pictures(count)], network())) for count in (3, 4))
    check_reference(enough, network(), (8, 8, 3))
    with pytest.raises(UsageError, match="pictures: too few pictures to be held against: give 4 at least"):
        check_reference(few, network(), (8, 8, 3))
    for width, spatial in ((5, 4), (6, 4), (5, 3)):
        np.savez(
            tmp_path / "some.npz",
            mu=np.zeros(width),
            sigma=np.eye(width),
            mu_s=np.zeros(spatial),
            sigma_s=np.eye(spatial),
        )
        inception = network("inception", spatial=True)
        stored = read_npz(tmp_path / "some.npz", inception)
        if (width, spatial) == (5, 4):
            check_reference(stored, inception, (8, 8, 3))
        else:
            with pytest.raises(UsageError, match="they are of different networks"):
                check_reference(stored, inception, (8, 8, 3))


def test_a_folder_is_read_in_order_cropped_as_training_images_are(tmp_path: Path) -> None:
    for index, name in enumerate(["b/2.png", "a/10.png", "a/1.webp", "top.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (index * 10, 0, 0)).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    paths = folder_of_pictures(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["a/1.webp", "a/10.png", "b/2.png", "top.png"]
    (batch,) = read_pictures(paths, 8, "RGB")
    assert batch.shape == (4, 8, 8, 3)
    assert batch[:, 0, 0, 0].tolist() == [20, 10, 0, 30]
    (grey,) = read_pictures(paths, 8, "L")
    assert grey.shape == (4, 8, 8, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no picture"):
        folder_of_pictures(tmp_path / "empty")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(LitconvertError, match=r"not a whole image .*; replace or remove it$"):
        list(read_pictures(folder_of_pictures(tmp_path), 8, "RGB"))


def test_hidden_pictures_do_not_count_and_a_folder_in_itself_is_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/.2.png", ".thumbs/1.png", "a/.cache/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert folder_of_pictures(tmp_path) == [tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"]
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="a link to a folder that it is in itself"):
        folder_of_pictures(tmp_path)


def test_a_picture_may_be_larger_than_pillow_lets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (80, 80), (9, 0, 0)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as if the image had 200 million
    (batch,) = read_pictures(folder_of_pictures(tmp_path), 8, "RGB")
    assert (batch == [9, 0, 0]).all()
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("nothing")
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3), dtype=np.float32))
    np.savez(tmp_path / "first.npz", np.zeros((2, 3, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "others.npz", other=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "complex.npz", mu=np.zeros(3, dtype=complex), sigma=np.eye(3))
    np.savez(tmp_path / "nan.npz", mu=np.array([0, np.nan]), sigma=np.eye(2))
    whole = io.BytesIO()
    np.save(whole, pictures(5))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole.getvalue()[:-200])
    for name, message in {
        "text.npz": "not a whole NPZ file",
        "float.npz": r"arr_0 is float32 \(2, 8, 8, 3\), and pictures are uint8",
        "first.npz": r"arr_0 is uint8 \(2, 3, 8, 8\)",
        "others.npz": "neither pictures",
        "odd.npz": r"sigma \(3, 2\) are no mean",
        "objects.npz": "mu and sigma cannot be read",
        "short.npz": "ends after 0 of 5 pictures",
        "complex.npz": "mu complex128 and sigma float64 are no real numbers",
        "nan.npz": "mu or sigma has NaN or infinite values",
    }.items():
        with pytest.raises(LitconvertError, match=message):
            read_npz(tmp_path / name, network("inception"))
