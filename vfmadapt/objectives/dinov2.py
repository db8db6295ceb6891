"""DINOv2's objective on an adapted backbone: a student follows the running average of itself.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", https://arxiv.org/abs/2304.07193. As in
ExPLoRA (https://arxiv.org/abs/2406.10973) the heads start from scratch: none are published.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from vfmadapt.contracts import Blank, UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.objectives.dino_loss import (
    Centring,
    Projection,
    SinkhornKnopp,
    block_mask,
    cross_entropy,
    entropy,
    koleo,
)
from vfmadapt.objectives.objective import Objective
from vfmadapt.objectives.views import blur, jitter, random_crop

_SETTLED = 0.3  # share of the steps after which a teacher's answers say something; its heads start at random
_UNIFORM = 0.98  # share of the greatest entropy above which they tell nothing
_CROPS = 2  # large crops of an image: the teacher's one is the student's other one's target


class DinoV2(Objective):
    """DINO between crops, iBOT on hidden patches, KoLeo; the teacher is a second adapter on the same frozen backbone.

    The teacher's adapter is an average of the student's parameters and is never merged: merged weights would no longer
    follow. Only the student is exported.

    Args:
        backbone: adapted; gets the adapter "teacher".
        large, small: sides in pixels of the two large and the small crops, multiples of the patch.
        crops: number of small crops (published: 8).
        large_scale, small_scale: image pixels for a crop's pixel, least and greatest.
        hidden, bottleneck, prototypes: of both heads (published: 2048, 256, 65536).
        standardise: the heads' hidden channels over the batch of a process. A masked autoencoder's class tokens differ
            little between images; without it the teacher's first answers are all the same, and stay so for long.
        centring: "centring" or "sinkhorn_knopp".
        masked: chance that a large crop has hidden patches.
        mask_ratio: least and greatest share of its patches that are.
        koleo_weight: beside 1 for DINO and 1 for iBOT.
        momentum: of the teacher at the start; it ends at 1 by a cosine.
        student_temperature: of the student's softmax.
        temperature: of the teacher's, at the start and after `temperature_warmup` (share of all steps).
        freeze_last: share of all steps in which the prototypes stay as drawn (published: the first 3000).
        strength: of the variation of contrast and brightness, see `jitter`.

    Raises:
        UserError: a setting out of its range.
    """

    least_batch = 2  # KoLeo compares images

    def __init__(
        self, backbone: AdaptedBackbone, *, large: int = 224, small: int = 96, crops: int = 8,
        large_scale: tuple[float, float] = (0.9, 1.6), small_scale: tuple[float, float] = (0.7, 1.6),
        hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65_536, standardise: bool = False,
        centring: Literal["centring", "sinkhorn_knopp"] = "centring", masked: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5), koleo_weight: float = 0.1, momentum: float = 0.992,
        student_temperature: float = 0.1, temperature: tuple[float, float] = (0.04, 0.07),
        temperature_warmup: float = 0.3, freeze_last: float = 0.02, strength: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        spec = backbone.spec
        self.patch, self.prefix, width = spec.strides[0], spec.prefix_tokens, spec.dims[-1]
        if wrong := [size for size in (large, small) if size < self.patch or size % self.patch]:
            raise UserError(f"objective.large, objective.small: {wrong[0]} is no multiple of the patch ({self.patch})")
        if not 0 <= momentum < 1 or min(*temperature, student_temperature) <= 0 or prototypes < 2 or crops < 0:
            raise UserError(
                f"objective.momentum={momentum} temperature={list(temperature)} student_temperature="
                f"{student_temperature} prototypes={prototypes} crops={crops}: momentum is from 0 to below 1, "
                "temperatures are above 0, prototypes at least 2, crops at least 0"
            )
        self.large, self.small, self.crops = large, small, crops
        self.large_scale, self.small_scale, self.strength = large_scale, small_scale, strength
        self.masked, self.mask_ratio, self.koleo_weight = masked, mask_ratio, koleo_weight
        self.momentum, self.temperatures, self.student_temperature = momentum, temperature, student_temperature
        self.temperature_warmup, self.freeze_last = temperature_warmup, freeze_last
        self.smallest, self.prototypes = max(large, small), prototypes
        self.window = math.ceil(max(large * large_scale[1], small * small_scale[1]))
        sizes = {"hidden": hidden, "bottleneck": bottleneck, "prototypes": prototypes}
        heads = {name: Projection(width, **sizes, standardise=standardise) for name in ("dino", "ibot")}
        self.student = nn.ModuleDict(heads)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        kind: type[nn.Module] = Centring if centring == "centring" else SinkhornKnopp
        self.balance = nn.ModuleDict({name: kind(prototypes) for name in ("dino", "ibot")})
        self.mask_token = nn.Parameter(torch.zeros(spec.embed_dim))
        self.progress: Tensor  # share of the steps that is done; a buffer, so that checkpoints have it
        self.register_buffer("progress", torch.zeros(()))
        backbone.add("teacher", deepcopy(backbone.adapters["main"]))  # type: ignore[arg-type]
        backbone.adapters["teacher"].requires_grad_(False)

    def sample(self, square: Tensor, draw: np.random.Generator, epoch: int) -> dict[str, Tensor]:
        """Large crops (2, C, L, L), small ones (n, C, S, S), hidden patches of the large ones, bool (2, h, w)."""
        cells = self.large // self.patch
        hidden = []
        for _ in range(_CROPS):
            share = draw.uniform(*self.mask_ratio) if draw.random() < self.masked else 0.0
            hidden.append(torch.from_numpy(block_mask(cells, cells, round(share * cells**2), draw)))
        return {
            "large": torch.stack([self._view(square, self.large, self.large_scale, draw) for _ in range(_CROPS)]),
            "small": torch.stack(
                [self._view(square, self.small, self.small_scale, draw) for _ in range(self.crops)]
                or [square.new_empty(0)]
            ),
            "hidden": torch.stack(hidden),
        }

    def _view(self, square: Tensor, size: int, scale: tuple[float, float], draw: np.random.Generator) -> Tensor:
        return blur(jitter(random_crop(square, size, scale, draw), self.strength, draw), 0.5, draw)  # DINO's chance

    def forward(self, backbone: AdaptedBackbone, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss, its parts, and how sharp and how varied the teacher's answers are."""
        images, hidden = batch["large"].flatten(0, 1), batch["hidden"].flatten(0, 1)
        targets = self._targets(backbone, images, hidden)
        tokens = backbone.tokens(images, blank=Blank(hidden, self.mask_token))
        classes = self._classes(tokens)
        crops = [self.student["dino"](classes).unflatten(0, (-1, _CROPS))]
        if self.crops:
            small = self._classes(backbone.tokens(batch["small"].flatten(0, 1)))
            crops.append(self.student["dino"](small).unflatten(0, (-1, self.crops)))
        dino = self._dino(targets["dino"].unflatten(0, (-1, _CROPS)), crops)
        ibot = self._ibot(targets["ibot"], self.student["ibot"](self._patches(tokens)[hidden.flatten(1)]), hidden)
        spread = torch.stack([koleo(part) for part in classes.unflatten(0, (-1, _CROPS)).unbind(1)]).sum()
        return {
            "loss": dino + ibot + self.koleo_weight * spread,
            "dino": dino.detach(), "ibot": ibot.detach(), "koleo": spread.detach(),
            "teacher_entropy": entropy(targets["dino"]),
            "prototypes_used": entropy(targets["dino"].mean(0, keepdim=True)).exp(),
        }  # fmt: skip

    @torch.no_grad()
    def _targets(self, backbone: AdaptedBackbone, images: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """What the teacher, who sees all, says of each large crop (2 B, K) and each hidden patch (m, K)."""
        first, last = self.temperatures
        risen = min(float(self.progress) / self.temperature_warmup, 1.0) if self.temperature_warmup else 1.0
        backbone.use("teacher")
        try:
            tokens = backbone.tokens(images)
        finally:
            backbone.use("main")
        seen = {"dino": self._classes(tokens), "ibot": self._patches(tokens)[hidden.flatten(1)]}
        temperature = first + (last - first) * risen
        return {name: self.balance[name](self.teacher[name](x), temperature) for name, x in seen.items()}

    def _dino(self, targets: Tensor, crops: list[Tensor]) -> Tensor:
        """Targets (B, 2, K) against large (B, 2, K) and small (B, n, K) crops: mean over all pairs of two crops."""
        pairs = [cross_entropy(targets.flip(1), crops[0], self.student_temperature)]
        if self.crops:
            pairs.append(cross_entropy(targets[:, :, None], crops[1][:, None], self.student_temperature).flatten(1))
        return torch.cat(pairs, dim=1).mean()

    def _ibot(self, targets: Tensor, found: Tensor, hidden: Tensor) -> Tensor:
        """Mean over the crops of the mean over each one's hidden patches; crops without any count as 0."""
        counts = hidden.flatten(1).sum(1)
        weights = (1 / counts.clamp(min=1)).repeat_interleave(counts)
        return (cross_entropy(targets, found, self.student_temperature) * weights).sum() / len(hidden)

    def _classes(self, tokens: Tensor) -> Tensor:
        """(B, P + N, C) -> the class token (B, C), or the mean of the patches where there is none."""
        return tokens[:, 0] if self.prefix else tokens.mean(1)

    def _patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.prefix :]

    def before_step(self) -> None:
        """Keep the prototypes as they are at first: while the MLPs are random, targets of moving ones collapse."""
        if self.progress < self.freeze_last:
            for head in self.student.values():
                cast(Projection, head).prototypes.grad = None

    def collapse(self, figures: Mapping[str, float]) -> str | None:
        """Whether the teacher's answers are uniform, or one for all; not asked of heads that are still random."""
        if self.progress < _SETTLED:
            return None
        if figures["teacher_entropy"] > _UNIFORM * math.log(self.prototypes):
            return "the teacher's answers are uniform and teach nothing; lower objective.temperature"
        if figures["prototypes_used"] < 2:
            return "one prototype takes all images; use objective.centring=sinkhorn_knopp"
        return None

    @torch.no_grad()
    def after_step(self, backbone: AdaptedBackbone, step: int, total: int) -> None:
        """Let the teacher, heads and adapter, follow the student."""
        done = step / total
        self.progress.fill_(done)
        keep = 1 - (1 - self.momentum) * (math.cos(math.pi * done) + 1) / 2
        pairs = [(self.teacher, self.student), (backbone.adapters["teacher"], backbone.adapters["main"])]
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - keep)
