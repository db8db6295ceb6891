"""Masked-image modelling of a backbone: a plain torch loop, resumable, writing timm-named weights."""

import csv
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt._mae import MaskedAutoencoder
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

MEAN, STD = 0.3, 0.2
"""Normalisation of the pictures (0..1), the same for every band."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Args:
        steps: optimiser steps of the whole run.
        minutes: wall-clock budget; the schedule ends at whichever of the two comes first. None: steps alone, and a resumed run
            equals an unbroken one.
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
    """Pictures uint8 (B, S, S, 3) -> crops (B, 3, size, size), normalised: any scale 0.5..1.6, flips, quarter turns, colour casts.

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
    theta = torch.stack([torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    image = F.grid_sample(pictures.permute(0, 3, 1, 2).float() / 255, grid, padding_mode="border", align_corners=False)
    image = image.clamp(min=1e-4) ** torch.exp(uniform(-0.25, 0.25, 1, 1, 1))
    image = image * torch.exp(uniform(-0.35, 0.3, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)) + uniform(-0.04, 0.04, 1, 1, 1)
    return (image.clamp(0, 1.2) - MEAN) / STD


class Trainer:
    """Model, optimiser and position of a run; every random draw is a function of (seed, step)."""

    def __init__(self, model: MaskedAutoencoder, pool: Any, plan: Plan, positions: Callable[[int], Tensor]) -> None:
        self.model, self.pool, self.plan, self.positions = model, pool, plan, positions
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)  # MAE's betas
        self.step, self.seconds, self.images = 0, 0.0, 0
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
        begin, plan, count = time.monotonic(), self.plan, 0
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.step, plan.progress(self.step, self.seconds))
        total = torch.zeros(())
        for index in range(rank, plan.shards, world):
            image, generator = self.shard(self.step, index)
            loss = self.model(image, self.positions(image.shape[2] // self.model.patch), generator) / plan.shards
            loss.backward()
            total, count = total + loss.detach(), len(image)
        clock = self.seconds + time.monotonic() - begin if rank == 0 else 0.0
        value, self.seconds = self._reduce(total, clock)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # early steps at the full rate spike
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.images = self.step + 1, self.images + count * plan.shards
        self.history.append((self.step, value, self.optimizer.param_groups[0]["lr"], self.images, round(self.seconds, 1)))
        return value

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
        self.step, self.seconds, self.images, self.history = state["step"], state["seconds"], state["images"], state["history"]

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


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


def save_weights(encoder: Any, path: Path) -> None:
    """Write a `MaskedViT`'s weights as fp16 safetensors under timm's names."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().half().contiguous() for name, value in encoder.weights().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    _atomically(path, lambda part: save_file(tensors, part, metadata={"format": "pt"}))


def save_curve(history: list[tuple[int, float, float, int, float]], folder: Path) -> None:
    """Write loss.csv (a row per step) and loss.png (median of 25 steps) into `folder`."""
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "lr", "images", "seconds"])
        writer.writerows((s, f"{x:.5f}", f"{r:.3e}", n, t) for s, x, r, n, t in history)
    draw_curve([row[1] for row in history], folder / "loss.png")


def draw_curve(losses: list[float], path: Path) -> None:
    """Draw a loss per step as a PNG with axes: steps against loss, each step faint and the running median dark."""
    import numpy as np
    from PIL import Image, ImageDraw

    if len(losses) < 2:
        return
    width, height, left, top = 720, 400, 56, 16
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    values = np.asarray(losses)
    low, high = 0.95 * float(values.min()), float(np.quantile(values, 0.995))
    across, up = (width - left - 16) / (len(values) - 1), (height - top - 40) / max(high - low, 1e-9)

    def at(step: int, loss: float) -> tuple[float, float]:
        return left + across * step, height - 40 - up * (min(loss, high) - low)

    for tick in np.linspace(low, high, 6):
        y = at(0, tick)[1]
        canvas.line([(left, y), (width - 16, y)], fill=(220, 220, 220))
        canvas.text((8, y - 6), f"{tick:.3f}", fill="black")
    for step in np.linspace(0, len(values) - 1, 6).astype(int):
        canvas.text((at(int(step), low)[0] - 10, height - 34), str(step + 1), fill="black")
    canvas.text((width // 2 - 40, height - 18), "step (loss, MAE)", fill="black")
    canvas.line([at(i, float(v)) for i, v in enumerate(values)], fill=(190, 210, 235))
    median = [float(np.median(values[max(0, i - 24) : i + 1])) for i in range(len(values))]
    canvas.line([at(i, v) for i, v in enumerate(median)], fill=(20, 60, 140), width=2)
    image.save(path, "PNG")


def build_trainer(cfg: "DictConfig") -> Trainer:
    """Instantiate encoder, decoder and pool of a config; weights drawn from its seed."""
    from functools import cache

    from hydra.utils import instantiate

    from vfmadapt.backbones._mae_encoder import sincos_positions

    plan = Plan(**{**cfg.plan, "sizes": tuple(cfg.plan.sizes)}, seed=cfg.seed, steps=cfg.steps, minutes=cfg.minutes)
    if cfg.objective != "mae":
        raise UserError(f"objective={cfg.objective}: only mae is known")
    pool = instantiate(cfg.pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = MaskedAutoencoder(instantiate(cfg.encoder), **cfg.decoder)
    wrong = [s for s in plan.sizes if s % model.patch]
    if wrong:
        raise UserError(f"plan.sizes={list(plan.sizes)}: {wrong[0]} is no multiple of the patch ({model.patch})")
    return Trainer(model, pool, plan, cache(lambda cells: sincos_positions(cells, cells, model.dim)))


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != trainer.plan.seed:
            raise UserError(f"seed={trainer.plan.seed}: {checkpoint} is of seed {state['seed']}; give that seed or another output=")
        trainer.load(state)
        log.info("continuing %s at step %d", checkpoint, trainer.step)


def _join(cfg: "DictConfig", rank: int) -> None:
    """Enter the process group; each process computes on one thread, for they meet once a step and threads at every product."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(cfg.output).resolve()}/.group", rank=rank, world_size=cfg.workers)


def _work(cfg: "DictConfig", rank: int) -> None:
    """A further process of the group: the same steps on other shards, nothing written."""
    _join(cfg, rank)
    trainer = build_trainer(cfg)
    _resume(trainer, Path(cfg.output) / "last.pt")
    fit(trainer)


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Pretrain, or continue the run that lies in `cfg.output`, with `cfg.workers` processes.

    Returns:
        weights (path), steps, images, seconds, loss (mean of the last 50 steps), first_loss (of the first 50), parameters.
    """
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(cfg)  # renders the pool before other processes want it
    checkpoint, weights = folder / "last.pt", folder / "weights.safetensors"
    _resume(trainer, checkpoint)
    processes = [get_context("spawn").Process(target=_work, args=(cfg, rank), daemon=True) for rank in range(1, cfg.workers)]
    if processes:
        (folder / ".group").unlink(missing_ok=True)
        for process in processes:
            process.start()
        _join(cfg, 0)

    def save() -> None:
        _atomically(checkpoint, lambda part: torch.save(trainer.state(), part))
        save_weights(trainer.model.encoder, weights)
        save_curve(trainer.history, folder)

    fit(trainer, save)
    if processes:
        dist.destroy_process_group()
    losses = [row[1] for row in trainer.history]
    return {
        "weights": str(weights), "steps": trainer.step, "images": trainer.images, "seconds": round(trainer.seconds, 1),
        "loss": sum(losses[-50:]) / len(losses[-50:]), "first_loss": sum(losses[:50]) / len(losses[:50]),
        "parameters": sum(value.numel() for value in trainer.model.encoder.weights().values()),
    }  # fmt: skip
