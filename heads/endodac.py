"""EndoDAC's depth head: DPT with an exit to a depth map at each of its four levels.

Cui et al., "EndoDAC: Efficient Adapting Foundation Model for Self-Supervised Depth Estimation from Any Endoscopic
Camera", https://arxiv.org/abs/2405.08672, §2.1.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, UserError
from vfmadapt.heads._depth_anything import load_depth_anything
from vfmadapt.heads._pyramid import LEVELS
from vfmadapt.heads.dpt import LAST_WIDTH, DPTHead


class EndoDACHead(DPTHead):
    """Depths between `nearest` and `farthest` at full, 1/2, 1/4 and 1/8 of DPT's detail; the first is the answer.

    Each exit ends in a sigmoid s of the inverse depth: 1 / depth = 1 / farthest + (1 / nearest - 1 / farthest) s.
    Four exits of width 128 have 369,156 parameters, all that the release trains in its head.

    Args:
        spec: the backbone's.
        num_classes: K, 1 for depth.
        layers, stages, width: as in `DPTHead`.
        nearest, farthest: in the unit of the answer, which self-supervision leaves open.
        weights: a checkpoint of Depth Anything, the file that backbone.weights names, for all but the exits.
        frozen: train the exits alone, as published with weights.

    Raises:
        UserError: as `DPTHead` does; an impossible range, frozen without weights.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        layers: Sequence[int] | None = None,
        stages: Sequence[int] | None = None,
        width: int = 128,
        nearest: float = 0.1,
        farthest: float = 150.0,
        weights: str | None = None,
        frozen: bool = False,
    ) -> None:
        if not 0 < nearest < farthest:
            raise UserError(f"head.nearest={nearest} head.farthest={farthest}: wanted is 0 < nearest < farthest")
        if frozen and weights is None:
            raise UserError("head.frozen=true freezes random weights: give head.weights=FILE or head.frozen=false")
        super().__init__(spec, num_classes=num_classes, layers=layers, stages=stages, width=width)
        if weights is not None:
            load_depth_anything(self, weights, output=False)
        if frozen:
            for part in (self.norms, self.reassemble, self.project, self.fusion):
                part.requires_grad_(False)
        self.exits = nn.ModuleList(_exit(width, num_classes) for _ in range(LEVELS - 1))
        self.inverse = (1 / farthest, 1 / nearest)

    @property
    def middle(self) -> float:
        """The depth of a value of 0, near which untrained heads begin."""
        return 2 / sum(self.inverse)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> depths (B, K, H, W)."""
        return self._depth(super().forward(features, size))

    def supervised(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Depths (B, K, H, W) of all four exits, the finest first."""
        *coarse, fine = self.fused(features)
        values = [self.full(fine, features, size)]
        for exit_, level in zip(self.exits, reversed(coarse), strict=True):
            values.append(_resized(exit_(level), features, size))
        return tuple(self._depth(v) for v in values)

    def _depth(self, values: Tensor) -> Tensor:
        low, high = self.inverse
        return 1 / (low + (high - low) * values.float().sigmoid())


def _resized(values: Tensor, features: Features, size: tuple[int, int]) -> Tensor:
    """Values that cover the features' grid -> (B, K, H, W), as DPT resizes its finest map."""
    padded = [cells * features.strides[0] for cells in features.grids[0].shape[2:]]
    return F.interpolate(values, padded, mode="bilinear", align_corners=True)[..., : size[0], : size[1]]


def _exit(width: int, values: int) -> nn.Sequential:
    """A fused map (B, width, h, w) -> values per place (B, K, h, w), as DPT's last convolutions."""
    narrow = max(width // 2, 1)
    return nn.Sequential(
        nn.Conv2d(width, narrow, 3, padding=1),
        nn.Conv2d(narrow, LAST_WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(LAST_WIDTH, values, 1),
    )
