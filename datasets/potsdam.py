"""ISPRS Potsdam: 38 orthophotos of 6000 x 6000 pixels, 0.05 m, red, green, blue and near infrared."""

from collections.abc import Sequence
from pathlib import Path

from vfmadapt.datasets._isprs import CLASSES
from vfmadapt.datasets._torchgeo import Colours, Files, TorchGeoSource, listed


class Potsdam(TorchGeoSource):
    """Potsdam as published: `4_Ortho_RGBIR/top_potsdam_*_RGBIR.tif`, beside that folder `top_potsdam_*_label.tif`.

    Args:
        root: the folder that `4_Ortho_RGBIR.zip` and `5_Labels_all.zip` were unpacked into.
        bands: of red, green, blue, nir.
        tile: side of the parts that the photos are cut into, pixels.
        val_fraction: share of the training images that validate.

    Raises:
        UserError: as `TorchGeoSource`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        bands: Sequence[str] = ("red", "green", "blue"),
        tile: int = 1000,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            name="potsdam",
            stored=("red", "green", "blue", "nir"),
            bands=bands,
            classes=CLASSES,
            labels=Colours(CLASSES),
            tile=tile,
            val_fraction=val_fraction,
        )
        self._root = Path(root).expanduser()

    def files(self, split: str) -> Files:
        """Photos and masks of the published training or test split."""
        return listed("Potsdam2D", self._root, "4_Ortho_RGBIR", split)
