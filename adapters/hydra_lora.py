"""Hydra: a parallel and a sequential low-rank branch at the attention's projection and at the MLP's last layer.

Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", https://arxiv.org/abs/2309.06922.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from vfmadapt.adapters._affine import AffineBottleneck, check_bottleneck, each, fold_after
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnLinear, OnOutput, Site, UserError

ROLES = ("proj", "fc2")


class HydraLora(Adapter):
    """Two affine bottlenecks at `proj` and `fc2` of every block: one beside the frozen layer and one behind it.

    With z = W x + b the frozen output: y = z + s (B_p(A_p x + a_p) + b_p) + s (B_s(A_s z + a_s) + b_s). The frozen
    network until trained. 239,712 parameters on ViT-B with rank 2. Not reproduced from the release (extremebird/Hydra):
    its merge takes fc2's weight for the attention's projection too, and crashes there (set_hydraWeight).

    Args:
        spec: the backbone's; layers may differ in width.
        rank: width of each bottleneck.
        scale: s; published values were searched per task.
        dropout: share of a bottleneck's values that training drops.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""

    def __init__(self, spec: BackboneSpec, *, rank: int = 2, scale: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"hydra_lora: rank={rank} must be at least 1 (published: 2)")
        check_bottleneck("hydra_lora", scale, dropout)
        self.parallel, self.sequential = nn.ModuleDict(), nn.ModuleDict()
        for role in ROLES:
            widths = spec.widths(role)
            self.parallel[role] = nn.ModuleList(
                AffineBottleneck(width, out, rank, scale=scale, dropout=dropout) for width, out in widths
            )
            self.sequential[role] = nn.ModuleList(
                AffineBottleneck(out, out, rank, scale=scale, dropout=dropout) for _, out in widths
            )

    def sites(self) -> Sequence[Site]:
        """The sequential branch first, so that it reads what the frozen layer gives."""
        found: list[Site] = []
        for role, index, parallel, sequential in self._branches():
            found += [OnOutput(role, index, sequential.residual), OnLinear(role, index, parallel.forward)]
        return found

    def merge(self, into: Merger) -> None:
        """W <- W + M_p + M_s W, b <- b + c_p + M_s b + c_s."""
        for role, index, parallel, sequential in self._branches():
            fold_after(into, role, index, sequential)
            into.add(role, index, *parallel.folded())

    def _branches(self) -> Iterator[tuple[str, int, AffineBottleneck, AffineBottleneck]]:
        """(role, block, parallel, sequential)."""
        for (role, index, parallel), (_, _, sequential) in zip(each(self.parallel), each(self.sequential), strict=True):
            yield role, index, parallel, sequential
