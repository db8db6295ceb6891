"""Watching for collapse while a backbone learns without labels: figures, curves and pictures of its features."""

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor

from vfmadapt.files import atomic_path
from vfmadapt.host import AdaptedBackbone
from vfmadapt.objectives.objective import Objective
from vfmadapt.raster.preview import panel, quicklook
from vfmadapt.tasks.progress import ProgressBar

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_IMAGES = 16  # whose features are looked at; of 128 pixels and patch 8 that is 4096 tokens
_SHOWN = 4  # of them, in the pictures
_LOST = 0.25  # share of the rank at the start below which features count as collapsed


def effective_rank(features: Tensor) -> float:
    """Exp of the entropy of the normalised singular values of (n, C): 1 for one direction, at most min(n, C).

    Roy and Vetterli 2007; as a measure of self-supervised features: RankMe, https://arxiv.org/abs/2210.02885.
    """
    values = torch.linalg.svdvals(features.float())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def principal_colours(grids: Tensor) -> NDArray[np.uint8]:
    """Grids (B, h, w, C) -> uint8 (B, h, w, 3): the three main components over all cells, 2nd to 98th percentile."""
    cells = grids.flatten(0, 2).double()
    centred = cells - cells.mean(0)
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -3:].flip(1)
    strongest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scores = (centred @ (directions * strongest.sign())).numpy()  # signs as of the largest entry: stable over epochs
    low, high = np.percentile(scores, (2, 98), axis=0)
    shown = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.asarray(shown * 255 + 0.5, dtype=np.uint8).reshape(*grids.shape[:3], 3)


def callbacks(run: Path, *, side: int) -> "tuple[list[Callback], FeatureWatch]":
    """The bar, a checkpoint after each epoch, and the watch over the features, which is also given by itself."""
    watch = FeatureWatch(run, side=side)
    saves = ModelCheckpoint(
        run / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    return [ProgressBar(), watch, saves], watch


class FeatureWatch(Callback):
    """After each epoch: effective rank, a picture of the features, the curves; a warning when they collapse.

    Everything goes to the loggers and into `folder`: losses.csv, curves.png, features/STEP.png.

    Args:
        folder: of the run.
        side: of the squares that are looked at, in pixels.
    """

    def __init__(self, folder: Path, *, side: int) -> None:
        self.folder, self.side = folder, side
        self.steps: list[dict[str, float]] = []
        self.ranks: list[tuple[int, float]] = []
        self._squares: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, for a resumed run."""
        return {"steps": self.steps, "ranks": self.ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.steps, self.ranks = state_dict["steps"], state_dict["ranks"]

    def summary(self) -> dict[str, float]:
        """Mean loss of the first and the last 50 steps, rank at the start and at the end."""
        losses, ranks = [row["train/loss"] for row in self.steps], [rank for _, rank in self.ranks]
        first, last = losses[:50], losses[-50:]
        return {
            "first_loss": sum(first) / len(first), "loss": sum(last) / len(last),
            "first_rank": ranks[0], "rank": ranks[-1],
        }  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features before the first step."""
        if trainer.is_global_zero and not self.ranks:
            self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keep the step's figures."""
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.steps.append({"step": trainer.global_step, **figures})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the features, draw the curves."""
        if not trainer.is_global_zero:
            return
        self._look(trainer, pl_module)
        self._warn(pl_module.model.objective)
        self._write_losses()
        with atomic_path(self.folder / "curves.png") as temporary:
            self._draw_curves(temporary)

    def _look(self, trainer: Trainer, task: Any) -> None:
        if self._squares is None:
            self._squares = trainer.datamodule.squares(_IMAGES, self.side)  # type: ignore[attr-defined]
        grids = _grids(task.model.backbone, self._squares.to(task.device))
        rank = effective_rank(grids.flatten(0, 2))
        self.ranks.append((trainer.global_step, rank))
        picture = self._picture(grids)
        with atomic_path(self.folder / "features" / f"{trainer.global_step:06d}.png") as temporary:
            picture.save(temporary, "PNG")
        for logger in trainer.loggers:
            logger.log_metrics({"feature_rank": rank}, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("features", np.asarray(picture), trainer.global_step, dataformats="HWC")

    def _picture(self, grids: Tensor) -> "Image":
        """The images above the colours of their features."""
        assert self._squares is not None
        colours = principal_colours(grids)
        names = [None] * self._squares.shape[1]
        columns = []
        for square, cells in list(zip(self._squares.numpy(), colours, strict=True))[:_SHOWN]:
            image = quicklook(square, np.ones(square.shape[1:], dtype=bool), names)
            patch = -(-self.side // len(cells))
            shown = cells.repeat(patch, 0).repeat(patch, 1)[: self.side, : self.side]
            columns.append(("image, features", np.concatenate([image, shown])))
        return panel(columns, ())

    def _warn(self, objective: Objective) -> None:
        (_, first), (step, rank) = self.ranks[0], self.ranks[-1]
        if rank < _LOST * first:
            log.warning("step %d: the features collapse, their rank fell from %.1f to %.1f", step, first, rank)
        if told := objective.collapse({k.removeprefix("train/"): v for k, v in self.steps[-1].items()}):
            log.warning("step %d: %s", step, told)

    def _write_losses(self) -> None:
        with atomic_path(self.folder / "losses.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.steps[-1])
            writer.writeheader()
            writer.writerows(self.steps)

    def _draw_curves(self, path: Path) -> None:
        """Each logged figure of the objective, and the rank, against steps; the running median of 25 steps dark."""
        from matplotlib.figure import Figure

        names = [n for n in self.steps[-1] if n not in ("step", "train/lr", "train/gradient")]
        rows = -(-(len(names) + 1) // 4)
        figure = Figure(figsize=(14, 3 * rows), layout="constrained")
        panels = figure.subplots(rows, 4, squeeze=False).flatten()
        for axes in panels[len(names) + 1 :]:
            axes.remove()
        steps = [row["step"] for row in self.steps]
        for axes, name in zip(panels, names, strict=False):
            values = [row[name] for row in self.steps]
            axes.plot(steps, values, color="#bed2eb", linewidth=0.8)
            axes.plot(steps, [float(np.median(values[max(0, i - 24) : i + 1])) for i in range(len(values))], "#143c8c")
            axes.ticklabel_format(useOffset=False)
            axes.set(title=name.removeprefix("train/").replace("_", " "), xlabel="step")
        panels[len(names)].plot(*zip(*self.ranks, strict=True), "o-", color="#143c8c", markersize=3)
        panels[len(names)].set(title="feature rank", xlabel="step")
        panels[len(names)].set_ylim(bottom=0)
        figure.savefig(path, format="png", dpi=80)


@torch.no_grad()
def _grids(backbone: AdaptedBackbone, squares: Tensor) -> Tensor:
    """Normed features (n, h, w, C) of the last block, on the CPU."""
    height, width = backbone.backbone.grid_size(*squares.shape[-2:])
    tokens = backbone.tokens(squares)[:, backbone.spec.prefix_tokens :]
    return tokens.unflatten(1, (height, width)).cpu()
