"""ExPLoRA: low-rank updates of attention, a block or two trained in full.

Khanna et al., "ExPLoRA: Parameter-Efficient Extended Pre-Training to Adapt Vision Transformers under Domain Shifts",
https://arxiv.org/abs/2406.10973. Made for going on with the backbone's own self-supervised objective; any loss will do.
"""

from collections.abc import Sequence
from typing import cast

from torch import nn

from vfmadapt.adapters._lora import LowRank
from vfmadapt.adapters.owned import Copies
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Merger, OnLinear, Site, UserError


class ExPLoRA(Adapter):
    """Trains low-rank updates of q and v in every block but `unfrozen`, and those blocks whole; identity when new.

    W + up down / rank: alpha is 1 whatever the rank. Parameters with rank 64 and the last block unfrozen: 18,627,584
    for DINOv2-L, 9,252,096 for DINOv2-B; 2,048 and 1,536 fewer for a ViT without LayerScale.
    Not reproduced from the release (samar-khanna/ExPLoRA): low rank on the projection or the MLP drops the layer's
    pretrained weight; switching to evaluation merges, so that a teacher which averages parameters no longer moves.

    Args:
        spec: the backbone's.
        rank: of the updates.
        unfrozen: blocks that are trained whole, negative ones counted from the last.
        cls_token: train the class token too.
        norms: train the norms of all blocks too, and the final norm where features come through it.

    Raises:
        UserError: a setting out of its range; `cls_token` on a backbone without one (when attached).
    """

    unmergeable = ""
    hint = (
        "explora is made for continued pre-training on unlabelled images (tools/pretrain.py method=explora); here it "
        "learns from labels"
    )

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        rank: int = 64,
        unfrozen: Sequence[int] = (-1,),
        cls_token: bool = False,
        norms: bool = False,
    ) -> None:
        super().__init__()
        depth = spec.depth
        if rank < 1:
            raise UserError(f"explora: rank={rank} must be at least 1 (published: 64, and 8 for fine-tuning)")
        if not all(-depth <= i < depth for i in unfrozen):
            raise UserError(f"explora: unfrozen={list(unfrozen)} must be from {-depth} to {depth - 1} ({depth} blocks)")
        whole = sorted({i % depth for i in unfrozen})
        self.roles = [f"blocks.{i}" for i in whole] + ["cls_token"] * cls_token + ["norms"] * norms
        self.copies = Copies()
        self.updates = nn.ModuleDict()
        for i in sorted(set(range(depth)) - set(whole)):
            pairs = {role: LowRank(*spec.widths(role)[i], rank, scale=1 / rank) for role in ("q", "v")}
            self.updates[str(i)] = nn.ModuleDict(pairs)

    def bind(self, backbone: Backbone) -> None:
        """Copy what is trained whole."""
        for role in self.roles:
            self.copies.take(backbone, role)

    def sites(self) -> Sequence[Site]:
        """The copies, and q and v of the other blocks."""
        return [self.copies.site(), *(OnLinear(role, i, pair.forward) for role, i, pair in self._pairs())]

    def merge(self, into: Merger) -> None:
        """Add the updates to the weights and put the copies in."""
        for role, i, pair in self._pairs():
            into.add(role, i, weight=pair.delta_weight())
        self.copies.merge(into)

    def _pairs(self) -> list[tuple[str, int, LowRank]]:
        blocks = ((int(i), cast(nn.ModuleDict, block)) for i, block in self.updates.items())
        return [(role, i, cast(LowRank, pair)) for i, block in blocks for role, pair in block.items()]
