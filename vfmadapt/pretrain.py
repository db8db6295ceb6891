"""Masked-image modelling of a backbone: resumable, on several processes, writing weights under timm's names."""

import csv
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from vfmadapt._mae import MaskedAutoencoder, draw_curve
from vfmadapt._mae_trainer import Plan, Trainer, fit
from vfmadapt._settings import check_arguments
from vfmadapt.backbones._mae_encoder import MaskedViT, sincos_positions
from vfmadapt.build import instantiate, plain
from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


def save_weights(encoder: MaskedViT, path: Path) -> None:
    """Write an encoder's weights as fp16 safetensors under timm's names."""
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


def build_trainer(cfg: "DictConfig") -> Trainer:
    """Instantiate encoder, decoder and pool of a config; weights drawn from its seed."""
    check_arguments(Plan, "plan", plain(cfg.plan))
    check_arguments(MaskedAutoencoder, "decoder", plain(cfg.decoder))
    plan = Plan(**{**cfg.plan, "sizes": tuple(cfg.plan.sizes)}, seed=cfg.seed, steps=cfg.steps, minutes=cfg.minutes)
    if cfg.objective != "mae":
        raise UserError(f"objective={cfg.objective}: only mae is known")
    if cfg.decoder.dim < 1 or cfg.decoder.dim % 4 or cfg.decoder.dim % cfg.decoder.heads:
        raise UserError(
            f"decoder.dim={cfg.decoder.dim} decoder.heads={cfg.decoder.heads}: dim is a multiple of 4 and of heads"
        )
    pool = instantiate(cfg.pool, packages=("vfmadapt.datasets.",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = MaskedAutoencoder(MaskedViT(instantiate(cfg.net)), **cfg.decoder)
    if not plan.sizes or (wrong := [s for s in plan.sizes if s % model.patch or s < 1]):
        which = f"{wrong[0]} is no multiple" if plan.sizes else "give some multiples"
        raise UserError(f"plan.sizes={list(plan.sizes)}: {which} of the patch ({model.patch})")
    if not 1 <= cfg.workers <= plan.shards:
        raise UserError(f"workers={cfg.workers}: 1 to {plan.shards} (plan.shards) processes can share the work")
    return Trainer(model, pool, plan, cache(lambda cells: sincos_positions(cells, cells, model.dim)))


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != trainer.plan.seed:
            raise UserError(
                f"seed={trainer.plan.seed}: {checkpoint} is of seed {state['seed']}; give that seed or another output="
            )
        trainer.load(state)
        log.info("continuing %s at step %d", checkpoint, trainer.step)


def _join(cfg: "DictConfig", rank: int) -> None:
    """Enter the process group; each process computes on one thread: they meet once a step, threads at every product."""
    torch.set_num_threads(1)
    where = f"file://{Path(cfg.output).resolve()}/.group"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=cfg.workers)


@contextmanager
def _group(cfg: "DictConfig") -> Iterator[None]:
    """Share the work with `cfg.workers` - 1 further processes (plain ones: why, says datasets/_tiles.py)."""
    from omegaconf import OmegaConf

    (Path(cfg.output) / ".group").unlink(missing_ok=True)
    code = "import sys; from vfmadapt.pretrain import work; work(sys.stdin.read())"
    settings, threads = OmegaConf.to_container(cfg, resolve=True), torch.get_num_threads()
    started = []
    for rank in range(1, cfg.workers):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps([settings, rank]))
        process.stdin.close()
        started.append(process)
    try:
        if started:
            _join(cfg, 0)
        yield
        if started:
            dist.destroy_process_group()
    except BaseException:
        for process in started:
            process.terminate()
        raise
    finally:
        torch.set_num_threads(threads)
        (Path(cfg.output) / ".group").unlink(missing_ok=True)


def work(text: str) -> None:
    """Be a further process of the group (`text`: JSON [config, rank]): same steps, other shards, nothing written."""
    from omegaconf import OmegaConf

    settings, rank = json.loads(text)
    cfg = OmegaConf.create(settings)
    _join(cfg, rank)
    trainer = build_trainer(cfg)
    _resume(trainer, Path(cfg.output) / "last.pt")
    fit(trainer)
    dist.destroy_process_group()


def main(cfg: "DictConfig") -> dict[str, Any]:
    """Pretrain, or continue the run that lies in `cfg.output`, with `cfg.workers` processes.

    Returns:
        weights (path), steps, images, seconds, loss (mean of the last 50 steps), first_loss (of the first 50),
        parameters.
    """
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(cfg)  # renders the pool before other processes want it
    checkpoint, weights = folder / "last.pt", folder / "weights.safetensors"
    _resume(trainer, checkpoint)

    def save() -> None:
        _atomically(checkpoint, lambda part: torch.save(trainer.state(), part))
        save_weights(trainer.model.encoder, weights)
        save_curve(trainer.history, folder)

    with _group(cfg):
        fit(trainer, save)
    losses = [row[1] for row in trainer.history]
    return {
        "weights": str(weights), "steps": trainer.step, "images": trainer.images, "seconds": round(trainer.seconds, 1),
        "loss": sum(losses[-50:]) / len(losses[-50:]), "first_loss": sum(losses[:50]) / len(losses[:50]),
        "parameters": sum(value.numel() for value in trainer.model.encoder.weights().values()),
    }  # fmt: skip
