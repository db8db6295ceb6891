"""Depth and other values against the truth, and beside what knows nothing of the image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfmadapt.contracts import ValueSpec
from vfmadapt.depth_metrics import DepthMetrics, ValueMetrics, check_align, plane_fit
from vfmadapt.errors import UserError
from vfmadapt.model import AdaptedModel
from vfmadapt.tasks.values import collate_values
from vfmadapt.tasks.windows import whole_image


def measure_values(
    model: AdaptedModel, samples: Any, values: Sequence[ValueSpec], *, align: str = "none", side: int = 512
) -> dict[str, Any]:
    """Errors of a model over samples of any sizes; larger images go by windows of `side` pixels.

    `values` are the data's. Errors are those of `ValueMetrics`, of inverse depth where either side has it, beside those
    of each image's best constant ("constant_rmse") and best plane ("plane_rmse"); of depth those of `DepthMetrics`, and
    "value_rmse" is the one to compare with the two.

    Raises:
        UserError: another `align`, or one by which a relative depth cannot be measured.
    """
    chosen, inverse = check_align(align), model.spec.values[0].inverse
    of_depth = inverse or values[0].inverse or values[0].log
    if inverse and chosen != "least_squares":
        raise UserError(f"align={align}: the model gives relative inverse depth; measure it by align=least_squares")
    names = tuple(v.name for v in values)
    errors, constant, plane = (ValueMetrics(names, align=a) for a in (chosen, "none", "none"))
    depth = DepthMetrics(align=chosen, found_inverse=inverse, truth_inverse=values[0].inverse)
    device = next(model.parameters()).device
    model.eval()
    for index in range(len(samples)):
        batch = collate_values([samples[index]])
        truth, known = batch["truth"], batch["known"]
        with torch.inference_mode():
            found = whole_image(model, batch["image"].to(device), batch["valid"].to(device), side=side).cpu()
        if of_depth:
            depth.update(found, truth, known)
        if inverse and not values[0].inverse:
            truth = 1 / truth
        errors.update(found, truth, known)
        for counted, fitted in zip((constant, plane), _fitted(truth[0], known[0]), strict=True):
            counted.update(fitted[None], truth, known)
    beside = {"constant_rmse": constant.compute()["rmse"], "plane_rmse": plane.compute()["rmse"]}
    result = errors.compute()
    if not of_depth:
        return result | beside
    return {**depth.compute(), "value_rmse": result["rmse"], **beside}


def _fitted(truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The best constants and the best planes (K, H, W) of one image's values (K, H, W)."""
    flat, planes = truth.double().clone(), truth.double().clone()
    for k in range(len(truth)):
        if known[k].any():
            flat[k] = truth[k][known[k]].double().mean()
            planes[k] = plane_fit(truth[k], known[k])
    return flat, planes
