"""Generated data sets as files: which tiles there are, and their rendering by several processes."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SPLITS = ("train", "val", "test")

_SPLIT_SEEDS = 1_000_000  # seeds of a split lie in their own range, so no tile of one split is in another
_INLINE = 12  # fewer tiles than this are not worth the start of a process


@dataclass(frozen=True)
class Job:
    """A set of tiles: where they go and what they are."""

    folder: Path
    seed: int
    size: int
    counts: Mapping[str, int]

    def tiles(self) -> list[tuple[str, int]]:
        """Every (split, index)."""
        return [(split, index) for split in SPLITS for index in range(self.counts[split])]

    def image(self, split: str, index: int) -> Path:
        """Path of an image tile."""
        return self.folder / split / f"image_{index:05d}.tif"

    def label(self, split: str, index: int) -> Path:
        """Path of a label tile."""
        return self.folder / split / f"label_{index:05d}.tif"


AnyJob = TypeVar("AnyJob", bound=Job)


def tile_seed(split: str, index: int, seed: int) -> int:
    """The number that a tile is drawn from: another one for every split, index and seed of the set."""
    return (seed * len(SPLITS) + SPLITS.index(split)) * _SPLIT_SEEDS + index


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_missing(job: AnyJob, write: Callable[[AnyJob, str, int], None], workers: int) -> int:
    """Write the tiles that are not there yet, and a marker when all are; returns how many were written.

    Args:
        job: the tiles.
        write: renders and writes the tile (job, split, index); a function at the top of a module.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        RuntimeError: a worker process failed.
    """
    marker = job.folder / "done.json"
    counts = dict(job.counts)
    if marker.exists():
        done = json.loads(marker.read_text())
        if all(done.get(split, 0) >= count for split, count in counts.items()):
            return 0
        counts = {split: max(count, done.get(split, 0)) for split, count in counts.items()}
    missing = [tile for tile in job.tiles() if not (job.image(*tile).exists() and job.label(*tile).exists())]
    workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)
    if len(missing) <= _INLINE or workers <= 1:
        for tile in missing:
            write(job, *tile)
    else:
        _write_in_processes(job, write, missing, workers)
    with atomic(marker) as temporary:
        temporary.write_text(json.dumps(counts))
    return len(missing)


def _write_in_processes(
    job: AnyJob, write: Callable[[AnyJob, str, int], None], missing: Sequence[tuple[str, int]], workers: int
) -> None:
    # Plain subprocesses and not multiprocessing: "fork" is unsafe beside torch's threads, and "spawn" runs the caller's
    # script again, which a script without a main guard does not survive.
    code = "import pickle, sys; write, job, tiles = pickle.load(sys.stdin.buffer); [write(job, *t) for t in tiles]"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for worker in range(workers):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((write, job, missing[worker::workers])))
        process.stdin.close()
        started.append(process)
    errors = [process.stderr.read().decode() if process.stderr is not None else "" for process in started]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(
            f"a process that renders tiles failed: {next(e for e, c in zip(errors, codes, strict=True) if c)}"
        )
