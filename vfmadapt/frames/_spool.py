"""Compressed streams on disk, so that any place in them can be read without holding all of it."""

import shutil
from tempfile import TemporaryFile
from typing import IO


def spool(stream: IO[bytes]) -> IO[bytes]:
    """The contents of a stream in a temporary file that vanishes when it is closed, at its beginning."""
    file = TemporaryFile()  # noqa: SIM115 - it belongs to the caller
    shutil.copyfileobj(stream, file, 1 << 20)
    file.seek(0)
    return file
