"""Pictures for the eye: label overlays, titled panels with a legend, and the quick-look of a raster beside its map."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import ClassSpec, ValueSpec
from vfmadapt.files import atomic_path
from vfmadapt.raster.colours import coloured, span_of, with_bar
from vfmadapt.raster.io import open_raster
from vfmadapt.raster.tiling import Area

if TYPE_CHECKING:
    from PIL.Image import Image

VOID_COLOUR = (224, 224, 224)
"""Colour of pixels without data in pictures."""

_MARGIN = 18
_TEXT = 16  # font size in pixels
_MIN_SIDE = 448  # smaller pictures are enlarged by a whole factor so that a 64-pixel tile is not a stamp
_STRETCH = (1, 99)  # percentiles that become black and white
_GAMMA = 0.7  # lifts the land that a few bright clouds would leave black
_OBJECTS = tuple(  # neighbours mostly have numbers close to each other, so their colours differ
    ClassSpec("object", colour)
    for colour in ((230, 25, 75), (60, 180, 75), (255, 200, 0), (0, 110, 220), (245, 130, 48), (145, 30, 180))
)
_RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"), ("b04", "b03", "b02"), ("b4", "b3", "b2"))


def overlay(
    image: NDArray[np.uint8], labels: NDArray[Any], classes: Sequence[ClassSpec], *, alpha: float = 0.5
) -> NDArray[np.uint8]:
    """Lay the colours of a label map over an image.

    Args:
        image: uint8 (H, W, 3).
        labels: integers (H, W); a label that is no index into `classes` (ignore, nodata) leaves the image as it is.
        classes: the classes in the order of their labels.
        alpha: weight of the class colour, 0..1.

    Returns:
        uint8 (H, W, 3).
    """
    known = (labels >= 0) & (labels < len(classes))
    colours = np.array([c.colour for c in classes], dtype=np.float32).reshape(-1, 3)
    out = image.copy()
    mixed = (1 - alpha) * image[known].astype(np.float32) + alpha * colours[labels[known].astype(np.int64)]
    out[known] = np.rint(mixed).clip(0, 255).astype(np.uint8)
    return out


def panel(images: Sequence[tuple[str, NDArray[np.uint8]]], classes: Sequence[ClassSpec]) -> "Image":
    """Set titled pictures in a row, with a legend of the classes beneath.

    `images`: (title, uint8 (H, W, 3)) from left to right; small pictures are enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw

    pictures = [_enlarged(picture) for _, picture in images]
    width = max(sum(p.width for p in pictures) + _MARGIN * (len(pictures) + 1), 2 * _MIN_SIDE)
    font = _font()
    rows = _legend_rows([c.name for c in classes], width - 2 * _MARGIN, font)
    top = _MARGIN + _TEXT + 8
    tallest = max((p.height for p in pictures), default=0)
    sheet = Image.new("RGB", (width, top + tallest + _MARGIN + len(rows) * (_TEXT + 12) + 6), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    x = (width - sum(p.width for p in pictures) - _MARGIN * (len(pictures) - 1)) // 2
    for (title, _), picture in zip(images, pictures, strict=True):
        draw.text((x, top - _TEXT - 10), title, fill=(30, 30, 30), font=font)
        sheet.paste(picture, (x, top))
        x += picture.width + _MARGIN
    for row, entries in enumerate(rows):
        y = top + tallest + _MARGIN + row * (_TEXT + 12)
        for index, left in entries:
            box = (_MARGIN + left, y, _MARGIN + left + _TEXT + 6, y + _TEXT)
            draw.rectangle(box, fill=classes[index].colour, outline=(90, 90, 90))
            draw.text((box[2] + 8, y - 2), classes[index].name, fill=(30, 30, 30), font=font)
    return sheet


def quicklook(image: NDArray[np.float32], valid: NDArray[np.bool_], bands: Sequence[str | None]) -> NDArray[np.uint8]:
    """Stretch an image for the eye: 1st to 99th percentile of its valid pixels.

    Bands named red, green, blue (or B04, B03, B02) are taken as such and share one stretch, which keeps the colours
    true; otherwise the first three bands are stretched one by one, and fewer than three give grey.

    Args:
        image: float32 (C, H, W).
        valid: bool (H, W); other pixels become `VOID_COLOUR`.
        bands: names of the C bands.

    Returns:
        uint8 (H, W, 3).
    """
    chosen, joint = _display_bands(bands)
    shown = image[chosen]
    out = np.empty((3, *valid.shape), dtype=np.float32)
    groups = [[0, 1, 2]] if joint else [[i] for i in range(3)]
    for group in groups:
        values = shown[group][:, valid]
        low, high = np.percentile(values, _STRETCH) if values.size else (0.0, 1.0)
        out[group] = (shown[group] - low) / max(float(high - low), 1e-6)
    rgb: NDArray[np.uint8] = np.rint(out.clip(0, 1) ** _GAMMA * 255).astype(np.uint8).transpose(1, 2, 0).copy()
    rgb[~valid] = VOID_COLOUR
    return rgb


def write_preview(
    source: str | Path,
    labels: str | Path,
    target: str | Path,
    *,
    bands: Sequence[int],
    names: Sequence[str],
    classes: Sequence[ClassSpec],
    shares: Mapping[str, float],
    values: Sequence[ValueSpec] = (),
    objects: int | None = None,
    window: Sequence[int] | None = None,
    max_side: int = 900,
) -> Path:
    """Write a PNG: the raster on the left, its label map laid over it on the right, classes and shares beneath.

    Of a map of values the first one is on the right, in colours with a scale bar; of a map of objects each in one of a
    few colours.

    Args:
        source: the raster; read at no more than `max_side` pixels per side.
        labels: its map, as `predict_raster` writes it.
        target: the PNG.
        bands: 1-based bands of the raster that the model reads.
        names: the model's names of those bands.
        classes: the classes in the order of their labels.
        shares: share of each class by name, 0..1, for the legend.
        values: the map's values where it is one of values.
        objects: how many there are where it is one of objects.
        window: [row, column, height, width], the part of the raster that was mapped; by default all.
        max_side: longer side of each picture in pixels.
    """
    with open_raster(source) as raster, open_raster(labels) as mapped:
        image, valid = raster.thumbnail(bands, max_side, None if window is None else Area(*window))
        drawn, known = mapped.thumbnail([1], max_side) if values else mapped.read_labels(max_side)
    title = "map"
    if objects is not None:
        known = valid  # 0 says that no object is there
    picture = quicklook(image, valid & known, names)
    if objects is not None:
        title, legend = f"{objects} objects", list[ClassSpec]()
        shown = overlay(picture, np.where(drawn > 0, drawn.astype(np.int64) % len(_OBJECTS), -1), _OBJECTS)
    elif values:
        span = span_of(drawn[0, known])
        title, shown, legend = values[0].name, coloured(drawn[0], known, span, void=VOID_COLOUR), list[ClassSpec]()
    else:
        shown = overlay(picture, drawn, classes)
        legend = [replace(c, name=f"{c.name} {100 * shares[c.name]:.1f} %") for c in classes]
    if not known.all():
        legend.append(ClassSpec("no data", VOID_COLOUR))
    sheet = panel([(Path(source).name, picture), (title, shown)], legend)
    if values:
        sheet = with_bar(sheet, span, values[0])
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(target)


def _display_bands(bands: Sequence[str | None]) -> tuple[list[int], bool]:
    """Indices of the three bands to show, and whether they are red, green and blue."""
    lower = [(name or "").strip().lower() for name in bands]
    for rgb in _RGB_NAMES:
        if all(name in lower for name in rgb):
            return [lower.index(name) for name in rgb], True
    return ([0, 1, 2] if len(lower) >= 3 else [0, 0, 0]), False


def _enlarged(picture: NDArray[np.uint8]) -> "Image":
    from PIL import Image

    factor = max(1, round(_MIN_SIDE / max(picture.shape[:2])))
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.NEAREST)


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=_TEXT)


def _legend_rows(names: Sequence[str], width: int, font: Any) -> list[list[tuple[int, int]]]:
    """Wrap the legend: per row, (index of the class, its left edge)."""
    rows: list[list[tuple[int, int]]] = [[]]
    left = 0
    for index, name in enumerate(names):
        needed = _TEXT + 6 + 8 + int(font.getlength(name)) + 26
        if left and left + needed > width:
            rows.append([])
            left = 0
        rows[-1].append((index, left))
        left += needed
    return rows
