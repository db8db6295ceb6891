"""What is remembered of one object: as much as SAM2 reads, whatever the length of the video."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """One frame's: `features` (h * w, 64) of mask and picture, None once too old to be read, and `pointer` (C,)."""

    features: Tensor | None
    pointer: Tensor


@dataclass(frozen=True)
class Recalled:
    """What is read for a frame: features with their slots, pointers with their ages in frames.

    The slot is how many frames old the features are, 0 for those of a prompt.
    """

    features: tuple[tuple[int, Tensor], ...]
    pointers: tuple[tuple[int, Tensor], ...]


@dataclass(frozen=True)
class Limits:
    """How much is read for a frame.

    `prompted`: frames with prompts, the nearest (4 in SAM2's training); `features`: of other frames, at most so many
    frames old (SAM2: 6); `pointers`: likewise (SAM2: 15).
    """

    prompted: int = 4
    features: int = 6
    pointers: int = 15


class Bank:
    """The memories of an object. Frames that had prompts are remembered apart from those that it was tracked in."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.prompted: dict[int, Memory] = {}
        self.tracked: dict[int, Memory] = {}

    def keep(self, frame: int, memory: Memory, *, prompted: bool) -> None:
        """Remember a frame; what was known of it is replaced."""
        self.tracked.pop(frame, None)
        (self.prompted if prompted else self.tracked)[frame] = memory

    def read(self, frame: int, *, reverse: bool) -> Recalled:
        """What SAM2 reads for a frame when going forward, or in `reverse`."""
        sign = -1 if reverse else 1
        chosen = self._nearest(frame)
        others = {t: m for t, m in self.prompted.items() if t not in chosen} | self.tracked
        features = [(0, self.prompted[t].features) for t in chosen]
        for age in range(self.limits.features, 0, -1):
            if memory := others.get(frame - sign * age):
                features.append((age, memory.features))
        pointers = [(sign * (frame - t), self.prompted[t].pointer) for t in chosen if sign * (frame - t) >= 0]
        for age in range(1, self.limits.pointers + 1):
            if memory := others.get(frame - sign * age):
                pointers.append((age, memory.pointer))
        return Recalled(tuple((slot, f) for slot, f in features if f is not None), tuple(pointers))

    def forget(self, frame: int, *, reverse: bool, anchor: int | None) -> None:
        """Let go of what no later frame reads, `frame` being the last one done.

        `anchor`: where the way back will start; what is read there is kept, and all prompted frames.
        """
        if anchor is None:
            sign = -1 if reverse else 1
            passed = sorted((t for t in self.prompted if sign * (frame - t) >= 0), key=lambda t: sign * t)
            for t in passed[: -self.limits.prompted]:
                self.tracked[t] = self.prompted.pop(t)
        for t in list(self.tracked):
            age = min(abs(frame - t), abs((frame if anchor is None else anchor) - t))
            if age >= self.limits.pointers:
                del self.tracked[t]
            elif age >= self.limits.features:
                self.tracked[t] = replace(self.tracked[t], features=None)

    def _nearest(self, frame: int) -> list[int]:
        """The prompted frames that are read: the nearest before, the nearest after, then whatever is nearest."""
        if len(self.prompted) <= self.limits.prompted:
            return list(self.prompted)
        before = max((t for t in self.prompted if t < frame), default=None)
        after = min((t for t in self.prompted if t >= frame), default=None)
        chosen = [t for t in (before, after) if t is not None][: self.limits.prompted]
        rest = sorted((t for t in self.prompted if t not in chosen), key=lambda t: abs(t - frame))
        return chosen + rest[: self.limits.prompted - len(chosen)]
