"""A user's own folder of images and depth (or disparity): PNG of 16 bits, NPY, NPZ, EXR, TIFF."""

from pathlib import Path

from vfmadapt.contracts import UserError, ValueSpec
from vfmadapt.datasets._depth_files import DEPTH_SUFFIXES, DepthData, DepthItem, folder
from vfmadapt.datasets._pairs import split_of
from vfmadapt.datasets._tiles import SPLITS

_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class DepthFolder(DepthData):
    """Images and depth maps of the same name in two folders (or one, told apart by what their names end with).

    Layouts: `root/images` and `root/depth`, split by a hash of the file's name; or folders named train, val and test
    with those two inside.

    Args:
        root: the folder.
        images: name of the folder of images.
        depths: name of the folder of depth maps.
        image_suffix: what an image's stem ends with besides the common name ("scene1_left": "_left").
        depth_suffix: the same for depth maps.
        scale: stored value x scale = depth in the unit, for instance 0.001 for PNG files in millimetres and metres.
        unit: of the depth.
        inverse: the maps are disparities, or other inverse depths.
        val_fraction: share of the images that validate, where no folders split them.
        test_fraction: share that tests; 1 makes every image a test image.

    Raises:
        UserError: an impossible setting; on use: no folder, no pairs, an image without depth, other sizes.
    """

    def __init__(
        self,
        *,
        root: str,
        images: str = "images",
        depths: str = "depth",
        image_suffix: str = "",
        depth_suffix: str = "",
        scale: float = 1.0,
        unit: str = "m",
        inverse: bool = False,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise UserError(
                f"data.val_fraction={val_fraction}, data.test_fraction={test_fraction}: allowed are shares >= 0 that "
                "sum to at most 1"
            )
        value = ValueSpec("disparity" if inverse else "depth", unit, log=not inverse, inverse=inverse)
        super().__init__(Path(root).name, value, scale=scale)
        self._root, self._folders = root, (images, depths)
        self._suffixes, self._fractions = (image_suffix, depth_suffix), (val_fraction, test_fraction)

    def _items(self) -> dict[str, list[DepthItem]]:
        images, depths = self._folders
        root = folder(self._root, f"{images}/ and {depths}/, or train/, val/ and test/ with those inside")
        if any((root / name / images).is_dir() for name in SPLITS):
            return {name: self._pairs(root / name) for name in SPLITS if (root / name / images).is_dir()}
        found: dict[str, list[DepthItem]] = {name: [] for name in SPLITS}
        for item in self._pairs(root):
            found[split_of(item.id, *self._fractions)].append(item)
        return found

    def _pairs(self, root: Path) -> list[DepthItem]:
        (image_suffix, depth_suffix), (images, depths) = self._suffixes, (root / name for name in self._folders)
        if images.resolve() == depths.resolve() and image_suffix == depth_suffix:
            raise UserError(f"{images} holds images and depths: tell them apart, for instance data.depth_suffix=_depth")
        maps = _by_name(depths, depth_suffix, DEPTH_SUFFIXES)
        found = _by_name(images, image_suffix, _IMAGES)
        if images.resolve() == depths.resolve():  # an empty suffix fits the other kind of file, too
            found = {name: path for name, path in found.items() if path not in maps.values()}
            maps = {name: path for name, path in maps.items() if path not in found.values()}
        if alone := sorted(set(found) - set(maps)):
            raise UserError(
                f"{found[alone[0]]} has no depth: looked in {depths} for {alone[0]}{depth_suffix} with an ending of "
                f"{', '.join(DEPTH_SUFFIXES)}"
            )
        return [DepthItem(name, found[name], maps[name]) for name in sorted(found)]


def _by_name(where: Path, suffix: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by their stem without the suffix."""
    files = sorted(folder(str(where), "images and depth maps of the same names").iterdir())
    chosen = [f for f in files if f.suffix.lower() in endings and f.stem.endswith(suffix) and f.name[0] != "."]
    return {f.stem.removesuffix(suffix): f for f in chosen}
