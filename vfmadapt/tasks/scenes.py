"""Loaders over samples that have more than an image and a mask: depth, labels beside it, neighbouring frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmadapt.errors import UserError
from vfmadapt.tasks.data import CachedSamples, Draw, EpochSampler, draw_generator, few

SPATIAL = ("image", "sources", "depth", "mask", "valid")
"""What a mirror turns; their last two axes are H and W."""

AXES = {"x": -1, "y": -2}


@dataclass(frozen=True)
class _Shrunk:
    """Samples at 1 / `factor` of their size."""

    samples: Any
    factor: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return shrunk(self.samples[index], self.factor)


def shrunk(sample: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """A sample at 1 / `factor` of its size, rounded down: means of images and depths, else every n-th pixel."""
    found = {**sample}
    for key in (key for key in SPATIAL if key in sample):
        value = sample[key]
        if key in ("mask", "valid"):
            found[key] = value[factor // 2 :: factor, factor // 2 :: factor]
            found[key] = found[key][: value.shape[0] // factor, : value.shape[1] // factor]
        else:
            found[key] = F.avg_pool2d(value.reshape(-1, 1, *value.shape[-2:]), factor)
            found[key] = found[key].reshape(*value.shape[:-2], *found[key].shape[-2:])
    if "intrinsics" in sample:  # the corner of the picture is (-0.5, -0.5) in either
        found["intrinsics"] = sample["intrinsics"] / factor
        found["intrinsics"][:2, 2] += 0.5 / factor - 0.5
        found["intrinsics"][2, 2] = 1
    return found


class _Mirrored(Dataset[dict[str, Any]]):
    def __init__(self, samples: CachedSamples, *, flips: Sequence[str], seed: int) -> None:
        self.samples, self.flips, self.seed = samples, flips, seed

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        sample: Any = self.samples[draw.sample]
        rng = draw_generator(self.seed, draw.epoch, draw.turn, sample["id"])
        for axis in self.flips:
            if rng.random() < 0.5:
                sample = mirrored(sample, axis)
        return {**sample}


def mirrored(sample: Mapping[str, Any], axis: str) -> dict[str, Any]:
    """A sample as a mirror shows it, "x": left and right exchanged, "y": top and bottom; its cameras with it."""
    dim = AXES[axis]
    found = {key: value.flip(dim) if key in SPATIAL else value for key, value in sample.items()}
    row = -1 - dim
    if "intrinsics" in sample:
        found["intrinsics"] = sample["intrinsics"].clone()
        found["intrinsics"][row, 2] = sample["image"].shape[dim] - 1 - sample["intrinsics"][row, 2]
    if "poses" in sample:
        mirror = torch.eye(4)
        mirror[row, row] = -1
        found["poses"] = mirror @ sample["poses"] @ mirror
    return found


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of one size -> their tensors stacked, "valid" (B, H, W) also where not given, "id": a list."""
    batch: dict[str, Any] = {k: torch.stack([s[k] for s in samples]) for k, v in samples[0].items() if _stacks(v)}
    whole = torch.ones(len(samples), *batch["image"].shape[-2:], dtype=torch.bool)
    return {"valid": whole, **batch, "id": [s["id"] for s in samples]}


def _stacks(value: object) -> bool:
    return isinstance(value, Tensor)


class SceneData(LightningDataModule):
    """Train, val and test loaders over scenes.

    Args:
        source: gives spec and splits; prepared by the caller.
        needs: keys that every sample must have.
        flips: axes along which half of the training samples are mirrored: "x", "y".
        shrink: use samples, those of val and test too, at 1 / n of their size: less to compute.
        batch_size: samples per step and process.
        steps_per_epoch: batches of an epoch; None: one pass over the data.
        num_workers: processes that load.
        cache_mb: memory for samples already read, in MiB per split and process; 0 for none.
        shots: train on this many samples alone, the first of an order that the seed draws.
        seed: of every draw.

    Raises:
        UserError: an empty split, fewer samples than shots, samples without what is needed, an impossible setting.
    """

    def __init__(
        self,
        source: Any,
        *,
        needs: Sequence[str],
        flips: Sequence[str] = ("x",),
        shrink: int = 1,
        batch_size: int = 8,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        cache_mb: int = 1024,
        shots: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, steps_per_epoch or 1, shrink) < 1 or num_workers < 0 or {*flips} - {*AXES}:
            raise UserError(
                f"loader.batch_size={batch_size} loader.steps_per_epoch={steps_per_epoch} loader.shrink={shrink} "
                f"loader.num_workers={num_workers} loader.flips={[*flips]}: batch_size, steps_per_epoch and shrink are "
                "at least 1, num_workers at least 0, flips among x and y"
            )
        self.source, self.needs, self.flips, self.seed = source, tuple(needs), tuple(flips), seed
        self.batch_size, self.steps_per_epoch, self.num_workers = batch_size, steps_per_epoch, num_workers
        self.shots, self.shrink, self._limit = shots, shrink, cache_mb * 2**20
        self._splits: dict[str, CachedSamples] = {}

    def samples(self, split: str) -> CachedSamples:
        """The samples of "train", "val" or "test", unaugmented."""
        if split not in self._splits:
            samples = self.source.split(split)
            if len(samples) == 0:
                raise UserError(f"{self.source.spec.name}: the {split} split holds no sample; look at data.*")
            if lacking := [key for key in self.needs if key not in samples[0]]:
                raise UserError(
                    f"{self.source.spec.name} gives samples without {' and '.join(lacking)}, which this task learns "
                    "from; for sources take data=endo_synthetic data.pairs=true, for masks data=solids_synthetic"
                )
            if split == "train" and self.shots is not None:
                samples = few(samples, self.shots, seed=self.seed, name=self.source.spec.name)
            self._splits[split] = CachedSamples(_Shrunk(samples, self.shrink), limit=self._limit)  # type: ignore[arg-type]  # samples of more than image and mask
        return self._splits[split]

    def mean_depth(self) -> Tensor:
        """Mean over the training samples of each pixel's depth (H, W): what one knows without looking."""
        samples: Any = self.samples("train")
        return torch.stack([samples[i]["depth"] for i in range(len(samples))]).nanmean(0)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Mirrored samples in the order of (seed, epoch)."""
        samples = self.samples("train")
        draws = None if self.steps_per_epoch is None else self.steps_per_epoch * self.batch_size
        sampler = EpochSampler(len(samples), draws=draws, seed=self.seed)
        return self._loader(
            _Mirrored(samples, flips=self.flips, seed=self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Samples of the val split, one by one."""
        return self._loader(self.samples("val"), batch_size=1)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Samples of the test split, one by one."""
        return self._loader(self.samples("test"), batch_size=1)

    def _loader(self, samples: Any, **settings: Any) -> DataLoader[Any]:
        return DataLoader(
            samples,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed),  # or each start would draw from torch's own
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **settings,
        )
