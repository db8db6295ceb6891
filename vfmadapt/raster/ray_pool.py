"""The actors of a map, as the driver sees them: started on the nodes there are, given blocks, replaced when lost."""

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vfmadapt.errors import UserError
from vfmadapt.raster.job import Work
from vfmadapt.raster.ray_actor import Mapper, Report, Task, import_ray
from vfmadapt.raster.reading import Done

logger = logging.getLogger(__name__)

_GIVEN = 2  # blocks per actor: one in the works, one to read on with
_LOSSES = 3  # actors that a block may take with it before it counts as failed
_LOOK = 1.0  # seconds between looks for nodes that have joined


@dataclass(eq=False)
class _Actor:
    """An actor, the stream of its reports, its node, and the blocks that it has been given and not ended."""

    handle: Any
    reports: Any
    node: str
    ready: bool = False
    blocks: set[int] = field(default_factory=set)
    seconds: float = 0.0


class Pool:
    """Actors for one task; ray is connected.

    Args:
        task: what they compute.
        most: how many there may be; None for as many as the nodes hold.
        gpus: of each actor on a GPU.
    """

    def __init__(self, task: Task, most: int | None, gpus: float) -> None:
        self._ray, self._task, self._most, self._gpus = import_ray(), task, most, gpus
        self._shared = self._ray.put(task)
        self._actors: list[_Actor] = []
        self._unfit: dict[str, str] = {}  # why, by node
        self._losses: Counter[int] = Counter()
        self._served = False
        self._look = 0.0

    def close(self) -> None:
        """End all actors, whatever they do."""
        for actor in self._actors:
            self._ray.kill(actor.handle)

    def computed(self, indices: Iterable[int], work: Work) -> Generator[int | Done, None, None]:
        """See `Job.computed`; blocks end in any order.

        Raises:
            UserError: no node can compute.
        """
        left = set(indices)
        busy = {index for actor in self._actors for index in actor.blocks}  # since an attempt that was given up
        waiting = deque(index for index in indices if index not in busy)
        while left:
            self._recruit()
            self._hand_out(waiting)
            for done in self._news(waiting, work):
                if isinstance(done, Done):
                    left.discard(done.block)
                yield done

    def _recruit(self) -> None:
        """Start actors wherever there is room for one."""
        if time.monotonic() < self._look:
            return
        self._look = time.monotonic() + _LOOK
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        for node in nodes:
            name = node["NodeID"]
            room = self._places(node["Resources"]) - sum(actor.node == name for actor in self._actors)
            for _ in range(0 if name in self._unfit else room):
                if self._most is None or len(self._actors) < self._most:
                    self._actors.append(self._started(name))
        if not self._actors:
            unfit = [self._unfit[node["NodeID"]] for node in nodes if node["NodeID"] in self._unfit]
            if unfit or not self._served:
                why = unfit[0] if unfit else f"none has {self._gpus:g} GPUs" if self._on_gpus else "none has a CPU"
                raise UserError(f"no node of the Ray cluster can compute the map: {why}")

    @property
    def _on_gpus(self) -> bool:
        return self._task.device.type == "cuda"

    def _places(self, resources: Mapping[str, float]) -> int:
        """How many actors a node holds."""
        if self._on_gpus:
            return int(resources.get("GPU", 0) / self._gpus)
        cpus = int(resources.get("CPU", 0))
        return min(cpus, max(1, cpus // (self._task.threads + 1)))  # one more for the reader

    def _started(self, node: str) -> _Actor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        handle = (
            self._ray.remote(Mapper)
            .options(
                num_cpus=0,  # readers ask for the CPUs; an actor that held them could wait for its reader for ever
                num_gpus=self._gpus if self._on_gpus else 0,
                max_concurrency=2,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._shared)
        )
        return _Actor(handle, handle.results.remote(), node)

    def _hand_out(self, waiting: deque[int]) -> None:
        """Give blocks to actors; one whose actor was lost is alone with the next, to see whether it is to blame."""
        while waiting:
            most = 1 if self._losses[waiting[0]] else _GIVEN
            free = [a for a in self._actors if a.ready and len(a.blocks) < most and not self._losses.keys() & a.blocks]
            if not free:
                return
            actor = min(free, key=lambda a: len(a.blocks))
            actor.blocks.add(waiting[0])
            actor.handle.give.remote(waiting.popleft())

    def _news(self, waiting: deque[int], work: Work) -> Iterator[int | Done]:
        """What an actor reports, if any does within a moment; blocks of a lost one are put back into `waiting`."""
        if not self._actors:
            time.sleep(_LOOK)
            return
        by_stream = {actor.reports: actor for actor in self._actors}
        for stream in self._ray.wait(list(by_stream), timeout=_LOOK)[0]:
            actor = by_stream[stream]
            try:
                report: Report = self._ray.get(next(stream))
            except (self._ray.exceptions.RayError, StopIteration) as error:
                yield from self._without(actor, _first_line(error), waiting)
                continue
            if report.broken is not None:
                yield from self._without(actor, report.broken, waiting)
                continue
            self._served = actor.ready = True
            work.model_seconds += (report.seconds - actor.seconds) / len(self._actors)
            actor.seconds = report.seconds
            if isinstance(report.done, Done):
                actor.blocks.discard(report.done.block)
            if report.done is not None:
                yield report.done

    def _without(self, actor: _Actor, why: str, waiting: deque[int]) -> Iterator[Done]:
        """Go on without an actor; one that never was ready tells that its node is unfit."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        logger.warning("an actor on node %s of the Ray cluster is lost: %s", actor.node, why)
        if not actor.ready:
            self._unfit[actor.node] = why
        for index in actor.blocks:
            self._losses[index] += 1
            if self._losses[index] < _LOSSES:
                waiting.append(index)
            else:
                del self._losses[index]
                yield Done(index, RuntimeError(f"{_LOSSES} actors were lost with it, the last one so: {why}"))


def _first_line(error: BaseException) -> str:
    """What an error of Ray says before it tells all circumstances; of one that code of ours raised there, that one."""
    cause = getattr(error, "cause", None) or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
