"""Several models on one raster: it is read once, each tile goes through all models, each has a map of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vfmadapt.errors import UserError
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.io import RasterInfo
from vfmadapt.raster.job import Job
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.planning import Settings, make_plan


@runtime_checkable
class Segmenters(Protocol):
    """What is needed of several models (an nn.Module): `vfmadapt.load_many` gives it."""

    def names(self) -> tuple[str, ...]:
        """The models."""
        ...

    def parts(self, name: str) -> Any:
        """An nn.Module that holds the tensors of a model, and its `spec`; not called."""
        ...

    def in_turn(self, image: Tensor, valid: Tensor) -> list[Tensor]:
        """Image float32 (B, C, H, W) in sensor units, valid bool (B, H, W) -> logits (B, K, H, W) of each model."""
        ...


class _Together(nn.Module):
    """The logits of all models, one after another."""

    def __init__(self, models: Any) -> None:
        super().__init__()
        self.models, self.spec = models, models.parts(models.names()[0]).spec

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        return torch.cat(self.models.in_turn(image, valid), dim=1)


def job_of_many(
    models: Segmenters, source: str, output: Path, device: torch.device, settings: Settings
) -> tuple[Job, RasterInfo]:
    """A job for the maps `output_of` all models; a map's plan is that of its model alone.

    Raises:
        UserError: as `make_plan`; models that want other bands, or to be compiled.
    """
    if settings.compile:
        raise UserError("compile=true goes with one adapter file; leave it out, or map with one after another")
    plans: dict[str, Plan] = {}
    for name in models.names():
        plans[name], info = make_plan(models.parts(name), source, device, settings)
    (first, common), *others = plans.items()
    for name, plan in others:
        if (plan.bands, plan.mix) != (common.bands, common.mix):
            raise UserError(
                f"{first} and {name} want other bands of {source}, or other units: they cannot share what is read; "
                "map with one after another"
            )
    outputs = sum(plan.outputs for plan in plans.values())
    common = replace(common, classes=(("", (0, 0, 0)),) * outputs, values=(), layers=())
    maps = [(plan, BlockFolder(output_of(output, name))) for name, plan in plans.items()]
    return Job(common, maps[0][1], _Together(models), device, maps), info


def output_of(output: Path, name: str) -> Path:
    """The map of one of several models, beside where that of a single one would be."""
    return output.with_name(f"{output.stem}_{name}{output.suffix}")
