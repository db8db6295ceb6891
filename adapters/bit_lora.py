"""Bi-LoRA: low-rank updates of the queries and values with N-bit weights.

Jie, Wang, Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
ICCV 2023, https://arxiv.org/abs/2307.16867. The quantised layer's equations are in `vfmadapt.kernels.bit_linear`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmadapt.adapters._quantised import Bottleneck, QuantisedAdapter, check_settings
from vfmadapt.contracts import BackboneSpec, Merger, OnLinear, Site

ROLES = ("q", "v")


class BitLoRA(QuantisedAdapter):
    """LoRA of N-bit weights on the queries and values of every block.

    q += s · up(dropout(down(x))), x the normalised input of the attention, and v likewise, with weights of their own;
    down and up without biases and quantised in every forward, with a straight-through gradient. Only approximately the
    identity when new: up is drawn from ±0.002 (published), since zeros have no deviation to normalise by; at 32 bits up
    is zero. 1,179,648 weights for ViT-B with dim 32, 147,840 bytes packed at 1 bit; 4,992 bytes with dim 1.

    Of the original's faults these are not reproduced:
    - its packed file silently drops the last weights where 8 / bits does not divide their number: ours fills the byte;
    - its files of 32-bit adapters hold no adapter (JieShibo/PETL-ViT#21): packing is refused, the adapter file has all.

    Args:
        spec: the backbone's; layers may differ in width.
        dim: rank of each update (published: 32 and 1).
        bits: per weight, 1, 2, 4 or 8; 32 for plain weights.
        scale: s (published: searched per task in 0.01, 0.1, 1, 10, 100).
        dropout: between down and up.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = ""

    def __init__(
        self, spec: BackboneSpec, *, dim: int = 32, bits: int = 1, scale: float = 1.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_settings("bit_lora", dim=dim, bits=bits, scale=scale, dropout=dropout)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    role: Bottleneck(
                        spec.widths(role)[i],
                        dim=dim,
                        bits=bits,
                        scale=scale,
                        dropout=dropout,
                        activation=nn.Identity(),
                    )
                    for role in ROLES
                }
            )
            for i in range(spec.depth)
        )

    def sites(self) -> Sequence[Site]:
        """Two per block."""
        return [OnLinear(role, i, layer.forward) for role, i, layer in self._updates()]

    def merge(self, into: Merger) -> None:
        """ΔW = s W_up W_down, of the weights as they act."""
        for role, i, layer in self._updates():
            weight = into.place(role, i).module.weight
            assert isinstance(weight, Tensor)
            identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            into.add(role, i, layer.up(layer.scale * layer.down(identity)).T)

    def _updates(self) -> list[tuple[str, int, Bottleneck]]:
        found = []
        for i, layers in enumerate(self.layers):
            assert isinstance(layers, nn.ModuleDict)
            found += [(role, i, layer) for role, layer in layers.items() if isinstance(layer, Bottleneck)]
        return found
