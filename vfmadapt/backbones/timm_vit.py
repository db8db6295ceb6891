"""Plain ViT, DINOv2, DINOv3 and CLIP image towers of timm behind the backbone contract.

timm's ViT (https://arxiv.org/abs/2010.11929) and Eva (its class for RoPE models such as DINOv3,
https://arxiv.org/abs/2508.10104) differ in what their blocks take; everything else is shared.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.backbones._frozen import FrozenNet
from vfmadapt.backbones._roles import Net, rotary_attention, unbypass
from vfmadapt.backbones._weights import RGB
from vfmadapt.contracts import Blank, Features, UserError

POSITIONS_KEPT = 16
"""Grid sizes whose resized position embeddings are kept; a raster uses one, mixed image folders a few."""


class TimmBackbone(FrozenNet):
    """A timm ViT as a frozen backbone: any H x W, any number of bands, features of any block.

    Args:
        net: timm VisionTransformer or Eva with `dynamic_img_size`, three input channels.
        name: what the adapter file calls it.
        bands: number of bands or their names; see `widen_patch_embed`.
        settings: further ones of `FrozenNet`.
    """

    def __init__(self, net: Net, *, name: str, bands: int | Sequence[str] = RGB, **settings: Any) -> None:
        _require_plain_vit(net, name)
        unbypass(net)
        depth, patch = len(net.blocks), net.patch_embed.patch_size[0]
        super().__init__(
            net,
            name=name,
            bands=bands,
            dims=(net.embed_dim,) * depth,
            strides=(patch,) * depth,
            windowed=(False,) * depth,
            prefix_tokens=net.num_prefix_tokens,
            **settings,
        )
        self._patch: int = patch
        self._frozen_positions = [net.pos_embed]  # in a list, or torch would take it for a second parameter
        self._positions: dict[tuple[Any, ...], tuple[Tensor | None, Tensor | None]] = {}

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an H x W image, the last row and column padded where needed."""
        return -(-height // self._patch), -(-width // self._patch)

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, P + h*w, C) -> prefix (B, P, C), grid (B, h, w, C)."""
        prefix = self.spec.prefix_tokens
        return tokens[:, :prefix], tokens[:, prefix:].unflatten(1, grid)

    def join(self, prefix: Tensor, grid: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([prefix, grid.flatten(1, 2)], dim=1)

    def widen_prefix(self, index: int, tokens: int) -> None:
        """Let a block's rotary attention leave `tokens` more prefix tokens unrotated; other attention does not care."""
        if (attention := rotary_attention(self.net.blocks[index])) is not None:
            attention.num_prefix_tokens += tokens

    def forward(self, image: Tensor, layers: Sequence[int]) -> Features:
        """Normalised image (B, bands, H, W) -> features of the blocks `layers` (ascending or not).

        Un-normalised, but for the last block's where `final_norm` is set.
        """
        self._check_image(image)
        grid = self.grid_size(image.shape[-2], image.shape[-1])
        tokens, rope = self._embed(image, grid)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(self.net.blocks[: max(layers) + 1]):
            tokens = self._run(block, tokens, {} if rope is None else {"rope": rope})
            if index in layers:
                normed = self.spec.final_norm and index == self.spec.depth - 1
                kept[index] = self.split(self.net.norm(tokens) if normed else tokens, grid)
        return self._features(layers, kept)

    def tokens(self, image: Tensor, *, keep: Tensor | None = None, blank: Blank | None = None) -> Tensor:
        """Normalised image -> normed tokens (B, P + N, C) after the last block; see `PatchBackbone`."""
        self._check_image(image)
        grid, prefix = self.grid_size(image.shape[-2], image.shape[-1]), self.spec.prefix_tokens
        tokens, rope = self._embed(image, grid, blank)
        if keep is not None:
            first = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
            chosen = torch.cat([first, keep + prefix], dim=1)
            tokens = tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            rope = None if rope is None else rope[keep].unsqueeze(1)  # one table per image, the same for all heads
        for block in self.net.blocks:
            tokens = self._run(block, tokens, {} if rope is None else {"rope": rope})
        normed: Tensor = self.net.norm(tokens)
        return normed

    def _embed(self, image: Tensor, grid: tuple[int, int], blank: Blank | None = None) -> tuple[Tensor, Tensor | None]:
        """Patches, class and register tokens and position embeddings -> tokens (B, P + h*w, C) and the rotary table."""
        net = self.net
        height, width = image.shape[-2:]
        pad = (0, grid[1] * self._patch - width, 0, grid[0] * self._patch - height)
        tokens = net.patch_embed(F.pad(image, pad, mode="replicate") if any(pad) else image)  # (B, h, w, C)
        if blank is not None:
            tokens = torch.where(blank.patches.unsqueeze(-1), blank.token.to(tokens.dtype), tokens)
        tokens = tokens.flatten(1, 2)
        position, rope = self._position(grid, tokens)
        extra = [t.expand(len(tokens), -1, -1) for t in (net.cls_token, net.reg_token) if t is not None]
        if position is not None and net.no_embed_class:
            tokens = tokens + position
        if extra:
            tokens = torch.cat([*extra, tokens], dim=1)
        if position is not None and not net.no_embed_class:
            tokens = tokens + position
        return net.norm_pre(tokens), rope

    def _position(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Absolute embedding (1, P or 0 + h*w, C) and rotary table; computed once per grid, device and dtype."""
        net = self.net
        trained = net.pos_embed is not self._frozen_positions[0]  # a trained copy stands in: nothing of it may be kept
        key = (*grid, like.device, like.dtype)
        if key in self._positions and not trained:
            return self._positions[key]
        position = rope = None
        if net.pos_embed is not None:
            position = _resize_positions(net, grid)
        if getattr(net, "rope", None) is not None:
            rope = net.rope.get_embed(shape=grid)
        if not trained:
            if len(self._positions) >= POSITIONS_KEPT:
                self._positions.pop(next(iter(self._positions)))
            self._positions[key] = position, rope
        return position, rope


def _resize_positions(net: Net, grid: tuple[int, int]) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    return resample_abs_pos_embed(net.pos_embed, list(grid), list(net.patch_embed.grid_size), prefix)


def _require_plain_vit(net: Net, name: str) -> None:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(net, VisionTransformer | Eva) or getattr(net, "rope_mixed", False):
        raise UserError(
            f"{name} is a {type(net).__name__}; this wrapper takes timm's VisionTransformer and Eva (DINOv3)"
        )
    if not net.dynamic_img_size:
        raise UserError(
            f"{name} was built for one image size; build it with timm.create_model(..., dynamic_img_size=True)"
        )
