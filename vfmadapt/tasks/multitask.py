"""Several tasks at once as a Lightning module: label maps, depth, surface normals, edges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import Samples, Streams
from vfmadapt.depth_metrics import DepthMetrics
from vfmadapt.errors import UserError
from vfmadapt.heads.multitask import MultiTaskHead
from vfmadapt.losses import SegmentationLoss
from vfmadapt.metrics import SegmentationMetrics
from vfmadapt.model import AdaptedModel
from vfmadapt.scene_targets import edges, normals
from vfmadapt.tasks.segmentation import check_classes
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule

EDGE_BALANCE = 0.95
"""Weight of edge pixels in their cross-entropy, 1 minus that of the others, as published."""


JUDGES: dict[str, tuple[str, Literal["max", "min"]]] = {
    "segmentation": ("miou", "max"),
    "depth": ("abs_rel", "min"),
    "normals": ("normals_degrees", "min"),
    "edges": ("edges_f1", "max"),
}
"""Metric of the val split by which the best epoch is chosen: that of the first of these tasks that is learnt."""


class MultiTaskTask(AdapterTask):
    """Trains one adapted backbone for several tasks, all in one forward.

    Losses, each before its weight: segmentation cross-entropy + Dice, depth mean |found - true| in the data's unit,
    normals mean |found - true| of unit vectors, edges balanced binary cross-entropy. Normals and edges are derived from
    the depth. All settings are keyword-only and appear under `task.` on the command line.

    Args:
        model: backbone, adapter and head=multitask.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        weights: of the tasks' losses (published: segmentation 1, depth 1, normals 10, edges 50).

    Raises:
        UserError: another head, an adapter with streams for other tasks, a task without a weight, labels of one class.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "multitask",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        weights: Mapping[str, float],
    ) -> None:
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        if not isinstance(model.head, MultiTaskHead):
            raise UserError("task=multitask needs head=multitask")
        self.tasks = model.head.tasks
        if "segmentation" in self.tasks:
            check_classes(model.spec)
        for site in (s for a in model.backbone.active for s in model.backbone.sites(a) if isinstance(s, Streams)):
            if {*site.tasks} != {*self.tasks}:
                raise UserError(
                    f"adapter.tasks={[*site.tasks]} and head.tasks={[*self.tasks]} are not the same: set both alike"
                )
        if lacking := [task for task in self.tasks if not weights.get(task, 0) > 0]:
            raise UserError(f"task.weights.{lacking[0]} is missing or 0: give a number above 0, or leave out the task")
        self.weights = {task: float(weights[task]) for task in self.tasks}
        self.monitor, self.better = next(judge for task, judge in JUDGES.items() if task in self.tasks)
        ignored, names = model.spec.ignore_index, [c.name for c in model.spec.classes]
        self.label_loss = SegmentationLoss(ignore_index=ignored)
        self.label_metrics = SegmentationMetrics(names, ignore_index=ignored) if "segmentation" in self.tasks else None
        self.depth_metrics = DepthMetrics()
        self._start()

    def outputs(self, image: Tensor, valid: Tensor) -> Mapping[str, Tensor]:
        """What each task gives for images (B, C, H, W): {task: (B, its channels, H, W)}."""
        features = self.model.features(image, valid)
        return cast(MultiTaskHead, self.model.head).outputs(features, (image.shape[-2], image.shape[-1]))

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Weighed sum of the tasks' losses, with the adapters' auxiliary losses."""
        losses = self.losses(self.outputs(batch["image"], batch["valid"]), batch)
        self.log_dict({f"train/{task}": loss.detach() for task, loss in losses.items()})
        return self.complete(torch.stack([self.weights[task] * loss for task, loss in losses.items()]).sum())

    def losses(self, found: Mapping[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """{task: its loss before its weight}."""
        truth = targets(batch)
        known = truth["known"]
        losses = {}
        if "segmentation" in found:
            losses["segmentation"] = self.label_loss(found["segmentation"], batch["mask"])["loss"]
        if "depth" in found:
            losses["depth"] = _mean((found["depth"][:, 0] - truth["depth"]).abs(), known)
        if "normals" in found:
            unit = F.normalize(found["normals"], dim=1)
            losses["normals"] = _mean((unit - truth["normals"]).abs().mean(1), known)
        if "edges" in found:
            wanted = truth["edges"].float()
            weight = torch.where(truth["edges"], EDGE_BALANCE, 1 - EDGE_BALANCE)
            each = F.binary_cross_entropy_with_logits(found["edges"][:, 0], wanted, weight, reduction="none")
            losses["edges"] = _mean(each, known)
        return losses

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Measure an image of the val split."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Measure an image of the test split."""
        self._evaluate(batch)

    def table(self) -> str:
        """The metrics of the test split as text."""
        known = ((key, value) for key, value in self.results["test"].items() if isinstance(value, float))
        return "\n".join(f"{key:<16}{value:8.4f}" for key, value in known)

    def draw(self, samples: Samples, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample: what each task should give, and below what it gives."""
        from vfmadapt.tasks.scene_previews import write_multitask_previews

        return write_multitask_previews(self.outputs, self.model, samples, folder, indices=indices)

    def _start(self) -> None:
        if self.label_metrics is not None:
            self.label_metrics.reset()
        self.depth_metrics.reset()
        self._angles: list[Tensor] = []
        self._edges = torch.zeros(3, dtype=torch.float64)  # found and true, found, true

    def _evaluate(self, batch: dict[str, Any]) -> None:
        found, truth = self.outputs(batch["image"], batch["valid"]), targets(batch)
        known = truth["known"]
        if self.label_metrics is not None:
            self.label_metrics.update(found["segmentation"], batch["mask"])
        if "depth" in found:
            self.depth_metrics.update(found["depth"][:, 0], truth["depth"], known)
        if "normals" in found:
            cosine = (F.normalize(found["normals"], dim=1) * truth["normals"]).sum(1).clamp(-1, 1)
            self._angles.append(cosine.acos().rad2deg()[known].mean().cpu())
        if "edges" in found:
            drawn, wanted = (found["edges"][:, 0] > 0) & known, truth["edges"] & known
            self._edges += torch.stack([(drawn & wanted).sum(), drawn.sum(), wanted.sum()]).double().cpu()

    def _conclude(self, split: str) -> None:
        result: dict[str, Any] = {}
        if self.label_metrics is not None:
            self.label_metrics.sync(self.device)
            result |= {key: self.label_metrics.compute()[key] for key in ("miou", "iou", "accuracy")}
        if "depth" in self.tasks:
            self.depth_metrics.sync(self.device)
            result |= self.depth_metrics.compute()
        if "normals" in self.tasks:
            result["normals_degrees"] = float(torch.stack(self._angles).mean())
        if "edges" in self.tasks:
            both, drawn, wanted = self._edges.tolist()
            result["edges_f1"] = 2 * both / max(drawn + wanted, 1.0)
        self.results[split] = result
        self.log_dict({f"{split}/{key}": value for key, value in result.items() if isinstance(value, float)})


def targets(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a batch "depth" (B, H, W), "known" (bool), "normals" (B, 3, H, W) and "edges" (bool); 1 where unknown."""
    known = batch["valid"] & batch["depth"].isfinite() & (batch["depth"] > 0)
    depth = batch["depth"].where(known, 1.0)
    return {
        "depth": depth,
        "known": known,
        "normals": normals(depth, batch["intrinsics"]),
        "edges": edges(depth),
    }


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return values.where(known, 0).sum() / known.sum().clamp_min(1)
