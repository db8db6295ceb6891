"""Semantic segmentation as a Lightning module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vfmadapt.contracts import DataSpec, Samples
from vfmadapt.errors import UserError
from vfmadapt.losses import SegmentationLoss, class_weights
from vfmadapt.metrics import SegmentationMetrics, as_table
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.previews import write_previews
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule
from vfmadapt.tasks.windows import whole_image


class SegmentationTask(AdapterTask):
    """Trains a model to label pixels, and measures it on whole images.

    All settings are keyword-only and appear under `task.` on the command line.

    Args:
        model: backbone, adapter and head.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice loss.
        class_weights: of the cross-entropy: a number per class, "auto" (from the training masks) or None.
        boundary_tolerance: of the boundary F1, in pixels.
        window: larger images are predicted by windows of this side, in pixels.

    Raises:
        UserError: fewer than two classes, or a setting out of its range.
    """

    metrics_class: type[SegmentationMetrics] = SegmentationMetrics

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "segmentation",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weights: Sequence[float] | Literal["auto"] | None = "auto",
        boundary_tolerance: float = 2.0,
        window: int = 512,
    ) -> None:
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        check_classes(model.spec)
        _check(class_weights, len(model.spec.classes))
        self.window = window
        self.class_weights = class_weights
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.loss = self._loss(None if class_weights == "auto" else class_weights)
        names = [c.name for c in model.spec.classes]
        ignored = model.spec.ignore_index
        lines = [c.name for c in model.spec.classes if c.line]
        self.metrics = self.metrics_class(names, ignore_index=ignored, tolerance=boundary_tolerance, lines=lines)

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.model(image, valid)
        return logits

    def setup(self, stage: str) -> None:
        """Take the class weights from the training masks where they are "auto"."""
        if stage == "fit" and self.class_weights == "auto":
            self.loss = self._loss(class_weights(self._data().class_pixels()))

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Loss of a batch, with the head's and the adapters' auxiliary losses; a second forward where they compare two.

        Raises:
            UserError: the loss is not finite; it names the step.
        """
        mask = batch["mask"]
        features = self.model.features(batch["image"], batch["valid"])
        size = (mask.shape[-2], mask.shape[-1])
        if (parts := self.model.head.loss(features, mask, ignore_index=self.model.spec.ignore_index)) is None:
            logits, *coarser = self.model.head.supervised(features, size)
            parts = self.loss(logits, mask)
            loss = torch.stack([parts["loss"], *(self.loss(c, mask)["loss"] for c in coarser)]).sum()
        else:
            loss = parts["loss"]
        if comparing := [a for a in self.model.backbone.active_adapters() if a.forwards_per_step == 2]:
            again = self.model(batch["image"], batch["valid"])
            first = self.model.head(features, size)
            consistency = torch.stack([a.consistency(first, again) for a in comparing]).sum()
            loss = loss + consistency
            self.log("train/consistency", consistency.detach())
        self.log_dict({f"train/{name}": part for name, part in parts.items() if name != "loss"})
        return self.complete(loss)

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the val split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the test split."""
        self._evaluate(batch, "test")

    def table(self) -> str:
        """The metrics of the test split as text."""
        return as_table(self.results["test"])

    def draw(self, samples: Samples, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample: image, truth and prediction."""
        return write_previews(self.model, samples, folder, indices=indices, side=self.window)

    def _start(self) -> None:
        self.metrics.reset()

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        logits = whole_image(self.model, batch["image"], batch["valid"], side=self.window)
        loss = self.loss(logits, batch["mask"])["loss"]
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=1, sync_dist=True)
        self.count(logits, batch)

    def count(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Count the logits (B, K, H, W) of a batch of whole images."""
        self.metrics.update(logits, batch["mask"])

    def _conclude(self, split: str) -> None:
        self.metrics.sync(self.device)
        result = self.metrics.compute()
        self.results[split] = result
        flat = {k: v for k, v in result.items() if not isinstance(v, dict)}
        per_class = {k: v for k, v in result.items() if isinstance(v, dict)}
        flat |= {f"{kind}_{name}": v for kind, values in per_class.items() for name, v in values.items()}
        known = {f"{split}/{k.replace(' ', '_')}": v for k, v in flat.items() if v is not None}
        # a set without a labelled pixel has no mIoU, but callbacks wait for one
        self.log(f"{split}/miou", known.pop(f"{split}/miou", 0.0), prog_bar=True)
        self.log_dict(known)

    def _loss(self, weights: Sequence[float] | None) -> SegmentationLoss:
        return SegmentationLoss(
            ce_weight=self.ce_weight,
            dice_weight=self.dice_weight,
            class_weights=weights,
            ignore_index=self.model.spec.ignore_index,
        )


def check_classes(spec: DataSpec) -> None:
    """Raise UserError where a label map has fewer than two classes: a softmax over one is 1 everywhere."""
    if len(spec.classes) >= 2:
        return
    thing = spec.classes[0].name if spec.classes else "thing"
    given = f"one class, {thing}" if spec.classes else "no classes"
    raise UserError(
        f"{spec.name} has {given}: a label map needs at least two; name the background as one "
        f"(data.classes=[background,{thing}])"
    )


def _check(weights: Any, count: int) -> None:
    if weights is not None and weights != "auto" and (isinstance(weights, str) or len(weights) != count):
        raise UserError(f"task.class_weights={weights}: give auto, null or a list of {count} numbers, one per class")
    if weights and weights != "auto" and min(weights) < 0:
        raise UserError(f"task.class_weights={list(weights)}: a weight is 0 or more")
