"""The loader of unlabelled windows; which window comes, and every view of it, is a function of (seed, epoch, draw)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmadapt.contracts import DataSource, DataSpec, Samples, UnlabelledSource
from vfmadapt.errors import UserError
from vfmadapt.model import normalise
from vfmadapt.objectives.objective import Objective
from vfmadapt.tasks.data import CachedSamples, Draw, EpochSampler, draw_generator


class WithoutLabels:
    """The training images of a labelled data set as a source without labels.

    Args:
        source: the data set, prepared by the caller.
        cache_mb: memory for images already read, in MiB.
    """

    def __init__(self, source: DataSource, *, cache_mb: int) -> None:
        self._source = source
        self._samples: Samples = CachedSamples(source.split("train"), limit=cache_mb * 2**20)

    @property
    def spec(self) -> DataSpec:
        """That of the data set."""
        return self._source.spec

    def prepare(self) -> None:
        """Nothing is left to do."""

    def require(self, side: int) -> None:
        """Raise UserError where the first image has a shorter side; a data set's images are alike."""
        height, width = self._samples[0]["valid"].shape
        if min(height, width) < side:
            raise UserError(
                f"{self.spec.name}: images of {height} x {width} pixels are smaller than a crop of {side}; make the "
                "crops of the objective smaller"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def window(self, index: int, side: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random square of an image, see `UnlabelledSource`."""
        sample = self._samples[index]
        height, width = sample["valid"].shape
        side = min(side, height, width)
        top, left = int(draw.integers(height - side + 1)), int(draw.integers(width - side + 1))
        at = (..., slice(top, top + side), slice(left, left + side))
        return sample["image"][at], sample["valid"][at]


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, source: UnlabelledSource, objective: Objective, seed: int) -> None:
        self.source, self.seed = source, seed
        self.sample: Callable[..., dict[str, Tensor]] = objective.sample
        self.side = objective.window
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (source.spec.mean, source.spec.std))

    def square(self, index: int, side: int, draw: np.random.Generator) -> Tensor:
        """A normalised square (C, s, s)."""
        image, valid = self.source.window(index, side, draw)
        return normalise(image[None], valid[None], self.mean, self.std)[0]

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        generator = draw_generator(self.seed, draw.epoch, draw.turn, str(draw.sample))
        return self.sample(self.square(draw.sample, self.side, generator), generator, draw.epoch)


class UnlabelledData(LightningDataModule):
    """Batches of an objective's samples.

    Args:
        source: prepared by the caller.
        objective: says what a sample is.
        batch_size: images per step and process.
        steps_per_epoch: batches of an epoch; with few images each comes several times.
        num_workers: processes that load.
        seed: of every draw.

    Raises:
        UserError: an impossible setting.
    """

    def __init__(
        self,
        source: UnlabelledSource,
        objective: Objective,
        *,
        batch_size: int = 32,
        steps_per_epoch: int = 50,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < objective.least_batch or steps_per_epoch < 1 or num_workers < 0:
            raise UserError(
                f"loader.batch_size={batch_size} steps_per_epoch={steps_per_epoch} num_workers={num_workers}: this "
                f"objective needs {objective.least_batch} images per step and process or more, an epoch at least 1 "
                "step, and num_workers is at least 0"
            )
        self.source, self.seed = source, seed
        self.batch_size, self.steps_per_epoch, self.num_workers = batch_size, steps_per_epoch, num_workers
        self._windows = _Windows(source, objective, seed)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Samples in the order of (seed, epoch); each process of a distributed run takes its share."""
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        draws = self.steps_per_epoch * self.batch_size * world
        return DataLoader(
            self._windows,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(self.source), draws=draws, seed=self.seed),
            generator=torch.Generator().manual_seed(self.seed),  # or its start would draw from torch's own
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )

    def squares(self, count: int, side: int) -> Tensor:
        """Normalised squares (n, C, side, side) of images spread over the source, always the same, to look at."""
        indices = np.unique(np.linspace(0, len(self.source) - 1, count).astype(int))
        found: list[Any] = [self._windows.square(int(i), side, np.random.default_rng(int(i))) for i in indices]
        return torch.stack(found)
