"""Videos that FFmpeg decodes."""

import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo

log = logging.getLogger(__name__)


class VideoClip(Clip):
    """The first video stream of a file: 0..255, or 0..65535 of more than 8 bits; grey where it is stored as grey.

    Frames in order are decoded once; a jump starts from the key frame before it. A file that ends early gives the
    frames that are there, and a warning.

    Args:
        path: .mp4, .avi, .mov, .mkv.
        spacing: millimetres of a pixel's side, which videos do not tell.
    """

    def __init__(self, path: Path, *, spacing: float | None = None) -> None:
        try:
            self._container = av.open(str(path))
        except FFmpegError as error:
            raise UserError(f"{path} is not a readable video ({error.strerror}): is the file whole?") from error
        if not self._container.streams.video:
            raise UserError(f"{path} holds no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._times = self._presented(path)
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._next = -1
        context = self._stream.codec_context
        deep = context.format is not None and max(c.bits for c in context.format.components) > 8
        grey = context.format is not None and len(context.format.components) == 1 and not context.format.has_palette
        self._format = {(True, False): "gray", (True, True): "gray16le", (False, False): "rgb24"}.get(
            (grey, deep), "rgb48le"
        )
        rate = self._stream.average_rate
        self.info = ClipInfo(
            path=str(path),
            kind="video",
            frames=len(self._times),
            height=context.height,
            width=context.width,
            channels=1 if grey else 3,
            spacing=(None, spacing, spacing),
            seconds_per_frame=float(1 / Fraction(rate)) if rate else None,
            window=None if deep else (0.0, 255.0),
        )

    def _presented(self, path: Path) -> list[int]:
        """Presentation times of the frames, from the packets alone: nothing is decoded."""
        times = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    times.append(packet.pts if packet.pts is not None else packet.dts)
        except FFmpegError as error:
            log.warning("%s ends early: %s", path, error.strerror)
        known = [time for time in times if time is not None]
        if not known or len(known) < len(times):
            raise UserError(f"{path} holds no frame that can be read: is the file whole?")
        if self._stream.frames > len(times):
            log.warning("%s ends early: %d of %d frames are there", path, len(times), self._stream.frames)
        return sorted(known)  # packets come in the order of decoding

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _read(self, index: int) -> NDArray[np.generic]:
        try:
            if index != self._next:
                self._container.seek(self._times[index], stream=self._stream)
                self._frames = self._container.decode(self._stream)
            frame = next(f for f in self._frames if f.pts is not None and f.pts >= self._times[index])
            values = frame.to_ndarray(format=self._format)
        except (FFmpegError, StopIteration) as error:
            self._next = -1
            raise UserError(
                f"{self.info.path}: frame {index} of {self.info.frames} cannot be decoded: the file is damaged or cut "
                f"off; make a whole copy, or stop at frame {index - 1}"
            ) from error
        self._next = index + 1
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
