"""The engine `ray`: blocks are computed by actors on the nodes of a Ray cluster, the map is put together here.

Nothing but the plan decides what a block's bytes are, so it matters to none of them which node computed it, nor how
often. Blocks come to the driver through the file system that all nodes share.
"""

import io
import logging
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vfmadapt.errors import UserError
from vfmadapt.raster.folder import BlockFolder
from vfmadapt.raster.job import Job, Work
from vfmadapt.raster.ray_actor import Task, find_batch, import_ray
from vfmadapt.raster.ray_pool import Pool
from vfmadapt.raster.reading import Done


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A Ray cluster that computes a map; all its nodes see the raster and the output under the same paths.

    Args:
        address: "auto" for the cluster that this machine belongs to, "host:port", or None to start Ray here.
        actors: most actors, each with a model of its own; None for as many as the nodes hold: one per GPU, or on CPUs
            one per as many cores as torch has threads here, and one core more for reading.
        gpus_per_actor: 0.5 puts two actors on each GPU; without meaning on CPUs.
    """

    address: str | None = "auto"
    actors: int | None = None
    gpus_per_actor: float = 1.0

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise UserError(f"ray.actors={self.actors}: allowed are 1 and more, or null for as many as the nodes hold")
        whole = self.gpus_per_actor == int(self.gpus_per_actor)
        if self.gpus_per_actor <= 0 or (self.gpus_per_actor > 1 and not whole):
            raise UserError(f"ray.gpus_per_actor={self.gpus_per_actor}: allowed are parts of 1, and whole numbers")
        if (self.address or "").startswith("ray://"):
            raise UserError(
                f"ray.address={self.address}: the driver must be a node of the cluster; run it on one, for instance "
                "with `ray job submit`, with ray.address=auto"
            )

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connected for the time; where the process is connected already, that connection is used and kept.

        Raises:
            UserError: ray is not installed, or there is no cluster at the address.
        """
        ray = import_ray()
        if ray.is_initialized():
            yield
            return
        local: dict[str, Any] = {"include_dashboard": False} if self.address is None else {}
        try:
            if self.address not in (None, "auto"):
                host, _, port = str(self.address).rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()  # Ray would try for minutes
            ray.init(self.address or "local", logging_level=logging.WARNING, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"ray.address={self.address}: no Ray cluster answers there ({str(error).splitlines()[0]}); give "
                "host:port, auto on one of its nodes, or null to start one here"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def device(self, given: str | torch.device | None) -> torch.device:
        """What its actors compute on: unless the user says, GPUs where it has one."""
        gpus = import_ray().cluster_resources().get("GPU", 0)
        device = torch.device(given or ("cuda" if gpus else "cpu"))
        if device.type == "cuda" and gpus < self.gpus_per_actor:
            raise UserError(
                f"device={device}: the Ray cluster has {gpus:g} GPUs, an actor takes {self.gpus_per_actor:g}; start a "
                "node with more, or give device=cpu"
            )
        return device

    def job(self, job: Job) -> Job:
        """The same job, whose blocks are computed by the cluster's actors while this process is connected to it."""
        return _RayJob(job, self)


class _RayJob(Job):
    at_once = 1024  # many actors are to be kept busy

    def __init__(self, job: Job, cluster: RayCluster) -> None:
        super().__init__(job.plan, job.folder, job.model, job.device, job.maps)
        self._cluster = cluster

    def run(self, indices: Iterable[int], on_pixels: Callable[[int], None]) -> Work:
        """As `Job.run`; the actors stay from the first block to the last."""
        with closing(Pool(self._task(), self._cluster.actors, self._cluster.gpus_per_actor)) as self._pool:
            return super().run(indices, on_pixels)

    def computed(self, indices: Iterable[int], work: Work) -> Generator[int | Done, None, None]:
        """As `Job.computed`, in the order in which actors are done; of the model's seconds the mean over actors."""
        yield from self._pool.computed(indices, work)

    def largest_batch(self) -> int:
        """As `Job.largest_batch`, on a GPU of the cluster."""
        ray, gpus = import_ray(), self._cluster.gpus_per_actor if self.device.type == "cuda" else 0
        found: int = ray.get(ray.remote(find_batch).options(num_gpus=gpus).remote(self._task()))
        return found

    def _task(self) -> Task:
        ray, buffer = import_ray(), io.BytesIO()
        try:
            torch.save(self.model, buffer, pickle_module=ray.cloudpickle)
        except Exception as error:
            raise UserError(f"the model cannot be sent to other nodes: {error}; use engine=local") from error
        maps = tuple((plan, BlockFolder(folder.output.absolute())) for plan, folder in self.maps)
        source = self.plan.source
        if Path(source).exists():  # else it is a URL
            source = str(Path(source).absolute())
        model = ray.put(np.frombuffer(buffer.getbuffer(), dtype=np.uint8))
        return Task(self.plan, maps, source, model, torch.get_num_threads())
