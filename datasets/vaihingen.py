"""ISPRS Vaihingen: 33 orthophotos of about 2500 x 2000 pixels, 0.09 m, near infrared, red and green."""

from collections.abc import Sequence
from pathlib import Path

from vfmadapt.datasets._isprs import CLASSES
from vfmadapt.datasets._torchgeo import Colours, Files, TorchGeoSource, listed

_BANDS = ("nir", "red", "green")


class Vaihingen(TorchGeoSource):
    """Vaihingen as published: `top/top_mosaic_09cm_area*.tif`, beside that folder the masks of the same names.

    Args:
        root: the folder that the archives of the images and of the complete ground truth were unpacked into.
        bands: of nir, red, green.
        tile: side of the parts that the photos are cut into, pixels.
        val_fraction: share of the training images that validate.

    Raises:
        UserError: as `TorchGeoSource`.
    """

    def __init__(
        self, *, root: str | Path, bands: Sequence[str] = _BANDS, tile: int = 1000, val_fraction: float = 0.1
    ) -> None:
        super().__init__(
            name="vaihingen",
            stored=_BANDS,
            bands=bands,
            classes=CLASSES,
            labels=Colours(CLASSES),
            tile=tile,
            val_fraction=val_fraction,
        )
        self._root = Path(root).expanduser()

    def files(self, split: str) -> Files:
        """Photos and masks of the published training or test split."""
        return listed("Vaihingen2D", self._root, "top", split)
