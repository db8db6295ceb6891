"""How far found depth, values, camera paths and focal lengths are from the truth; alignment is named, never silent."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vfmadapt.contracts import UserError
from vfmadapt.metrics import sync_counts

Align = Literal["none", "median", "least_squares"]

DEPTH_KEYS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")

_DELTA = 1.25
_LEAST = 1e-6  # a depth or inverse depth that logarithms bear


def check_align(align: str) -> Align:
    """One of "none", "median", "least_squares"; raises UserError for another."""
    if align not in get_args(Align):
        raise UserError(f"align={align}: allowed are {', '.join(get_args(Align))}")
    return align  # type: ignore[return-value]


def aligned(found: Tensor, truth: Tensor, align: Align) -> tuple[Tensor, float, float]:
    """Values (n,) brought to the truth (n,): those, and the factor and summand that did it.

    "none": as they are; "median": times median(truth) / median(found); "least_squares": s found + t with the least
    squared error to the truth.
    """
    if align == "none":
        return found, 1.0, 0.0
    if align == "median":
        scale = float(truth.median() / found.median().clamp_min(_LEAST))
        return found * scale, scale, 0.0
    centred = found - found.mean()
    scale = float((centred * truth).sum() / centred.square().sum().clamp_min(_LEAST**2))
    shift = float(truth.mean() - scale * found.mean())
    return scale * found + shift, scale, shift


class DepthMetrics:
    """Errors of depth, of each image over its known pixels, then averaged over the images.

    abs_rel = mean |P - T| / T, sq_rel = mean (P - T)^2 / T, rmse, rmse_log (natural logarithm), delta1..3 = share of
    pixels with max(P / T, T / P) < 1.25, 1.25^2, 1.25^3 (Eigen et al. 2014, https://arxiv.org/abs/1406.2283).

    Args:
        align: how each image is brought to its truth first: "none", "median" (one factor) or "least_squares" (factor
            and summand; of inverse depth where `found_inverse`).
        found_inverse: predictions are inverse depths.
        truth_inverse: the truth is, too; the metrics are then of 1 / truth, in no unit.
        most: depths are cut there; None: at the greatest true depth of the image, which only matters where an aligned
            inverse depth comes out as 0 or less.

    Raises:
        UserError: another `align`.
    """

    def __init__(
        self,
        *,
        align: str = "none",
        found_inverse: bool = False,
        truth_inverse: bool = False,
        most: float | None = None,
    ) -> None:
        self.align = check_align(align)
        self.found_inverse, self.truth_inverse, self.most = found_inverse, truth_inverse, most
        self.reset()

    def reset(self) -> None:
        """Forget everything that was counted."""
        self.sums = torch.zeros(len(DEPTH_KEYS) + 2, dtype=torch.float64)  # and the factor and its square
        self.images = torch.zeros((), dtype=torch.int64)

    def update(self, found: Tensor, truth: Tensor, known: Tensor) -> None:
        """Count images: found, truth and `known` (bool) of (B, H, W) or (B, 1, H, W); one without known is left out."""
        for one, true, counted in zip(*(t.flatten(1) for t in (found, truth, known)), strict=True):
            if counted.any():
                errors, scale = self._errors(one[counted].double(), true[counted].double())
                self.sums += torch.tensor([*errors, scale, scale**2], dtype=torch.float64)
                self.images += 1

    def _errors(self, found: Tensor, truth: Tensor) -> tuple[list[float], float]:
        true = 1 / truth.clamp_min(_LEAST) if self.truth_inverse else truth
        if self.found_inverse:
            brought, scale, _ = aligned(found, 1 / true, self.align)
            depth = 1 / brought.clamp_min(1 / (self.most or float(true.max())))
        else:
            brought, scale, _ = aligned(found, true, self.align)
            depth = brought.clamp_min(_LEAST) if self.most is None else brought.clamp(_LEAST, self.most)
        gap, ratio = depth - true, torch.maximum(depth / true, true / depth)
        errors = [
            (gap.abs() / true).mean(),
            (gap.square() / true).mean(),
            gap.square().mean().sqrt(),
            (depth.log() - true.log()).square().mean().sqrt(),
            *((ratio < _DELTA**power).double().mean() for power in (1, 2, 3)),
        ]
        return [float(e) for e in errors], scale

    def sync(self, device: torch.device | None = None) -> None:
        """Sum over the processes of a distributed run; `device` is one that its backend can reduce on."""
        sync_counts(self, ("sums", "images"), device)

    def compute(self) -> dict[str, Any]:
        """All counted so far: `DEPTH_KEYS`, "align", "images", and "scale" and "scale_std" of the factors.

        The keys are None where no image has a known pixel.
        """
        images = int(self.images)
        means = [float(s) / images if images else None for s in self.sums]
        scale, square = means[-2:]
        spread = None if scale is None or square is None else max(square - scale**2, 0.0) ** 0.5
        found = dict(zip(DEPTH_KEYS, means, strict=False))
        return {**found, "align": self.align, "images": images, "scale": scale, "scale_std": spread}


class ValueMetrics:
    """Errors of values over all known pixels of a set, value by value.

    Args:
        names: of the K values.
        align: as in `DepthMetrics`, for each image and value.

    Raises:
        UserError: another `align`.
    """

    def __init__(self, names: tuple[str, ...], *, align: str = "none") -> None:
        self.names, self.align = names, check_align(align)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was counted."""
        # per value: pixels, squared and absolute errors, errors, truth and its square
        self.sums = torch.zeros(6, len(self.names), dtype=torch.float64)

    def update(self, found: Tensor, truth: Tensor, known: Tensor) -> None:
        """Count images: found, truth and `known` (bool), all (B, K, H, W)."""
        for image in zip(found, truth, known, strict=True):
            for k, (one, true, counted) in enumerate(zip(*image, strict=True)):
                if counted.any():
                    wanted = true[counted].double()
                    gap = aligned(one[counted].double(), wanted, self.align)[0] - wanted
                    sums = (gap.square().sum(), gap.abs().sum(), gap.sum(), wanted.sum(), wanted.square().sum())
                    self.sums[:, k] += torch.stack([gap.new_tensor(gap.numel()), *sums]).cpu()

    def sync(self, device: torch.device | None = None) -> None:
        """Sum over the processes of a distributed run; `device` is one that its backend can reduce on."""
        sync_counts(self, ("sums",), device)

    def compute(self) -> dict[str, Any]:
        """All counted so far: "rmse", "mae", "bias" and "r2" of the first value, all of them by "values", "align".

        r2 = 1 - squared error / that of the best constant. None where no pixel is known, r2 also of a constant truth.
        """
        each = {name: _scores(*column) for name, column in zip(self.names, self.sums.T.tolist(), strict=True)}
        return {**each[self.names[0]], "values": each, "align": self.align}


def _scores(
    pixels: float, squared: float, absolute: float, error: float, truth: float, truth_squared: float
) -> dict[str, float | None]:
    if not pixels:
        return dict.fromkeys(("rmse", "mae", "bias", "r2"))
    spread = truth_squared - truth**2 / pixels
    return {
        "rmse": (squared / pixels) ** 0.5,
        "mae": absolute / pixels,
        "bias": error / pixels,
        "r2": 1 - squared / spread if spread > 0 else None,
    }


def trajectory_error(found: Tensor, truth: Tensor) -> dict[str, float]:
    """How far a camera's path is from the true one, up to the scale that one camera cannot tell.

    Shapes: (T, 4, 4) camera to world, T at least 2. "ate": root mean square distance of the positions after the best
    similarity (Umeyama 1991), in the truth's unit; "rpe_translation", "rpe_degrees": root mean square of the errors of
    the moves between neighbouring frames, found translations times "scale", the similarity's factor.

    Raises:
        UserError: other shapes.
    """
    if found.shape != truth.shape or found.ndim != 3 or found.shape[1:] != (4, 4) or len(found) < 2:
        raise UserError(
            f"poses {tuple(found.shape)} and {tuple(truth.shape)}: both are (T, 4, 4), camera to world, T at least 2"
        )
    found, truth = found.double().clone(), truth.double()
    rotation, scale, shift = _similarity(found[:, :3, 3], truth[:, :3, 3])
    apart = scale * found[:, :3, 3] @ rotation.T + shift - truth[:, :3, 3]
    found[:, :3, 3] *= scale
    moves, true_moves = (torch.linalg.inv(path[:-1]) @ path[1:] for path in (found, truth))
    errors = torch.linalg.inv(true_moves) @ moves
    cosine = ((errors[:, :3, :3].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)
    return {
        "ate": float(apart.square().sum(1).mean().sqrt()),
        "rpe_translation": float(errors[:, :3, 3].square().sum(1).mean().sqrt()),
        "rpe_degrees": float(cosine.acos().rad2deg().square().mean().sqrt()),
        "scale": scale,
    }


def _similarity(found: Tensor, truth: Tensor) -> tuple[Tensor, float, Tensor]:
    """R, s, t with the least squared distance of s R found + t to the truth; points (T, 3)."""
    middle, true_middle = found.mean(0), truth.mean(0)
    here, there = found - middle, truth - true_middle
    left, strengths, right = torch.linalg.svd(there.T @ here)
    sign = torch.ones(3, dtype=found.dtype)
    sign[-1] = torch.sign(torch.linalg.det(left) * torch.linalg.det(right))
    rotation = left @ sign.diag() @ right
    scale = float((strengths * sign).sum() / here.square().sum().clamp_min(_LEAST**2))
    return rotation, scale, true_middle - scale * rotation @ middle


def focal_error(found: float, truth: float) -> float:
    """Relative error of a focal length, |found - truth| / truth; both in pixels of one image size."""
    if truth <= 0:
        raise UserError(f"a true focal length of {truth} pixels; it is above 0")
    return abs(found - truth) / truth


def plane_fit(truth: Tensor, known: Tensor) -> Tensor:
    """The plane a x + b y + c with the least squared error to the known pixels of a map: what a layout alone explains.

    Shapes: `truth` and bool `known` (H, W) -> (H, W), float64.
    """
    y, x = (axis.double() for axis in torch.meshgrid(*(torch.arange(n) for n in truth.shape), indexing="ij"))
    columns = torch.stack([x, y, torch.ones_like(x)], -1)
    solved = torch.linalg.lstsq(columns[known], truth[known].double()[:, None]).solution
    return (columns @ solved)[..., 0]


def as_table(result: Mapping[str, Any]) -> str:
    """The result of `DepthMetrics` or `ValueMetrics` as aligned text, the alignment in its first line."""
    rows = [f"alignment: {result['align']}"]
    rows += [f"{key:<12}{value:10.4g}" for key, value in result.items() if isinstance(value, float)]
    for name, scores in result.get("values", {}).items():
        rows.append(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if v is not None))
    return "\n".join(rows)
