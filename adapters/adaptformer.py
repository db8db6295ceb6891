"""AdaptFormer: a bottleneck beside the MLP of every block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", https://arxiv.org/abs/2205.13535.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, ParallelMLP, Site, UserError


class AdaptFormer(Adapter):
    """A block's output gains s U drop(ReLU(D h)), h the residual stream between attention and MLP.

    h is not normalised, as in the released image code, and prefix tokens are adapted like any other. U starts at 0, so
    nothing changes until it is trained. 1,189,632 parameters for ViT-B with dim 64.

    Args:
        spec: the backbone's; blocks may differ in width.
        dim: width of the bottleneck (published: 64).
        scale: the fixed s (published: 0.1).
        dropout: of the narrow activations in training (published: 0.1).

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "a ReLU stands between its two layers"

    def __init__(self, spec: BackboneSpec, *, dim: int = 64, scale: float = 0.1, dropout: float = 0.1) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"adaptformer: dim={dim} must be at least 1 (published: 64)")
        if not scale > 0:
            raise UserError(f"adaptformer: scale={scale} must be above 0, or nothing is learnt (published: 0.1)")
        if not 0 <= dropout < 1:
            raise UserError(f"adaptformer: dropout={dropout} must be at least 0 and below 1 (published: 0.1)")
        self.branches = nn.ModuleList(Branch(channels, dim, scale, dropout) for channels in spec.dims)

    def sites(self) -> Sequence[Site]:
        """One per block."""
        return [ParallelMLP(i, branch.forward) for i, branch in enumerate(self.branches)]


class Branch(nn.Module):
    """s U drop(ReLU(D h))."""

    def __init__(self, channels: int, dim: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.zeros_(self.down.bias)  # D's weight: Kaiming-uniform, as nn.Linear draws it
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden: Tensor = self.up(self.dropout(F.relu(self.down(h))))
        return self.scale * hidden
