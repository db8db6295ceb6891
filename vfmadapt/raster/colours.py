"""Values as colours, and the bar that says which colour is which value."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import ValueSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Span = tuple[float, float]

_MAP = "turbo"  # of matplotlib: even steps of brightness up and down, many colours between
_ENDS = (1, 99)  # percentiles that get the last colours
_MARGIN, _BAR, _TEXT = 18, 18, 14  # pixels
_TICKS = 5


def span_of(values: NDArray[Any]) -> Span:
    """The values that get the first and the last colour; (0, 1) without any value."""
    low, high = np.percentile(values, _ENDS) if values.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-9 + 1e-6 * abs(low)))


def coloured(
    values: NDArray[Any], known: NDArray[np.bool_], span: Span, *, void: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Values (H, W) -> uint8 (H, W, 3), those out of the span in its last colours, `void` where not `known`."""
    from matplotlib import colormaps

    low, high = span
    share = np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0, 1)
    out: NDArray[np.uint8] = np.ascontiguousarray(colormaps[_MAP](share, bytes=True)[..., :3])
    out[~known] = void
    return out


def with_bar(sheet: "Image", span: Span, value: ValueSpec) -> "Image":
    """A picture with a bar of the colours from `span`'s first to its last value beneath, with ticks and the unit."""
    from matplotlib import colormaps
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT)
    width = sheet.width - 2 * _MARGIN
    out = Image.new("RGB", (sheet.width, sheet.height + _BAR + 3 * _TEXT + 2 * _MARGIN), (255, 255, 255))
    out.paste(sheet, (0, 0))
    draw, top = ImageDraw.Draw(out), sheet.height + _TEXT + 6
    name = f"{value.name} ({value.unit})" if value.unit else value.name
    draw.text((_MARGIN, sheet.height - 2), name, fill=(30, 30, 30), font=font)
    ramp = colormaps[_MAP](np.linspace(0, 1, width), bytes=True)[None, :, :3].repeat(_BAR, 0)
    out.paste(Image.fromarray(np.ascontiguousarray(ramp)), (_MARGIN, top))
    for i in range(_TICKS):
        share = i / (_TICKS - 1)
        x, text = _MARGIN + share * (width - 1), f"{span[0] + share * (span[1] - span[0]):.4g}"
        draw.line((x, top + _BAR, x, top + _BAR + 5), fill=(30, 30, 30))
        draw.text((x - share * font.getlength(text), top + _BAR + 6), text, fill=(30, 30, 30), font=font)
    return out
