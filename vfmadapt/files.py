"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vfmadapt.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there gets the real name at the end, or goes on an error.

    The folder is made where it is missing. Raises UserError where it cannot be written to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another output") from error
    try:
        yield temporary
        publish(temporary, target)
    finally:
        for leftover in (temporary, temporary.with_name(temporary.name + ".aux.xml")):  # GDAL writes the second
            leftover.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its final name, safely on disk; both lie on one file system."""
    _sync(temporary)
    os.replace(temporary, target)
    with suppress(OSError):  # some file systems cannot open a folder; the file itself is safe by now
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
