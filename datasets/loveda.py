"""LoveDA: 5,987 images of towns and countryside around three Chinese cities, 0.3 m, seven land covers.

Wang et al. 2021, "LoveDA: A Remote Sensing Land-Cover Dataset for Domain Adaptive Semantic Segmentation",
https://arxiv.org/abs/2110.08733.
"""

from collections.abc import Sequence
from pathlib import Path

from vfmadapt.contracts import IGNORE_INDEX
from vfmadapt.datasets._landcover import class_set
from vfmadapt.datasets._torchgeo import Files, Numbers, TorchGeoSource, listed
from vfmadapt.errors import UserError

_BANDS = ("red", "green", "blue")
_SCENES = ("urban", "rural")


class LoveDA(TorchGeoSource):
    """LoveDA as published: `Train/Urban/images_png`, `Train/Urban/masks_png`, the same of `Rural` and of `Val`.

    Labels of the published test images are not public: `Val` is the test split here, and a share of `Train` validates.

    Args:
        root: the folder that holds `Train` and `Val`.
        classes: landcover (its seven) or urban (other, building, road, water).
        scenes: urban, rural or both.
        val_fraction: share of the training images that validate.

    Raises:
        UserError: as `TorchGeoSource`; an unknown class set or scene.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        classes: str = "landcover",
        scenes: Sequence[str] = _SCENES,
        val_fraction: float = 0.1,
    ) -> None:
        if not scenes or set(scenes) - set(_SCENES):
            raise UserError(f"data.scenes={list(scenes)}: choose of {', '.join(_SCENES)}")
        chosen = class_set(classes)
        super().__init__(
            name="loveda",
            stored=_BANDS,
            bands=_BANDS,
            classes=chosen.classes,
            labels=Numbers((IGNORE_INDEX, *chosen.labels)),  # 0 is no data
            tile=1024,  # the images' side
            val_fraction=val_fraction,
        )
        self._root, self._scenes = Path(root).expanduser(), list(scenes)

    def files(self, split: str) -> Files:
        """Images and masks of the published training or validation images."""
        part = "train" if split == "train" else "val"
        return listed("LoveDA", self._root, part.capitalize(), part, scene=self._scenes)
