"""Semantic segmentation as a Lightning module."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from vfmadapt._state import load_state
from vfmadapt.errors import UserError
from vfmadapt.losses import SegmentationLoss, class_weights
from vfmadapt.metrics import SegmentationMetrics
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.windows import whole_image

Schedule = Literal["cosine", "poly", "constant"]


def lr_factor(step: int, total: int, *, warmup: float, schedule: Schedule) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`, as a share of its peak.

    Linear from 1/n to 1 over the first n = `warmup` x total steps, then half a cosine to 0, (1 - t)^0.9 ("poly"), or
    constant.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = min((step - rising) / max(total - rising, 1), 1.0)
    decay: dict[str, Callable[[float], float]] = {
        "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
        "poly": lambda t: (1 - t) ** 0.9,
        "constant": lambda t: 1.0,
    }
    return decay[schedule](done)


class SegmentationTask(LightningModule):
    """Trains what is trainable in a model, with AdamW, and measures it on whole images.

    Checkpoints hold no frozen tensor. All settings are keyword-only and appear under `task.` on the command line.

    Args:
        model: backbone, adapter and head.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice loss.
        class_weights: of the cross-entropy: a number per class, "auto" (from the training masks) or None.
        boundary_tolerance: of the boundary F1, in pixels.
        window: larger images are predicted by windows of this side, in pixels.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "segmentation",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weights: Sequence[float] | Literal["auto"] | None = "auto",
        boundary_tolerance: float = 2.0,
        window: int = 512,
    ) -> None:
        super().__init__()
        _check(lr, warmup, schedule, class_weights, len(model.spec.classes))
        self.strict_loading = False  # checkpoints hold no frozen tensor; on_load_checkpoint checks the rest strictly
        self.model, self.name, self.window = model, name, window
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.schedule: Schedule = schedule
        self.class_weights = class_weights
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.loss = self._loss(None if class_weights == "auto" else class_weights)
        names = [c.name for c in model.spec.classes]
        ignored = model.spec.ignore_index
        lines = [c.name for c in model.spec.classes if c.line]
        self.metrics = SegmentationMetrics(names, ignore_index=ignored, tolerance=boundary_tolerance, lines=lines)
        self.results: dict[str, dict[str, Any]] = {}
        self._stepped = 0

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.model(image, valid)
        return logits

    def setup(self, stage: str) -> None:
        """Take the class weights from the training masks where they are "auto"."""
        if stage == "fit" and self.class_weights == "auto":
            self.loss = self._loss(class_weights(self._data().class_pixels()))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters, a learning rate per step."""
        trained = self.model.trainable_parameters()
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        total = self._total_steps()
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, warmup=self.warmup, schedule=self.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Seed torch by (seed, epoch, process), so that dropout and the like continue exactly after a resume."""
        key = np.random.SeedSequence([self._data().seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def on_train_start(self) -> None:
        """Remember where the count of optimiser steps stands."""
        self._stepped = self.global_step

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Loss of a batch, with the adapters' auxiliary losses; a second forward where they compare two.

        Raises:
            UserError: the loss is not finite; it names the step.
        """
        logits = self.model(batch["image"], batch["valid"])
        parts = self.loss(logits, batch["mask"])
        loss: Tensor = parts["loss"]
        if (aux := self.model.backbone.aux_loss()) is not None:
            loss = loss + aux
            self.log("train/aux", aux.detach())
        if comparing := [a for a in self.model.backbone.active_adapters() if a.forwards_per_step == 2]:
            again = self.model(batch["image"], batch["valid"])
            consistency = torch.stack([a.consistency(logits, again) for a in comparing]).sum()
            loss = loss + consistency
            self.log("train/consistency", consistency.detach())
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower task.lr (now {self.lr:g}), "
                "set trainer.gradient_clip_val, or use trainer.precision=32-true"
            )
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({"train/ce": parts["ce"], "train/dice": parts["dice"]})
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Tell the adapters about every optimiser step (not every accumulated batch)."""
        if self.global_step != self._stepped:
            self._stepped = self.global_step
            self.model.backbone.after_step(self.global_step, self._total_steps())

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the val split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count a whole image of the test split."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.metrics.reset()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self.metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the val split."""
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split."""
        self._conclude("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was trained: by object, as the model says, not by name."""
        checkpoint["state_dict"] = self.model.adapter_state()
        checkpoint["training_state"] = self.model.backbone.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was trained; raises UserError unless it is exactly what this model trains."""
        self.model.load_adapter_state(checkpoint["state_dict"])
        load_state(self.model.backbone.training_state(), checkpoint["training_state"])
        checkpoint["state_dict"] = {}  # nothing is left for Lightning to load

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        logits = whole_image(self.model, batch["image"], batch["valid"], side=self.window)
        loss = self.loss(logits, batch["mask"])["loss"]
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=1, sync_dist=True)
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

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("training has no end: set trainer.max_steps or trainer.max_epochs")
        return int(total)


def _check(lr: float, warmup: float, schedule: str, weights: Any, classes: int) -> None:
    if lr <= 0 or not 0 <= warmup < 1 or schedule not in ("cosine", "poly", "constant"):
        raise UserError(
            f"task.lr={lr} task.warmup={warmup} task.schedule={schedule}: lr is above 0, warmup a share in 0..1, "
            "schedule one of cosine, poly, constant"
        )
    if weights is not None and weights != "auto" and (isinstance(weights, str) or len(weights) != classes):
        raise UserError(f"task.class_weights={weights}: give auto, null or a list of {classes} numbers, one per class")
