"""Regression of any value of a pixel as a Lightning module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.depth_metrics import DepthMetrics, ValueMetrics, as_table
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule
from vfmadapt.tasks.windows import whole_image

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class RegressionTask(AdapterTask):
    """Trains a model to give values of pixels, such as canopy height or biomass, and measures it on whole images.

    Args:
        model: backbone, adapter and head.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        loss: "l1", "l2" or "huber", of (value - mean) / std (`ValueSpec`), averaged over the known pixels.
        window: larger images are predicted by windows of this side, in pixels.

    Raises:
        UserError: data without values, an adapter that compares label maps, an unknown loss.
    """

    monitor = "rmse"
    better = "min"

    metrics: ValueMetrics | DepthMetrics

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "regression",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        loss: Literal["l1", "l2", "huber"] = "huber",
        window: int = 512,
    ) -> None:
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        check_model(model, name)
        if loss not in _LOSSES:
            raise UserError(f"task.loss={loss}: allowed are {', '.join(_LOSSES)}")
        self._pixel_loss, self.window = _LOSSES[loss], window
        self.truth_inverse = model.spec.values[0].inverse
        self.metrics = ValueMetrics(tuple(v.name for v in model.spec.values))

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """The model's values."""
        found: Tensor = self.model(image, valid)
        return found

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Loss of a batch, with the adapters' auxiliary losses.

        Raises:
            UserError: the loss is not finite; it names the step.
        """
        found = self.model(batch["image"], batch["valid"])
        return self.complete(self.loss(found, batch["truth"], batch["known"]))

    def loss(self, found: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Loss of values (B, K, H, W) in their units, `known` bool; 0 without a known pixel."""
        parts = []
        for k, value in enumerate(self.model.spec.values):
            pair = [one[:, k].float().masked_fill(~known[:, k], 1.0) for one in (found, truth)]
            here, there = (((p.log() if value.log else p) - value.mean) / value.std for p in pair)
            parts.append(self._pixel_loss(here, there, reduction="none").mul(known[:, k]).sum())
        return torch.stack(parts).sum() / known.sum().clamp_min(1)

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the val split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the test split."""
        self._evaluate(batch, "test")

    def table(self) -> str:
        """The metrics of the test split as text."""
        return as_table(self.results["test"])

    def draw(self, samples: Any, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample: image, truth and prediction in one scale of colours."""
        from vfmadapt.tasks.value_previews import write_value_previews

        return write_value_previews(
            self.model, samples, folder, indices=indices, side=self.window, truth_inverse=self.truth_inverse
        )

    def _start(self) -> None:
        self.metrics.reset()

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        found = whole_image(self.model, batch["image"], batch["valid"], side=self.window)
        loss = self.loss(found, batch["truth"], batch["known"])
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=1, sync_dist=True)
        self.metrics.update(found, batch["truth"], batch["known"])

    def _conclude(self, split: str) -> None:
        self.metrics.sync(self.device)
        result = self.metrics.compute()
        self.results[split] = result
        known = {f"{split}/{k}": v for k, v in result.items() if isinstance(v, float)}
        # a set without a known pixel has no error, but callbacks wait for one
        self.log(f"{split}/{self.monitor}", known.pop(f"{split}/{self.monitor}", float("inf")), prog_bar=True)
        self.log_dict(known)


def check_model(model: AdaptedModel, task: str) -> None:
    """Raise UserError unless a model gives values and its adapters do not compare label maps."""
    if not model.spec.values:
        raise UserError(
            f"task={task} learns values of pixels, {model.spec.name} has "
            f"{len(model.spec.classes)} classes; take data=endo_synthetic, height_synthetic or depth_folder"
        )
    if any(adapter.forwards_per_step > 1 for adapter in model.backbone.active_adapters()):
        raise UserError(f"task={task}: this adapter compares label maps, which the task has none of")
