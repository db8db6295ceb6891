"""Frozen vision foundation models, plug-in adapters, dense prediction in domains they never saw."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfmadapt.bank import load_many as load_many
    from vfmadapt.build import adapt as adapt
    from vfmadapt.checkpoint import load as load
    from vfmadapt.checkpoint import save as save
    from vfmadapt.errors import UserError as UserError
    from vfmadapt.raster.predict import predict_raster as predict_raster

__version__ = "0.1.0"

_PUBLIC = {
    "adapt": "vfmadapt.build",
    "load": "vfmadapt.checkpoint",
    "load_many": "vfmadapt.bank",
    "save": "vfmadapt.checkpoint",
    "predict_raster": "vfmadapt.raster.predict",
    "UserError": "vfmadapt.errors",
}
__all__ = ["UserError", "__version__", "adapt", "load", "load_many", "predict_raster", "save"]


def __getattr__(name: str) -> Any:
    """Import on first use: `vfmadapt list` and error messages must not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vfmadapt' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
