"""Second stage of a run: tiles through the model, in batches of one size."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vfmadapt.errors import UserError
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.reading import Done, TileRow
from vfmadapt.raster.tiling import pad_to_tile


class TooLargeError(UserError):
    """A batch of tiles does not fit into the device's memory."""


@dataclass(frozen=True)
class ScoredRow:
    """A row of tiles with its logits: (first pixel column, float32 (K, tile, tile)) from left to right."""

    block: int
    first: int
    left: int
    valid: NDArray[np.bool_]
    tiles: list[tuple[int, NDArray[np.float32]]]


@dataclass
class _Waiting:
    """A row whose tiles have not all been through the model."""

    row: TileRow
    left: int
    tiles: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)


class Scorer:
    """Runs a model over rows of tiles.

    A batch is filled with the tiles of a block in order, across its rows; the last one of a block is padded with its
    last tile. So the batches depend on the block alone. `seconds` counts the time in the model, `forwarded` the tiles.
    """

    def __init__(self, model: Any, plan: Plan, device: torch.device) -> None:
        self._model = D4Mean(model) if plan.compute["tta"] == "d4" else model
        self._plan, self._device = plan, device
        layouts = {"true": torch.channels_last, "false": torch.contiguous_format}
        self._layout = layouts[plan.compute["channels_last"]]
        self.seconds = 0.0
        self.forwarded = 0

    def score(self, rows: Iterator[TileRow | Done]) -> Iterator[ScoredRow | Done]:
        """Logits for each row; a block on which the model fails ends with a `Done` that says why."""
        waiting: deque[_Waiting] = deque()
        queue: deque[tuple[_Waiting, int]] = deque()
        failed: int | None = None  # until the end of its rows: the block may come again
        for row in rows:
            if row.block == failed:
                failed = None if isinstance(row, Done) else failed
                continue
            try:
                if isinstance(row, TileRow):
                    waiting.append(_Waiting(row, len(row.columns)))
                    queue.extend((waiting[-1], column) for column in row.columns)
                while len(queue) >= self._plan.batch or (queue and isinstance(row, Done) and row.error is None):
                    self._forward([queue.popleft() for _ in range(min(len(queue), self._plan.batch))])
            except Exception as error:
                failed = None if isinstance(row, Done) else row.block
                row = Done(row.block, error)
            if isinstance(row, Done) and row.error is not None:
                waiting.clear()
                queue.clear()
            while waiting and not waiting[0].left:
                ready = waiting.popleft()
                yield ScoredRow(ready.row.block, ready.row.first, ready.row.left, ready.row.valid, ready.tiles)
            if isinstance(row, Done):
                yield row

    def _forward(self, batch: list[tuple[_Waiting, int]]) -> None:
        wanted = [self._wanted(waiting.row, column) for waiting, column in batch]
        for waiting, _ in batch:
            waiting.left -= 1
        if not any(wanted):
            return
        side = self._plan.tile
        images, masks = [], []
        for waiting, column in batch:
            at = slice(column - waiting.row.left, column - waiting.row.left + side)
            images.append(pad_to_tile(waiting.row.image[:, :, at], side))
            masks.append(pad_to_tile(waiting.row.valid[:, at], side))
        missing = self._plan.batch - len(batch)
        logits = self.logits(np.stack(images + images[-1:] * missing), np.stack(masks + masks[-1:] * missing))
        for (waiting, column), keep, scores in zip(batch, wanted, logits, strict=False):
            if keep:
                waiting.tiles.append((column, scores))

    def _wanted(self, row: TileRow, column: int) -> bool:
        area, grid = self._plan.area(row.block), self._plan.grid
        return row.first in grid.rows_over(area.row, area.bottom) and column in grid.columns_over(
            area.column, area.right
        )

    def logits(self, images: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Logits (B, K, tile, tile) of images (B, C, tile, tile) in sensor units and their valid pixels.

        Raises:
            TooLargeError: the batch does not fit into the device's memory.
            UserError: the model gives NaN.
        """
        start = time.perf_counter()
        logits = self._forwarded(images, masks)
        if logits is None:
            plan = self._plan
            raise TooLargeError(
                f"a batch of {plan.batch} tiles of {plan.tile} pixels does not fit into the {self._device.type} "
                "device's memory; take a smaller batch= (batch=auto finds one) or tile="
            )
        expected = (len(images), self._plan.outputs, *images.shape[2:])
        if tuple(logits.shape) != expected:
            raise RuntimeError(f"the model gave logits {tuple(logits.shape)}, not {expected}")
        out: NDArray[np.float32] = logits.float().cpu().numpy()
        self.seconds += time.perf_counter() - start
        self.forwarded += len(images)
        if not np.isfinite(out).all():
            raise UserError(
                f"the model gives NaN or infinite scores on {self._plan.source}, whose values there are "
                f"{images.min():g} to {images.max():g} in sensor units; reflectance is about 0 to 1: "
                "check scale= and offset="
            )
        return out

    def _forwarded(self, images: NDArray[np.float32], masks: NDArray[np.bool_]) -> Tensor | None:
        """Logits; None where they do not fit: an error would hold on to the memory that a second attempt needs."""
        try:
            image, valid = torch.from_numpy(images).to(self._device), torch.from_numpy(masks).to(self._device)
            with torch.inference_mode(), self._precision():
                return self._model(image.contiguous(memory_format=self._layout), valid)
        except torch.OutOfMemoryError:
            return None

    def _precision(self) -> AbstractContextManager[Any]:
        if self._plan.compute["dtype"] == "bfloat16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return nullcontext()


class D4Mean(nn.Module):
    """A model of classes asked about the eight flips and quarter turns of each image: the mean of its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.spec = model, model.spec

    def forward(self, image: Tensor, valid: Tensor) -> Tensor:
        """Images (B, C, H, W) in sensor units, valid bool (B, H, W) -> logits (B, K, H, W), float32."""
        total: Tensor | None = None
        for turns in range(4):
            for flip in (False, True):
                seen, known = (torch.rot90(t.flip(-1) if flip else t, turns, (-2, -1)) for t in (image, valid))
                back = torch.rot90(self.model(seen, known).float(), -turns, (-2, -1))
                back = back.flip(-1) if flip else back
                total = back if total is None else total + back
        assert total is not None
        return total / 8


class evaluation:  # noqa: N801 - used like a function
    """The module in evaluation mode, and back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(m, m.training) for m in self._model.modules()]
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU for one without."""
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
