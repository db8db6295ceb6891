"""Linear probe: one linear classifier per token of the last grid."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head
from vfmadapt.heads._resize import resolve_layers, to_image


class LinearHead(Head):
    """LayerNorm over channels (features come un-normalised), a linear classifier per token, bilinear upsampling.

    `layers`: the one block to read, the last by default; negative indices count from the end. `cells`: logits per side
    of a token; with 4 each token gives 4 x 4 logits of its own, as masked-image models do with pixels.
    """

    def __init__(self, spec: BackboneSpec, *, num_classes: int, layers: Sequence[int] = (-1,), cells: int = 1) -> None:
        super().__init__()
        self.layers = resolve_layers(spec, tuple(layers))[-1:]
        channels = spec.dims[self.layers[0]]
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, num_classes * cells**2)
        self.cells = cells

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of the one layer -> logits (B, K, H, W)."""
        grid = features.grids[0]
        logits: Tensor = self.classifier(self.norm(grid.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        logits = F.pixel_shuffle(logits, self.cells)
        return to_image(logits, (grid.shape[2], grid.shape[3]), features.strides[0], size)
