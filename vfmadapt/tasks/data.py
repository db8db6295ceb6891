"""Loaders over a data source.

Which samples come, in which order and how augmented, is a function of (seed, epoch, sample id) alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vfmadapt.contracts import DataSource, Sample, Samples
from vfmadapt.errors import UserError
from vfmadapt.tasks.augment import Augment

WEIGHED_SAMPLES = 512
"""Class weights are estimated from at most this many training masks, evenly spaced."""
_SHOTS = crc32(b"shots")  # a stream of random numbers of its own


class Draw(NamedTuple):
    """A sample to be given in an epoch: its index, the epoch, and the how-manieth pass over the data this is."""

    sample: int
    epoch: int
    turn: int


def draw_generator(seed: int, epoch: int, turn: int, sample_id: str) -> np.random.Generator:
    """The generator of one augmentation."""
    return np.random.default_rng([seed, epoch, turn, crc32(sample_id.encode())])


class EpochSampler(Sampler[Draw]):
    """A permutation of the samples per epoch, or more or less of it where an epoch is a fixed number of draws.

    The epoch travels with every index, so worker processes need no state. In a distributed run each process takes
    its share.
    """

    def __init__(self, samples: int, *, draws: int | None = None, seed: int = 0) -> None:
        self.samples, self.draws, self.seed = samples, draws or samples, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; Lightning calls this, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.draws // _processes()[1]

    def __iter__(self) -> Iterator[Draw]:
        rank, world = _processes()
        turns = range(-(-self.draws // self.samples))
        order = (Draw(int(i), self.epoch, turn) for turn in turns for i in self._permutation(turn))
        for position, draw in enumerate(order):
            if position >= len(self) * world:
                return
            if position % world == rank:
                yield draw

    def _permutation(self, turn: int) -> Any:
        return np.random.default_rng([self.seed, self.epoch, turn]).permutation(self.samples)


def _processes() -> tuple[int, int]:
    """Rank and number of the processes of a distributed run; (0, 1) otherwise."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class CachedSamples(Dataset[Sample]):
    """A split whose samples stay in memory after the first read, up to `limit` bytes (of each process)."""

    def __init__(self, samples: Samples, *, limit: int) -> None:
        self.samples, self.limit = samples, limit
        self._kept: dict[int, Sample] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        size = sum(t.nbytes for t in sample.values() if isinstance(t, Tensor))
        if self._bytes + size <= self.limit:
            self._kept[index] = sample
            self._bytes += size
        return sample


@dataclass(frozen=True)
class FewSamples:
    """Some of the samples of a split."""

    samples: Samples
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.chosen[index]]


def few(samples: Samples, shots: int, *, seed: int, name: str) -> FewSamples:
    """The first `shots` training samples of data `name`, in an order that the seed draws; see `drawn`."""
    return FewSamples(samples, drawn(shots, len(samples), seed=seed, name=name))


def drawn(shots: int, total: int, *, seed: int, name: str, what: str = "images") -> tuple[int, ...]:
    """Indices of `shots` of the `total` training samples of data `name`: the first of an order that the seed draws.

    Raises:
        UserError: there are not so many; it calls them `what`.
    """
    if not 1 <= shots <= total:
        raise UserError(
            f"data.shots={shots}: {name} has {total} training {what}; allowed are 1 to {total}, or null for all"
        )
    return tuple(int(i) for i in np.random.default_rng([seed, _SHOTS]).permutation(total)[:shots])


class _Augmented(Dataset[Sample]):
    def __init__(self, samples: CachedSamples, augment: Augment, seed: int) -> None:
        self.samples, self.augment, self.seed = samples, augment, seed

    def __getitem__(self, draw: Draw) -> Sample:
        sample = self.samples[draw.sample]
        return self.augment(sample, draw_generator(self.seed, draw.epoch, draw.turn, sample["id"]))


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples of one size -> {"image" (B, C, H, W), "mask" (B, H, W), "valid" (B, H, W), "id", "spacing": lists}."""
    batch: dict[str, Any] = {k: torch.stack([s[k] for s in samples]) for k in ("image", "mask", "valid")}
    return batch | {"id": [s["id"] for s in samples], "spacing": [s.get("spacing") for s in samples]}


class SegmentationData(LightningDataModule):
    """Train, val and test loaders over a data source; subclasses batch what other samples hold.

    Args:
        source: gives spec and splits; prepared by the caller.
        augment: applied to training samples only; val and test samples come whole, one by one, since their sizes may
        differ. batch_size: training windows per step and process.
        steps_per_epoch: batches of an epoch; None: one pass over the data.
        num_workers: processes that load; 0 is right where the samples fit into the cache.
        cache_mb: memory for samples already read, in MiB per split and process; 0 for none.
        shots: train on this many images alone, the first of an order that the seed draws, so that five are among ten.
        seed: of every draw.

    Raises:
        UserError: a split without a sample, fewer training images than shots, or an impossible setting.
    """

    collate: Callable[[list[Any]], dict[str, Any]] = staticmethod(collate)

    def __init__(
        self,
        source: DataSource,
        *,
        augment: Augment,
        batch_size: int = 8,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        cache_mb: int = 1024,
        shots: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (steps_per_epoch is not None and steps_per_epoch < 1) or num_workers < 0 or seed < 0:
            raise UserError(
                f"batch_size={batch_size} steps_per_epoch={steps_per_epoch} num_workers={num_workers} seed={seed}; "
                "batch_size and steps_per_epoch are at least 1, num_workers and seed at least 0"
            )
        self.source, self.augment, self.seed = source, augment, seed
        self.batch_size, self.steps_per_epoch, self.num_workers = batch_size, steps_per_epoch, num_workers
        self.shots, self._limit = shots, cache_mb * 2**20
        self._splits: dict[str, CachedSamples] = {}

    def samples(self, split: str) -> CachedSamples:
        """The samples of "train", "val" or "test", whole and unaugmented."""
        if split not in self._splits:
            samples = self.source.split(split)
            if len(samples) == 0:
                raise UserError(
                    f"{self.source.spec.name}: the {split} split holds no sample; look at the folder and data.*"
                )
            shots = self.shots if split == "train" else None
            chosen = samples if shots is None else few(samples, shots, seed=self.seed, name=self.source.spec.name)
            self._splits[split] = CachedSamples(chosen, limit=self._limit)
        return self._splits[split]

    def class_pixels(self) -> list[int]:
        """Labelled pixels per class in (at most `WEIGHED_SAMPLES` of) the training split."""
        samples, classes = self.samples("train"), len(self.source.spec.classes)
        chosen = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), WEIGHED_SAMPLES)).astype(int))
        total = torch.zeros(classes, dtype=torch.int64)
        for index in chosen:
            mask = samples[int(index)]["mask"]
            total += torch.bincount(mask[mask != self.source.spec.ignore_index], minlength=classes)
        return [int(n) for n in total]

    def train_dataloader(self) -> DataLoader[Sample]:
        """Augmented windows in the order of (seed, epoch)."""
        samples = self.samples("train")
        draws = None if self.steps_per_epoch is None else self.steps_per_epoch * self.batch_size * _processes()[1]
        sampler = EpochSampler(len(samples), draws=draws, seed=self.seed)
        return self._loader(
            _Augmented(samples, self.augment, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Whole images of the val split."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Whole images of the test split."""
        return self._whole("test")

    def _whole(self, split: str) -> DataLoader[Sample]:
        samples = self.samples(split)
        rank, world = _processes()
        if len(samples) < world:
            raise UserError(
                f"{self.source.spec.name}: the {split} split holds {len(samples)} images for {world} processes; "
                "lower trainer.devices"
            )
        return self._loader(samples, batch_size=1, sampler=range(rank, len(samples), world))

    def _loader(self, samples: Dataset[Sample], **settings: Any) -> DataLoader[Sample]:
        return DataLoader(
            samples,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(
                self.seed
            ),  # or each start of the loader would draw from torch's own
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **settings,
        )
