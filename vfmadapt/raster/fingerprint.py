"""Has an input or a model changed? Hashes that say so."""

import hashlib
from pathlib import Path
from typing import Any

_WHOLE = 1 << 26  # files up to 64 MiB are read whole
_PIECES = 64  # of a larger one so many pieces of 1 MiB, spread evenly, first and last included
_PIECE = 1 << 20


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size, time of change and content (of a sample of it beyond 64 MiB)."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        if status.st_size <= _WHOLE:
            digest.update(file.read())
        else:
            for piece in range(_PIECES):
                file.seek(piece * (status.st_size - _PIECE) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def source_fingerprint(files: tuple[str, ...], description: object) -> str:
    """SHA-256 of all files that a raster consists of (a VRT names others), and of what it says about itself.

    Remote files count by their description only: size, bands, types, georeference.
    """
    digest = hashlib.sha256(repr(description).encode())
    for name in files:
        path = Path(name)
        digest.update((file_fingerprint(path) if path.is_file() else name).encode())
    return digest.hexdigest()


def model_fingerprint(model: Any) -> str:
    """SHA-256 of a module's class, data spec, parameters and buffers; the same on every device."""
    import torch

    digest = hashlib.sha256(f"{type(model).__qualname__} {model.spec!r}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
