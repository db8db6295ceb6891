"""Inputs of many files as one raster: a VRT over a folder, a glob, a STAC item or collection.

Files that cover the same rectangle are one raster's bands; files that lie on one grid are a mosaic.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vfmadapt.errors import UserError
from vfmadapt.files import atomic_path
from vfmadapt.raster.io import RasterInfo, raster_info

_SUFFIXES = {".tif", ".tiff", ".jp2", ".png", ".jpg", ".vrt", ".img"}
_TYPES = {"uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32"}
_TYPES |= {"float32": "Float32", "float64": "Float64"}
_SLACK = 0.01  # of a pixel that grids may lie apart: coordinates are decimal numbers


@dataclass(frozen=True)
class _Piece:
    """A band of a file and the pixels of the whole where it lies."""

    info: RasterInfo
    band: int
    row: int
    column: int
    height: int
    width: int


def one_raster(given: str, output: Path) -> str:
    """The path of one raster for what the user gave; where that means several files, of a VRT beside the output.

    Args:
        given: a raster or URL; a folder; a glob such as "tiles/*.tif"; a STAC item or collection (.json).
        output: the map to come; the VRT is `NAME_input.vrt` beside it, written only if it is new.

    Raises:
        UserError: no files, or files that do not fit together; the line says which two.
    """
    files = _files(given)
    if files is None:
        return given
    if len(files) == 1:
        return files[0]
    infos = [raster_info(f) for f in files]
    same = all(_same_extent(i, infos[0]) for i in infos)
    text = _stacked(infos) if same else _mosaic(infos)
    path = output.with_name(f"{output.stem}_input.vrt")
    if not path.is_file() or path.read_text() != text:
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    return str(path)


def _files(given: str) -> list[str] | None:
    """The files that are meant; None where the text itself is a raster's name."""
    path = Path(given)
    if path.suffix.lower() == ".json" and path.is_file():
        return _stac_files(path)
    if path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    elif glob.has_magic(given) and "://" not in given and not path.exists():
        found = sorted(f for f in glob.glob(given, recursive=True) if Path(f).suffix.lower() in _SUFFIXES)
    else:
        return None
    if not found:
        raise UserError(f"{given}: no raster there; allowed are files that end in {', '.join(sorted(_SUFFIXES))}")
    return found


def _stac_files(path: Path) -> list[str]:
    """Data assets of a STAC item, or of all items that a collection links to."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["type"] == "Feature":
            assets = content["assets"].values()
            data = [a for a in assets if "data" in a.get("roles", [])]
            data = data or [a for a in assets if str(a.get("type", "")).startswith("image/tiff")]
            found = [_place(path, a["href"]) for a in data]
        else:
            items = [_place(path, link["href"]) for link in content["links"] if link["rel"] == "item"]
            found = [f for item in items for f in _stac_files(Path(item))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no STAC item or collection that can be read: {type(error).__name__}") from error
    if not found:
        raise UserError(f'{path}: no asset with the role "data" or of type image/tiff')
    return found


def _place(path: Path, href: str) -> str:
    return href if "://" in href or href.startswith("/") else str(path.parent / href)


def _same_extent(info: RasterInfo, other: RasterInfo) -> bool:
    """Whether two rasters cover the same rectangle, to a hundredth of a pixel; their pixels may be of other sizes."""
    if info.crs is None or info.crs != other.crs:
        return info.crs == other.crs and (info.height, info.width) == (other.height, other.width)
    corners = [
        (t.c, t.f, t.c + t.a * i.width + t.b * i.height, t.f + t.d * i.width + t.e * i.height)
        for i, t in ((info, info.transform), (other, other.transform))
    ]
    scale = max(abs(info.transform.a), abs(info.transform.b))
    return max(abs(a - b) for a, b in zip(*corners, strict=True)) <= _SLACK * scale


def _stacked(infos: Sequence[RasterInfo]) -> str:
    """One file per band or per group of bands; coarser ones are repeated to the finest grid."""
    finest = max(infos, key=lambda i: i.height)
    bands = [[_Piece(i, b, 0, 0, finest.height, finest.width)] for i in infos for b in i.data_bands]
    return "\n".join(_vrt(finest, finest.height, finest.width, finest.transform, bands))


def _mosaic(infos: Sequence[RasterInfo]) -> str:
    """Files side by side on one grid; where they overlap, the later in order lies on top."""
    first = infos[0]
    t = first.transform
    places = []
    for info in infos:
        other = info.transform
        column, row = ~t * (other.c, other.f)
        grid = (info.crs, info.dtypes, info.nodata, info.colours, info.masked)
        fits = grid == (first.crs, first.dtypes, first.nodata, first.colours, False)
        scale = max(abs(t.a), abs(t.b))
        turned = max(abs(getattr(t, k) - getattr(other, k)) for k in "abde") * max(info.height, info.width)
        if not fits or turned > _SLACK * scale or max(abs(column - round(column)), abs(row - round(row))) > _SLACK:
            raise UserError(
                f"{info.path} and {first.path} are not of one grid (CRS, pixels, bands, types, nodata, no mask band); "
                "map them one by one, or make a VRT of them"
            )
        places.append((info, round(row), round(column)))
    top, left = min(p[1] for p in places), min(p[2] for p in places)
    height, width = max(i.height + r for i, r, _ in places) - top, max(i.width + c for i, _, c in places) - left
    bands = [
        [_Piece(i, b, r - top, c - left, i.height, i.width) for i, r, c in places]
        for b in range(1, len(first.dtypes) + 1)
    ]
    return "\n".join(_vrt(first, height, width, t * type(t).translation(left, top), bands))


def _vrt(info: RasterInfo, height: int, width: int, transform: Any, bands: Sequence[Sequence[_Piece]]) -> Iterator[str]:
    yield f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">'
    if info.crs is not None:
        yield f"<SRS>{escape(info.crs.to_wkt())}</SRS>"
    if not info.transform.is_identity:
        yield f"<GeoTransform>{', '.join(repr(float(v)) for v in transform.to_gdal())}</GeoTransform>"
    for number, pieces in enumerate(bands, start=1):
        one, at = pieces[0].info, pieces[0].band - 1
        if one.dtypes[at] not in _TYPES:
            raise UserError(f"{one.path} holds {one.dtypes[at]} values; allowed: {', '.join(_TYPES)}")
        yield f'<VRTRasterBand dataType="{_TYPES[one.dtypes[at]]}" band="{number}">'
        name = one.band_names[at] or (Path(one.path).stem if len(one.data_bands) == 1 and len(bands) > 1 else None)
        yield f"<Description>{escape(name)}</Description>" if name else ""
        nodata = one.nodata[at]
        yield f"<NoDataValue>{nodata!r}</NoDataValue>" if nodata is not None else ""
        kind = "Alpha" if one.alpha == at + 1 else (one.colours[at] or "gray").capitalize()
        yield f"<ColorInterp>{kind}</ColorInterp>"
        yield f"<Offset>{one.offsets[at]!r}</Offset><Scale>{one.scales[at]!r}</Scale>"
        source = "SimpleSource" if nodata is None else "ComplexSource"
        for p in pieces:
            yield f'<{source}><SourceFilename relativeToVRT="0">{escape(str(_absolute(p.info.path)))}</SourceFilename>'
            yield f"<SourceBand>{p.band}</SourceBand>"
            yield f'<SrcRect xOff="0" yOff="0" xSize="{p.info.width}" ySize="{p.info.height}"/>'
            yield f'<DstRect xOff="{p.column}" yOff="{p.row}" xSize="{p.width}" ySize="{p.height}"/>'
            yield f"<NODATA>{nodata!r}</NODATA>" if nodata is not None else ""
            yield f"</{source}>"
        yield "</VRTRasterBand>"
    yield "</VRTDataset>"


def _absolute(path: str) -> str:
    return path if "://" in path or path.startswith("/vsi") else str(Path(path).resolve())
