"""Linear probe with a classifier of 1-bit weights, the partner of the 1-bit adapters.

Jie, Wang, Deng, ICCV 2023, https://arxiv.org/abs/2307.16867 (their "Bi-Head"); the equations are in
`vfmadapt.kernels.bit_linear`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec
from vfmadapt.heads.linear import LinearHead
from vfmadapt.kernels.bit_linear import codebook, fake_quantise


class BitLinearHead(LinearHead):
    """`LinearHead` whose classifier has 1-bit weights and no bias; same settings."""

    def __init__(self, spec: BackboneSpec, *, num_classes: int, layers: Sequence[int] = (-1,), cells: int = 1) -> None:
        super().__init__(spec, num_classes=num_classes, layers=layers, cells=cells)
        self.classifier = BinaryLinear(self.classifier.in_features, self.classifier.out_features)


class BinaryLinear(nn.Linear):
    """A linear layer without bias, its weights quantised to one bit in every forward."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.levels: Tensor
        self.register_buffer("levels", torch.tensor(codebook(1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, fake_quantise(self.weight, self.levels))
