"""DPT whose value is an expectation over bins, as in AdaBins: for depth in units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, UserError
from vfmadapt.heads._layers import LayerNorm2d
from vfmadapt.heads.dpt import DPTHead


class DPTBinsHead(DPTHead):
    """Value = sum_k p_k c_k, p the softmax of DPT's outputs, c the centres of bins whose widths the image decides.

    Bhat et al. 2021, "AdaBins", https://arxiv.org/abs/2011.14141, eq. 1 to 3. The bins cover -span..span of the value
    as heads learn it ((value - mean) / std, of its logarithm where the data say so), so of logarithmic depth they grow
    with it. Their widths come from the mean of the last block's features through two layers, in place of the paper's
    small transformer; its loss on the centres is left out. At the start all widths are nearly equal.

    Args:
        spec: the backbone's.
        num_classes: K, values per pixel; each has bins of its own.
        bins: how many each has.
        span: standard deviations on either side of the mean.
        layers: see `DPTHead`.
        stages: see `DPTHead`.
        width: see `DPTHead`.

    Raises:
        UserError: fewer than two bins, a span of 0, or what `DPTHead` refuses.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        bins: int = 64,
        span: float = 3.5,
        layers: Sequence[int] | None = None,
        stages: Sequence[int] | None = None,
        width: int = 128,
    ) -> None:
        if bins < 2 or span <= 0:
            raise UserError(f"head.bins={bins} head.span={span}: bins is at least 2, span above 0")
        super().__init__(spec, num_classes=num_classes * bins, layers=layers, stages=stages, width=width)
        self.bins, self.span = bins, span
        deepest = spec.dims[self.layers[-1]]
        self.pooled = LayerNorm2d(deepest, eps=1e-6)
        self.widths = nn.Sequential(nn.Linear(deepest, width), nn.GELU(), nn.Linear(width, num_classes * bins))

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> values (B, K, H, W), in standard deviations from the mean."""
        shares = super().forward(features, size).float().unflatten(1, (-1, self.bins)).softmax(2)
        return torch.einsum("bknhw,bkn->bkhw", shares, self.centres(features))

    def centres(self, features: Features) -> Tensor:
        """Centres of the bins (B, K, bins), rising, within -span..span."""
        pooled = self.pooled(features.grids[-1]).float().mean((2, 3))
        widths = self.widths(pooled).unflatten(1, (-1, self.bins)).softmax(2) * (2 * self.span)
        return widths.cumsum(2) - widths / 2 - self.span
