"""A map of classes or objects as polygons: a row for each connected region, in a GeoPackage or a GeoParquet file.

The map is taken in squares, row by row. Regions inside a square are done at once; those that reach its edge are kept in
pieces until nothing can be added to them. So memory follows the outlines of the regions that are open, not the map.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.raster.io import RasterInfo, open_raster
from vfmadapt.raster.tiling import Area
from vfmadapt.raster.write import nodata_of

_NEEDED = {"gpkg": ("shapely", "pyogrio"), "parquet": ("shapely", "pyarrow")}
_SIDE = 1024  # pixels of a square; in larger ones there are fewer seams, but too many polygons where a map is all noise
_AT_ONCE = 5_000  # polygons that are written together

Region = tuple[int, Any]
"""A class or the number of an object, and its polygon of shapely in columns and rows of pixels."""


def check_polygons(form: str | None, info: RasterInfo, values: Sequence[Any]) -> None:
    """Refuse polygons that cannot be made, before any work begins; None wants none.

    Raises:
        UserError: no such format, a library that is not installed, a raster without a transform, a map of values.
    """
    if form is None:
        return
    if form not in _NEEDED:
        raise UserError(f"polygons={form}: allowed are {', '.join(_NEEDED)}")
    if values:
        raise UserError(f"polygons={form} are regions of a class, the model gives values; leave it out")
    if info.transform.is_identity and (info.gcps or info.rpcs is not None):
        raise UserError(
            f"polygons={form}: {info.path} is placed by control points or RPCs; warp it first (gdalwarp), or leave "
            "polygons= out"
        )
    if missing := [name for name in _NEEDED[form] if find_spec(name) is None]:
        raise UserError(f"polygons={form} needs {' and '.join(missing)}; run pip install 'vfmadapt[geo]'")


def write_polygons(
    labels: Path,
    target: Path,
    info: RasterInfo,
    classes: Sequence[str],
    object_classes: NDArray[np.int64] | None = None,
) -> None:
    """Write the regions of a map, in the format that the ending of `target` names.

    Pixels belong together where they share a side and the class. Columns: class, name, pixels, area_m2 (on the
    projection; without a projected CRS there is none), geometry (columns and rows of pixels without a transform). Of
    objects the first is object, the number, and class and name are there where objects have classes; the parts of one
    that is not connected have a row each.

    Args:
        labels: the map, as `predict_raster` writes it.
        target: a new file.
        info: of the map: CRS and transform.
        classes: names in the order of the labels; none for a map of objects without classes.
        object_classes: label of each object's class, in the order of their numbers, for a map of objects with classes.

    Raises:
        UserError: the file cannot be written.
    """

    def read(row: int, column: int) -> NDArray[Any]:
        return raster.read_labels(area=Area(row, column, _SIDE, _SIDE).cut(Area(0, 0, height, width)))[0]

    write = _write_gpkg if target.suffix == ".gpkg" else _write_parquet
    with open_raster(labels) as raster:
        height, width = raster.info.height, raster.info.width
        found = regions(read, height, width, _SIDE)
        columns = partial(_table, info=info, classes=classes, object_classes=object_classes)
        tables = map(columns, iter(lambda: list(islice(found, _AT_ONCE)), []))
        try:
            write(target, info, chain([columns([])], tables))
        except RuntimeError as error:  # pyogrio's errors; those of a full disk among them
            raise UserError(f"cannot write {target.name}: {' '.join(str(error).split())}") from error


def regions(read: Callable[[int, int], NDArray[Any]], height: int, width: int, side: int) -> Iterator[Region]:
    """Each region of a map of `height` x `width` pixels, always in the same order.

    `read(row, column)` gives the labels of the square of `side` pixels that begins there, less at the map's edge.
    """
    seams = _Seams(width)
    for row in range(0, height, side):
        for column in range(0, width, side):
            labels = read(row, column)
            ids, classes = _components(labels)
            polygons = _polygons(ids, row, column)
            sides = {"above": row > 0, "left": column > 0, "below": row + side < height, "right": column + side < width}
            edges = {"above": ids[0], "left": ids[:, 0], "below": ids[-1], "right": ids[:, -1]}
            reaching = np.unique(np.concatenate([[0], *(edges[name] for name in edges if sides[name])]))[1:]
            inside = np.setdiff1d(np.arange(1, len(classes)), reaching)
            yield from ((int(classes[i]), polygons[i - 1]) for i in inside)
            seams.add(column, labels, ids, {int(i): (int(classes[i]), polygons[i - 1]) for i in reaching})
        yield from seams.closed(last=row + side >= height)


class _Seams:
    """The regions that reach the edge of a square, in pieces; each goes by the number of its first piece."""

    def __init__(self, width: int) -> None:
        from scipy.cluster.hierarchy import DisjointSet

        self._sets: Any = DisjointSet()
        self._pieces: dict[int, tuple[int, list[Any]]] = {}
        self._count = 0
        # label and number (0: void) of each pixel above the present row of squares, below it, left of the present one
        self._above = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        self._below = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        self._left: tuple[NDArray[Any], NDArray[np.int64]] | None = None

    def add(self, column: int, labels: NDArray[Any], ids: NDArray[np.int32], reaching: dict[int, Region]) -> None:
        """Add a square that begins at a column; `reaching` are the regions of its `ids` that reach its edge."""
        numbers = np.zeros(int(ids.max()) + 1, dtype=np.int64)
        for index, (label, polygon) in reaching.items():
            self._count += 1
            numbers[index] = self._count
            self._sets.add(self._count)
            self._pieces[self._count] = (label, [polygon])
        at = slice(column, column + labels.shape[1])
        if column:
            assert self._left is not None
            self._join(self._left, (labels[:, 0], numbers[ids[:, 0]]))
        self._join((self._above[0][at], self._above[1][at]), (labels[0], numbers[ids[0]]))
        self._left = labels[:, -1], numbers[ids[:, -1]]
        self._below[0][at], self._below[1][at] = labels[-1], numbers[ids[-1]]

    def _join(self, *sides: tuple[NDArray[Any], NDArray[np.int64]]) -> None:
        """What has the same class on both sides of a seam is one region; void pixels have no number."""
        (first, ones), (second, others) = sides
        same = (first == second) & (ones > 0) & (others > 0)
        for one, other in np.unique(np.stack([ones[same], others[same]]), axis=1).T.tolist():
            self._sets.merge(one, other)

    def closed(self, *, last: bool) -> Iterator[Region]:
        """The regions that end in the row of squares that is complete now; the rest stays for the next row."""
        from scipy.cluster.hierarchy import DisjointSet

        labels, numbers = self._below
        present, where = np.unique(numbers, return_inverse=True)
        open_now = set() if last else set(present.tolist())
        renamed, left = dict.fromkeys(present.tolist(), 0), DisjointSet()
        for members in sorted(map(sorted, self._sets.subsets())):
            taken = [self._pieces.pop(number) for number in members]
            label, pieces = taken[0][0], list(chain.from_iterable(some for _, some in taken))
            if open_now.isdisjoint(members):
                yield label, _united(pieces)
                continue
            left.add(members[0])
            self._pieces[members[0]] = label, pieces
            renamed |= dict.fromkeys(members, members[0])
        self._sets = left
        self._above = labels.copy(), np.array([renamed[n] for n in present.tolist()], dtype=np.int64)[where]


def _components(labels: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Regions of a square, numbered from 1 on, 0 where void; and the class of each number."""
    from scipy import ndimage

    void = int(nodata_of(labels.dtype))
    ids, classes = np.zeros(labels.shape, dtype=np.int32), [void]
    present, at = np.unique(labels, return_inverse=True)
    for label, box in zip(present.tolist(), ndimage.find_objects(at + 1), strict=True):
        if label != void:
            some, count = ndimage.label(labels[box] == label)
            np.copyto(ids[box], some + np.int32(len(classes) - 1), where=some > 0)
            classes += [label] * count
    return ids, np.array(classes, dtype=np.int64)


def _polygons(ids: NDArray[np.int32], row: int, column: int) -> Any:
    """An array of polygons, the first of the region 1, of a square that begins at a row and column."""
    import shapely
    from rasterio.features import shapes

    found = sorted(shapes(ids, mask=ids > 0, connectivity=4), key=lambda pair: pair[1])
    rings = [ring for geometry, _ in found for ring in geometry["coordinates"]]
    if not rings:
        return np.empty(0, dtype=object)
    corners = np.array(list(chain.from_iterable(rings))) + np.array([column, row])
    ends = np.cumsum([0, *map(len, rings)])
    polygons = np.cumsum([0, *(len(geometry["coordinates"]) for geometry, _ in found)])
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, corners, (ends, polygons))


def _united(pieces: list[Any]) -> Any:
    """One polygon of pieces that share sides of pixels."""
    import shapely

    if len(pieces) == 1:
        return pieces[0]
    dense = shapely.transform(shapely.segmentize(np.array(pieces), 1.0), np.rint)  # a corner at each pixel: edges match
    return shapely.simplify(shapely.get_parts(shapely.coverage_union_all(dense))[0], 0, preserve_topology=False)


def _table(
    rows: Sequence[Region], info: RasterInfo, classes: Sequence[str], object_classes: NDArray[np.int64] | None
) -> dict[str, NDArray[Any]]:
    """The columns of some regions."""
    import shapely

    a, b, c, d, e, f = info.transform[:6]

    def placed(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = corners.T
        return np.column_stack([a * x + b * y + c, d * x + e * y + f])

    polygons, labels = np.array([p for _, p in rows], dtype=object), np.array([n for n, _ in rows], dtype=np.int64)
    pixels = np.rint(shapely.area(polygons)).astype(np.int64)
    table: dict[str, NDArray[Any]] = {}
    if object_classes is not None or not classes:
        table["object"] = labels
    if classes:
        of = labels if object_classes is None else object_classes[labels - 1]
        table |= {"class": of.astype(np.int32), "name": np.array([classes[n] for n in of], dtype=object)}
    table["pixels"] = pixels
    if info.pixel_m2 is not None:
        table["area_m2"] = pixels * info.pixel_m2
    return table | {"geometry": shapely.to_wkb(shapely.transform(polygons, placed))}


def _write_gpkg(target: Path, info: RasterInfo, tables: Iterable[dict[str, NDArray[Any]]]) -> None:
    from pyogrio.raw import write

    crs = None if info.crs is None else info.crs.to_wkt(version="WKT2_2019")
    for index, table in enumerate(tables):
        names = [name for name in table if name != "geometry"]
        columns = [table[name] for name in names]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")
            write(
                target,
                geometry=table["geometry"],
                field_data=columns,
                fields=names,
                layer=target.stem,
                driver="GPKG",
                geometry_type="Polygon",
                crs=crs,
                append=index > 0,
            )


def _write_parquet(target: Path, info: RasterInfo, tables: Iterable[dict[str, NDArray[Any]]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    crs = None if info.crs is None else info.crs.to_dict(projjson=True)
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": crs}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    types = {"class": pa.int32(), "name": pa.string(), "object": pa.int64(), "pixels": pa.int64()}
    types |= {"area_m2": pa.float64(), "geometry": pa.binary()}
    writer = None
    for table in tables:
        schema = pa.schema([(name, types[name]) for name in table], metadata={"geo": json.dumps(geo)})
        writer = writer or parquet.ParquetWriter(target, schema, compression="zstd")
        writer.write_table(pa.table(table, schema=schema))
    assert writer is not None
    writer.close()
