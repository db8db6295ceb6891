"""Opens any clip: the reader is chosen by what the path holds."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip
from vfmadapt.frames.images import IMAGES

# ending -> module of this package and its reader; a module is imported when it is first needed
_READERS = {
    ".npz": "npz.NpzClip",
    ".nii": "nifti.NiftiClip",
    ".nii.gz": "nifti.NiftiClip",
    ".mha": "metaimage.MetaImageClip",
    ".mhd": "metaimage.MetaImageClip",
    ".dcm": "dicom.DicomClip",
    ".mp4": "video.VideoClip",
    ".avi": "video.VideoClip",
    ".mov": "video.VideoClip",
    ".mkv": "video.VideoClip",
    ".gif": "images.PagesClip",
    ".tif": "images.PagesClip",
    ".tiff": "images.PagesClip",
    ".png": "images.PagesClip",
    ".jpg": "images.PagesClip",
    ".jpeg": "images.PagesClip",
    ".bmp": "images.PagesClip",
}


def open_clip(path: str | Path, **options: Any) -> Clip:
    """A video, a volume or a folder of images or DICOM files as a lazy sequence of frames.

    Args:
        path: NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd), NPZ, DICOM (a multi-frame file, or the folder of a series),
            video (.mp4, .avi, .mov, .mkv), an image (GIF and TIFF with all their pages), or a folder of images.
        options: what that reader takes, see its class.

    Raises:
        UserError: nothing readable there, or an option that the reader does not have.
    """
    where = Path(path).expanduser()
    reader, allowed = _reader(where), options_of(where)
    for name in options:
        if name not in allowed:
            raise UserError(f"{where}: no option {name!r}; for files of this kind there are: {', '.join(allowed)}")
    return reader(where, **options)


def options_of(path: Path) -> list[str]:
    """Names of what the reader of a path takes; raises UserError where nothing readable is there."""
    return list(signature(_reader(path)).parameters)[1:]


def _reader(path: Path) -> Callable[..., Clip]:
    name = _folder_reader(path) if path.is_dir() else _file_reader(path)
    module, reader = name.split(".")
    try:
        found: Callable[..., Clip] = getattr(import_module(f"vfmadapt.frames.{module}"), reader)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs {error.name}; type: pip install 'vfmadapt[medical]'") from error
    return found


def _file_reader(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if name := _READERS.get(ending(path)):
        return name
    if is_dicom(path):
        return _READERS[".dcm"]
    raise UserError(f"{path}: not a known kind of clip; allowed: {', '.join(_READERS)}, DICOM, or a folder of images")


def _folder_reader(path: Path) -> str:
    if any(ending(f) in IMAGES for f in path.iterdir() if f.is_file() and not f.name.startswith(".")):
        return "images.FolderClip"
    if has_dicom(path):
        return _READERS[".dcm"]
    raise UserError(f"{path}: the folder holds neither images ({', '.join(IMAGES)}) nor DICOM files")


def is_clip(path: Path) -> bool:
    """Whether a path is a volume, a video or DICOM, that is, none of what is read as a raster, too."""
    if path.is_dir():
        return has_dicom(path)
    reader = _READERS.get(ending(path))
    return path.is_file() and (is_dicom(path) if reader is None else not reader.startswith("images."))


def has_dicom(folder: Path) -> bool:
    """Whether a file in a folder is DICOM, whatever its name."""
    return any(is_dicom(file) for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def ending(path: Path) -> str:
    """The file name's ending in lower case, ".nii.gz" as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
