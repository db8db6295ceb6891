"""DD-Adapter: depthwise convolutions of two dilations after the first blocks of a frozen encoder.

Xu, Kabat, Zhang, "Depthwise-dilated convolutional adapters for medical object tracking and segmentation using the
Segment Anything Model 2", https://arxiv.org/abs/2507.14613.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, Site, UserError
from vfmadapt.kernels.depthwise_dilated import depthwise_dilated


class DD(Adapter):
    """Adds GELU(U Σ_i GELU(DW_i GELU(D x))) to a block's output x, with DW_i a depthwise 3 x 3 of dilation i.

    Not the identity when new: no scale and no layer starts at zero, as published. D narrows C channels to C / 2, so a
    block has C² + 11.5 C parameters with two dilations; the first six blocks of SAM2.1's Hiera-T have 544,080.

    Not reproduced: the grid guessed as sqrt(N) x sqrt(N) (DD-SAM2's `infer_hw`), and blocks that all run the last one's
    adapter (its `add_adapters_to_model`).

    Args:
        spec: the backbone's; blocks may differ in width.
        blocks: how many of the first blocks have an adapter (published: 6); all where there are fewer.
        dilations: of the convolutions side by side (published: 1 and 3).

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "convolutions and GELUs stand between its layers"

    def __init__(self, spec: BackboneSpec, *, blocks: int = 6, dilations: Sequence[int] = (1, 3)) -> None:
        super().__init__()
        if blocks < 1:
            raise UserError(f"dd: blocks={blocks} must be at least 1 (published: 6); adapter=frozen has none")
        if not dilations or min(dilations) < 1:
            raise UserError(
                f"dd: dilations={list(dilations)} must be one or more numbers, each at least 1 (published: [1,3])"
            )
        self.layers = nn.ModuleList(Branch(channels, dilations) for channels in spec.dims[:blocks])

    def sites(self) -> Sequence[Site]:
        """One on the output of each of the first blocks."""
        return [AfterBlock(i, layer.forward) for i, layer in enumerate(self.layers)]


class Branch(nn.Module):
    """x + o(x) for one block; every tensor starts as torch's own convolutions do."""

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        width, taps = channels // 2, 9
        self.dilations = tuple(dilations)
        self.down = nn.Linear(channels, width)
        self.weight = nn.Parameter(torch.empty(len(dilations), width, 3, 3).uniform_(-(taps**-0.5), taps**-0.5))
        self.bias = nn.Parameter(torch.empty(len(dilations), width).uniform_(-(taps**-0.5), taps**-0.5))
        self.up = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        return x + self.correction(x)

    def correction(self, x: Tensor) -> Tensor:
        """What is added: (B, h, w, C), nowhere below -0.17, the least of GELU."""
        narrow = depthwise_dilated(F.gelu(self.down(x)), self.weight, self.bias, self.dilations)
        return F.gelu(self.up(narrow))
