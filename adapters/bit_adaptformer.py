"""Bi-AdaptFormer: a bottleneck of N-bit weights parallel to the MLP of every block.

Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
ICCV 2023, https://arxiv.org/abs/2307.16867. The quantised layer's equations are in `vfmadapt.kernels.bit_linear`.
"""

from collections.abc import Sequence

from torch import nn

from vfmadapt.adapters._quantised import Bottleneck, QuantisedAdapter, check_settings
from vfmadapt.contracts import BackboneSpec, ParallelMLP, Site


class BitAdaptFormer(QuantisedAdapter):
    """A bottleneck of N-bit weights beside each MLP, reading the residual stream before the second norm.

    y = h + MLP(norm(h)) + s · up(dropout(ReLU(down(h)))), down and up without biases and quantised in every forward,
    with a straight-through gradient. Only approximately the identity when new: up is drawn from ±0.002 (published),
    since zeros have no deviation to normalise by; at 32 bits up is zero. 589,824 weights for ViT-B with dim 32,
    73,920 bytes packed at 1 bit; 2,496 bytes with dim 1.

    Of the original's faults these are not reproduced:
    - its packed file silently drops the last weights where 8 / bits does not divide their number: ours fills the byte;
    - its files of 32-bit adapters hold no adapter (JieShibo/PETL-ViT#21): packing is refused, the adapter file has all.

    Args:
        spec: the backbone's; blocks may differ in width.
        dim: width of each bottleneck (published: 32 and 1).
        bits: per weight, 1, 2, 4 or 8; 32 for plain weights.
        scale: s (published: searched per task in 0.01, 0.1, 1, 10, 100).
        dropout: on the bottleneck's activations.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "its bottlenecks have a ReLU, so they are not linear in the frozen weights"

    def __init__(
        self, spec: BackboneSpec, *, dim: int = 32, bits: int = 1, scale: float = 1.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_settings("bit_adaptformer", dim=dim, bits=bits, scale=scale, dropout=dropout)
        self.layers = nn.ModuleList(
            Bottleneck((width, width), dim=dim, bits=bits, scale=scale, dropout=dropout, activation=nn.ReLU())
            for width in spec.dims
        )

    def sites(self) -> Sequence[Site]:
        """One per block."""
        return [ParallelMLP(i, layer.forward) for i, layer in enumerate(self.layers)]
