"""SAM2's video model in its parts, every one of them for a batch of objects.

SAM2: https://arxiv.org/abs/2408.00714. N objects, S pixels per side of a frame, h = w = S / 16 cells of the memory's
grid, C channels; coarse masks have 4h x 4w pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import DataSpec, Features, Head
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel, normalise
from vfmadapt.tracking.attention import attend, rotations

ABSENT = -1024.0
"""Logit of every pixel of an object that is not in the frame, as in SAM2."""

MASK_LOGIT = 10.0  # a mask that is given counts as logits of -10 and 10, as in SAM2


@dataclass(frozen=True)
class Encoded:
    """What the image encoder makes of B frames.

    `fine` (B, C/8, 4h, 4w) and `middle` (B, C/4, 2h, 2w) go to the mask decoder, `coarse` (B, C, h, w) to the memory.
    """

    fine: Tensor
    middle: Tensor
    coarse: Tensor

    def at(self, index: int) -> "Encoded":
        """One frame (B = 1)."""
        one = slice(index, index + 1)
        return Encoded(self.fine[one], self.middle[one], self.coarse[one])


@dataclass(frozen=True)
class Decoded:
    """The mask decoder's answer for N objects.

    `logits` (N, T, 4h, 4w): T alternatives as they come from the decoder; `ious` (N, T): the IoU expected of each;
    `best` (N,): the alternative with the highest; `scores` (N,): above 0 where the object is in the frame; `pointers`
    (N, C): what the memory keeps of the answer.
    """

    logits: Tensor
    ious: Tensor
    best: Tensor
    scores: Tensor
    pointers: Tensor

    @property
    def masks(self) -> Tensor:
        """Logits (N, 4h, 4w) of the best alternatives, `ABSENT` where the object is not in the frame."""
        chosen = self.logits[torch.arange(len(self.best), device=self.best.device), self.best]
        return torch.where((self.scores > 0)[:, None, None], chosen, ABSENT)

    @property
    def iou(self) -> Tensor:
        """The IoU expected of the best alternatives, (N,)."""
        return self.ious.take_along_dim(self.best[:, None], 1)[:, 0]


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind for N objects, places in pixels of the S x S frame.

    `points` (N, P, 2), x before y, with `labels` (N, P): 1 on the object, 0 off it, 2 and 3 the corners of a box; or
    `masks` (N, S, S), 0 or 1. `before` (N, 4h, 4w): logits that the points correct.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None
    before: Tensor | None = None


class StageEnds(Head):
    """What a tracking model wants of its backbone: the grids of the last block of every stage; it labels no pixels."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = tuple(max(i for i, s in enumerate(strides) if s == stride) for stride in sorted(set(strides)))

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Refused: raises UserError."""
        raise UserError("this model follows objects through frames and labels no pixels: use it with tools/track.py")


class TrackingModel(AdaptedModel):
    """SAM2's video model with an adapted image encoder; what the adapters do not train is frozen.

    Args:
        backbone: over a `Sam2VideoBackbone`.
        spec: of the data that it was trained for; bands are red, green and blue, pictures from 0 to 1.

    Raises:
        UserError: another backbone.
    """

    def __init__(self, backbone: AdaptedBackbone, *, spec: DataSpec) -> None:
        if not hasattr(backbone.backbone.exported(), "memory_attention"):
            raise UserError(
                f"{backbone.spec.name} has no memory of earlier frames: take backbone=sam2_mini, sam2_video_tiny or "
                "another of SAM2's video models"
            )
        super().__init__(backbone, StageEnds(backbone.spec.strides), spec=spec)
        cells = self.size // 16
        like = self.net.no_memory_embedding
        self._position: Tensor
        self._memory_position: Tensor
        self._decoder_position: Tensor
        self._turns: Tensor
        with torch.no_grad():
            grids = [
                encoding(torch.Size((1, 1, cells, cells)), like.device, like.dtype)
                for encoding in (
                    self.net.vision_encoder.neck.position_encoding,
                    self.net.memory_encoder.position_encoding,
                )
            ]
            wide = self.net.get_image_wide_positional_embeddings()
        self.register_buffer("_position", _tokens(grids[0]), persistent=False)
        self.register_buffer("_memory_position", _tokens(grids[1])[0], persistent=False)
        self.register_buffer("_decoder_position", wide, persistent=False)
        self.register_buffer("_turns", rotations(self.net.memory_attention, wide), persistent=False)

    @property
    def net(self) -> Any:
        """Transformers' `Sam2VideoModel`."""
        return self.backbone.backbone.exported()

    @property
    def size(self) -> int:
        """Side of the frames in pixels."""
        return int(self.net.image_size)

    def encode(self, frames: Tensor) -> Encoded:
        """Frames (B, 3, S, S), pictures from 0 to 1 -> their encodings; the only costly step that no object repeats."""
        return self.encode_normalised(normalise(frames, None, self.mean, self.std))

    def encode_normalised(self, frames: Tensor) -> Encoded:
        """As `encode`, for frames that are normalised already."""
        stages = self.backbone(frames, self.head.layers).grids
        neck, decoder = self.net.vision_encoder.neck, self.net.mask_decoder
        lateral = [conv(grid) for conv, grid in zip(neck.convs, reversed(stages), strict=True)]
        above = F.interpolate(lateral[0].float(), scale_factor=2.0, mode="nearest").to(lateral[0].dtype)
        return Encoded(fine=decoder.conv_s0(lateral[3]), middle=decoder.conv_s1(lateral[2]), coarse=lateral[1] + above)

    def without_memory(self, frame: Encoded) -> Tensor:
        """What the decoder reads of a frame (B = 1) where nothing is remembered: (1, C, h, w)."""
        return frame.coarse + self.net.no_memory_embedding.view(1, -1, 1, 1)

    def recall(self, frame: Encoded, memory: Tensor, position: Tensor, pointer_tokens: int) -> Tensor:
        """What the decoder reads of a frame (B = 1), conditioned on N objects' memories: (N, C, h, w).

        Args:
            frame: the encoding of the frame.
            memory: tokens (N, L, 64), those of the pointers last.
            position: their position embedding (N, L, 64).
            pointer_tokens: how many tokens are of pointers, which have no place in the frame.
        """
        tokens = _tokens(frame.coarse) + 0.1 * self._position
        x = attend(self.net.memory_attention, tokens, memory, position, self._turns, pointer_tokens)
        return x.transpose(1, 2).unflatten(2, frame.coarse.shape[-2:])

    def pointer_tokens(self, pointers: Tensor, ages: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Pointers (N, P, C) that are `ages` (N, P) frames old -> tokens and their positions, (N, P * C / 64, 64) each.

        `longest`: the age that counts as 1.
        """
        from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

        channels = self.net.mem_dim
        pieces = pointers.shape[-1] // channels
        age = get_1d_sine_pe(ages.float() / longest, dim=pointers.shape[-1]).to(pointers.dtype)
        position = self.net.temporal_positional_encoding_projection_layer(age)
        return pointers.unflatten(2, (pieces, channels)).flatten(1, 2), position.repeat_interleave(pieces, dim=1)

    def memory_position(self, slot: int) -> Tensor:
        """Position embedding (h * w, 64) of a memory that is `slot` frames old; 0 for that of a prompt."""
        return self._memory_position + self.net.memory_temporal_positional_encoding[slot - 1, 0]

    def decode(self, frame: Encoded, coarse: Tensor, asked: Asked | None = None) -> Decoded:
        """Masks of N objects from what was recalled, `coarse` (N, C, h, w), or (1, C, h, w) for all of them."""
        points, labels, several = self._points(coarse, asked)
        before = None if asked is None or asked.before is None else asked.before[:, None]
        return self._decode(frame, coarse, points, labels, before, several=several)

    def use_masks(self, frame: Encoded, masks: Tensor) -> Decoded:
        """Masks (N, S, S) of 0 and 1 as the answer: the decoder only makes their pointers."""
        logits = (2 * MASK_LOGIT) * masks[:, None] - MASK_LOGIT
        size = self.net.prompt_encoder.mask_input_size
        low = F.interpolate(logits, size=size, mode="bilinear", align_corners=False, antialias=True)
        prompt = self.net.mask_downsample(masks[:, None])
        points, labels, _ = self._points(prompt, None)
        pointers = self._decode(frame, frame.coarse, points, labels, prompt, several=False).pointers
        there = masks.flatten(1).any(1)
        return Decoded(
            logits=low,
            ious=torch.ones_like(low[:, :, 0, 0]),
            best=torch.zeros(len(masks), dtype=torch.int64, device=masks.device),
            scores=torch.where(there, MASK_LOGIT, -MASK_LOGIT),
            pointers=self._pointers(pointers, there),
        )

    def remember(self, frame: Encoded, masks: Tensor, scores: Tensor, certain: Tensor) -> Tensor:
        """What the memory keeps of N masks in a frame: tokens (N, h * w, 64).

        Args:
            frame: the encoding of the frame.
            masks: logits (N, 4h, 4w).
            scores: (N,), above 0 where the object is in the frame.
            certain: bool (N,): the mask was prompted, so it is taken as 0 or 1.
        """
        config, net = self.net.config, self.net
        high = F.interpolate(masks[:, None], size=(self.size, self.size), mode="bilinear", align_corners=False)
        sure = torch.where(certain[:, None, None, None], (high > 0).to(high.dtype), high.sigmoid())
        scaled = sure * config.sigmoid_scale_for_mem_enc + config.sigmoid_bias_for_mem_enc
        memory, _ = net.memory_encoder(frame.coarse, scaled)
        gone = (scores <= 0).to(memory.dtype)[:, None, None]
        return _tokens(memory) + gone * net.occlusion_spatial_embedding_parameter

    def _points(self, like: Tensor, asked: Asked | None) -> tuple[Tensor, Tensor, bool]:
        """Points and labels for the prompt encoder, and whether the decoder shall give alternatives."""
        config, points, labels = self.net.config, None, None
        if asked is not None and asked.points is not None and asked.labels is not None:
            points, labels = asked.points[:, None], asked.labels[:, None]
        count = 0 if points is None else points.shape[2]
        several = config.multimask_min_pt_num <= count <= config.multimask_max_pt_num
        if points is None or labels is None:
            points = like.new_zeros(len(like), 1, 1, 2)
            labels = torch.full((len(like), 1, 1), -1, device=like.device)
        return points, labels, several

    def _decode(
        self, frame: Encoded, coarse: Tensor, points: Tensor, labels: Tensor, masks: Tensor | None, *, several: bool
    ) -> Decoded:
        net = self.net
        sparse, dense = net.prompt_encoder(points, labels, None, masks)
        logits, ious, tokens, scores = net.mask_decoder(
            image_embeddings=coarse.expand(len(points), -1, -1, -1),
            image_positional_embeddings=self._decoder_position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
            high_resolution_features=[frame.fine, frame.middle],
        )
        logits, ious, tokens, scores = logits[:, 0], ious[:, 0], tokens[:, 0], scores[:, 0, 0]
        best = ious.argmax(1)
        token = tokens[torch.arange(len(best), device=best.device), best]
        return Decoded(logits, ious, best, scores, self._pointers(net.object_pointer_proj(token), scores > 0))

    def _pointers(self, pointers: Tensor, there: Tensor) -> Tensor:
        """Pointers (N, C), replaced by the learned one where the object is not there."""
        return torch.where(there[:, None], pointers, self.net.no_object_pointer)


def _tokens(grid: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h * w, C)."""
    return grid.flatten(2).transpose(1, 2)
