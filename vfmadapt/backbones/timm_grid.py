"""SAM's ViT and SAM2's Hiera, as timm has them, behind the backbone contract: tokens stay a grid (B, h, w, C).

SAM: https://arxiv.org/abs/2304.02643; SAM2: https://arxiv.org/abs/2408.00714. Their blocks partition the grid into
windows by themselves; there are no prefix tokens, and no sequence that prompts could lengthen.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vfmadapt.backbones._frozen import FrozenNet
from vfmadapt.backbones._roles import Net, linear_widths, patch_convolution
from vfmadapt.backbones._weights import RGB
from vfmadapt.contracts import Features, UserError


class GridBackbone(FrozenNet):
    """SAM's ViT or SAM2's Hiera as a frozen backbone: any H x W (padded to its coarsest stride), any number of bands.

    Args:
        net: timm VisionTransformerSAM or HieraDet, three input channels.
        name: what the adapter file calls it.
        bands: number of bands or their names; see `widen_patch_embed`.
        settings: further ones of `FrozenNet`.
    """

    def __init__(
        self, net: Net, *, name: str, bands: int | Sequence[str] = RGB, trunk: str = "", **settings: Any
    ) -> None:
        has_blocks = net.get_submodule(trunk)
        strides, widths = _strides(has_blocks), linear_widths(has_blocks)["fc2"]
        super().__init__(
            net,
            name=name,
            bands=bands,
            dims=[channels for _, channels in widths],
            strides=strides,
            windowed=(True,) * len(widths),
            prefix_tokens=0,
            trunk=trunk,
            **settings,
        )
        self._multiple = strides[-1]
        if (tile := self._position_tile()) > 1:
            self._multiple = math.lcm(strides[-1], strides[0] * tile)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of the first block's grid for an H x W image, padding included."""
        step, stride = self._multiple, self.spec.strides[0]
        return -(-height // step) * step // stride, -(-width // step) * step // stride

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) -> prefix (B, 0, C), grid (B, h, w, C)."""
        return tokens.new_empty(tokens.shape[0], 0, tokens.shape[-1]), tokens

    def join(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split`."""
        return grid

    def widen_prefix(self, index: int, tokens: int) -> None:
        """Refused: raises UserError."""
        raise UserError(f"{self.spec.name} attends within windows, so prompt tokens do not fit; choose another adapter")

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> un-normalised features of the blocks `layers` (ascending or not)."""
        self._check_image(image)
        height, width = image.shape[-2:]
        pad = (0, -width % self._multiple, 0, -height % self._multiple)
        tokens = self._embed(F.pad(image, pad, mode="replicate") if any(pad) else image)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(self.trunk.blocks[: max(layers) + 1]):
            tokens = self._run(block, tokens, {})
            if index in layers:
                kept[index] = self.split(tokens, (0, 0))
        return self._features(layers, kept)

    def _position_tile(self) -> int:
        """Side of the position embedding that is tiled over the first grid, 1 where there is none."""
        return 1 if _is_sam(self.net) else self.net.window_spec[0]

    def _embed(self, image: Tensor) -> Tensor:
        from timm.layers import resample_abs_pos_embed_nhwc

        net = self.net
        tokens: Tensor = net.patch_embed(image)
        if not _is_sam(net):
            embedded: Tensor = net._pos_embed(tokens)
            return embedded
        if net.pos_embed is not None:
            tokens = tokens + resample_abs_pos_embed_nhwc(net.pos_embed, list(tokens.shape[1:3]))
        normed: Tensor = net.norm_pre(tokens)
        return normed


def keeps_grid(net: Net) -> bool:
    """Whether a timm network is one that `GridBackbone` takes."""
    from timm.models.hieradet_sam2 import HieraDet

    return _is_sam(net) or isinstance(net, HieraDet)


def _is_sam(net: Net) -> bool:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return isinstance(net, VisionTransformerSAM)


def _strides(net: Net) -> list[int]:
    """Pixels per cell after each block."""
    stride, found = patch_convolution(net).stride[0], []
    for block in net.blocks:
        pooled = getattr(block, "q_stride", None) or getattr(block, "query_stride", None)
        stride *= pooled[0] if pooled else 1
        found.append(stride)
    return found
