"""Data sets of videos and volumes, whose labelled frames or slices belong together."""

from collections.abc import Sequence
from typing import Protocol, TypedDict, runtime_checkable

from torch import Tensor

from vfmadapt.contracts.data import DataSpec


class ClipSample(TypedDict):
    """Labelled frames of a video or slices of a volume.

    `image`: float32 (T, C, H, W), 0 black to 1 white; `mask`: int64 (T, H, W), 0 background, IGNORE_INDEX where no
    label counts; `spacing`: millimetres from frame to frame (None in time), row to row and column to column, None where
    unknown; `id`: stable name.
    """

    image: Tensor
    mask: Tensor
    spacing: tuple[float | None, float | None, float | None]
    id: str


@runtime_checkable
class Clips(Protocol):
    """The clips of one split; index -> ClipSample of a whole one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ClipSample: ...

    def labelled(self, index: int) -> Sequence[int]:
        """The frames of a clip that have labels."""
        ...

    def read(self, index: int, frames: Sequence[int]) -> ClipSample:
        """Some frames of a clip, in the order given."""
        ...


@runtime_checkable
class ClipSource(Protocol):
    """An entry of conf/data whose samples belong to clips; its frames make it a `DataSource`, too."""

    @property
    def spec(self) -> DataSpec:
        """Bands, classes and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def clips(self, name: str) -> Clips:
        """The clips of "train", "val" or "test"."""
        ...
