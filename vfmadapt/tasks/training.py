"""What every task shares as a Lightning module: optimiser, learning rate, adapters' losses, checkpoints."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vfmadapt._state import load_state
from vfmadapt.contracts import Samples
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel, normalise
from vfmadapt.tasks.muon import Muon, layer_weights

Schedule = Literal["cosine", "poly", "constant"]
Optimizer = Literal["adamw", "muon"]


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


class AdapterTask(LightningModule):
    """Trains what is trainable in a model; subclasses add the steps and what they are measured by.

    Checkpoints hold no frozen tensor.

    Args:
        model: backbone, adapter and head.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        betas: of AdamW.
        optimizer: "adamw", or "muon" for the weights of linear and convolution layers and AdamW for the rest (see
            `Muon`): on maps, heads that start from nothing needed less than half of the steps.
    """

    monitor: str = "miou"
    """The metric of the val split that says which epoch is the best."""
    better: Literal["max", "min"] = "max"
    """Whether a greater or a smaller one is better."""

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str,
        lr: float,
        weight_decay: float,
        warmup: float,
        schedule: Schedule,
        betas: tuple[float, float] = (0.9, 0.999),
        optimizer: Optimizer = "adamw",
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "muon"):
            raise UserError(f"task.optimizer={optimizer}: adamw or muon")
        if lr <= 0 or not 0 <= warmup < 1 or schedule not in ("cosine", "poly", "constant"):
            raise UserError(
                f"task.lr={lr} task.warmup={warmup} task.schedule={schedule}: lr is above 0, warmup a share in 0..1, "
                "schedule one of cosine, poly, constant"
            )
        self.strict_loading = False  # checkpoints hold no frozen tensor; on_load_checkpoint checks the rest strictly
        self.model, self.name = model, name
        self.lr, self.weight_decay, self.warmup, self.betas = lr, weight_decay, warmup, betas
        self.schedule: Schedule = schedule
        self.optimizer: Optimizer = optimizer
        self.results: dict[str, dict[str, Any]] = {}
        self._stepped = 0

    def table(self) -> str:
        """The metrics of the test split as text."""
        raise NotImplementedError  # abstract

    def draw(self, samples: Samples, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample."""
        raise NotImplementedError  # abstract

    def images(self, batch: dict[str, Any]) -> Tensor:
        """The images of a batch, normalised, for adapters that start from data: (B, C, H, W)."""
        return normalise(batch["image"], batch["valid"], self.model.mean, self.model.std)

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return self.model.trainable_parameters()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Muon over the trainable parameters, a learning rate per step."""
        trained = self.trained()
        weights = layer_weights(self.model.modules()) if self.optimizer == "muon" else set()
        others = [p for p in trained if p not in weights]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in trained if p in weights], "weight_decay": self.weight_decay, "orthogonal": True},
        ]
        total = self._total_steps()
        fused = not str(self.trainer.precision).endswith("mixed")  # there Lightning refuses to clip for a fused step
        make = Muon if weights else torch.optim.AdamW
        optimizer = make([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, fused=fused)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, warmup=self.warmup, schedule=self.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Seed torch by (seed, epoch, process), so that dropout and the like continue exactly after a resume."""
        key = np.random.SeedSequence([self._data().seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def on_train_start(self) -> None:
        """Remember where the count of optimiser steps stands.

        Adapters are built in evaluation mode, and Lightning leaves modes as they are: without the switch there would be
        no dropout, noise or stage of training.
        """
        self.train()
        self._stepped = self.global_step

    def complete(self, loss: Tensor) -> Tensor:
        """A step's loss with the adapters' auxiliary losses, logged.

        Raises:
            UserError: it is not finite; names the step.
        """
        if (aux := self.model.backbone.aux_loss()) is not None:
            loss = loss + aux
            self.log("train/aux", aux.detach())
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower task.lr (now {self.lr:g}), "
                "set trainer.gradient_clip_val, or use trainer.precision=32-true"
            )
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Tell the adapters and the head about every optimiser step (not every accumulated batch)."""
        if self.global_step != self._stepped:
            self._stepped = self.global_step
            for part in (self.model.backbone, self.model.head):
                part.after_step(self.global_step, self._total_steps())

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._start()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._start()

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
        _close_epoch(checkpoint["loops"]["fit_loop"])

    def _start(self) -> None:
        """Forget what was counted."""
        raise NotImplementedError  # abstract

    def _conclude(self, split: str) -> None:
        """Put the metrics of what was counted into `results`, and log them."""
        raise NotImplementedError  # abstract

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("training has no end: set trainer.max_steps or trainer.max_epochs")
        return int(total)


def _close_epoch(loop: dict[str, Any]) -> None:
    """Count the epoch of a checkpoint as complete where it is over.

    Lightning saves an epoch's end just before it counts it, and a run by `max_steps` then resumes with an epoch without
    batches, so that all later ones bear another number, and other draws.
    """
    progress = loop["epoch_progress"]
    if progress["total"]["processed"] < progress["total"]["started"]:
        return
    for counts in progress.values():
        counts["completed"] = counts["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
