"""ZeroI2V's linear adapters around attention and the MLP, and its shift of keys and values between video frames.

Li et al., "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video",
https://arxiv.org/abs/2310.01324.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from vfmadapt.adapters._affine import (
    READERS,
    AffineBottleneck,
    check_bottleneck,
    each,
    fold_after,
    fold_before,
    input_widths,
)
from vfmadapt.contracts import Adapter, BackboneSpec, Merger, OnInput, OnOutput, Site, UserError


class LinearAdapters(Adapter):
    """Four per block, x <- x + s (B drop(A x + a) + b): on what attention and fc1 read, on what proj and fc2 give.

    The frozen network until trained. 14,201,856 parameters on ViT-B: twelve blocks of four at width 768, none after
    the merge. With `frames` above 1 the batch holds videos, frame after frame, and keys and values of neighbouring
    frames are mixed (`shift_frames`), which is not the identity when new and cannot be merged.

    Args:
        spec: the backbone's; layers may differ in width.
        ratio: width of each bottleneck over the channels there.
        scale: s.
        dropout: share of a bottleneck's values that training drops.
        frames: images per video; a smaller batch is one shorter video.
        shift_div: a key or value takes 1/shift_div of its channels from the frame before and as many from the one
            after; the number of heads makes that one head each.

    Raises:
        UserError: a setting out of its range; frames on a backbone that attends within windows.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        ratio: float = 0.25,
        scale: float = 0.5,
        dropout: float = 0.0,
        frames: int = 1,
        shift_div: int = 12,
    ) -> None:
        super().__init__()
        check_bottleneck("linear", scale, dropout)
        widths = {role: input_widths(spec, role) for role in READERS}
        widths |= {role: [out for _, out in spec.widths(role)] for role in ("proj", "fc2")}
        if not 0 < ratio <= 1 or min(int(ratio * n) for found in widths.values() for n in found) < 1:
            raise UserError(f"linear: ratio={ratio} must be above 0, at most 1 and leave a channel (published: 0.25)")
        _check_frames(spec, frames, shift_div)
        self.bottlenecks = nn.ModuleDict()
        for role, found in widths.items():
            self.bottlenecks[role] = nn.ModuleList(
                AffineBottleneck(n, n, int(ratio * n), scale=scale, dropout=dropout) for n in found
            )
        self.depth, self.frames, self.shift_div = spec.depth, frames, shift_div
        if frames > 1:
            self.unmergeable = f"frames={frames} shifts keys and values in time, which no weight can do"

    def sites(self) -> Sequence[Site]:
        """Four bottlenecks per block, and two shifts with `frames` above 1."""
        found: list[Site] = [
            (OnInput if role in READERS else OnOutput)(role, index, bottleneck.residual)
            for role, index, bottleneck in each(self.bottlenecks)
        ]
        if self.frames > 1:
            shift = partial(shift_frames, frames=self.frames, div=self.shift_div)
            found += [OnOutput(role, index, shift) for role in ("k", "v") for index in range(self.depth)]
        return found

    def merge(self, into: Merger) -> None:
        """W <- W (I + M), b <- b + W c in q, k, v and fc1; W <- (I + M) W, b <- b + M b + c in proj and fc2."""
        for role, index, bottleneck in each(self.bottlenecks):
            (fold_before if role in READERS else fold_after)(into, role, index, bottleneck)


def shift_frames(x: Tensor, frames: int, div: int) -> Tensor:
    """Give every frame some channels of its neighbours.

    The first C // div channels come from the frame before, the next C // div from the frame after, the others stay; a
    video's first and last frame keep their own where there is no neighbour. No parameters.

    Args:
        x: (videos * frames, ..., C), the frames of a video in order; fewer than `frames` are one shorter video.
        frames: per video.
        div: share of the channels, at least 2.

    Raises:
        UserError: a batch that is no whole number of videos.
    """
    if len(x) > frames and len(x) % frames:
        raise UserError(f"linear: a batch of {len(x)} images is no multiple of frames={frames}; feed whole videos")
    video, part = x.unflatten(0, (-1, min(frames, len(x)))), x.shape[-1] // div
    shifted = video.clone()
    shifted[:, 1:, ..., :part] = video[:, :-1, ..., :part]
    shifted[:, :-1, ..., part : 2 * part] = video[:, 1:, ..., part : 2 * part]
    return shifted.flatten(0, 1)


def _check_frames(spec: BackboneSpec, frames: int, shift_div: int) -> None:
    if frames < 1 or shift_div < 2:
        raise UserError(
            f"linear: frames={frames} shift_div={shift_div} must be at least 1 and 2 (published: 8 frames, heads)"
        )
    if frames > 1 and any(spec.windowed):
        raise UserError(
            f"linear: frames={frames} needs attention over the whole image, {spec.name} attends within windows; use 1"
        )
