"""What samples are held against: pictures of a folder or an NPZ file, batch by batch, or stored statistics of some."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.files import whole_file
from litconvert.common.listener import UNSEEN, Task
from litconvert.encoding.image_sources import files_in
from litconvert.encoding.images import ImageSample, is_image_name, pillow_unbounded, read_image
from litconvert.errors import LitconvertError, UsageError
from litconvert.evaluation.metrics import NEIGHBOURS, Moments, Statistics
from litconvert.evaluation.networks import FeatureNetwork, Outputs

# Pictures at a time; it changes rounding alone.
BATCH_SIZE = 64
Pictures = Iterator[NDArray[np.uint8]]
# The names of statistics in an NPZ file: the features', and for sFID the spatial ones'.
STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class ImageSet:
    """A set of pictures as a network sees it, or what is known of one.

    Attributes:
        name: what it is.
        count: pictures; None: of stored statistics nobody knows.
        outputs: of each picture; None: there are stored statistics alone.
        pooled, spatial: of its features; `spatial` of Inception alone.
    """

    name: str
    count: int | None
    outputs: Outputs | None
    pooled: Statistics
    spatial: Statistics | None = None

    @classmethod
    def of(cls, name: str, outputs: Outputs) -> "ImageSet":
        """Of what a network made of all pictures."""
        spatial = None if outputs.spatial is None else Moments.of(outputs.spatial).statistics
        return cls(name, len(outputs.features), outputs, Moments.of(outputs.features).statistics, spatial)


def seen(pictures: Iterable[NDArray[np.uint8]], network: FeatureNetwork, task: Task = UNSEEN) -> Outputs:
    """What a network makes of pictures (N, H, W, C), uint8, which come in batches; `task` advances with each."""
    parts = []
    for batch in pictures:
        parts.append(network(batch))
        task.advance(len(batch))
    return Outputs.joined(parts)


def folder_of_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and those in it, but hidden ones, sorted.

    Raises UsageError where there is none, and for a folder that is in itself by a link.
    """
    found = [path for path in files_in(folder) if is_image_name(path.name)]
    if not found:
        raise UsageError(f"{folder}: holds no picture; name a folder of them, or an NPZ file with --reference")
    return sorted(found)


def read_pictures(paths: Iterable[Path], side: int, mode: str) -> Pictures:
    """Pictures of any size, each cropped to a square of `side` pixels as training images are.

    Args:
        mode: `RGB`, or `L` for grey ones.

    Raises LitconvertError for one that cannot be read.
    """
    batch: list[NDArray[np.uint8]] = []
    for path in paths:
        with pillow_unbounded():
            image = read_image(ImageSample(str(path), path, -1), mode, [(side, side)], otherwise="")
        batch.append(image.transpose(1, 2, 0))
        if len(batch) == BATCH_SIZE:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


@dataclass(frozen=True)
class NpzFile:
    """An NPZ file of the ADM evaluator's layout: arr_0 (N, H, W, 3) uint8, or statistics mu, sigma, mu_s, sigma_s."""

    path: Path

    def arrays(self) -> set[str]:
        """The names in it. Raises LitconvertError for a file that is none."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise LitconvertError(f"{self.path}: not a whole NPZ file ({error}); download or write it again") from error

    def pictures(self) -> Pictures:
        """Piece by piece: 50,000 of 256 pixels are 10 GB. Raises UsageError for an array of anything else."""
        with _opened_pictures(self.path) as (file, count, size):
            length = int(np.prod(size))
            for start in range(0, count, BATCH_SIZE):
                some = min(BATCH_SIZE, count - start)
                data = file.read(some * length)
                if len(data) != some * length:
                    raise LitconvertError(f"{self.path}: ends after {start:,} of {count:,} pictures; get it again")
                yield np.frombuffer(data, dtype=np.uint8).reshape(some, *size).copy()

    def statistics(self, of: str) -> Statistics | None:
        """Of `pooled` or `spatial` features; None where there are none.

        Raises LitconvertError for what is no mean and covariance.
        """
        mean, covariance = STATISTICS[of]
        if not {mean, covariance} <= self.arrays():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                stored = arrays[mean], arrays[covariance]
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise LitconvertError(f"{self.path}: its {mean} and {covariance} cannot be read; get it again") from error
        if any(array.dtype.kind not in "fiu" for array in stored):
            raise LitconvertError(
                f"{self.path}: {mean} {stored[0].dtype} and {covariance} {stored[1].dtype} are no real numbers; get it "
                "again"
            )
        values = [torch.from_numpy(array.astype(np.float64)) for array in stored]
        return self._checked(values[0], values[1], (mean, covariance))

    def _checked(self, mean: Tensor, covariance: Tensor, names: tuple[str, str]) -> Statistics:
        if mean.dim() != 1 or covariance.shape != (len(mean),) * 2:
            raise LitconvertError(
                f"{self.path}: {names[0]} {tuple(mean.shape)} and {names[1]} {tuple(covariance.shape)} are no mean (D,)"
                " and covariance (D, D)"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise LitconvertError(f"{self.path}: {names[0]} or {names[1]} has NaN or infinite values; get it again")
        return Statistics(mean, (covariance + covariance.T) / 2)

    def features(self) -> str | None:
        """The network of the statistics, where litconvert wrote them; others call other things so."""
        if "features" not in self.arrays():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                name = arrays["features"]
        except ValueError:  # objects
            return None
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise LitconvertError(f"{self.path}: not a whole NPZ file ({error}); download or write it again") from error
        return str(name) if name.ndim == 0 and name.dtype.kind == "U" else None


@contextmanager
def _opened_pictures(path: Path) -> Iterator[tuple[IO[bytes], int, tuple[int, ...]]]:
    """The bytes of arr_0 behind its header, the number of pictures, and height, width and channels."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8 or fortran:
                raise UsageError(
                    f"{path}: arr_0 is {dtype} {shape}, and pictures are uint8 (N, H, W, 3), as the ADM evaluator has "
                    "them"
                )
            yield file, int(shape[0]), tuple(int(side) for side in shape[1:])
    except KeyError as error:
        raise UsageError(
            f"{path}: holds no pictures (arr_0, uint8 (N, H, W, 3), as the ADM evaluator has them); give one that does"
        ) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise LitconvertError(f"{path}: its pictures cannot be read ({error}); download or write it again") from error


def read_npz(path: Path, network: FeatureNetwork, task: Task = UNSEEN) -> ImageSet:
    """A reference batch, as a network sees it. Statistics that are stored with it count before those of its pictures.

    ADM's own are of more pictures than the file holds, and of Inception; for another network the pictures are used.

    Raises UsageError for a file of neither, and for statistics of another network without pictures.
    """
    file = NpzFile(path)
    arrays = file.arrays()
    kind = file.features() or ("inception" if "mu" in arrays else None)
    stored = kind == network.kind
    pooled, spatial = (file.statistics(of) if stored else None for of in STATISTICS)
    if "arr_0" not in arrays:
        if pooled is None:
            what = f"statistics of {kind}" if kind else "neither pictures (arr_0) nor statistics (mu, sigma)"
            raise UsageError(f"{path}: holds {what}, and the features asked for are {network.name} (--features)")
        return ImageSet(path.name, None, None, pooled, spatial)
    found = ImageSet.of(path.name, seen(file.pictures(), network, task))
    return ImageSet(path.name, found.count, found.outputs, pooled or found.pooled, spatial or found.spatial)


def check_reference(reference: ImageSet, network: FeatureNetwork, shape: tuple[int, int, int]) -> None:
    """Raise UsageError for a reference that samples (H, W, C) cannot be held against, before they are drawn: too few
    pictures, and statistics of another network."""
    if reference.count is not None and reference.count <= NEIGHBOURS:
        raise UsageError(f"{reference.name}: too few pictures to be held against: give {NEIGHBOURS + 1} at least")
    seen = network(np.zeros((1, *shape), dtype=np.uint8))
    for stored, made in ((reference.pooled, seen.features), (reference.spatial, seen.spatial)):
        if stored is not None and made is not None and len(stored.mean) != made.shape[1]:
            raise UsageError(
                f"{reference.name}: its statistics are of {len(stored.mean):,} features, and {network.name} makes "
                f"{made.shape[1]:,}: they are of different networks (--features)"
            )


def write_statistics(images: ImageSet, network: FeatureNetwork, path: Path) -> None:
    """Write a set's statistics as `read_npz` and the ADM evaluator take them, with the network's kind."""
    arrays: dict[str, Any] = {"mu": images.pooled.mean.numpy(), "sigma": images.pooled.covariance.numpy()}
    if images.spatial is not None:
        arrays |= {"mu_s": images.spatial.mean.numpy(), "sigma_s": images.spatial.covariance.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, features=np.array(network.kind))
