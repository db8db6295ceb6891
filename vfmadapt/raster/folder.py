"""The folder beside an unfinished map: its plan, its finished blocks, its failures, and who works on it."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.raster.blocks import Block, DamagedError, read_block
from vfmadapt.raster.plan import Plan


class BlockFolder:
    """`NAME.tif.blocks` beside the map `NAME.tif`; it goes when the map is there."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.blocks")

    def block(self, index: int) -> Path:
        """Where a block's file is, or will be; at most 1000 of them lie in one folder."""
        return self.path / f"{index // 1000:04d}" / f"{index:07d}.block"

    @contextmanager
    def locked(self, part: int | None = None) -> Iterator[None]:
        """Keep other processes away: from the whole map, or from one part of it where several work on parts.

        The system drops the lock when its process ends, however it ends. Raises UserError where another holds it.
        """
        self._make()
        with self._lock("lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH):
            if part is None:
                yield
            else:
                with self._lock(f"lock-{part}", fcntl.LOCK_EX):
                    yield

    def open(
        self, plan: Plan, *, restart: bool, shared: bool = False, find_batch: Callable[[], int] | None = None
    ) -> Plan:
        """Take the folder up for a plan; finished blocks of the same plan stay, with `shared` even on `restart`.

        Gives the plan that is in force: with `find_batch` its batch is that of an earlier run or part with otherwise
        the same plan, else what `find_batch` finds.

        Raises:
            UserError: it holds blocks of another plan, and `restart` is not set.
        """
        with self._lock("lock-plan", fcntl.LOCK_EX, wait=True):
            old = self.plan()
            if find_batch is not None:
                same = old is not None and old.key == replace(plan, batch=old.batch).key
                plan = replace(plan, batch=old.batch if old is not None and same else find_batch())
            if old is None or old.key != plan.key or (restart and not shared):
                self._begin(old, plan, restart=restart)
            return plan

    def _begin(self, old: Plan | None, plan: Plan, *, restart: bool) -> None:
        blocks = sum(1 for _ in self.path.glob("*/*.block"))
        if blocks and not restart:
            what = ", ".join(old.differences(plan)) if old is not None else "unknown"
            raise UserError(
                f"{self.path} holds {blocks} finished blocks of an interrupted run with another {what}; go on with "
                "what it began with, or write restart=true to begin anew"
            )
        for blocks_of in self.path.glob("*/"):
            shutil.rmtree(blocks_of)
        (self.path / "failed.json").unlink(missing_ok=True)
        with atomic_path(self.path / "plan.json") as temporary:
            temporary.write_text(plan.to_json())

    def plan(self) -> Plan | None:
        """The plan that the folder was made for; None without one that can be read."""
        try:
            return Plan.from_json((self.path / "plan.json").read_text())
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None

    def read(self, plan: Plan, index: int) -> tuple[Block, int] | None:
        """A finished block and the offset of its first tile; None where it is missing, damaged or of another plan."""
        try:
            block, start = read_block(self.block(index))
        except (FileNotFoundError, DamagedError):
            return None
        return (block, start) if block.plan == plan.key else None

    def record_failures(self, failures: dict[int, str]) -> None:
        """Write down which blocks failed and why; nothing is kept once none does."""
        path = self.path / "failed.json"
        if not failures:
            path.unlink(missing_ok=True)
            return
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({str(index): text for index, text in failures.items()}, indent=1))

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Remove it unless it holds a finished block."""
        if not any(self.path.glob("*/*.block")):
            self.remove()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.output}: {error.strerror}; choose another output") from error

    @contextmanager
    def _lock(self, name: str, kind: int, *, wait: bool = False) -> Iterator[None]:
        path = self.path / name
        while True:
            self._make()
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
                if _same(path, descriptor):
                    break
            except BlockingIOError as error:
                os.close(descriptor)
                raise UserError(
                    f"another run is writing {self.output}; wait for its end, or choose another output"
                ) from error
            os.close(descriptor)  # the holder has removed the folder meanwhile
        try:
            yield
        finally:
            os.close(descriptor)


def _same(path: Path, descriptor: int) -> bool:
    """Whether a file is still the one that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
