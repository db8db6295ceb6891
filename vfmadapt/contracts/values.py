"""Data sets with values or depth of each pixel instead of labels."""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from vfmadapt.contracts.data import DataSpec, ValueSpec


class ValueSample(TypedDict):
    """One image with values of its pixels.

    `image`, `valid`, `id`, `bands`, `crs`, `transform`: as in `Sample`; `values`: float32 (K, H, W), in the order and
    the units of the data's `ValueSpec`s, NaN where unknown.
    """

    image: Tensor
    values: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]


class DepthSample(TypedDict):
    """One image with depth.

    `image`, `valid`, `id`, `bands`, `crs`, `transform`: as in `Sample`; `depth`: float32 (H, W) along the optical axis,
    in the unit of the data's `ValueSpec`, NaN where unknown.
    """

    image: Tensor
    depth: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]


class FrameTriple(TypedDict):
    """A frame of a video and S others of the same scene.

    `image`: float32 (C, H, W), 0..1; `sources`: (S, C, H, W), for instance the frames before and after; `depth`: (H, W)
    of the image, NaN where unknown; `poses`: (S, 4, 4), which take points from the image's camera to each source's, in
    the unit of the depth; `intrinsics`: (3, 3) in pixels, the centre of the first pixel being (0, 0).
    """

    image: Tensor
    sources: Tensor
    depth: Tensor
    poses: Tensor
    intrinsics: Tensor
    id: str


@runtime_checkable
class ValueSource(Protocol):
    """An entry of conf/data whose samples hold values or depth instead of labels."""

    @property
    def values(self) -> tuple[ValueSpec, ...]:
        """What the values are; known before `prepare`, unlike the statistics."""
        ...

    @property
    def spec(self) -> DataSpec:
        """Bands, values and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def split(self, name: str) -> "ValueSamples":
        """The samples of "train", "val" or "test"."""
        ...


@runtime_checkable
class ValueSamples(Protocol):
    """One split of such a data set, without augmentation."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ValueSample | DepthSample: ...
