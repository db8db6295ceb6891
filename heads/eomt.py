"""EoMT: queries join the tokens of a ViT's last blocks and come out as masks with classes.

Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model", https://arxiv.org/abs/2503.19108; the blocks
stay frozen here, and an adapter may change them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import Adapter, BackboneSpec, Features, Head, Instances, Prompts, Site, UserError
from vfmadapt.heads._layers import LayerNorm2d
from vfmadapt.heads._mask_loss import mask_loss, mask_targets
from vfmadapt.heads._resize import to_image

FINEST = 4
"""Pixels per cell of the masks, about, as published."""

SMALLEST_SCORE = 1e-6
"""Of a class at a pixel, whose logarithm is its logit: float32 tells no smaller shares of 1 apart."""


class EomtHead(Head):
    """Learned queries in the last blocks; each gives a mask and a class, or "nothing".

    Trained by its own loss: labelled masks are matched with queries, and every block's predictions are compared with
    them. While it trains, a query attends only to the patches in the mask that it predicts before a block; this fades
    from the first of the blocks to the last, until none is left (mask annealing, §3.3), so that the trained model runs
    the blocks as they are. Logits of classes are log sum_q p_q(class) m_q(pixel).

    Args:
        spec: the backbone's; its blocks must attend globally.
        num_classes: K.
        queries: learned ones (published: 100 for label maps, 200 for objects).
        blocks: the last ones, which the queries pass (published: 3 for ViT-S and -B, 4 for -L, 5 for -g); a shallower
            backbone keeps its first block to itself.
        doublings: of the grid for the masks; by default until a cell has about 4 pixels.
        regions: the labelled masks are the connected regions of each class, so that the model tells objects apart; else
            one mask per class.
        linked: take the queries from the adapter (rein with link_queries=true, query_dim the backbone's channels).

    Raises:
        UserError: a backbone of one block or with windows, or a setting out of its range.
    """

    shares: Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        queries: int = 100,
        blocks: int = 3,
        doublings: int | None = None,
        regions: bool = False,
        linked: bool = False,
    ) -> None:
        super().__init__()
        if any(spec.windowed) or spec.depth < 2:
            raise UserError(
                f"eomt: {spec.name} attends within windows or has one block only, where queries find no place; "
                "choose a plain ViT or head=upernet"
            )
        if queries < 1 or blocks < 1 or (doublings is not None and doublings < 0):
            raise UserError(
                f"head.queries={queries} head.blocks={blocks} head.doublings={doublings}: "
                "give at least 1 query, 1 block and 0 doublings"
            )
        blocks, channels, stride = min(blocks, spec.depth - 1), spec.dims[-1], spec.strides[-1]
        self.layers = tuple(range(spec.depth - blocks - 1, spec.depth))
        self.regions, self.linked = regions, linked
        self._source: tuple[Adapter, ...] = ()
        self.query = None if linked else nn.Parameter(torch.randn(queries, channels))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.classifier = nn.Linear(channels, num_classes + 1)
        layers = [nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU()]
        self.embed = nn.Sequential(*layers, nn.Linear(channels, channels))
        if doublings is None:
            doublings = max(round(math.log2(stride / FINEST)), 0)
        self.upsample = nn.Sequential(*(_doubling(channels) for _ in range(doublings)))
        self.register_buffer("shares", torch.ones(blocks))

    def sites(self, adapters: Sequence[Adapter]) -> Sequence[Site]:
        """Queries before the first of the last blocks, and what became of them before each other one.

        Raises:
            UserError: linked, but no adapter has queries of the backbone's width.
        """
        if self.linked:
            # in a tuple they are no part of this module
            self._source = tuple(a for a in adapters if type(a).queries is not Adapter.queries)
            if not self._source:
                raise UserError(
                    "head.linked=true: no adapter has queries; use adapter=rein adapter.link_queries=true, or "
                    "head.linked=false"
                )
        count, width = self.queries().shape
        if width != self.norm.weight.shape[0]:
            raise UserError(
                f"head.linked=true: the adapter's queries have {width} channels, the backbone {len(self.norm.weight)}; "
                f"set adapter.query_dim={len(self.norm.weight)}"
            )
        return [
            Prompts(block, count, self.enter if i == 0 else self.go_on, partial(self.attended, i))
            for i, block in enumerate(self.layers[1:])
        ]

    def queries(self) -> Tensor:
        """The queries (Q, C), the head's own or the adapter's."""
        return self._source[0].queries() if self.query is None else self.query

    def enter(self, _previous: Tensor | None) -> Tensor:
        """The queries before the first of the blocks."""
        return self.queries()

    def go_on(self, previous: Tensor | None) -> Tensor:
        """What the block before made of them, (B, Q, C)."""
        assert previous is not None
        return previous

    @torch.no_grad()
    def attended(self, number: int, queries: Tensor, grid: Tensor) -> Tensor | None:
        """Queries (B, Q, C) and grid (B, h, w, C) before a block -> the cells that each may attend to, (B, Q, h, w).

        In training a query is bound to its mask at random, with the block's share; else all are, or none.
        """
        share = float(self.shares[number])
        if share == 0 or (not self.training and share < 0.5):
            return None
        _, masks = self.predict(queries, grid.permute(0, 3, 1, 2))
        inside = F.interpolate(masks.float(), grid.shape[1:3], mode="bilinear", align_corners=False) > 0
        if self.training and share < 1:
            inside = inside | (torch.rand(queries.shape[:2], device=queries.device) > share)[..., None, None]
        return inside

    def after_step(self, step: int, total: int) -> None:
        """Fade the binding to masks: one block after the other, by the power 0.9, as published."""
        parts = len(self.shares) + 2
        for i in range(len(self.shares)):
            faded = min(max(parts * step / total - (i + 1), 0.0), 1.0)
            self.shares[i] = (1 - faded) ** 0.9

    def predict(self, queries: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C), grid (B, C, h, w) -> logits of classes (B, Q, K + 1) and of masks (B, Q, h', w')."""
        found = self.norm(queries)
        fine = self.upsample(self.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.classifier(found), torch.einsum("bqc,bchw->bqhw", self.embed(found), fine)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        classes, masks = self.predict(_prompts(features, self.layers[-1]), features.grids[-1])
        shares, inside = classes.float().softmax(-1)[..., :-1], masks.float().sigmoid()
        # mixed at the masks' resolution: a hundred masks at the image's would take 100 MB for 512 x 512 pixels
        scores = torch.einsum("bqk,bqhw->bkhw", shares, inside).clamp_min(SMALLEST_SCORE).log()
        return to_image(scores, _cells(features), features.strides[-1], size)

    def loss(self, features: Features, mask: Tensor, *, ignore_index: int) -> Mapping[str, Tensor]:
        """Sum of the losses of the predictions before, between and after the blocks; parts of the last."""
        first = self.queries().expand(mask.shape[0], -1, -1)
        queries = [first, *(_prompts(features, block) for block in self.layers[1:])]
        found = [self.predict(q, grid) for q, grid in zip(queries, features.grids, strict=True)]
        (height, width), stride = _cells(features), features.strides[-1]
        padding = (0, width * stride - mask.shape[2], 0, height * stride - mask.shape[1])
        shape = (found[0][1].shape[2], found[0][1].shape[3])
        targets = [
            mask_targets(labels, shape, ignore_index=ignore_index, regions=self.regions)
            for labels in F.pad(mask, padding, value=ignore_index)
        ]
        parts = [mask_loss(classes, masks, targets) for classes, masks in found]
        return {**parts[-1], "loss": torch.stack([p["loss"] for p in parts]).sum()}

    def instances(self, features: Features, size: tuple[int, int]) -> list[Instances]:
        """One object per query whose mask holds a pixel and that is likelier something than nothing.

        Its score: the probability of its class times the mean probability of the pixels in its mask.
        """
        classes, masks = self.predict(_prompts(features, self.layers[-1]), features.grids[-1])
        found = []
        for each, logits in zip(classes.float().softmax(-1), masks.float(), strict=True):
            probability, chosen = each.max(-1)
            full = to_image(logits[None], _cells(features), features.strides[-1], size)[0]
            inside = full > 0
            mean = (full.sigmoid() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1)
            keep = ((chosen < each.shape[1] - 1) & inside.flatten(1).any(1)).nonzero()[:, 0]
            scores = (probability * mean)[keep]
            order = scores.argsort(descending=True, stable=True)
            found.append(Instances(inside[keep][order], chosen[keep][order], scores[order]))
        return found


def _prompts(features: Features, block: int) -> Tensor:
    if block not in features.prompts:
        raise UserError("the queries of this head are in no block: build the model with a config or AdaptedModel")
    return features.prompts[block]


def _cells(features: Features) -> tuple[int, int]:
    return features.grids[-1].shape[2], features.grids[-1].shape[3]


def _doubling(channels: int) -> nn.Sequential:
    """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        LayerNorm2d(channels, eps=1e-6),
    )
