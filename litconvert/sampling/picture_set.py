"""Pictures by the thousand: drawn part by part by several processes, and written for the ADM evaluator."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litconvert.common.files import digest_of, read_json, require_space, whole_file, write_whole
from litconvert.common.listener import UNSEEN, Listener, Task
from litconvert.common.outputs import work_paths
from litconvert.errors import LitconvertError
from litconvert.families.sources import OpenSource
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.pipeline_lit import VAE_FACTOR
from litconvert.recipe.schema import Guidance, Recipe
from litconvert.sampling.captions import Captions
from litconvert.sampling.draw import SamplerSettings, draw
from litconvert.sampling.parts import Group, Parts, written
from litconvert.sampling.pictures import to_images, vae_inputs

IMAGES = "images.npy"


@dataclass(frozen=True)
class PictureSet:
    """A model's pictures, each of the noise and the condition of its index.

    Attributes:
        model: on its device.
        conditions: of a range of indices, classes or captions.
        count: of pictures.
        sampler: how they are drawn.
        vae: which decodes them; None: the model's are pixels.
        part_size: pictures that are drawn before they are kept.
    """

    model: LiTTransformer2DModel
    conditions: Callable[[range], Tensor | Captions]
    count: int
    sampler: SamplerSettings
    vae: Any | None
    part_size: int

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.count // self.part_size)

    def indices(self, part: int) -> range:
        """Of the pictures of a part."""
        return range(self.count)[part * self.part_size : (part + 1) * self.part_size]

    def steps(self, parts: Iterable[int]) -> int:
        """How many steps of the sampler these parts take, batch by batch."""
        return sum(self.sampler.steps_of(len(self.indices(part))) for part in parts)

    def images(self, indices: range, task: Task = UNSEEN) -> NDArray[np.uint8]:
        """Pictures (N, H, W, C) of these indices; `task` is advanced with each step of each batch."""
        batches = draw(self.model, self.conditions(indices), self.sampler, first=indices.start, task=task)
        return np.concatenate([to_images(batch, self.vae) for batch in batches])

    def draw(self, parts: Parts, name: str = "sample") -> None:
        """Draw what this process has to, and keep it part by part."""
        own = parts.own
        mine = range(parts.group.process, parts.count, parts.group.processes)
        with parts.task(name, self.steps(mine)) as task:
            task.advance(self.steps(mine) - self.steps(own))
            for part in own:
                images = self.images(self.indices(part), task)
                with parts.make(part) as folder, (folder / IMAGES).open("wb") as file:
                    # Not np.save: where the disk is full its error does not say so.
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
                    file.write(np.ascontiguousarray(images).data)

    @property
    def labels(self) -> Tensor | None:
        """The class of each; None: they are of captions."""
        if isinstance(self.conditions(range(1)), Captions):
            return None  # all of their features at once would fill any memory
        conditions = self.conditions(range(self.count))
        assert isinstance(conditions, Tensor)
        return conditions

    def digest(self, source: OpenSource, conditions: str, recipe: Recipe) -> str:
        """Of all that determines the pictures.

        Args:
            source: the model's file, which is read whole for it.
            conditions: what tells those that are drawn from any others, see `digest_of_conditions`.
            recipe: whose VAE decodes.
        """
        checkpoint, sampler = source.checkpoint, self.sampler
        return digest_of(
            {
                "model": [checkpoint.sha256(), checkpoint.weights, source.config.given],
                "conditions": conditions,
                "count": self.count,
                "guidance": {key: getattr(sampler.guidance, key) for key in Guidance.model_fields},
                "sampler": [sampler.num_timesteps, sampler.seed, sampler.bf16],
                "vae": None if recipe.source.vae is None else vae_inputs(recipe.source.vae),
            }
        )

    def make_parts(self, npz: Path, digest: str, group: Group, listener: Listener) -> Parts:
        """The parts of an NPZ file; those of another size are others."""
        return Parts(npz, [digest_of([digest, self.part_size])], self.parts, group, listener)

    def require_space(self, npz: Path, parts: Parts) -> None:
        """Refuse before the work where a full disk can be foreseen: what is to be drawn, and then all of it joined."""
        config = self.model.config
        pixels = (config.sample_size * (1 if self.vae is None else VAE_FACTOR)) ** 2
        left = sum(len(self.indices(part)) for part in range(parts.count) if not parts.part(part).exists())
        require_space(npz.parent, pixels * ((1 if config.in_channels == 1 else 3) * left + 3 * self.count))


def digest_of_conditions(conditions: Tensor | Captions) -> str:
    """sha256 of classes, or of captions and of what guidance leads away from."""
    if isinstance(conditions, Tensor):
        tensors: list[Tensor | None] = [conditions]
    else:
        tensors = [conditions.features, conditions.mask, conditions.null_features, conditions.null_mask]
    told = hashlib.sha256()
    for tensor in tensors:
        told.update(repr(None if tensor is None else (tensor.dtype, tuple(tensor.shape))).encode())
        if tensor is not None:
            told.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return told.hexdigest()


def in_turn(conditions: Tensor | Captions) -> Callable[[range], Tensor | Captions]:
    """A few classes or captions, each in its turn."""
    return lambda indices: conditions[torch.arange(indices.start, indices.stop) % len(conditions)]


def draw_npz(pictures: PictureSet, npz: Path, digest: str, group: Group, listener: Listener, name: str) -> None:
    """Draw into an NPZ file and keep the digest beside it, unless the file is there already. Every process calls it.

    Args:
        digest: of all that determines the pictures.
        name: of the work, for the listener.

    Raises LitconvertError for a file that is there and was drawn from something else.
    """
    record = npz.with_suffix(".json")
    if npz.exists():
        if record.is_file() and read_json(record).get("digest") == digest:
            if group.process == 0:
                for folder in work_paths(npz, "shards-"):  # ended between joining them and removing them
                    shutil.rmtree(folder)
            return
        raise LitconvertError(
            f"{npz} is there and holds other samples: another model's, of other settings, or of a file that changed; "
            "name another folder, or remove it"
        )
    parts = pictures.make_parts(npz, digest, group, listener)
    with written(npz), parts.begun(lambda: pictures.require_space(npz, parts)):
        pictures.draw(parts, name)

        def join(folders: Sequence[Path]) -> None:
            write_whole(record, json.dumps({"digest": digest}) + "\n")
            save_npz(folders, pictures.labels, npz)

        parts.finish(join)


def first_of_parts(folders: Sequence[Path], count: int) -> NDArray[np.uint8]:
    """The first so many pictures of finished parts; no part behind them is read."""
    found: list[NDArray[np.uint8]] = []
    for some in read_parts(folders):
        found.append(some[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    return np.concatenate(found)


def read_parts(folders: Sequence[Path]) -> Iterator[NDArray[np.uint8]]:
    """The pictures of finished parts (N, H, W, C), mapped from disk one part at a time."""
    for folder in folders:
        yield np.load(folder / IMAGES, mmap_mode="r")


def save_npz(pieces: Sequence[Path] | NDArray[np.uint8], labels: Tensor | None, path: Path) -> None:
    """Write pictures in the ADM evaluator's layout, whole or not at all.

    That is arr_0 (N, H, W, 3) uint8 and, where there are labels, arr_1 (N,). Of parts one at a time is in memory.

    Raises LitconvertError where the disk has no room for them.
    """

    def pictures() -> Iterator[NDArray[np.uint8]]:
        # Never all at once: each is a file that is open.
        return iter([pieces]) if isinstance(pieces, np.ndarray) else read_parts(pieces)

    count, (height, width, channels) = sum(map(len, pictures())), next(pictures()).shape[1:]
    require_space(path.parent, count * height * width * 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for some in pictures():
                file.write(np.ascontiguousarray(some.repeat(3, axis=-1) if channels == 1 else some).data)
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels.numpy())
