"""Training loop of masked-image modelling: schedule, random views, steps, state.

Every random draw is a function of (seed, step, shard).
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt._mae import MaskedAutoencoder

log = logging.getLogger(__name__)

MEAN, STD = 0.3, 0.2
"""Normalisation of the pictures (0..1), the same for every band."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Args:
        steps: optimiser steps of the whole run.
        minutes: wall-clock budget; the schedule ends at whichever of the two comes first. None: steps alone, and a
            resumed run equals an unbroken one.
        tokens: patches per step (before masking): the batch is `tokens` over the patches of the step's crop size.
        shards: equal parts of a batch, each with its own random stream; up to so many processes share the work.
        sizes: crop sizes in pixels, one drawn per step.
        lr: peak learning rate; `warmup` steps up to it, then a cosine to 0.
        weight_decay: of AdamW, on matrices only.
        seed: of weights, crops and masks.
        save_seconds: time between checkpoints.
    """

    steps: int
    minutes: float | None
    tokens: int
    shards: int
    sizes: tuple[int, ...]
    lr: float
    warmup: int
    weight_decay: float
    seed: int
    save_seconds: float

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done (0..1)."""
        timed = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(step / self.steps, timed))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a step."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


def random_views(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Pictures uint8 (B, S, S, 3) -> normalised crops (B, 3, size, size): scale 0.5..1.6, flips, quarter turns, casts.

    A scale above 1 shows more ground per pixel; the crop always lies inside the picture.
    """
    count, side = pictures.shape[:2]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    extent = (size / side * torch.exp(uniform(math.log(0.5), math.log(1.6)))).clamp(max=1.0)
    turn = torch.randint(4, (count,), generator=generator) * (math.pi / 2)
    flip = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    shift = uniform(-1, 1, 2) * (1 - extent).unsqueeze(1)
    cos, sin = torch.cos(turn) * extent, torch.sin(turn) * extent
    rows = [torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, size, size], align_corners=False)
    image = F.grid_sample(pictures.permute(0, 3, 1, 2).float() / 255, grid, padding_mode="border", align_corners=False)
    image = image.clamp(min=1e-4) ** torch.exp(uniform(-0.25, 0.25, 1, 1, 1))
    gain = torch.exp(uniform(-0.35, 0.3, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1))
    image = image * gain + uniform(-0.04, 0.04, 1, 1, 1)
    return (image.clamp(0, 1.2) - MEAN) / STD


class Trainer:
    """Model, optimiser and position of a run.

    `pool`: pictures uint8 (n, S, S, 3); `positions`: cells per side of a crop -> the decoder's
    positions (cells^2, dim).
    `history`: (step, loss, learning rate, images so far, seconds so far) of every step.
    """

    def __init__(self, model: MaskedAutoencoder, pool: Any, plan: Plan, positions: Callable[[int], Tensor]) -> None:
        self.model, self.pool, self.plan, self.positions = model, pool, plan, positions
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)  # MAE's betas
        self.step, self.seconds, self.images, self.seen = 0, 0.0, 0, time.monotonic()
        self.history: list[tuple[int, float, float, int, float]] = []

    def shard(self, step: int, index: int) -> tuple[Tensor, torch.Generator]:
        """Normalised crops of a step's shard and the generator for its masks."""
        generator = torch.Generator().manual_seed((self.plan.seed * 1_000_003 + step) * 64)
        size = self.plan.sizes[int(torch.randint(len(self.plan.sizes), (1,), generator=generator))]
        count = max(1, self.plan.tokens // self.plan.shards // (size // self.model.patch) ** 2)
        generator.manual_seed((self.plan.seed * 1_000_003 + step) * 64 + 1 + index)
        chosen = torch.randint(len(self.pool), (count,), generator=generator)
        return random_views(torch.from_numpy(self.pool[chosen.numpy()]), size, generator), generator

    def train_step(self) -> float:
        """One optimiser step -> loss. In a process group each process works on its share of the shards."""
        plan, count = self.plan, 0
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.step, plan.progress(self.step, self.seconds))
        total = torch.zeros(())
        for index in range(rank, plan.shards, world):
            image, generator = self.shard(self.step, index)
            loss = self.model(image, self.positions(image.shape[2] // self.model.patch), generator) / plan.shards
            loss.backward()
            total, count = total + loss.detach(), len(image)
        value, self.seconds = self._reduce(total, self._clock() if rank == 0 else 0.0)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # early steps at the full rate spike
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.images = self.step + 1, self.images + count * plan.shards
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append((self.step, value, rate, self.images, round(self.seconds, 1)))
        return value

    def _clock(self) -> float:
        """Seconds of the run so far, those of earlier sittings included."""
        before, self.seen = self.seen, time.monotonic()
        return self.seconds + self.seen - before

    def _reduce(self, loss: Tensor, clock: float) -> tuple[float, float]:
        """Sum gradients, loss and clock (the first process's) over the process group -> (loss, clock)."""
        if not dist.is_initialized():
            return loss.item(), clock
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.reshape(1), torch.tensor([clock])])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat[:-2].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-2].item(), flat[-1].item()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "images": self.images, "history": self.history, "seed": self.plan.seed,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.images = state["step"], state["seconds"], state["images"]
        self.history, self.seen = state["history"], time.monotonic()

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.plan.progress(self.step, self.seconds) >= 1


def fit(trainer: Trainer, save: Callable[[], None] = lambda: None) -> None:
    """Train to the end of the plan, calling `save` every `save_seconds` and at the end."""
    saved = logged = time.monotonic()
    while not trainer.done:
        trainer.train_step()
        now = time.monotonic()
        if now - logged > 30 or trainer.done:  # one line per half minute
            logged = now
            recent = [row[1] for row in trainer.history[-50:]]
            loss, speed = sum(recent) / len(recent), trainer.images / max(trainer.seconds, 1e-9)
            log.info("step %d  loss %.4f  %.0f images/s  %.0f s", trainer.step, loss, speed, trainer.seconds)
        if now - saved > trainer.plan.save_seconds:
            saved = now
            save()
    save()
