"""Tracked masks drawn over their clip, as MP4 or GIF."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfmadapt.contracts import ClassSpec
from vfmadapt.files import atomic_path
from vfmadapt.frames import Clip, ClipInfo
from vfmadapt.frames.clip import Frame
from vfmadapt.raster.preview import overlay
from vfmadapt.tracking.tracked import Tracked

Picture = NDArray[np.uint8]

# bright on grey tissue and told apart by colour-blind eyes (Okabe and Ito 2008), in an order of falling contrast
_COLOURS = (
    (230, 159, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178),
)  # fmt: skip
_MIN_SIDE = 384  # smaller frames are enlarged, so that contours are thin and text can be read
_FILL = 0.25  # of the colour: the tissue beneath stays visible
_VOLUME_RATE = 8  # slices per second, slow enough to look at
_TEXT = 14  # font size in pixels


def write_mp4(path: str | Path, clip: Clip, tracked: Tracked) -> Path:
    """Write an H.264 video of the clip with its masks, at the clip's frame rate; slices at 8 per second."""
    import av

    rate = Fraction(_rate(clip.info)).limit_denominator(1000)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = None
        for picture in pictures(clip, tracked):
            even = np.pad(picture, [(0, n % 2) for n in picture.shape[:2]] + [(0, 0)], mode="edge")  # as 4:2:0 needs
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


def write_gif(path: str | Path, clip: Clip, tracked: Tracked) -> Path:
    """Write an animated GIF; for short clips, since the format's writer keeps all frames (8 bits) in memory."""
    from PIL import Image

    images = (Image.fromarray(picture) for picture in pictures(clip, tracked))
    with atomic_path(path) as temporary:
        first = next(images)
        pause = round(1000 / _rate(clip.info))
        first.save(temporary, format="GIF", save_all=True, append_images=images, duration=pause, loop=0)
    return Path(path)


def pictures(clip: Clip, tracked: Tracked) -> Iterator[Picture]:
    """uint8 (H', W', 3) of each frame: masks as tinted areas with a contour, beneath it what was found.

    Volumes are turned as radiologists look at them, pixels made square and small frames enlarged.
    """
    window = clip.window()
    for index, frame in clip.iterate():
        yield _picture(frame, tracked, index, window)


def _picture(frame: Frame, tracked: Tracked, index: int, window: tuple[float, float]) -> Picture:
    import cv2

    colours = [_COLOURS[k % len(_COLOURS)] for k in range(len(tracked.names))]
    classes = [ClassSpec(name, colour) for name, colour in zip(tracked.names, colours, strict=True)]
    image = _shown(_rgb(frame, window), tracked.info, cv2.INTER_LINEAR)
    labels = _shown(tracked.labels[index], tracked.info, cv2.INTER_NEAREST)
    inner = cv2.erode(labels, np.ones((3, 3), np.uint8)) == cv2.dilate(labels, np.ones((3, 3), np.uint8))
    at = np.where(labels == 0, -1, np.searchsorted(tracked.objects, labels))
    drawn = overlay(overlay(image, at, classes, alpha=_FILL), np.where(inner, -1, at), classes, alpha=1)
    return _captioned(drawn, classes, tracked.present[index], f"{index} / {tracked.info.frames - 1}")


def _captioned(image: Picture, classes: list[ClassSpec], present: NDArray[np.bool_], number: str) -> Picture:
    """Add a strip with the frame's number and the structures, those that are absent in grey."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT)
    sheet = Image.new("RGB", (image.shape[1], image.shape[0] + _TEXT + 10))
    sheet.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(sheet)
    left, top = 6.0, image.shape[0] + 3
    for text, colour in [(number, (255, 255, 255))] + [
        (c.name if here else f"{c.name} absent", c.colour if here else (120, 120, 120))
        for c, here in zip(classes, present, strict=True)
    ]:
        draw.text((left, top), text, fill=colour, font=font)
        left += font.getlength(text) + 14
    return np.asarray(sheet)


def _rgb(frame: Frame, window: tuple[float, float]) -> Picture:
    low, high = window
    shown = ((frame - low) * (255 / (high - low))).clip(0, 255)  # black may be the higher value
    channels = [0, 1, 2] if len(frame) >= 3 else [0, 0, 0]
    return np.rint(shown[channels].transpose(1, 2, 0)).astype(np.uint8)


def _shown(values: Picture, info: ClipInfo, interpolation: int) -> Picture:
    """Turned upright, with square pixels, enlarged."""
    import cv2

    _, row, column = info.spacing
    tall = 1.0 if row is None or column is None else row / column
    height, width = info.height * max(tall, 1), info.width * max(1 / tall, 1)
    factor = max(1, round(_MIN_SIDE / max(height, width)))
    turned = np.flip(values, tuple(axis for axis, turn in enumerate(info.upright) if turn))
    size = round(width * factor), round(height * factor)
    return np.asarray(cv2.resize(np.ascontiguousarray(turned), size, interpolation=interpolation), dtype=np.uint8)


def _rate(info: ClipInfo) -> float:
    return 1 / info.seconds_per_frame if info.seconds_per_frame else _VOLUME_RATE
