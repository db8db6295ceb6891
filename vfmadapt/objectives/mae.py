"""Masked autoencoder: hidden patches are told from the visible ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377; the decoder attends
from hidden positions to visible tokens only, as in CrossMAE, https://arxiv.org/abs/2401.14391.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.backbones.scratch import sincos_positions
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.objectives.objective import Objective
from vfmadapt.objectives.views import jitter, random_crop


class MaskedAutoencoder(Objective):
    """Encodes the visible patches, decodes a part of the hidden ones, compares with their normalised pixels.

    Args:
        backbone: adapted; gives widths, bands and prefix tokens.
        sizes: crop sizes in pixels, multiples of the patch; each epoch has one, in turn.
        scale: image pixels for a crop's pixel, least and greatest.
        mask_ratio: share of the patches that are hidden.
        predict_ratio: share of all patches that are decoded, at most the hidden ones.
        stats_weight: share of the loss that is on each patch's band means and log deviations, which normalised pixels
            leave out; 0 is the paper's loss.
        dim, depth, heads: of the decoder.
        strength: of the variation of contrast and brightness, see `jitter`.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self, backbone: AdaptedBackbone, *, sizes: Sequence[int] = (224,), scale: tuple[float, float] = (0.5, 1.6),
        mask_ratio: float = 0.75, predict_ratio: float = 0.4, stats_weight: float = 0.5,
        dim: int = 128, depth: int = 2, heads: int = 4, strength: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        spec = backbone.spec
        self.patch, self.bands, self.prefix = spec.strides[0], spec.bands, spec.prefix_tokens
        _check_sizes("sizes", sizes, self.patch)
        if dim < 4 or dim % 4 or dim % heads:
            raise UserError(f"objective.dim={dim} objective.heads={heads}: dim is a multiple of 4 and of heads")
        if not 0 < mask_ratio < 1 or not 0 < predict_ratio <= 1 or not 0 < scale[0] <= scale[1]:
            raise UserError(
                f"objective.mask_ratio={mask_ratio} predict_ratio={predict_ratio} scale={list(scale)}: the ratios are "
                "between 0 and 1, scale is the least and the greatest, both above 0"
            )
        self.sizes, self.scale, self.dim, self.strength = tuple(sizes), scale, dim, strength
        self.mask_ratio, self.predict_ratio, self.stats_weight = mask_ratio, predict_ratio, stats_weight
        self.smallest, self.window = max(sizes), math.ceil(max(sizes) * scale[1])
        self.embed = nn.Linear(spec.dims[-1], dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, self.bands * (self.patch**2 + 2))

    def sample(self, square: Tensor, draw: np.random.Generator, epoch: int) -> dict[str, Tensor]:
        """A crop, and the indices of the patches that are visible and of those to be decoded."""
        size = self.sizes[epoch % len(self.sizes)]
        tokens = (size // self.patch) ** 2
        order = torch.from_numpy(draw.permutation(tokens))
        visible = max(1, round(tokens * (1 - self.mask_ratio)))
        wanted = max(1, round(tokens * self.predict_ratio))
        return {
            "image": jitter(random_crop(square, size, self.scale, draw), self.strength, draw),
            "keep": order[:visible],
            "wanted": order[visible : visible + wanted],
        }

    def forward(self, backbone: AdaptedBackbone, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reconstruction loss and its two parts."""
        image, keep, wanted = batch["image"], batch["keep"], batch["wanted"]
        cells = image.shape[-1] // self.patch
        positions = sincos_positions(cells, cells, self.dim).to(image)
        predicted = self.decode(backbone.tokens(image, keep=keep), keep, wanted, positions)
        patches = F.unfold(image, self.patch, stride=self.patch).mT
        target = patch_targets(patches.gather(1, wanted.unsqueeze(-1).expand(-1, -1, patches.shape[2])), self.bands)
        error = (predicted - target).square()
        pixels, statistics = error[..., : -2 * self.bands].mean(), error[..., -2 * self.bands :].mean()
        loss = (1 - self.stats_weight) * pixels + self.stats_weight * statistics
        return {"loss": loss, "pixels": pixels.detach(), "statistics": statistics.detach()}

    def decode(self, tokens: Tensor, visible: Tensor, wanted: Tensor, positions: Tensor) -> Tensor:
        """Encoded tokens (B, P + n, C), patch indices (B, n), (B, Q), positions (N, dim) -> targets (B, Q, T)."""
        memory = self.embed(tokens)
        memory = torch.cat([memory[:, : self.prefix], memory[:, self.prefix :] + positions[visible]], dim=1)
        x = self.mask_token + positions[wanted]
        for block in self.blocks:
            x = block(x, memory)
        return self.predict(self.norm(x))


class CrossBlock(nn.Module):
    """Queries attend to visible tokens, then an MLP; both residual and pre-normed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, Q, C), memory (B, M, C) -> (B, Q, C)."""
        query = self.query(self.norm_query(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def patch_targets(patches: Tensor, bands: int, floor: float = 0.05) -> Tensor:
    """Patches (B, N, C * p * p) -> (B, N, C * p * p + 2 C): normalised pixels, band means, log deviations.

    Pixels: less the patch's band means, over the patch's standard deviation. They alone (MAE's target) would leave
    brightness out of the features. `floor` keeps the noise of flat patches small.
    """
    values = patches.unflatten(2, (bands, -1))
    mean, std = values.mean(3), values.std(3)
    shape = (values - mean.unsqueeze(3)) / (values.var(dim=(2, 3)).sqrt()[..., None, None] + floor)
    return torch.cat([shape.flatten(2), mean, torch.log(std + floor)], dim=2)


def _check_sizes(name: str, sizes: Sequence[int], patch: int) -> None:
    if not sizes or (wrong := [s for s in sizes if s < patch or s % patch]):
        which = f"{wrong[0]} is no multiple" if sizes else "give some multiples"
        raise UserError(f"objective.{name}={list(sizes)}: {which} of the patch ({patch} pixels)")
