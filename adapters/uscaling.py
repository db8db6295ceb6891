"""U-scaling: a side branch that looks at the image at many scales and hands what it sees to a frozen backbone.

Inspired by, not a reproduction of: Li, Hong, Zhang, Li, Camps-Valls, Zhu, Chanussot, "UrbanSAM: Learning
Invariance-Inspired Adapters for Segment Anything Models in Urban Construction", https://arxiv.org/abs/2502.15199. No
code and no equations of it were at hand, only that its adapter rests on multi-resolution analysis, aims at invariance
to scale, is a side branch of four modules between the image and the trunk, and is aligned to the trunk by masked
cross-attention. Everything else here is our design.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.adapters._layers import resolve_layers
from vfmadapt.contracts import Adapter, AfterBlock, BackboneSpec, OnImage, Site, UserError

CELL = 8
"""Side of a pyramid cell in pixels of its own level: two convolutions of stride 2, then the mean of 2 x 2."""


class UScaling(Adapter):
    """Tokens attend to nearby cells of a pyramid of the image; inspired by UrbanSAM's adapter, not a reproduction.

    Four modules. Analysis (fixed): level j + 1 is level j after a B3-spline low-pass, halved; what the low-pass took
    away is level j's detail. Response: one small convolutional network, the same for every level, makes cells of it,
    each 8 x 8 pixels of its level, so that an image scaled by 2 has the same cells one level on. Neighbourhood: a token
    sees, on each level, the window x window cells around its centre. Alignment: the token attends to all of them at
    once, x + O softmax(Q x · K z) V z; nothing marks a cell's level, so a shift of the levels only changes what lies at
    the pyramid's ends.

    On SAM it stands for UrbanSAM's learnable prompter: with `head=sam_decoder` nobody prompts, and what the pyramid
    sees reaches the decoder through the trunk.

    The identity at the start: O is zero. Prefix tokens pass untouched. Memory grows linearly with the tokens.

    Args:
        spec: the backbone's; blocks may differ in width and stride.
        levels: scales of the pyramid; the coarsest cells are 8 · 2^(levels - 1) pixels wide.
        dim: width of the cells and of the attention.
        heads: of the attention; a divisor of dim.
        window: cells per side of a neighbourhood, odd.
        layers: blocks that attend, negative ones counted from the last; four evenly spaced by default, the last one
            included.

    Raises:
        UserError: a setting out of its range.
    """

    unmergeable = "its attention reads the image, so it is not linear in the frozen weights"

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        levels: int = 4,
        dim: int = 32,
        heads: int = 2,
        window: int = 3,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check(levels, dim, heads, window)
        self.pyramid = Pyramid(spec.bands, dim, levels)
        used = resolve_layers(_spread(spec.depth) if layers is None else layers, spec.depth, "uscaling: layers")
        self.layers = nn.ModuleDict(
            {str(i): Alignment(spec.dims[i], spec.strides[i], dim, heads, window) for i in used}
        )

    def sites(self) -> Sequence[Site]:
        """The pyramid on the image, then one attention per layer."""
        return [
            OnImage(self.pyramid.forward),
            *(AfterBlock(int(i), layer.forward, context=True) for i, layer in self.layers.items()),
        ]


class Pyramid(nn.Module):
    """Analysis and response: image -> cells of every level."""

    def __init__(self, bands: int, dim: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.response = nn.Sequential(  # even kernels, so that a cell's centre is that of its pixels
            nn.Conv2d(bands, dim, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 4, stride=2, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, bands, H, W) -> per level j the cells (B, ceil(H / s), ceil(W / s), dim), s = 8 · 2^j."""
        height, width = image.shape[-2:]
        coarsest, found = CELL << self.levels - 1, []
        smooth = F.pad(image, (0, -width % coarsest, 0, -height % coarsest), mode="replicate")
        for level in range(self.levels):
            fine, smooth = smooth, low_pass(smooth)
            cells = self.response(fine - smooth).permute(0, 2, 3, 1)
            rows, columns = (-(-side // (CELL << level)) for side in (height, width))
            found.append(self.norm(cells[:, :rows, :columns]))
            smooth = F.avg_pool2d(smooth, 2)
        return tuple(found)


def low_pass(image: Tensor) -> Tensor:
    """(B, C, H, W) smoothed by the B3-spline (1, 4, 6, 4, 1) / 16 along both axes; edges repeat.

    As four means of 2 x 2: unlike a convolution, they keep full precision under autocast, and details are small.
    """
    smooth = F.pad(image, (2, 2, 2, 2), mode="replicate")
    for _ in range(4):
        smooth = F.avg_pool2d(smooth, 2, stride=1)
    return smooth


class Alignment(nn.Module):
    """Neighbourhood and masked cross-attention of one block."""

    def __init__(self, channels: int, stride: int, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.stride, self.heads, self.window = stride, heads, window
        self.norm = nn.LayerNorm(channels)  # tokens come un-normalised
        self.query = nn.Linear(channels, dim)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, grid: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """(B, h, w, C) and the cells of every level -> (B, h, w, C)."""
        query = self.query(self.norm(grid)).unflatten(-1, (self.heads, -1))
        gathered, seen = [], []
        for level, cells in enumerate(pyramid):
            near, inside = self.neighbours(self.key_value(cells), CELL << level, (grid.shape[1], grid.shape[2]))
            gathered.append(near)
            seen.append(inside)
        near = torch.cat(gathered, 3).unflatten(-1, (2, self.heads, -1))
        scores = torch.einsum("bhwgd,bhwngd->bhwgn", query, near[..., 0, :, :]) * query.shape[-1] ** -0.5
        shares = scores.masked_fill(~torch.cat(seen, -1).unsqueeze(2), float("-inf")).softmax(-1)
        found = torch.einsum("bhwgn,bhwngd->bhwgd", shares, near[..., 1, :, :])
        return grid + self.out(found.flatten(-2))

    def neighbours(self, cells: Tensor, side: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cells (B, h', w', D) of `side` pixels -> those around each token (B, h, w, window², D), and which are real.

        The second result is (h, w, window²): False where the neighbourhood reaches beyond the image.
        """
        rows, rows_inside = self._around(grid[0], cells.shape[1], side, cells.device)
        columns, columns_inside = self._around(grid[1], cells.shape[2], side, cells.device)
        near = cells[:, rows[:, None, :, None], columns[None, :, None, :]]
        inside = rows_inside[:, None, :, None] & columns_inside[None, :, None, :]
        return near.flatten(3, 4), inside.flatten(2, 3)

    def _around(self, tokens: int, cells: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Along one axis: indices (tokens, window) of the cells around each token's centre, and which exist.

        Tokens in the backbone's padding look at the image's last cells.
        """
        centre = ((2 * torch.arange(tokens, device=device) + 1) * self.stride // (2 * side)).clamp(max=cells - 1)
        index = centre.unsqueeze(-1) + torch.arange(self.window, device=device) - self.window // 2
        return index.clamp(0, cells - 1), (index >= 0) & (index < cells)


def _check(levels: int, dim: int, heads: int, window: int) -> None:
    if levels < 1:
        raise UserError(f"uscaling: levels={levels} must be at least 1")
    if heads < 1 or dim < heads or dim % heads:
        raise UserError(f"uscaling: dim={dim} must be a multiple of heads={heads}, which must be at least 1")
    if window < 1 or window % 2 == 0:
        raise UserError(f"uscaling: window={window} must be odd and at least 1, so that a token's cell is its middle")


def _spread(depth: int) -> list[int]:
    """Four evenly spaced blocks, the last included; all of them where there are fewer."""
    return sorted({-(-depth * part // 4) - 1 for part in (1, 2, 3, 4)})
