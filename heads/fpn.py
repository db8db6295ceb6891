"""Multi-level head: a simple feature pyramid over chosen blocks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head
from vfmadapt.heads._resize import resolve_layers, spread, to_image, upsample_to


class _Level(nn.Module):
    """LayerNorm over channels, 1x1 projection, and `doublings` learned x2 upsamplings."""

    def __init__(self, channels: int, width: int, doublings: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, width)
        steps: list[nn.Module] = []
        for _ in range(doublings):
            steps += [nn.GELU(), nn.ConvTranspose2d(width, width, 2, stride=2)]
        self.upsample = nn.Sequential(*steps)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h x 2^doublings, w x 2^doublings)."""
        tokens = self.project(self.norm(grid.permute(0, 2, 3, 1)))
        projected = tokens.permute(0, 3, 1, 2)  # a channels-last tensor as it stands: what convolutions on a CPU want
        upsampled: Tensor = self.upsample(projected)
        return upsampled


class FPNHead(Head):
    """Pyramid from few blocks: the two earliest are upsampled to 1/4 and 1/2 of the stride, the deep ones keep it.

    A plain ViT has one stride, so finer levels are made by transposed convolutions, as in ViTDet's simple pyramid
    (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", §3), but from early blocks,
    whose tokens still hold the detail within a patch. Levels are added from deep to shallow (FPN, Lin et al. 2017),
    fused by one 3x3 convolution at the finest, and classified there. A hierarchical backbone's own strides are kept
    as they are.

    `layers`: blocks to read, four evenly spaced by default; negative indices count from the end. `width`: channels
    of the pyramid.
    """

    def __init__(
        self, spec: BackboneSpec, *, num_classes: int, layers: Sequence[int] | None = None, width: int = 64
    ) -> None:
        super().__init__()
        self.layers = resolve_layers(spec, spread(spec.depth) if layers is None else tuple(layers))
        strides = [spec.strides[i] for i in self.layers]
        plain = len(set(strides)) == 1
        # with one level alone it is the finest itself; with three or more, the two earliest become 1/4 and 1/2
        finest = min(2, len(self.layers)) if plain else 0
        self.doublings = tuple(max(finest - i, 0) for i in range(len(self.layers)))
        self.levels = nn.ModuleList(
            _Level(spec.dims[i], width, d) for i, d in zip(self.layers, self.doublings, strict=True)
        )
        self.fuse = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(1, width), nn.GELU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        maps = [level(grid) for level, grid in zip(self.levels, features.grids, strict=True)]
        scales = [s / 2**d for s, d in zip(features.strides, self.doublings, strict=True)]
        merged = maps[-1]
        for (fine, scale), (_, coarse_scale) in reversed(list(pairwise(zip(maps, scales, strict=True)))):
            merged = fine + upsample_to(fine, merged, coarse_scale / scale)
        logits = self.classifier(self.fuse(merged))
        height, width = features.grids[0].shape[2:]
        return to_image(logits, (height, width), features.strides[0], size)
