"""Self-supervised depth: what a frame's depths and its neighbours' motion predict of it, compared with what is there.

Cui et al., "EndoDAC: Efficient Adapting Foundation Model for Self-Supervised Depth Estimation from Any Endoscopic
Camera", https://arxiv.org/abs/2405.08672, §2.3; flow and change of light after Shao et al., "Self-Supervised monocular
depth and ego-Motion estimation in endoscopy: Appearance flow to the rescue", https://arxiv.org/abs/2112.08122.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.self_depth.geometry import camera_matrix, coverage, look_up, pixels, pose_matrix, project
from vfmadapt.self_depth.losses import edge_aware, least, masked_mean, photometric
from vfmadapt.self_depth.networks import FOCAL, STAGES, MotionNetwork, PairNetwork

FLOW_SMOOTHNESS = DEPTH_SMOOTHNESS = 1e-3  # all four as published
CHANGE_WEIGHT = CHANGE_SMOOTHNESS = 0.01
VISIBLE = 0.5  # least coverage of a pixel that a neighbour shows
SCALES = 4  # of the flow's loss: at full size, 1/2, 1/4, 1/8, where large motions become small

Phase = Literal["turns", "motions", "depths"]


@dataclass(frozen=True)
class Camera:
    """Motion and intrinsics of P pairs: `motion` (P, 6); `focal`, `centre` (P, 2) in widths and heights."""

    motion: Tensor
    focal: Tensor
    centre: Tensor


class Neighbours(nn.Module):
    """The networks that look at a frame and a neighbour, and the loss of the frame's depths.

    Its parts share no parameter, and no gradient passes from the depth's loss to the flow: one optimiser trains both,
    where the release alternates two. Not reproduced from it: the intrinsics of a frame's last neighbour used for all.

    Args:
        channels: of an image.
        learned: predict the intrinsics; else they are given.
        appearance: train flow and change of light, too; without, every pixel of a neighbour is compared as it is.
        width, blocks: of the networks.
        stages, focal: of the one for the motion.
    """

    def __init__(
        self,
        channels: int,
        *,
        learned: bool,
        appearance: bool,
        width: int,
        blocks: int,
        stages: int = STAGES,
        focal: float = FOCAL,
    ) -> None:
        super().__init__()
        self.learned = learned
        self.motion = MotionNetwork(channels, width=width, blocks=blocks, stages=stages, focal=focal)
        if not learned:
            self.motion.camera.requires_grad_(False)
        sizes = {"width": width, "blocks": blocks}
        self.flow = PairNetwork(channels, 2, **sizes) if appearance else None
        self.light = PairNetwork(channels, channels, **sizes) if appearance else None

    def camera(self, target: Tensor, source: Tensor, intrinsics: Tensor) -> Camera:
        """Motion from target to source (P, C, H, W) and intrinsics; `intrinsics` (P, 3, 3), used where not learned."""
        motion, focal, centre = self.motion(target, source)
        if not self.learned:
            extent = intrinsics.new_tensor([target.shape[-1], target.shape[-2]])
            focal = intrinsics.diagonal(dim1=1, dim2=2)[:, :2] / extent
            centre = (intrinsics[:, :2, 2] + 0.5) / extent
        return Camera(motion, focal, centre)

    def forward(
        self, image: Tensor, sources: Tensor, depths: Sequence[Tensor], intrinsics: Tensor, *, phase: Phase = "depths"
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image: frames (B, C, H, W) in 0..1.
            sources: S neighbours of each (B, S, C, H, W).
            depths: (B, 1, H, W) each, the finest first; the n-th is compared at 1 / 2^n of the size.
            intrinsics: (B, 3, 3) in pixels.
            phase: "turns": only rotations are learnt; "motions": translations, too; "depths": all. Before the last the
                camera stays as it begins, and all pixels of all neighbours count. Then the better neighbour of each
                pixel does, and none that fits unmoved: pixels that must fit better than unmoved confirm any motion.

        Returns:
            {"loss": the sum, "photometric", and with appearance "flow" and "change": without gradient}.
        """
        count = sources.shape[1]
        target, source = image.repeat_interleave(count, 0), sources.flatten(0, 1)
        camera = self.camera(target, source, intrinsics.repeat_interleave(count, 0))
        if not (choosy := phase == "depths"):
            motion = camera.motion if phase == "motions" else F.pad(camera.motion[:, :3], (0, 3))
            camera = Camera(motion, camera.focal.detach(), camera.centre.detach())
        wanted, shown = target, torch.ones_like(target[:, 0], dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        if self.flow is not None:
            wanted, shown, parts = self._lit(target, source)
        terms = []
        for scale, depth in enumerate(depths):
            terms.append(self._at_scale(scale, depth, image, source, wanted, shown, camera, choosy))
        parts["photometric"] = torch.stack([photo for photo, _ in terms]).mean()
        smooth = torch.stack([smoothness for _, smoothness in terms]).mean()
        total = torch.stack([*parts.values()]).sum() + smooth
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}

    def _at_scale(
        self,
        scale: int,
        depth: Tensor,
        image: Tensor,
        source: Tensor,
        wanted: Tensor,
        shown: Tensor,
        camera: Camera,
        choosy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Photometric loss and weighed smoothness of one of the depths."""
        image, source, wanted, depth = (shrunk(x, scale) for x in (image, source, wanted, depth))
        visible = shrunk(shown[:, None].float(), scale)[:, 0] > 0.5
        size, count = (source.shape[-2], source.shape[-1]), len(source) // len(image)
        matrix = camera_matrix(camera.focal, camera.centre, size)
        repeated = depth[:, 0].repeat_interleave(count, 0)
        places, inside = project(repeated, pose_matrix(camera.motion), matrix)
        moved, there = photometric(look_up(source, places), wanted), inside & visible
        if choosy:
            unmoved = photometric(source, wanted)
            fit = least(*(x.unflatten(0, (-1, count)).unbind(1) for x in (moved, there, unmoved)))
        else:
            fit = masked_mean(moved, there)
        inverse = 1 / depth
        smooth = edge_aware(inverse / inverse.mean((2, 3), keepdim=True), image)
        return fit, DEPTH_SMOOTHNESS / 2**scale * smooth

    def _lit(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Targets in the light of their sources, the pixels (P, H, W) that sources show, and the losses of both."""
        assert self.flow is not None
        assert self.light is not None
        there, back = self.flow(torch.cat([target, source]), torch.cat([source, target])).chunk(2)
        visible = coverage(back.detach()) > VISIBLE
        losses = [self._flow_loss(scale, there, target, source, visible) for scale in range(SCALES)]
        registered = look_up(source, pixels((target.shape[-2], target.shape[-1]), there) + there.permute(0, 2, 3, 1))
        change = self.light(registered.detach(), target).tanh() * visible[:, None]
        wanted = (target + change).clamp(0, 1)
        off = masked_mean((wanted - registered.detach()).abs().mean(1), visible)
        parts = {"change": CHANGE_WEIGHT * off + CHANGE_SMOOTHNESS * edge_aware(change, target)}
        return wanted, visible, parts | {"flow": torch.stack(losses).mean()}

    def _flow_loss(self, scale: int, flow: Tensor, target: Tensor, source: Tensor, visible: Tensor) -> Tensor:
        flow, target, source = (shrunk(x, scale) for x in (flow / 2**scale, target, source))
        seen = shrunk(visible[:, None].float(), scale)[:, 0] > 0.5
        size = (target.shape[-2], target.shape[-1])
        registered = look_up(source, pixels(size, flow) + flow.permute(0, 2, 3, 1))
        return masked_mean(photometric(registered, target), seen) + FLOW_SMOOTHNESS * edge_aware(flow, target)


def shrunk(x: Tensor, scale: int) -> Tensor:
    """(B, C, H, W) -> the same at 1 / 2^scale of the size, rounded down, but 4 pixels at least."""
    if scale == 0:
        return x
    return F.interpolate(x, [max(n >> scale, 4) for n in x.shape[-2:]], mode="area")
