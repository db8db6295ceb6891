"""KITTI with the split of Eigen et al. 2014 (https://arxiv.org/abs/1406.2283), in the layout of BTS and AdaBins.

Raw images under one folder, the official annotated depth (PNG of 16 bits, 1/256 m, 0 unknown) under another, and lists
of both by split. The depth is sparse: about a fifth of the pixels.
"""

from pathlib import Path

from vfmadapt.contracts import UserError, ValueSpec
from vfmadapt.datasets._depth_files import DepthData, DepthItem, folder, listed

_CROPS = {
    # shares of the height and width: top, bottom, left, right (Garg et al. 2016, https://arxiv.org/abs/1603.04992)
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


class KittiEigen(DepthData):
    """Images and depth named by lists, a line each: image, depth, focal length ("None" for a depth that is missing).

    Args:
        root: folder of the raw images, that the lists are relative to.
        depth_root: folder of the annotated depth.
        train_list: of training images; None: there are none.
        test_list: of test images (697, of which 652 have annotated depth).
        val_list: of validation images; None: the last twentieth of the training list.
        crop: "garg" or "eigen": pixels that papers measure; None: all.

    Raises:
        UserError: another crop; on use: no folder or list, files that are not there.
    """

    def __init__(
        self,
        *,
        root: str,
        depth_root: str,
        test_list: str,
        train_list: str | None = None,
        val_list: str | None = None,
        crop: str | None = "garg",
    ) -> None:
        if crop is not None and crop not in _CROPS:
            raise UserError(f"data.crop={crop}: allowed are {', '.join(_CROPS)} and null")
        cut = None if crop is None else _CROPS[crop]
        super().__init__("kitti_eigen", ValueSpec("depth", "m", log=True), scale=1 / 256, crop=cut)
        self._root, self._depth_root = root, depth_root
        self._lists = {"train": train_list, "val": val_list, "test": test_list}

    def _items(self) -> dict[str, list[DepthItem]]:
        root, depths = folder(self._root, "KITTI's raw images"), folder(self._depth_root, "KITTI's annotated depth")
        found = {name: listed(root, depths, Path(file)) for name, file in self._lists.items() if file is not None}
        if "val" not in found and found.get("train"):
            count = max(1, len(found["train"]) // 20)
            found["train"], found["val"] = found["train"][:-count], found["train"][-count:]
        return found
