"""One step of SAM2's tracking for all objects at once; gradients pass, so that training takes the same step."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfmadapt.tracking.memory import Bank, Limits, Memory, Recalled
from vfmadapt.tracking.model import Asked, Decoded, Encoded, TrackingModel

STORED = torch.bfloat16  # of features in the memory, as in the sam2 package: half the space


@dataclass(frozen=True)
class Question:
    """Prompts of one kind for some objects, `asked` in their order; a correction is about one object."""

    objects: Sequence[int]
    asked: Asked


@dataclass(frozen=True)
class Answer:
    """What was decoded in one batch for some objects."""

    objects: Sequence[int]
    decoded: Decoded


class Propagation:
    """The memories of O objects, and the step from frame to frame.

    Args:
        model: decodes and remembers.
        objects: O; they are counted from 0 here.
        frames: T, where known: SAM2 measures the age of pointers against the length of a shorter clip.
        anchor: the frame from which the way back will start, where there is one.
        limits: of the memory.
    """

    def __init__(
        self,
        model: TrackingModel,
        objects: int,
        *,
        frames: int | None = None,
        anchor: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits = limits or Limits()
        self.model, self.anchor = model, anchor
        self.banks = [Bank(limits) for _ in range(objects)]
        self._longest = max(limits.pointers if frames is None else min(frames - 1, limits.pointers), 1)

    def add_object(self) -> None:
        """One more object, of which nothing is known; it counts after the others."""
        self.banks.append(Bank(self.limits))

    def knows(self, at: int, index: int) -> bool:
        """Whether an object was prompted or tracked in frame `index`."""
        return index in self.banks[at].prompted or index in self.banks[at].tracked

    def step(self, frame: Encoded, index: int, questions: Sequence[Question], *, reverse: bool = False) -> list[Answer]:
        """Answers for frame `index` (B = 1): of the objects asked about, and of all others that are known."""
        asked = {i for question in questions for i in question.objects}
        known = [i for i, bank in enumerate(self.banks) if bank.prompted and i not in asked]
        tracked = [
            Answer(objects, self.model.decode(frame, coarse))
            for objects, coarse in self._recall(frame, index, known, reverse=reverse)
        ]
        prompted = self._ask(frame, questions)
        self._remember(frame, index, prompted, tracked)
        for bank in self.banks:
            bank.forget(index, reverse=reverse, anchor=self.anchor)
        return [*prompted, *tracked]

    def ask(self, frame: Encoded, index: int, questions: Sequence[Question]) -> list[Answer]:
        """As `step`, but only of the objects asked about; nothing is forgotten."""
        answers = self._ask(frame, questions)
        self._remember(frame, index, answers, [])
        return answers

    def correct(self, frame: Encoded, index: int, question: Question, *, reverse: bool) -> Answer:
        """A new answer for one object in the frame of the last step.

        Where it was tracked in that frame, its memory counts beside the prompt, and the frame stays a tracked one.
        """
        (at,) = question.objects
        if index not in self.banks[at].tracked:
            return self.ask(frame, index, [question])[0]
        ((_, coarse),) = self._recall(frame, index, [at], reverse=reverse)
        answer = self._answer(frame, coarse, question)
        (memory,) = self._memories(frame, [answer], certain=[True])
        self.banks[at].keep(index, memory, prompted=False)
        return answer

    def _ask(self, frame: Encoded, questions: Sequence[Question]) -> list[Answer]:
        """Answers that no memory counts for."""
        coarse = self.model.without_memory(frame)
        return [self._answer(frame, coarse, question) for question in questions]

    def _answer(self, frame: Encoded, coarse: Tensor, question: Question) -> Answer:
        if question.asked.masks is not None:
            return Answer(question.objects, self.model.use_masks(frame, question.asked.masks))
        return Answer(question.objects, self.model.decode(frame, coarse, question.asked))

    def _recall(
        self, frame: Encoded, index: int, objects: Sequence[int], *, reverse: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Objects that remember equally much, with the frame conditioned on their memories, (N, C, h, w)."""
        read = {i: self.banks[i].read(index, reverse=reverse) for i in objects}
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, recalled in read.items():
            groups[len(recalled.features), len(recalled.pointers)].append(i)
        for members in groups.values():
            yield members, self.model.recall(frame, *self._tokens([read[i] for i in members]))

    def _tokens(self, recalled: Sequence[Recalled]) -> tuple[Tensor, Tensor, int]:
        """What N objects remember, equally much each -> tokens, their positions, and how many are of pointers."""
        slots = {slot for one in recalled for slot, _ in one.features}
        places = {slot: self.model.memory_position(slot) for slot in slots}
        memory = torch.stack([torch.cat([feature for _, feature in one.features]) for one in recalled])
        position = torch.stack([torch.cat([places[slot] for slot, _ in one.features]) for one in recalled])
        memory = memory.to(position.dtype)
        if not recalled[0].pointers:
            return memory, position, 0
        pointers = torch.stack([torch.stack([pointer for _, pointer in one.pointers]) for one in recalled])
        ages = torch.tensor([[age for age, _ in one.pointers] for one in recalled], device=pointers.device)
        tokens, at = self.model.pointer_tokens(pointers, ages, self._longest)
        return torch.cat([memory, tokens], 1), torch.cat([position, at], 1), tokens.shape[1]

    def _remember(self, frame: Encoded, index: int, prompted: Sequence[Answer], tracked: Sequence[Answer]) -> None:
        new = [i for answer in prompted for i in answer.objects]
        objects = new + [i for answer in tracked for i in answer.objects]
        certain = [i in new for i in objects]
        for i, memory in zip(objects, self._memories(frame, [*prompted, *tracked], certain), strict=True):
            self.banks[i].keep(index, memory, prompted=i in new)

    def _memories(self, frame: Encoded, answers: Sequence[Answer], certain: Sequence[bool]) -> list[Memory]:
        """Memories of all objects of some answers, in order; `certain`: which of their masks were prompted."""
        if not answers:
            return []
        masks = torch.cat([answer.decoded.masks for answer in answers])
        scores = torch.cat([answer.decoded.scores for answer in answers])
        sure = torch.tensor(certain, device=masks.device)
        features = self.model.remember(frame, masks, scores, sure).to(STORED)
        pointers = torch.cat([answer.decoded.pointers for answer in answers])
        return [Memory(*pair) for pair in zip(features, pointers, strict=True)]
