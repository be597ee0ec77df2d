"""The teacher's outputs for a finite set of noises, computed once and kept on disk."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from litconvert.common.files import take_room


class TeacherOutputs:
    """A file of outputs for each bucket, float32, one row for each (sample, noise), and which rows are there.

    Processes of one run share the folder: each writes the rows of its own part of a batch. Which rows are there is
    written down with each checkpoint, after the rows themselves: what a kill leaves in doubt is computed again.

    Args:
        folder: created when it is not there.
        sizes: for each bucket, rows and the shape of one.
    """

    def __init__(self, folder: Path, sizes: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._marks, self._fresh = [], [], []
        for bucket, (count, shape) in enumerate(sizes):
            self._rows.append(_open(folder / f"{bucket}.float32", np.float32, (count, *shape)))
            self._marks.append(_open(folder / f"{bucket}.marks", np.uint8, (count,)))
            self._fresh.append(np.zeros(count, dtype=bool))

    def get(self, bucket: int, rows: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The outputs (N, ...) of these rows (N,), computed where one of them is not there yet."""
        index = rows.numpy()
        stored, fresh = self._rows[bucket], self._fresh[bucket]
        if bool((fresh[index] | (self._marks[bucket][index] > 0)).all()):
            return torch.from_numpy(stored[index])
        output = compute()
        values = output.float().cpu()
        stored[index] = values.numpy()
        fresh[index] = values.flatten(1).isfinite().all(1).numpy()  # what went wrong once is computed again
        return output

    def keep(self) -> None:
        """Write down which rows are there, after the rows."""
        for rows, marks, fresh in zip(self._rows, self._marks, self._fresh, strict=True):
            if fresh.any():
                rows.flush()
                marks[fresh] = 1
                marks.flush()
                fresh[:] = False


def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
    """A file as an array, zeros where it is new. Its space is taken at once: a mapped file that meets a full disk later
    would end the process without a word."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        take_room(descriptor, size)
        if os.fstat(descriptor).st_size < size:  # of a file system that takes no room
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
