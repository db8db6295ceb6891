"""Learning without labels as a Lightning module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt._state import load_state
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.objectives.objective import Objective
from vfmadapt.tasks.training import AdapterTask, Schedule


class PretrainingModel(nn.Module):
    """An adapted backbone and the objective that it learns by."""

    def __init__(self, backbone: AdaptedBackbone, objective: Objective) -> None:
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An objective's samples -> its loss and figures."""
        figures: dict[str, Tensor] = self.objective(self.backbone, batch)
        return figures

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimiser may change: the adapter's and the objective's."""
        return [*self.backbone.trainable_parameters(), *(p for p in self.objective.parameters() if p.requires_grad)]

    def adapter_state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs: adapters, a teacher's too, and the objective's parts."""
        return self.backbone.adapter_state() | {f"objective.{k}": v for k, v in self.objective.state_dict().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `adapter_state`; raises UserError unless keys and shapes are the same."""
        load_state(self.adapter_state(), state)


class PretrainingTask(AdapterTask):
    """Trains what is trainable in a `PretrainingModel`; a loss or gradient that is not finite ends it.

    Args:
        model: backbone and objective.
        lr, weight_decay, warmup, schedule, betas: as in `AdapterTask`.
        settle: share of all steps in which the backbone stays as it is, while the objective's decoder or heads, which
            start from scratch, learn: until then their gradients would only undo what the backbone knows.

    Raises:
        UserError: a setting out of its range.
    """

    model: Any

    def __init__(
        self,
        model: PretrainingModel,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        betas: tuple[float, float] = (0.9, 0.999),
        settle: float = 0.0,
    ) -> None:
        if not 0 <= settle < 1:
            raise UserError(f"task.settle={settle}: give a share of the steps, from 0 to below 1")
        self.settle = settle
        trained: Any = model  # what AdapterTask uses of its model is here, too
        super().__init__(
            trained, name="pretraining", lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, betas=betas
        )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The objective's loss, its figures logged."""
        figures = self.model(batch)
        loss: Tensor = figures.pop("loss")
        self._demand_finite(loss, "loss")
        for name, figure in figures.items():
            self.log(f"train/{name}", figure)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
        """Look at the gradients, then let the objective have its way with them."""
        gradients = [p.grad for p in self.model.trainable_parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._demand_finite(norm, "gradient's norm")
        self.log("train/gradient", norm)
        if self.global_step < round(self.settle * self._total_steps()):
            for parameter in self.model.backbone.trainable_parameters():
                parameter.grad = None  # AdamW passes over it, decay included
        self.model.objective.before_step()

    def on_train_batch_end(self, *_: Any) -> None:
        """Tell adapters and objective about every optimiser step (not every accumulated batch)."""
        if self.global_step != self._stepped:
            self._stepped = self.global_step
            self.model.backbone.after_step(self.global_step, self._total_steps())
            self.model.objective.after_step(self.model.backbone, self.global_step, self._total_steps())

    def _demand_finite(self, value: Tensor, name: str) -> None:
        """Raise UserError in all processes where the value of one is not finite."""
        seen = self.trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
        if torch.isfinite(torch.as_tensor(seen)):
            return
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = f"{last} holds the last whole epoch" if last.is_file() else "no epoch was finished"
        raise UserError(
            f"the {name} is {float(seen)} at step {self.global_step}; {kept}: lower task.lr (now {self.lr:g}), set "
            "trainer.gradient_clip_val, or use trainer.precision=32-true"
        )
