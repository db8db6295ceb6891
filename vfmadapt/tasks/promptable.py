"""Masks of prompted objects as a Lightning module, trained and measured with simulated boxes and clicks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmadapt.contracts import MaskPrompts, PromptedMasks, Samples
from vfmadapt.errors import UserError
from vfmadapt.losses import PromptLoss, mask_iou
from vfmadapt.metrics import PromptMetrics
from vfmadapt.model import AdaptedModel
from vfmadapt.promptable import PromptableModel, is_ambiguous
from vfmadapt.tasks.clicks import (
    Objects,
    boxes_of,
    central_place,
    find_objects,
    first_click,
    jitter,
    next_click,
    random_place,
    stack_objects,
)
from vfmadapt.tasks.training import AdapterTask, Optimizer, Schedule


class PromptableTask(AdapterTask):
    """Trains a model to segment what is pointed at, on the connected regions of any labelled images.

    A step draws objects, prompts all of them with a random point or all with a box that is a little off, and then goes
    on clicking where the masks are wrong, the last masks being prompts, too (Kirillov et al. 2023,
    https://arxiv.org/abs/2304.02643, appendix A). All settings are keyword-only and appear under `task.` on the command
    line.

    Args:
        model: backbone, adapter and a head that answers prompts.
        name: name of the task, for the run folder.
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (biases, norms, scales) are not decayed.
        warmup: share of all steps in which the learning rate rises.
        schedule: "cosine", "poly" or "constant".
        optimizer: "adamw" or "muon", see `AdapterTask`.
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice loss.
        iou_weight: weight of the expected IoU's squared error.
        classes: names of the classes whose regions are objects; None: all that are not lines.
        objects: at most so many per image and step.
        smallest: pixels of the smallest object.
        clicks: after the first prompt, in training and in the metric.
        window: larger images are measured by windows of this side, in pixels.

    Raises:
        UserError: a head that answers no prompts, an adapter that compares label maps, an impossible setting.
    """

    model: PromptableModel

    def __init__(
        self,
        model: AdaptedModel,
        *,
        name: str = "promptable",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        optimizer: Optimizer = "adamw",
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        classes: Sequence[str] | None = None,
        objects: int = 8,
        smallest: int = 40,
        clicks: int = 2,
        window: int = 512,
    ) -> None:
        if not isinstance(model, PromptableModel):
            raise UserError("task=promptable needs a head that answers prompts: head=sam or head=sam_tiny")
        super().__init__(
            model, name=name, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule, optimizer=optimizer
        )
        if objects < 1 or smallest < 1 or clicks < 0 or window < 1:
            raise UserError(
                f"task.objects={objects} task.smallest={smallest} task.clicks={clicks} task.window={window}: "
                "clicks is at least 0, the others at least 1"
            )
        if any(a.forwards_per_step > 1 for a in model.backbone.active_adapters()):
            raise UserError("task=promptable: this adapter compares label maps, which the task has none of")
        self.classes = _labels(model, classes)
        self.objects, self.smallest, self.clicks, self.window = objects, smallest, clicks, window
        self.loss = PromptLoss(ce_weight=ce_weight, dice_weight=dice_weight, iou_weight=iou_weight)
        self.metrics = PromptMetrics([c.name for c in model.spec.classes], clicks=clicks)

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        """Mean loss of a batch over the rounds of prompts, with the adapters' auxiliary losses."""
        objects, counted = self.drawn_objects(batch["mask"]), batch["mask"] != self.model.spec.ignore_index
        size = (objects.masks.shape[-2], objects.masks.shape[-1])
        embedding = self.model.encode(batch["image"], batch["valid"])
        nothing = None
        if torch.rand(()) < 0.5:
            prompts = MaskPrompts(boxes=jitter(boxes_of(objects.masks), size))
        else:
            places, nothing = self._places(objects, batch["mask"], counted)
            prompts = first_click(places, random_place)
        losses = []
        for _ in range(1 + self.clicks):
            answer = self.model.asked.decode(embedding, prompts, size, several=is_ambiguous(prompts))
            parts = self.loss(answer, objects.masks, counted, objects.present, nothing)
            losses.append(parts["loss"])
            nothing = None  # only a first point lies on nothing
            prompts = click(prompts, answer.best(), objects.masks, counted, random_place)
        self.log_dict({"train/mask": parts["mask"], "train/iou": parts["iou"]})
        return self.complete(torch.stack(losses).mean())

    def validation_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count the objects of a whole image of the val split."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], *_: Any) -> None:
        """Count the objects of a whole image of the test split."""
        self._evaluate(batch)

    def table(self) -> str:
        """The metrics of the test split as text."""
        result = self.results["test"]
        rows = [("box", result["box_iou"]), ("point", result["point_iou"]), ("clicks", result["clicks_iou"])]
        rows += [(f"box, {name}", value) for name, value in result["iou"].items() if value is not None]
        width = max(len(name) for name, _ in rows)
        shown = [f"{name:<{width}}  {'-' if value is None else format(value, '.3f')}" for name, value in rows]
        return "\n".join([f"IoU of {result['objects']} objects from", *shown])

    def draw(self, samples: Samples, folder: Path, *, indices: Sequence[int]) -> list[Path]:
        """Write one picture per sample: the truth with its boxes and points, and what was found from each."""
        from vfmadapt.tasks.prompt_previews import write_prompt_previews

        return write_prompt_previews(self, samples, folder, indices=indices)

    def drawn_objects(self, mask: Tensor) -> Objects:
        """Objects of label maps (B, H, W), drawn at random where there are more than `objects`."""
        images = []
        for one in mask:
            found = find_objects(one, self.classes, smallest=self.smallest)
            images.append([found[i] for i in torch.randperm(len(found))[: self.objects].tolist()])
        return self._stack(images, mask)

    def _places(self, objects: Objects, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Where points may lie, bool (B, M, H, W): on the object, and where there is none on what is no object.

        Asked for all objects, the head is asked about such places, too (`vfmadapt.automatic`).

        Returns:
            the places; bool (B, M): those on no object.
        """
        other = counted & ~torch.isin(mask, mask.new_tensor(self.classes))
        places = torch.where(objects.present[..., None, None], objects.masks, other[:, None])
        return places, ~objects.present & other.flatten(1).any(1)[:, None]

    def all_objects(self, mask: Tensor) -> Iterator[Objects]:
        """Every object of a label map (H, W), `objects` at a time, in batches of one image."""
        found = find_objects(mask, self.classes, smallest=self.smallest)
        for first in range(0, len(found), self.objects):
            yield self._stack([found[first : first + self.objects]], mask)

    def ask(self, embedding: Tensor, objects: Objects, counted: Tensor) -> dict[str, PromptedMasks]:
        """Answers to one "box", one "point", and the point with `clicks` more ("clicks"), none of them random."""
        size = (objects.masks.shape[-2], objects.masks.shape[-1])
        answers = {"box": self.model.answer(embedding, MaskPrompts(boxes=boxes_of(objects.masks)), size)}
        prompts = first_click(objects.masks, central_place)
        answers["point"] = answers["clicks"] = self.model.answer(embedding, prompts, size)
        for _ in range(self.clicks):
            prompts = click(prompts, answers["clicks"], objects.masks, counted, central_place)
            answers["clicks"] = self.model.answer(embedding, prompts, size)
        return answers

    def _stack(self, images: list[list[tuple[int, Tensor]]], mask: Tensor) -> Objects:
        made = stack_objects(images, (mask.shape[-2], mask.shape[-1]), most=self.objects)
        device = mask.device
        return Objects(made.masks.to(device), made.classes.to(device), made.present.to(device))

    def _start(self) -> None:
        self.metrics.reset()

    def _evaluate(self, batch: dict[str, Any]) -> None:
        height, width = batch["mask"].shape[-2:]
        for top in range(0, height, self.window):
            for left in range(0, width, self.window):
                at = (..., slice(top, top + self.window), slice(left, left + self.window))
                self._evaluate_window(batch["image"][at], batch["valid"][at], batch["mask"][at])

    def _evaluate_window(self, image: Tensor, valid: Tensor, mask: Tensor) -> None:
        embedding, counted = None, mask != self.model.spec.ignore_index
        for objects in self.all_objects(mask[0]):
            embedding = self.model.encode(image, valid) if embedding is None else embedding
            answers = self.ask(embedding, objects, counted)
            found = {
                kind: mask_iou(answer.logits[:, :, 0] > 0, objects.masks, counted[:, None])[0]
                for kind, answer in answers.items()
            }
            self.metrics.update(objects.classes[0], found)

    def _conclude(self, split: str) -> None:
        self.metrics.sync(self.device)
        result = self.metrics.compute()
        self.results[split] = result
        known = {f"{split}/{k}": v for k, v in result.items() if isinstance(v, float)}
        self.log(f"{split}/miou", known.pop(f"{split}/miou", 0.0), prog_bar=True)  # callbacks wait for one
        self.log_dict(known)


def click(prompts: MaskPrompts, answer: PromptedMasks, truth: Tensor, counted: Tensor, place: Any) -> MaskPrompts:
    """The next round: one more point where the one answer (T = 1) is wrong, and its mask as a prompt."""
    found = answer.logits[:, :, 0].detach() > 0
    return replace(next_click(prompts, found, truth, counted, place), masks=answer.coarse[:, :, 0].detach())


def _labels(model: AdaptedModel, classes: Sequence[str] | None) -> list[int]:
    known = model.spec.classes
    if classes is None:
        return [i for i, c in enumerate(known) if not c.line]
    names = [c.name for c in known]
    if isinstance(classes, str) or not classes or (unknown := [n for n in classes if n not in names]):
        wrong = classes if isinstance(classes, str) or not classes else unknown[0]
        raise UserError(f"task.classes: {wrong!r} is no class of {model.spec.name}; choose from {', '.join(names)}")
    return [names.index(n) for n in classes]
