"""Networks that look at two frames at once: how the camera moved, its intrinsics, optical flow, change of light.

They help to train a depth model and are not part of it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from vfmadapt.errors import UserError

STAGES = 4
TURN, SHIFT = 0.1, 0.01  # of a motion for an output of 1: SHIFT is Monodepth2's, but an endoscope's tip turns quickly
GROUPS = 8  # of GroupNorm, where ResNet has batch norm: pairs come in small batches


class PairEncoder(nn.Module):
    """ResNet over two images stacked: (B, 6, H, W) -> maps at 1/2, 1/4, ... 1/32 of the size, the finest first.

    Width 64 and two blocks per stage are ResNet-18, as published. Where ResNet pools after its first layer, the first
    stage strides.
    """

    def __init__(self, channels: int, *, width: int, blocks: int) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS or blocks < 1:
            raise UserError(
                f"task.width={width} task.blocks={blocks}: width is a multiple of {GROUPS}, blocks at least 1 "
                "(published: 64 and 2)"
            )
        self.widths = (width, *(width << i for i in range(STAGES)))
        norm = partial(nn.GroupNorm, GROUPS)
        stem = [nn.Conv2d(2 * channels, width, 7, stride=2, padding=3, bias=False), norm(width), nn.ReLU()]
        self.stages = nn.ModuleList([nn.Sequential(*stem)])
        for before, after in zip(self.widths[:-1], self.widths[1:], strict=True):
            shrink = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), norm(after))
            first = BasicBlock(before, after, stride=2, downsample=shrink, norm_layer=norm)
            others = [BasicBlock(after, after, norm_layer=norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *others))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in 0..1 each -> five maps."""
        x = (torch.cat([first, second], 1) - 0.45) / 0.225  # Monodepth2's: about zero mean and unit deviation
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class MotionNetwork(nn.Module):
    """How the camera moved between two frames, and what its focal length and centre are.

    Rotation vector and translation are means over the picture; intrinsics come from the mean of the encoder's last map
    as f = softplus(a) + 0.5 and c = b + 0.5, in widths and heights of the picture (EndoDAC, §2.3). It begins with the
    frames' being one, f = 1.19 and c in the middle.

    Args:
        channels: of an image.
        width, blocks: of the encoder.
    """

    def __init__(self, channels: int, *, width: int, blocks: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(channels, width=width, blocks=blocks)
        deepest, hidden = self.encoder.widths[-1], 4 * width
        self.motion = nn.Sequential(
            nn.Conv2d(deepest, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 6, 1),
        )
        self.camera = nn.Linear(deepest, 4)
        nn.init.zeros_(self.camera.weight)
        nn.init.zeros_(self.camera.bias)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two images (B, C, H, W) -> motion (B, 6) from the first to the second, focal (B, 2), centre (B, 2)."""
        deepest = self.encoder(first, second)[-1]
        turn, shift = self.motion(deepest).mean((2, 3)).split(3, 1)
        focal, centre = self.camera(deepest.mean((2, 3))).split(2, 1)
        return torch.cat([TURN * turn, SHIFT * shift], 1), F.softplus(focal) + 0.5, centre + 0.5


class PairNetwork(nn.Module):
    """A map of the size of two images, from both of them: optical flow, or the change of light between them.

    A decoder doubles the encoder's last map back to full size, joined with the finer ones on the way (U-Net). Its last
    layer is so small that it begins near zero.

    Args:
        channels: of an image.
        outputs: of the map.
        width, blocks: of the encoder.
    """

    def __init__(self, channels: int, outputs: int, *, width: int, blocks: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(channels, width=width, blocks=blocks)
        widths = self.encoder.widths
        self.joins = nn.ModuleList(
            nn.Conv2d(coarse + fine, fine, 3, padding=1)
            for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(widths[0], outputs, 3, padding=1)
        nn.init.normal_(self.last.weight, std=1e-5)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two images (B, C, H, W) -> (B, outputs, H, W)."""
        *finer, x = self.encoder(first, second)
        for join, skip in zip(self.joins, reversed(finer), strict=True):
            grown = F.interpolate(x, skip.shape[-2:], mode="nearest")
            x = F.elu(join(torch.cat([grown, skip], 1)))
        full: Tensor = self.last(F.interpolate(x, first.shape[-2:], mode="bilinear", align_corners=False))
        return full
