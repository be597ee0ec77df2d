"""The micro-batches of a stage: which samples, noises and timesteps, each a function of its place in the run."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litconvert.common.seeds import generator_of, permutation
from litconvert.data.dataset import LatentDataset, Samples

# No stage of training has this number: what is drawn for it was drawn for no student to learn from.
NO_STAGE = -1


class Schedule:
    """Which samples a stage sees, and when.

    A batch is of one bucket. Within a bucket, samples come epoch by epoch in a new order each time, every one once an
    epoch, and a batch may end one epoch and begin the next. Buckets come in cycles, each as often as its share of the
    samples says (rounded to whole batches, at least one), in a new order each cycle.

    Args:
        sizes: samples in each bucket.
        batch_size: samples a step.
        seed, stage: what the orders are a function of.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, stage: int) -> None:
        self.sizes, self.batch_size, self.seed, self.stage = tuple(sizes), batch_size, seed, stage
        self.turns = [max(1, round(size / batch_size)) for size in sizes]  # batches of each bucket in a cycle
        self._buckets = torch.repeat_interleave(torch.arange(len(self.turns)), torch.tensor(self.turns))

    def at(self, step: int, positions: Sequence[int]) -> tuple[int, list[int], list[int]]:
        """The bucket of a step, and for these positions of its batch the samples' indices in it and their epochs."""
        if len(self.sizes) == 1:
            bucket, turn = 0, step
        else:
            cycle, place = divmod(step, len(self._buckets))
            order = self._buckets[permutation(self.seed, "buckets", len(self._buckets), self.stage, cycle)]
            bucket = int(order[place])
            turn = cycle * self.turns[bucket] + int((order[:place] == bucket).sum())
        indices, epochs = [], []
        for position in positions:
            epoch, place = divmod(turn * self.batch_size + position, self.sizes[bucket])
            order = permutation(self.seed, "order", self.sizes[bucket], self.stage, bucket, epoch)
            indices.append(int(order[place]))
            epochs.append(epoch)
        return bucket, indices, epochs


@dataclass(frozen=True)
class Batch:
    """One micro-batch, drawn once for student and teacher alike.

    Attributes:
        samples: clean x_0 (N, C, H, W) and what they are conditioned on.
        noise: eps (N, C, H, W).
        timestep: (N,) int64; of a model that predicts velocity float32 in [0, 1).
        dropped: (N,) bool, whose condition is dropped.
        bucket: of the data set.
        rows: (N,) int64, a number for each (sample, noise) of the bucket where noise is drawn from a finite set.
    """

    samples: Samples
    noise: Tensor
    timestep: Tensor
    dropped: Tensor
    bucket: int = 0
    rows: Tensor | None = None


def _leave_signals_alone(worker: int) -> None:
    """Launchers signal whole process groups. Readers end with their trainer, which saves first and needs them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class MicroBatches(Dataset[Batch]):
    """The micro-batches of a stage, each a function of (seed, stage, step, position in the step's batch).

    Args:
        data: clean latents.
        seed: the run's.
        stage: the stage's index.
        batch_size: samples a step.
        num_timesteps: timesteps are 0 to num_timesteps - 1; None: continuous in [0, 1), for velocities.
        condition_dropout: share of samples whose condition is dropped.
        flip: mirror half of the samples.
        noise_set: each sample meets so many noises, timesteps and dropped conditions in turn; None: always new ones.
        stratified: a batch has one timestep in each of batch_size equal parts of all timesteps.
        processes, process: how many share a batch, and which this is.
        accumulation: parts that a process computes its share in.
    """

    data: LatentDataset
    seed: int
    stage: int
    batch_size: int
    num_timesteps: int | None
    condition_dropout: float = 0.0
    flip: bool = False
    noise_set: int | None = None
    stratified: bool = False
    processes: int = 1
    process: int = 0
    accumulation: int = 1
    _schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        sizes = [len(bucket) for bucket in self.data.buckets]
        object.__setattr__(self, "_schedule", Schedule(sizes, self.batch_size, self.seed, self.stage))

    def batch(self, step: int, positions: Sequence[int]) -> Batch:
        """The samples at these positions of a step's batch. Neither processes nor interruptions change a draw."""
        bucket, indices, epochs = self._schedule.at(step, positions)
        shape = self.data.buckets[bucket].shape
        noise, timesteps, dropped, flips, posterior, rows = [], [], [], [], [], []
        for position, index, epoch in zip(positions, indices, epochs, strict=True):
            if self.noise_set is None:
                generator = generator_of(self.seed, "sample", self.stage, step, position)
            else:
                turn = epoch % self.noise_set
                rows.append(index * self.noise_set + turn)
                generator = generator_of(self.seed, "noise set", bucket, index, turn)
            noise.append(torch.randn(shape, generator=generator))
            timesteps.append(self._timestep(position, generator))
            dropped.append(torch.rand((), generator=generator) < self.condition_dropout)
            flips.append(torch.rand((), generator=generator) < 0.5)
            if self.data.kind == "moments":
                posterior.append(torch.randn(shape, generator=generator))
        samples = self.data.read(
            bucket,
            indices,
            noise=torch.stack(posterior) if posterior else None,
            flip=torch.stack(flips) if self.flip else None,
        )
        return Batch(
            samples,
            torch.stack(noise),
            torch.stack(timesteps),
            torch.stack(dropped),
            bucket,
            torch.tensor(rows) if rows else None,
        )

    def _timestep(self, position: int, generator: torch.Generator) -> Tensor:
        """Of the sample at this position of a batch, a scalar."""
        if self.num_timesteps is not None and not self.stratified:
            return torch.randint(self.num_timesteps, (), generator=generator)
        share = torch.rand((), generator=generator)
        if self.stratified:
            share = (position + share) / self.batch_size
        if self.num_timesteps is None:
            return share
        # Rounding may take the last part's share to 1.
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def __getitem__(self, index: int) -> Batch:
        """This process's micro-batch: step times accumulation plus the part."""
        step, part = divmod(index, self.accumulation)
        size = self.batch_size // (self.processes * self.accumulation)
        start = (part * self.processes + self.process) * size
        return self.batch(step, range(start, start + size))

    def read_ahead(self, first: int, steps: int, workers: int) -> Iterator[Batch]:
        """This process's micro-batches of the steps from `first` on, read by so many processes ahead of their use."""
        order = range(first * self.accumulation, steps * self.accumulation)
        loader: DataLoader[Batch] = DataLoader(
            self,
            batch_size=None,  # an item is a micro-batch already
            sampler=order,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_signals_alone,
        )
        return iter(loader)
