"""Tracking as a Lightning module: an adapted image encoder and mask decoder, trained through the memory.

Xu, Kabat, Zhang, "Depthwise-dilated convolutional adapters for medical object tracking and segmentation using the
Segment Anything Model 2", https://arxiv.org/abs/2507.14613. Not reproduced: its losses take the sigmoid of a sigmoid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmadapt.contracts import PromptedMasks
from vfmadapt.errors import UserError
from vfmadapt.frames.array import ArrayClip
from vfmadapt.losses import PromptLoss
from vfmadapt.model import AdaptedModel, normalise
from vfmadapt.tasks.clicks import boxes_of, jitter, random_place
from vfmadapt.tasks.clips import lost_labels
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule
from vfmadapt.tracking.model import Asked, Encoded, TrackingModel
from vfmadapt.tracking.prompts import Prompt
from vfmadapt.tracking.propagation import Answer, Propagation, Question
from vfmadapt.tracking.regions import check_focus
from vfmadapt.tracking.tracker import track

PROMPTS = ("box", "point", "mask")


class TrackingTask(AdapterTask):
    """Trains SAM2's video model to follow the structures of clips from a prompt on the first frame of a piece.

    Each structure of a whole clip is measured, from its mask in the middle frame of those that have it. All settings
    are keyword-only and appear under `task.` on the command line.

    Args:
        model: SAM2's video model with its adapters.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice loss.
        iou_weight: weight of the expected IoU's squared error.
        score_weight: weight of the cross-entropy of being in the frame.
        absent_weight: weight of the cross-entropy of masks, which must be empty, where the object is not in the frame.
        prompts: kinds that are drawn from: "box", "point", "mask".
        objects: at most so many per piece.
        focus: of the tracker where whole clips are measured, see `vfmadapt.tracking.tracker.Tracker`.

    Raises:
        UserError: another model, an impossible setting.
    """

    model: TrackingModel

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "tracking",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        score_weight: float = 0.2,
        absent_weight: float = 5.0,
        prompts: Sequence[str] = PROMPTS,
        objects: int = 3,
        focus: float | None = None,
    ) -> None:
        if not isinstance(model, TrackingModel):
            raise UserError("task=tracking needs SAM2's video model: backbone=sam2_mini head=null, or another size")
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        if not prompts or set(prompts) - set(PROMPTS) or objects < 1:
            raise UserError(
                f"task.prompts={list(prompts)} task.objects={objects}: prompts are one or more of "
                f"{', '.join(PROMPTS)}, objects at least 1"
            )
        check_focus(focus)
        self.prompts, self.objects, self.focus = tuple(prompts), objects, focus
        self.score_weight, self.absent_weight = score_weight, absent_weight
        self.loss = PromptLoss(ce_weight=ce_weight, dice_weight=dice_weight, iou_weight=iou_weight)
        self._counts: list[Tensor] = []
        self._labels: list[int] = []

    def images(self, batch: dict[str, Any]) -> Tensor:
        """All frames of a batch of pieces, normalised: (B * T, 3, S, S)."""
        return normalise(batch["image"].flatten(0, 1), None, self.model.mean, self.model.std)

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Mean loss over the frames and objects of a batch of pieces, with the adapters' auxiliary losses."""
        frames = batch["mask"].shape[1]
        encoded = self.model.encode_normalised(self.images(batch))
        losses = []
        for number, mask in enumerate(batch["mask"]):
            truth = drawn_objects(mask, self.objects, self.model.spec.ignore_index)
            if len(truth):
                piece = [encoded.at(number * frames + t) for t in range(frames)]
                losses += self._follow(piece, truth, mask != self.model.spec.ignore_index)
        if not losses:  # no piece has a structure in its first frame
            return self.complete(encoded.coarse.sum() * 0)
        return self.complete(torch.stack(losses).mean())

    def _follow(self, piece: Sequence[Encoded], truth: Tensor, counted: Tensor) -> list[Tensor]:
        """Losses of the frames of one piece; `truth` bool (O, T, S, S), `counted` bool (T, S, S)."""
        objects = range(len(truth))
        propagation = Propagation(self.model, len(truth), frames=len(piece))
        asked = self._ask(truth[:, 0])
        losses = []
        for t, frame in enumerate(piece):
            answers = propagation.step(frame, t, [Question(objects, asked)] if t == 0 else [])
            if counted[t].any() and (t > 0 or asked.masks is None):
                losses += [self._frame_loss(answer, truth[:, t], counted[t]) for answer in answers]
        return losses

    def _ask(self, truth: Tensor) -> Asked:
        """A prompt of a random kind for each object, bool (O, S, S)."""
        kind = self.prompts[int(torch.randint(len(self.prompts), ()))]
        if kind == "mask":
            return Asked(masks=truth.float())
        size = (truth.shape[-2], truth.shape[-1])
        if kind == "point":
            places = random_place(truth[None])[0][:, None].float() + 0.5
            return Asked(points=places, labels=torch.ones_like(places[..., 0], dtype=torch.int64))
        corners = jitter(boxes_of(truth[None]).float(), size)[0].unflatten(1, (2, 2))
        return Asked(points=corners, labels=torch.tensor([[2, 3]], device=truth.device).expand(len(truth), 2))

    def _frame_loss(self, answer: Answer, truth: Tensor, counted: Tensor) -> Tensor:
        """Loss of one frame; objects that are not in it train the score, and masks that are empty."""
        decoded, wanted = answer.decoded, truth[list(answer.objects)]
        there = wanted.flatten(1).any(1)
        logits = F.interpolate(decoded.logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)
        masks = PromptedMasks(logits=logits[None], scores=decoded.ious[None], coarse=decoded.logits[None])
        parts = self.loss(masks, wanted[None], counted[None], there[None])
        score = F.binary_cross_entropy_with_logits(decoded.scores, there.float())
        empty = (F.softplus(logits.float()) * counted).mean((1, 2, 3))[~there].sum() / max(int((~there).sum()), 1)
        return parts["loss"] + self.score_weight * score + self.absent_weight * empty

    def validation_step(self, sample: dict[str, Any], *_: Any) -> None:
        """Measure a whole clip of the val split."""
        self._evaluate(sample)

    def test_step(self, sample: dict[str, Any], *_: Any) -> None:
        """Measure a whole clip of the test split."""
        self._evaluate(sample)

    def table(self) -> str:
        """The metrics of the test split as text."""
        result = self.results["test"]
        lines = [f"{result['structures']} structures   Dice {result['dice']:.3f}   IoU {result['miou']:.3f}"]
        each = result["structure_dice"]
        width = max(map(len, each), default=0)
        return "\n".join([*lines, *(f"  {name:<{width}}  Dice {dice:.3f}" for name, dice in each.items())])

    def draw(self, samples: Any, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per clip: some of its frames with the truth, and below with what was found."""
        from vfmadapt.tasks.clip_previews import write_clip_previews

        return write_clip_previews(self.follow, samples, folder, indices=indices)

    def follow(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Track all structures of a clip, each from its mask in the middle frame of those that have it.

        Returns:
            found and truth, bool (O, T, H, W); the prompted frames (O,).
        """
        mask = sample["mask"].cpu()
        labels = structures(mask, self.model.spec.ignore_index)
        truth = torch.stack([mask == label for label in labels]) if labels else mask.new_zeros((0, *mask.shape)).bool()
        middles = [present[len(present) // 2] for present in (one.flatten(1).any(1).nonzero()[:, 0] for one in truth)]
        prompts = [
            Prompt(int(middle), label, mask=one[middle].numpy())
            for middle, label, one in zip(middles, labels, truth, strict=True)
        ]
        found = torch.zeros_like(truth)
        if prompts:
            clip = ArrayClip(sample["image"].cpu().numpy(), name=str(sample["id"]))
            for index, result in track(self.model, clip, prompts, focus=self.focus):
                found[:, index] = result.masks
        return found, truth, torch.tensor([int(m) for m in middles])

    def _start(self) -> None:
        self._counts, self._labels = [], []

    def _evaluate(self, sample: dict[str, Any]) -> None:
        found, truth, prompted = self.follow(sample)
        counted = (sample["mask"].cpu() != self.model.spec.ignore_index).expand_as(truth).clone()
        counted[torch.arange(len(prompted)), prompted] = False
        both = (found & truth & counted).flatten(1).sum(1)
        sizes = ((found & counted).flatten(1).sum(1), (truth & counted).flatten(1).sum(1))
        self._counts.append(torch.stack([both, *sizes], 1).double())
        self._labels += structures(sample["mask"].cpu(), self.model.spec.ignore_index)

    def _conclude(self, split: str) -> None:
        """Dice and IoU of every structure over all frames of its clip but the prompted one, averaged.

        "structure_dice": of those of each class by itself, {class: mean}, classes that no clip has left out.
        """
        counts = torch.cat(self._counts) if self._counts else torch.zeros(0, 3)
        known = (counts[:, 1:] > 0).any(1)
        both, found, truth = counts[known].T
        each = 2 * both / (found + truth)
        dice, iou = each.nanmean(), (both / (found + truth - both)).nanmean()
        self.results[split] = {
            "dice": float(dice),
            "miou": float(iou),
            "structures": len(both),
            "structure_dice": self._by_class(torch.tensor(self._labels, dtype=torch.int64)[known], each),
        }
        self.log(f"{split}/miou", float(iou), prog_bar=True)  # callbacks wait for one
        self.log(f"{split}/dice", float(dice))

    def _by_class(self, labels: Tensor, values: Tensor) -> dict[str, float]:
        """Means of values (N,) over those of each label (N,)."""
        names = {label: spec.name for label, spec in enumerate(self.model.spec.classes)}
        return {
            names.get(label, str(label)): float(values[labels == label].mean()) for label in labels.unique().tolist()
        }


def structures(mask: Tensor, ignored: int) -> list[int]:
    """Labels in a label map, but for background and what is ignored."""
    return [int(label) for label in mask.unique() if label not in (0, ignored)]


def drawn_objects(mask: Tensor, most: int, ignored: int) -> Tensor:
    """Structures in the first frame of a label map (T, S, S), at most `most`: bool (O, T, S, S).

    Those that a later frame lacks come first, since they alone teach absence; otherwise the choice is random.
    """
    labels = structures(mask[0], ignored)
    drawn = [labels[i] for i in torch.randperm(len(labels)).tolist()]
    lost = lost_labels(mask).tolist()
    chosen = sorted(drawn, key=lambda label: label not in lost)[:most]
    return torch.stack([mask == label for label in chosen]) if chosen else mask.new_zeros((0, *mask.shape)).bool()
