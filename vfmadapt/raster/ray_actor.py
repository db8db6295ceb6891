"""What runs on the nodes of a Ray cluster: readers of blocks, and actors that hold the model."""

import errno
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from vfmadapt.errors import UserError
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.job import Job, Work, is_full, reason
from vfmadapt.raster.plan import Plan
from vfmadapt.raster.reading import Done, TileRow, read_rows

T = TypeVar("T")

_ROWS = 2  # rows of tiles that a reader is ahead of its actor


@dataclass(frozen=True)
class Task:
    """What an actor needs to know.

    `plan` and `maps` are those of the job, with paths as every node finds them, but for the raster in `plan`, which is
    `source`; `model` refers to the serialised module in Ray's object store; torch computes with `threads` on a CPU:
    sums that are split in another way round in another way.
    """

    plan: Plan
    maps: tuple[tuple[Plan, BlockFolder], ...]
    source: str
    model: Any
    threads: int

    @property
    def device(self) -> torch.device:
        """Where the model runs; Ray lets an actor see its own GPU only."""
        return torch.device(self.plan.compute["device"])

    def unpacked(self) -> Any:
        """The model; the process is set up to compute with it as the driver would.

        Raises:
            UserError: another torch than the driver's.
        """
        wanted = self.plan.compute["torch"]
        if version("torch") != wanted:
            raise UserError(f"torch is {version('torch')} there and {wanted} on the driver; install one version")
        os.environ["VFMADAPT_KERNELS"] = self.plan.compute["kernels"]
        torch.set_num_threads(self.threads)
        model = torch.load(io.BytesIO(import_ray().get(self.model)), map_location="cpu", weights_only=False)
        return model.to(self.device)


@dataclass(frozen=True)
class Report:
    """What an actor tells.

    `done`: pixels that were finished, or the end of a block; None once, when the model is loaded. `seconds` in the
    model so far. `broken` says why the actor cannot compute at all.
    """

    done: int | Done | None = None
    seconds: float = 0.0
    broken: str | None = None


class Mapper:
    """An actor: loads the model once, then computes the blocks that it is given from rows that are read elsewhere.

    Its two methods run at once, each in a thread of its own.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._given: SimpleQueue[int] = SimpleQueue()

    def give(self, index: int) -> None:
        """Add a block."""
        self._given.put(index)

    def results(self) -> Iterator[Report]:
        """Compute the blocks in the order in which they were given; never ends unless the actor is `broken`."""
        try:
            job = self._job()
        except Exception as error:
            yield Report(broken=reason(error))
            return
        yield Report()
        work = Work()
        for done in job.computed(iter(self._given.get, None), work):
            yield Report(portable(done), work.model_seconds)

    def _job(self) -> Job:
        task = self._task
        for plan, folder in task.maps:
            if folder.plan() != plan:
                raise UserError(f"{folder.path} is not there; output= must lie on a file system that all nodes share")
        return _FedJob(task)


class _FedJob(Job):
    """A job whose rows of tiles come from readers elsewhere."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.plan, task.maps[0][1], task.unpacked(), task.device, task.maps)
        self._read = replace(task.plan, source=task.source)

    def rows(self, indices: Iterable[int]) -> Iterator[TileRow | Done]:
        """As `Job.rows`; one reader at a time, for one that waited for another could keep the last free CPU from it."""
        ray = import_ray()
        options = {"num_cpus": 1, "num_returns": "streaming", "_generator_backpressure_num_objects": _ROWS}
        reader = ray.remote(read_block).options(**options)
        for index in indices:
            try:
                for row in reader.remote(self._read, index):
                    yield ray.get(row)
            except Exception as error:  # its node is gone, and so are those where Ray started it again
                yield Done(index, error)


def read_block(plan: Plan, index: int) -> Iterator[TileRow | Done]:
    """The rows of one block and its end, whatever happens."""
    try:
        for row in read_rows(plan, [index]):
            yield portable(row)
    except Exception as error:
        yield portable(Done(index, error))


def find_batch(task: Task) -> int:
    """See `Job.largest_batch`."""
    return Job(task.plan, task.maps[0][1], task.unpacked(), task.device).largest_batch()


def portable(item: T) -> T:
    """The end of a block with an error that every process can unpickle: what it says, and whether the disk is full."""
    if not isinstance(item, Done) or item.error is None:
        return item
    text = reason(item.error)
    return replace(item, error=OSError(errno.ENOSPC, text) if is_full(item.error) else RuntimeError(text))


def import_ray() -> Any:
    """The package, told to send nothing to its makers and to start its workers in this very environment.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of workers of a Ray started here; by default they yield to all
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what it will do one day
    try:
        import ray
    except ImportError as error:
        raise UserError("engine=ray needs Ray; pip install 'vfmadapt[ray]'") from error
    return ray
