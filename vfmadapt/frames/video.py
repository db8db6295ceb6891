"""Videos that FFmpeg decodes."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from vfmadapt.errors import UserError
from vfmadapt.frames.clip import Clip, ClipInfo, Frame

log = logging.getLogger(__name__)

_HELD = 16 << 20  # pixels of the frames that are held to run backwards: 24 MB of most videos, 64 frames of 512 x 512
_GAP = 1.5  # of a frame's duration: what is further from it than that is not the next frame

_Timed = tuple[int, av.VideoFrame]


class VideoClip(Clip):
    """The first video stream of a file: 0..255, or 0..65535 of more than 8 bits; grey where it is stored as grey.

    Frames in order are decoded once; a jump starts from the key frame before it; backwards, a run of frames is decoded
    and held. A file that ends early gives the frames that are there, and a warning. So does one that is damaged: where
    a frame cannot be decoded it shows the one before, and `iterate` ends where nothing more can be decoded.

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
        in_avi = self._container.format.name == "avi"  # which tells times of decoding; of H.264 the others are guessed
        self._by_order = in_avi and self._stream.codec_context.name in ("h264", "hevc")
        self._times, self._keys, self._places = self._presented(path, by_decoding=in_avi)
        self._decoder: Iterator[_Timed] = iter(())
        self._next: int | None = None  # the frame after the last one; None: the decoder stands nowhere
        self._before: av.VideoFrame | None = None
        self._newest: _Timed | None = None
        self._held: dict[int, av.VideoFrame] = {}
        self._warned = False
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

    def iterate(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[tuple[int, Frame]]:
        """As `Clip.iterate`; ends with a warning where nothing more can be decoded, unless that is at `start`."""
        if step < 0:
            yield from self._backwards(range(start, -1 if stop is None else stop, step))
            return
        for index in range(start, self.info.frames if stop is None else stop, step):
            try:
                frame = self.frame(index)
            except _EndError:
                if index == start:
                    raise
                self._warn(f"frames {index} to {self.info.frames - 1} cannot be decoded and are left out")
                return
            yield index, frame

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _presented(self, path: Path, *, by_decoding: bool) -> tuple[list[int], list[int], list[int]]:
        """Times of the frames in order, which are key frames, and the times by which to seek those.

        From the packets alone: nothing is decoded. `by_decoding`: the container seeks by the times of decoding.
        """
        times, keys, whole, last, hidden = [], {}, True, None, 0
        try:
            for packet in self._container.demux(self._stream):
                time = packet.dts if packet.pts is None else packet.pts
                if packet.is_corrupt:  # cut off within
                    whole = False
                elif packet.is_discard:  # before where the file says that it begins
                    hidden += 1
                elif packet.size and time is not None:
                    last = packet
                    times.append(time)
                    if packet.is_keyframe:
                        keys[time] = time if packet.dts is None or not by_decoding else packet.dts
        except FFmpegError:
            whole = False
        if last is None:
            raise UserError(f"{path} holds no frame that can be read: is the file whole?")
        times.sort()  # packets come in the order of decoding
        step = last.duration or (times[-1] - times[0]) / max(len(times) - 1, 1)
        if not whole or self._stream.frames > len(times) + hidden or self._lacks(times[-1] + step, step):
            times = _without_gaps(times, step, decoded=last.dts)
            of = f" of {self._stream.frames}" if self._stream.frames else ""
            log.warning("%s ends early: %d%s frames are there", path, len(times), of)
        places = {index: keys[time] for index, time in enumerate(times) if time in keys and not self._by_order}
        places = {0: min([times[0], *keys.values()])} | places
        return times, list(places), list(places.values())

    def _lacks(self, end: float, step: float) -> bool:
        """Whether the header promises more than half a frame after `end`: of Matroska, which counts no frames."""
        told, unit = self._container.duration, self._stream.time_base
        if self._stream.frames or told is None or not unit or len(self._container.streams) > 1:
            return False
        return told / av.time_base / float(unit) - end > step / 2

    def _read(self, index: int) -> NDArray[np.generic]:
        values = self._picture(index).to_ndarray(format=self._format)
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)

    def _picture(self, index: int) -> av.VideoFrame:
        """Frame `index`; where it cannot be decoded the one before it, or the one after where there is none."""
        if index in self._held:
            return self._held[index]
        key = max(bisect_right(self._keys, index) - 1, 0)
        if self._next is None or not self._keys[key] <= self._next <= index:
            self._container.seek(self._places[key], stream=self._stream)
            self._decoder, self._before, self._newest = self._decoded(), None, None
        wanted = self._times[index]
        while self._newest is None or self._newest[0] < wanted:
            following = next(self._decoder, None)
            if following is None:
                self._next = None
                raise _EndError(
                    f"{self.info.path}: frame {index} of {self.info.frames} cannot be decoded, nor what follows: the "
                    "file is damaged or cut off; make a whole copy"
                )
            self._before, self._newest = self._newest and self._newest[1], following
        self._next = index + 1
        if self._newest[0] == wanted:
            if self._newest[1].is_corrupt:
                self._warn(f"frame {index}, and others like it, show as much as can be decoded")
            return self._newest[1]
        self._warn(f"frame {index} cannot be decoded; it, and others like it, show the frame beside it")
        return self._before or self._newest[1]

    def _decoded(self) -> Iterator[_Timed]:
        """The frames from where the file stands on, in the order of presentation, but those that cannot be decoded."""
        packets, order = self._container.demux(self._stream), iter(self._times)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:  # the file ends here
                packet = None
            if packet is not None and packet.is_corrupt:
                continue
            try:
                frames = self._stream.codec_context.decode(packet)
            except FFmpegError:
                frames = []
            for frame in frames:
                time = next(order, None) if self._by_order else frame.dts if frame.pts is None else frame.pts
                if time is not None:
                    yield time, frame
            if packet is None or not packet.size:
                return

    def _backwards(self, indices: range) -> Iterator[tuple[int, Frame]]:
        """Frames of falling indices, in runs that are decoded forwards, held and given in reverse.

        A run begins at a key frame where it can, so that frames are decoded once; of a key frame that is further away
        than a run is long, those between are decoded once for each run after them.
        """
        longest = max(1, _HELD // (self.info.height * self.info.width))
        while indices:
            low = indices[0] - longest + 1
            at = bisect_left(self._keys, low)
            if at < len(self._keys) and self._keys[at] <= indices[0]:
                low = self._keys[at]
            run = [index for index in indices[:longest] if index >= low]
            try:
                self._held = {index: self._picture(index) for index in reversed(run)}
                for index in run:
                    yield index, self.frame(index)
                    self._held.pop(index, None)
            finally:
                self._held = {}
            indices = indices[len(run) :]

    def _warn(self, what: str) -> None:
        """Say once that the file is damaged."""
        if not self._warned:
            log.warning("%s is damaged: %s; make a whole copy", self.info.path, what)
        self._warned = True


class _EndError(UserError):
    """Nothing more can be decoded."""


def _without_gaps(times: list[int], step: float, *, decoded: int | None) -> list[int]:
    """Times up to the first gap after that at which the last packet was to be decoded.

    Where a file is cut, frames of its end may be there without some that are presented before but stored after them.
    """
    first = 1 if decoded is None else max(bisect_right(times, decoded), 1)
    gaps = (index for index in range(first, len(times)) if times[index] - times[index - 1] > _GAP * step)
    return times[: next(gaps, len(times))]
