"""A map in the making: what is left of its blocks, in which order, and the last step."""

import errno
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vfmadapt.contracts import ClassSpec
from vfmadapt.errors import UserError
from vfmadapt.raster.finishing import FULL, Finisher
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.io import RasterInfo, raster_info
from vfmadapt.raster.merge import Collected, collect, pyramid
from vfmadapt.raster.pipeline import ahead
from vfmadapt.raster.plan import LAYERS, Plan
from vfmadapt.raster.reading import Done, read_rows
from vfmadapt.raster.scoring import Scorer, evaluation
from vfmadapt.raster.tiff import read_tags, write_tiff
from vfmadapt.raster.tiling import Area
from vfmadapt.raster.write import map_header, publish

_ATTEMPTS = 2  # a read over a network, or a full GPU, may go well the second time
_MOST_FAILURES = 3  # what fails in three blocks fails in all
_AT_ONCE = 64  # blocks that are handed to a run; looking whether more are finished takes its time


@dataclass
class Work:
    """What a run did: blocks, pixels of the window, tiles through the model, and seconds, in all and in the model."""

    blocks: int = 0
    pixels: int = 0
    forwarded: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)


class Job:
    """A plan, its folder and a model.

    Args:
        plan: what to compute.
        folder: where blocks lie.
        model: an nn.Module that is a `Segmenter`.
        device: where it runs.
    """

    def __init__(self, plan: Plan, folder: BlockFolder, model: Any, device: torch.device) -> None:
        self.plan, self.folder, self._model, self._device = plan, folder, model, device

    def run_block(self, index: int) -> None:
        """Compute one block and write its file; the same bytes whenever and wherever it is done."""
        for done in self._computed([index], Work()):
            if isinstance(done, Done) and done.error is not None:
                raise done.error

    def run(self, indices: Iterable[int], on_pixels: Callable[[int], None]) -> Work:
        """Compute those of the blocks that are not finished; `on_pixels` is told of pixels as they are.

        Raises:
            UserError: blocks failed, each twice; the others are finished and kept.
        """
        work, start = Work(), time.perf_counter()
        left = (i for i in indices if not self._finished(i, on_pixels))
        while len(work.failures) < _MOST_FAILURES and (todo := list(islice(left, _AT_ONCE))):
            for _ in range(_ATTEMPTS):
                todo = self._attempt(todo, work, on_pixels)
        work.seconds = time.perf_counter() - start
        self.folder.record_failures(work.failures)
        if work.failures:
            raise UserError(self._failure_line(work.failures))
        return work

    def _finished(self, index: int, on_pixels: Callable[[int], None]) -> bool:
        found = self.folder.read(self.plan, index)
        if found is None:
            return False
        on_pixels(sum(found[0].counts))
        return True

    def _attempt(self, indices: list[int], work: Work, on_pixels: Callable[[int], None]) -> list[int]:
        """Compute blocks; gives those that are still left. Of those that failed `work` knows why."""
        left, failed = dict.fromkeys(indices), 0
        with closing(self._computed(indices, work)) as results:
            for done in results if indices else ():
                if isinstance(done, int):
                    work.pixels += done
                    on_pixels(done)
                elif done.error is None:
                    work.blocks += 1
                    work.failures.pop(done.block, None)
                    del left[done.block]
                elif _is_full(done.error):
                    raise _no_space(self.folder) from done.error
                else:
                    failed += 1
                    work.failures[done.block] = " ".join(str(done.error).split()) or type(done.error).__name__
                    if failed == _MOST_FAILURES:
                        break
        return list(left)

    def _computed(self, indices: list[int], work: Work) -> Generator[int | Done, None, None]:
        """The three stages, each at work while the others are."""
        scorer = Scorer(self._model, self.plan, self._device)
        rows = ahead(read_rows(self.plan, self._model.spec, indices))
        scored = ahead(scorer.score(rows))
        try:
            with evaluation(self._model):
                yield from Finisher(self.plan, self.folder.block).finish(scored)
        finally:
            scored.close()
            work.model_seconds += scorer.seconds
            work.forwarded += scorer.forwarded

    def _failure_line(self, failures: dict[int, str]) -> str:
        index, reason = next(iter(failures.items()))
        area = self.plan.area(index).cut(Area(0, 0, self.plan.height, self.plan.width))
        count = f"{len(failures)} blocks" if len(failures) > 1 else "a block"
        return (
            f"{count} of {self.plan.source} failed; rows {area.row} to {area.bottom - 1}, columns {area.column} to "
            f"{area.right - 1}: {reason}; what is finished is kept, the same command goes on from there"
        )


def merge(folder: BlockFolder, plan: Plan, tags_of: Callable[[Collected], dict[str, str]]) -> Collected:
    """Finished blocks -> the map (and `NAME_scores.tif` beside it); the folder is removed.

    Args:
        folder: where the blocks are.
        plan: their plan.
        tags_of: what the map's tags say of the pixels.

    Raises:
        UserError: blocks are missing or damaged, or the disk is full.
    """
    collected = collect(folder, plan)
    classes = [ClassSpec(name, colour) for name, colour in plan.classes]
    info = shifted(raster_info(plan.source), plan.window)
    tags = tags_of(collected)
    try:
        for name, image in collected.images.items():
            bands, unit = ([name], 1.0) if name == "class" else (_score_names(plan), 1 / FULL)
            header = map_header(info, bands, classes=classes, tags=tags, unit=unit)
            temporary = folder.path / f"{name}.tif"
            with (folder.path / "overviews").open("w+b") as spool:
                write_tiff(temporary, pyramid(image, plan, spool), read_tags(header))
            publish(temporary, file_of(folder.output, name))
    except (OSError, UserError) as error:
        if _is_full(error):
            raise _no_space(folder) from error
        raise
    folder.remove()
    return collected


def file_of(output: Path, name: str) -> Path:
    """Where the file "class" or "scores" lies."""
    return output if name == "class" else output.with_name(f"{output.stem}_{name}{output.suffix}")


def shifted(info: RasterInfo, window: Area) -> RasterInfo:
    """What a window of a raster says about itself."""
    from rasterio.control import GroundControlPoint
    from rasterio.transform import Affine

    points = tuple(
        GroundControlPoint(p.row - window.row, p.col - window.column, p.x, p.y, p.z, p.id, p.info) for p in info.gcps
    )
    rpcs = copy(info.rpcs)
    if rpcs is not None:
        rpcs.line_off -= window.row
        rpcs.samp_off -= window.column
    placed = not info.transform.is_identity  # the identity says that there is none
    transform = info.transform * Affine.translation(window.column, window.row) if placed else info.transform
    return replace(info, transform=transform, gcps=points, rpcs=rpcs)


def _score_names(plan: Plan) -> list[str]:
    """Names of the bands of the file of scores, as `decide` orders them."""
    shares = [f"probability of {name}" for name, _ in plan.classes] if "probabilities" in plan.layers else []
    return shares + [name for name in LAYERS[2:] if name in plan.layers]


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def _no_space(folder: BlockFolder) -> UserError:
    return UserError(
        f"no space left on the disk of {folder.output}; make room and give the same command again, it goes on where "
        "it stopped"
    )
