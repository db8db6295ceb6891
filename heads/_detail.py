"""Detail for masks that patches blur: a small U-Net over the image itself, and a glance at it for each object."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

DILATIONS = (1, 3, 9)


class Detail(nn.Module):
    """What the masks see of the image beside SAM's embedding: lines of a few pixels are lost in patches.

    A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) whose highest level has the masks' resolution,
    and whose third is joined by the embedding. It is added to the features that masks are made of, as HQ-SAM adds those
    of an early block (Ke et al. 2023, https://arxiv.org/abs/2306.01567, §3.2). Batch norm, not layer norm over the
    image: what a tile shows must not depend on the rest of it. A batch in training needs more than one place of 2 x 2
    cells.

    Args:
        bands: of the image.
        width: of the image embedding; masks are made of an eighth of it.
        stride: pixels per cell of the embedding; a mask has 4 x 4 per cell. Where 4 does not divide it the image is
            enlarged until it does.
    """

    def __init__(self, bands: int, width: int, stride: int) -> None:
        super().__init__()
        pixel, least = -(-stride // 4), width // 8
        self.stride, self.enlarged = stride, 4 * pixel
        widths = [least * factor for factor in (1, 2, 4, 6)]
        steps = [*pairwise(widths)]
        self.first = nn.Sequential(
            nn.Conv2d(bands, least, pixel + 2, stride=pixel, padding=1), *_convolutions(least, least)
        )
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *_convolutions(*s)) for s in steps)
        self.join = nn.Conv2d(width, widths[2], 1)
        self.up = nn.ModuleList(nn.Sequential(*_convolutions(fine + deep, fine)) for fine, deep in steps)
        self.last = nn.Conv2d(least, width // 8, 1)
        self.to(memory_format=torch.channels_last)  # a seventh faster on the CPU

    def forward(self, embedding: Tensor, image: Tensor | None) -> Tensor:
        """Embedding (B, width, h, w) and image (B, bands, H, W) -> (B, width / 8, 4 h, 4 w)."""
        if image is None:
            raise ValueError("these features came from a backbone without its host, which adds the image")
        rows, columns = embedding.shape[-2:]
        below, right = self.stride * rows - image.shape[-2], self.stride * columns - image.shape[-1]
        image = F.pad(image, (0, right, 0, below)).contiguous(memory_format=torch.channels_last)
        if self.enlarged > self.stride:
            size = (self.enlarged * rows, self.enlarged * columns)
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        levels = [self.first(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        levels[2] = levels[2] + self.join(embedding)
        deep = levels.pop()
        for up in reversed(self.up):
            fine = levels.pop()
            wide = F.interpolate(deep, size=fine.shape[-2:], mode="bilinear", align_corners=False)
            deep = up(torch.cat([fine, wide], 1))
        detail: Tensor = self.last(deep)
        return detail


class Objectwise(nn.Module):
    """The image once more, for one object: which of the things that look alike is meant.

    `Detail` is the same for all objects of an image, and the decoder knows them by cells; what separates two pieces of
    a field is a road of a few pixels. Dilated convolutions (Yu and Koltun 2016, https://arxiv.org/abs/1511.07122) at
    half the masks' resolution, added to what masks are made of; at first they add nothing. No batch norm: batches of
    boxes and batches of points have other statistics, and what is asked is not known in advance.

    Args:
        width: channels of what masks are made of.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(width + 1, 2 * width, 4, stride=2, padding=1), LayerNorm2d(2 * width), nn.ReLU()
        )
        self.wider = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=step, dilation=step), nn.ReLU())
            for step in DILATIONS
        )
        self.last = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.to(memory_format=torch.channels_last)  # half the time on the CPU
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, upscaled: Tensor, prompt: Tensor) -> Tensor:
        """Upscaled embedding and detail (N, width, 4h, 4w), prompt -1..1 (N, 1, 4h, 4w) -> what is added to them."""
        x = self.first(torch.cat([upscaled, prompt], 1))
        for wider in self.wider:
            x = x + wider(x)
        added: Tensor = self.last(x)
        return added


def _convolutions(before: int, after: int) -> list[nn.Module]:
    """Twice a 3 x 3 convolution, batch norm, ReLU."""
    return [
        module
        for channels in (before, after)
        for module in (nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    ]
