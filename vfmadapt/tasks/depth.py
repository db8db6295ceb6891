"""Depth from one image as a Lightning module: in units, or up to an unknown scale and shift."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from vfmadapt.contracts import ValueSpec
from vfmadapt.depth_losses import gradient_matching, scale_and_shift_invariant, silog
from vfmadapt.depth_metrics import DepthMetrics
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.regression import RegressionTask
from vfmadapt.tasks.training import Optimizer, Schedule


class DepthTask(RegressionTask):
    """Trains a model to give depth, and measures it on whole images.

    `kind` "metric": depth in the data's unit, by `silog`. "relative": inverse depth of unknown scale and shift, by
    `scale_and_shift_invariant` and `gradient_matching`, for truths of many cameras and units, disparities included; the
    model then says so in its spec. Either gets `gradient_weight` x `gradient_matching` on top.

    Args:
        model: backbone, adapter and head, for data with one value.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        kind: "metric" or "relative".
        variance: of `silog`: 1 ignores a common factor, 0 is the plain error of logarithms.
        gradient_weight: weight of the gradient matching, on logarithms of metric depth.
        align: how predictions are brought to each image's truth before they are measured, see `DepthMetrics`; a
            relative depth bears "least_squares" alone.
        most: greatest depth that is measured; None: none is cut.
        window: larger images are predicted by windows of this side, in pixels.

    Raises:
        UserError: data without a single value, an impossible setting.
    """

    monitor = "abs_rel"

    metrics: DepthMetrics

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "depth",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        kind: Literal["metric", "relative"] = "metric",
        variance: float = 0.85,
        gradient_weight: float = 0.5,
        align: Literal["none", "median", "least_squares"] = "none",
        most: float | None = None,
        window: int = 512,
    ) -> None:
        super().__init__(
            model,
            name=name,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,
            optimizer=optimizer,
            window=window,
        )
        _check(model, kind, align, variance)
        self.kind, self.variance, self.gradient_weight = kind, variance, gradient_weight
        if kind == "relative":
            model.spec = replace(model.spec, values=(ValueSpec("relative inverse depth", inverse=True),))
        self.metrics = DepthMetrics(
            align=align, found_inverse=model.spec.values[0].inverse, truth_inverse=self.truth_inverse, most=most
        )

    def loss(self, found: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Loss of depth (B, 1, H, W), or inverse depth where `kind` is "relative"; `known` bool."""
        if self.kind == "relative":
            wanted = truth if self.truth_inverse else 1 / truth
            return scale_and_shift_invariant(found, wanted, known) + self.gradient_weight * gradient_matching(
                found, wanted, known
            )
        loss = silog(found, truth, known, variance=self.variance)
        if self.gradient_weight:
            of_found, of_truth = (one.masked_fill(~known, 1.0).log() for one in (found.float(), truth))
            loss = loss + self.gradient_weight * gradient_matching(of_found, of_truth, known)
        return loss


def _check(model: AdaptedModel, kind: Any, align: str, variance: float) -> None:
    values = model.spec.values
    if len(values) != 1:
        raise UserError(f"task=depth: {model.spec.name} has the values {[v.name for v in values]}; it takes one, depth")
    if kind not in ("metric", "relative") or not 0 <= variance <= 1:
        raise UserError(f"task.kind={kind} task.variance={variance}: kind is metric or relative, variance 0 to 1")
    if kind == "relative" and align != "least_squares":
        raise UserError(
            f"task.align={align}: a relative depth has neither scale nor shift; measure it by task.align=least_squares"
        )
    if kind == "metric" and not values[0].log:
        raise UserError(
            f"task.kind=metric learns the logarithm of depth, {model.spec.name} gives {values[0].name} without one; "
            "take task.kind=relative task.align=least_squares"
        )
