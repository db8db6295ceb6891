"""Visual prompt tuning: learned tokens beside those of the image.

Jia et al., "Visual Prompt Tuning", https://arxiv.org/abs/2203.12119.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, Prompts, Site, UserError


class VPT(Adapter):
    """Prompt tokens between the prefix tokens and the patches, which attention reads; they have no position.

    Deep: every block gets prompts of its own, and what the block before made of its ones is dropped. Shallow: only the
    first block gets new ones, the others go on with what became of them. Not the identity when new: attention also
    spends weight on prompts, whatever they hold.

    Parameters: prompts x channels x blocks (deep; 460,800 for 50 on ViT-B) or prompts x channels (shallow).
    All images of a batch share one dropout mask; the release draws one for each.

    Args:
        spec: the backbone's; its blocks must attend globally.
        prompts: tokens per block.
        deep: prompts for every block, not only for the first.
        dropout: share of the prompts' values dropped in training, at least 0 and below 1.

    Raises:
        UserError: a setting out of its range, or blocks that attend within windows.
    """

    unmergeable = "its prompts lengthen the sequence of tokens"

    def __init__(self, spec: BackboneSpec, *, prompts: int = 50, deep: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        if prompts < 1:
            raise UserError(f"vpt: prompts={prompts} must be at least 1 (published: 1 to 200)")
        if not 0 <= dropout < 1:
            raise UserError(f"vpt: dropout={dropout} must be at least 0 and below 1 (published: 0 and 0.1)")
        if any(spec.windowed):
            raise UserError(
                f"vpt: {spec.name} attends within windows, where prompt tokens do not fit; "
                "choose a plain ViT or another adapter"
            )
        self.dropout, self.depth = dropout, spec.depth
        # as Glorot's for a map from a patch's values to the channels; the stride is the side of a patch
        bound = math.sqrt(6 / (spec.bands * spec.strides[0] ** 2 + spec.embed_dim))
        self.prompts = nn.Parameter(torch.empty(spec.depth if deep else 1, prompts, spec.embed_dim))
        nn.init.uniform_(self.prompts, -bound, bound)

    def sites(self) -> Sequence[Site]:
        """One per block."""
        own, count = self.prompts.shape[:2]
        first = [Prompts(i, count, partial(self.new, i)) for i in range(own)]
        return [*first, *(Prompts(i, count, self.carry) for i in range(own, self.depth))]

    def new(self, index: int, _previous: Tensor | None) -> Tensor:
        """The prompts (n, C) of block `index`."""
        return F.dropout(self.prompts[index], self.dropout, self.training)

    def carry(self, previous: Tensor | None) -> Tensor:
        """What the previous block made of its prompts, (B, n, C)."""
        assert previous is not None
        return previous
