"""Masked autoencoder: masking, a light cross-attention decoder and the reconstruction loss.

He et al. 2022 (arXiv 2111.06377); the decoder attends from masked positions to visible tokens only, as in CrossMAE
(arXiv 2401.14391).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def random_split(batch: int, tokens: int, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random permutation of `tokens` patches per image -> (visible, masked) indices, `ratio` of them masked."""
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    visible = max(1, round(tokens * (1 - ratio)))
    return order[:, :visible], order[:, visible:]


def patch_targets(patches: Tensor, floor: float = 0.05) -> Tensor:
    """Patches (B, N, 3 * p * p) -> targets (B, N, 3 * p * p + 6): normalised pixels, channel means, log deviations.

    Pixels: less the patch's channel means, over the patch's standard deviation. They alone (MAE's target) would leave
    brightness out of the features. `floor` keeps the noise of flat patches small.
    """
    channels = patches.unflatten(2, (3, -1))
    mean, std = channels.mean(3), channels.std(3)
    shape = (channels - mean.unsqueeze(3)) / (channels.var(dim=(2, 3)).sqrt()[..., None, None] + floor)
    return torch.cat([shape.flatten(2), mean, torch.log(std + floor)], dim=2)


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


class MaskedAutoencoder(nn.Module):
    """Encoder on visible patches, decoder for a part of the masked ones; `forward` gives the loss.

    `mask_ratio` of the patches are hidden; of these, as many as `predict_ratio` of all patches are decoded.
    `stats_weight`: share of the loss that is on each patch's means and deviations.
    """

    encoder: Any  # a MaskedViT

    def __init__(
        self, encoder: nn.Module, *, dim: int = 128, depth: int = 2, heads: int = 4, mask_ratio: float = 0.75,
        predict_ratio: float = 0.4, stats_weight: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.dim = encoder, dim
        self.mask_ratio, self.predict_ratio, self.stats_weight = mask_ratio, predict_ratio, stats_weight
        width, self.patch = int(self.encoder.embed_dim), int(self.encoder.patch_size)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, 3 * self.patch**2 + 6)

    def decode(self, tokens: Tensor, visible: Tensor, wanted: Tensor, positions: Tensor) -> Tensor:
        """Encoded tokens (B, 1 + n, C) and patch indices (B, n), (B, Q); positions (N, dim) -> (B, Q, targets)."""
        memory = self.embed(tokens)
        memory = torch.cat([memory[:, :1], memory[:, 1:] + positions[visible]], dim=1)
        x = self.mask_token + positions[wanted]
        for block in self.blocks:
            x = block(x, memory)
        return self.predict(self.norm(x))

    def forward(self, image: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised image (B, 3, H, W) and the decoder's positions (N, dim) -> scalar loss."""
        visible, masked = random_split(len(image), len(positions), self.mask_ratio, generator)
        wanted = masked[:, : max(1, round(len(positions) * self.predict_ratio))]
        predicted = self.decode(self.encoder(image, visible), visible, wanted, positions)
        patches = F.unfold(image, self.patch, stride=self.patch).transpose(1, 2)
        target = patch_targets(patches.gather(1, wanted.unsqueeze(-1).expand(-1, -1, patches.shape[2])))
        error = (predicted - target).square()
        pixels, statistics = error[..., :-6].mean(), error[..., -6:].mean()
        return (1 - self.stats_weight) * pixels + self.stats_weight * statistics


def draw_curve(losses: list[float], path: Path) -> None:
    """Draw a loss per step as a PNG with axes: steps against loss, each step faint and the running median dark."""
    import numpy as np
    from PIL import Image, ImageDraw

    if len(losses) < 2:
        return
    width, height, left, top = 720, 400, 56, 16
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    values = np.asarray(losses)
    low, high = 0.95 * float(values.min()), float(np.quantile(values, 0.995))
    across, up = (width - left - 16) / (len(values) - 1), (height - top - 40) / max(high - low, 1e-9)

    def at(step: int, loss: float) -> tuple[float, float]:
        return left + across * step, height - 40 - up * (min(loss, high) - low)

    for tick in np.linspace(low, high, 6):
        y = at(0, tick)[1]
        canvas.line([(left, y), (width - 16, y)], fill=(220, 220, 220))
        canvas.text((8, y - 6), f"{tick:.3f}", fill="black")
    for step in np.linspace(0, len(values) - 1, 6).astype(int):
        canvas.text((at(int(step), low)[0] - 10, height - 34), str(step + 1), fill="black")
    canvas.text((width // 2 - 40, height - 18), "step (loss, MAE)", fill="black")
    canvas.line([at(i, float(v)) for i, v in enumerate(values)], fill=(190, 210, 235))
    median = [float(np.median(values[max(0, i - 24) : i + 1])) for i in range(len(values))]
    canvas.line([at(i, v) for i, v in enumerate(median)], fill=(20, 60, 140), width=2)
    image.save(path, "PNG")
