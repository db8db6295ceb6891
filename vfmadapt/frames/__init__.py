"""Videos and volumes as lazy sequences of frames, and what is written beside them."""

from vfmadapt.frames.clip import Clip as Clip
from vfmadapt.frames.clip import ClipInfo as ClipInfo
from vfmadapt.frames.reading import open_clip as open_clip
