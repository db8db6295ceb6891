"""Networks that look at two frames at once: how the camera moved, its intrinsics, optical flow, change of light.

They help to train a depth model and are not part of it.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from vfmadapt.errors import UserError
from vfmadapt.self_depth.geometry import pixels

STAGES = 4
NEAREST_FOCAL, FOCAL = 0.5, 0.5 + math.log(2)  # the least that the network can say, and what EndoDAC begins with
TURN, SHIFT = 0.1, 0.01  # of a motion for an output of 1: SHIFT is Monodepth2's, but an endoscope's tip turns quickly
DEPTH = 0.2  # of untrained heads, in whose unit translations are
GROUPS = 8  # of GroupNorm, where ResNet has batch norm: pairs come in small batches


class PairEncoder(nn.Module):
    """ResNet over two images stacked: (B, 6, H, W) -> maps at 1/2, 1/4, ... 1/32 of the size, the finest first.

    Width 64 and two blocks in each of four stages are ResNet-18, as published. Where ResNet pools after its first
    layer, the first stage strides.
    """

    def __init__(self, channels: int, *, width: int, blocks: int, stages: int = STAGES) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS or blocks < 1:
            raise UserError(
                f"task.width={width} task.blocks={blocks}: width is a multiple of {GROUPS}, blocks at least 1 "
                "(published: 64 and 2)"
            )
        self.widths = (width, *(width << i for i in range(stages)))
        norm = partial(nn.GroupNorm, GROUPS)
        stem = [nn.Conv2d(2 * channels, width, 7, stride=2, padding=3, bias=False), norm(width), nn.ReLU()]
        self.stages = nn.ModuleList([nn.Sequential(*stem)])
        for before, after in zip(self.widths[:-1], self.widths[1:], strict=True):
            shrink = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), norm(after))
            first = BasicBlock(before, after, stride=2, downsample=shrink, norm_layer=norm)
            others = [BasicBlock(after, after, norm_layer=norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *others))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in 0..1 each -> a map of the first layer, and one per stage."""
        x = (torch.cat([first, second], 1) - 0.45) / 0.225  # Monodepth2's: about zero mean and unit deviation
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class MotionNetwork(nn.Module):
    """How the camera moved between two frames, and what its focal length and centre are.

    Each cell of the encoder's last map gives a rotation vector and a translation; the picture's are their means. That
    finds what moves all cells alike; a roll and a forward motion move opposite sides in opposite ways, so to these two
    is added what the cells' turns sideways say of them (not in EndoDAC; without it a small network finds neither).
    Intrinsics come from the mean of the map as f = softplus(a) + 0.5 and c = b + 0.5, in widths and heights of the
    picture (EndoDAC, §2.3). It begins with the frames' being one, f = `focal` and c in the middle.

    Args:
        channels: of an image.
        width, blocks, stages: of the encoder; the map should have four cells or more each way.
        focal: to begin with, above 0.5 widths and heights of the picture.
    """

    def __init__(self, channels: int, *, width: int, blocks: int, stages: int = STAGES, focal: float = FOCAL) -> None:
        super().__init__()
        if stages < 1 or focal <= NEAREST_FOCAL:
            raise UserError(f"task.stages={stages} task.focal={focal}: stages is at least 1, focal above 0.5")
        self.encoder = PairEncoder(channels, width=width, blocks=blocks, stages=stages)
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
        self.camera.bias.data[:2] = math.log(math.expm1(focal - NEAREST_FOCAL))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two images (B, C, H, W) -> motion (B, 6) from the first to the second, focal (B, 2), centre (B, 2)."""
        deepest = self.encoder(first, second)[-1]
        focal, centre = self.camera(deepest.mean((2, 3))).split(2, 1)
        focal, centre = F.softplus(focal) + NEAREST_FOCAL, centre + 0.5
        turns, shifts = self.motion(deepest).split(3, 1)
        turns, shifts = TURN * turns, SHIFT * shifts
        roll, away = along_axis(turns[:, :2], focal.detach(), centre.detach())
        zero = torch.zeros_like(roll)
        more = torch.stack([zero, zero, roll, zero, zero, DEPTH * away], 1)
        return torch.cat([turns.mean((2, 3)), shifts.mean((2, 3))], 1) + more, focal, centre


def along_axis(turns: Tensor, focal: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Roll, and motion along the axis over depth, that fit turns about x and y (B, 2, h, w) of a picture's cells best.

    A cell at (x, y) from the axis, in focal lengths, shows a small roll r as turns of -r (x, y), and points that go
    away by a share a of their depth as turns of a (y, -x). `focal`, `centre` (B, 2) in widths and heights.
    """
    height, width = turns.shape[-2:]
    cells = (pixels((height, width), turns) + 0.5) / turns.new_tensor([width, height])
    x, y = ((cells - centre[:, None, None]) / focal[:, None, None]).unbind(-1)
    square = (x * x + y * y).mean((1, 2))
    about_x, about_y = turns.unbind(1)
    roll = -(x * about_x + y * about_y).mean((1, 2)) / square
    away = (y * about_x - x * about_y).mean((1, 2)) / square
    return roll, away


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
