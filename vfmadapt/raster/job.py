"""A map in the making: what is left of its blocks, in which order, and the last step."""

import errno
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from vfmadapt.contracts import ClassSpec
from vfmadapt.errors import UserError
from vfmadapt.files import publish
from vfmadapt.raster.finishing import finish
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.io import RasterInfo, raster_info
from vfmadapt.raster.merge import Collected, bands_of, collect, numbered, pyramid
from vfmadapt.raster.pipeline import ahead
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.polygons import write_polygons
from vfmadapt.raster.reading import Done, TileRow, read_rows, with_units_checked
from vfmadapt.raster.scoring import Scorer, evaluation
from vfmadapt.raster.throughput import largest_batch
from vfmadapt.raster.tiff import read_tags, write_tiff
from vfmadapt.raster.tiling import Area
from vfmadapt.raster.write import map_header

_ATTEMPTS = 2  # a read over a network, or a full GPU, may go well the second time
_LONGEST = 1000  # characters of an error that are told; a compiler's run to thousands
_MOST_FAILURES = 3  # what fails in three blocks fails in all


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
        maps: plans and folders of several maps of which `plan` says what they have in common; the model gives the
            logits of all, one after another.
    """

    at_once = 64  # blocks that are computed in one go; looking whether more are finished takes its time

    def __init__(
        self,
        plan: Plan,
        folder: BlockFolder,
        model: Any,
        device: torch.device,
        maps: Sequence[tuple[Plan, BlockFolder]] = (),
    ) -> None:
        self.plan, self.folder, self.model, self.device = plan, folder, model, device
        self.maps = list(maps) or [(plan, folder)]
        self._called = torch.compile(model) if plan.compute["compile"] == "true" else model

    @contextmanager
    def opened(self, *, auto_batch: bool, restart: bool, part: int | None = None) -> Iterator[None]:
        """The folders taken up (see `BlockFolder`) and kept from other processes; `auto_batch` settles the batch.

        Of a whole job that fails no empty folder stays.
        """
        find = self.largest_batch if auto_batch else None
        with ExitStack() as stack:
            for number, (plan, folder) in enumerate(self.maps):
                stack.enter_context(folder.locked(part))
                if part is None:
                    stack.push(partial(_tidy, folder))
                plan = replace(plan, batch=self.plan.batch)
                plan = folder.open(plan, restart=restart, shared=part is not None, find_batch=find)
                self.maps[number], find = (plan, folder), None
                self.plan = replace(self.plan, batch=plan.batch)
            yield

    def largest_batch(self) -> int:
        """Tiles per forward pass for batch=auto."""
        return largest_batch(self.model, self.plan, self.device)

    def run_block(self, index: int) -> None:
        """Compute one block and write its file; the same bytes whenever and wherever it is done."""
        for done in self.computed([index], Work()):
            if isinstance(done, Done) and done.error is not None:
                raise done.error

    def run(self, indices: Iterable[int], on_pixels: Callable[[int], None]) -> Work:
        """Compute those of the blocks that are not finished; `on_pixels` is told of pixels as they are.

        Raises:
            UserError: blocks failed, each twice; the others are finished and kept.
        """
        work, start = Work(), time.perf_counter()
        left = (i for i in indices if not self._finished(i, on_pixels))
        while len(work.failures) < _MOST_FAILURES and (todo := list(islice(left, self.at_once))):
            for _ in range(_ATTEMPTS):
                todo = self._attempt(todo, work, on_pixels)
        work.seconds = time.perf_counter() - start
        for _, folder in self.maps:
            folder.record_failures(work.failures)
        if work.failures:
            raise UserError(self._failure_line(work.failures))
        return work

    def _finished(self, index: int, on_pixels: Callable[[int], None]) -> bool:
        found = None
        for plan, folder in self.maps:
            if (found := folder.read(plan, index)) is None:
                return False
        assert found is not None
        on_pixels(sum(found[0].counts))
        return True

    def _attempt(self, indices: list[int], work: Work, on_pixels: Callable[[int], None]) -> list[int]:
        """Compute blocks; gives those that are still left. Of those that failed `work` knows why."""
        left, failed = dict.fromkeys(indices), 0
        with closing(self.computed(indices, work)) as results:
            for done in results if indices else ():
                if isinstance(done, int):
                    work.pixels += done
                    on_pixels(done)
                elif done.error is None:
                    work.blocks += 1
                    work.failures.pop(done.block, None)
                    del left[done.block]
                elif is_full(done.error):
                    raise _no_space(self.folder) from done.error
                else:
                    failed += 1
                    work.failures[done.block] = reason(done.error)
                    if failed == _MOST_FAILURES:
                        break
        return list(left)

    def computed(self, indices: Iterable[int], work: Work) -> Generator[int | Done, None, None]:
        """Compute blocks in three stages, each at work while the others are; pixels as they are done, ends of blocks.

        A block is asked for once the one before it has been read. `work` is told of the model's seconds and tiles.
        """
        scorer, before = Scorer(self._called, self.plan, self.device), work.model_seconds
        rows = with_units_checked(self.plan.source, self.model.spec, self.rows(indices))
        scored = ahead(scorer.score(ahead(rows)))
        try:
            with evaluation(self.model):
                for done in finish([(plan, folder.block) for plan, folder in self.maps], scored):
                    work.model_seconds = before + scorer.seconds
                    yield done
        finally:
            scored.close()
            work.model_seconds = before + scorer.seconds
            work.forwarded += scorer.forwarded

    def rows(self, indices: Iterable[int]) -> Iterator[TileRow | Done]:
        """The first stage."""
        return read_rows(self.plan, indices)

    def _failure_line(self, failures: dict[int, str]) -> str:
        index, reason = next(iter(failures.items()))
        area = self.plan.area(index).cut(Area(0, 0, self.plan.height, self.plan.width))
        count = f"{len(failures)} blocks" if len(failures) > 1 else "a block"
        return (
            f"{count} of {self.plan.source} failed; rows {area.row} to {area.bottom - 1}, columns {area.column} to "
            f"{area.right - 1}: {reason}; what is finished is kept, the same command goes on from there"
        )


def merge(
    folder: BlockFolder, plan: Plan, tags_of: Callable[[Collected], dict[str, str]], polygons: str | None = None
) -> Collected:
    """Finished blocks -> the map (and what is asked for beside it); the folder is left to the caller.

    Args:
        folder: where the blocks are.
        plan: their plan.
        tags_of: what the map's tags say of the pixels.
        polygons: "gpkg" or "parquet": the map's regions as polygons, too.

    Raises:
        UserError: blocks are missing or damaged, or the disk is full.
    """
    collected = collect(folder, plan)
    classes = [] if plan.objects else [ClassSpec(name, colour) for name, colour in plan.classes]
    info = shifted(raster_info(plan.source), plan.window)
    tags = tags_of(collected)
    try:
        for name, image in collected.images.items():
            bands = bands_of(plan, collected, name)
            temporary = folder.path / f"{name}.tif"
            with (folder.path / "overviews").open("w+b") as spool:
                if collected.numbering is not None:
                    image = numbered(image, collected.numbering, spool)
                header = map_header(info, bands, dtype=image.dtype, classes=classes, tags=tags)
                write_tiff(temporary, pyramid(image, plan, spool), read_tags(header))
            publish(temporary, file_of(folder.output, name))
        if polygons is not None:
            target = polygons_of(folder.output, polygons)
            temporary = folder.path / target.name
            temporary.unlink(missing_ok=True)  # of a run that was killed
            names = [name for name, _ in plan.classes]
            write_polygons(folder.output, temporary, info, names, collected.object_classes)
            publish(temporary, target)
    except (OSError, UserError) as error:
        if is_full(error):
            raise _no_space(folder) from error
        raise
    return collected


def file_of(output: Path, name: str) -> Path:
    """Where a file of `Plan.files` lies."""
    return output if name in ("class", "value", "object") else output.with_name(f"{output.stem}_{name}{output.suffix}")


def polygons_of(output: Path, form: str) -> Path:
    """Where the polygons of a map lie."""
    return output.with_suffix(f".{form}")


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


def _tidy(folder: BlockFolder, kind: type[BaseException] | None, *_: object) -> None:
    """Remove an empty folder after an error of that kind."""
    if kind is not None:
        folder.remove_if_empty()


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return shorten(str(error), _LONGEST, placeholder=" ...") or type(error).__name__


def _no_space(folder: BlockFolder) -> UserError:
    return UserError(
        f"no space left on the disk of {folder.output}; make room and give the same command again, it goes on where "
        "it stopped"
    )
