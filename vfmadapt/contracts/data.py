"""What a data set promises: its spec, its labelled samples, its images without labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator

IGNORE_INDEX = 255
"""Label of a pixel that no loss and no metric counts."""


@dataclass(frozen=True)
class ClassSpec:
    """A class of a label map: its name and its 8-bit RGB colour; `line`: roads and the like, judged by their course."""

    name: str
    colour: tuple[int, int, int]
    line: bool = False


@dataclass(frozen=True)
class ValueSpec:
    """A continuous value of each pixel, such as canopy height: its name and its unit ("" without one).

    `mean` and `std` of the value, or of its logarithm where `log` (it is then above 0): heads learn it in these units.
    `inverse`: it is an inverse depth, such as a disparity.
    """

    name: str
    unit: str = ""
    mean: float = 0.0
    std: float = 1.0
    log: bool = False
    inverse: bool = False


@dataclass(frozen=True)
class DataSpec:
    """What a data set promises: bands in order, classes by label, per-band mean and std in sensor units.

    A model of `values` instead has no classes: its output (B, K, H, W) are K values in their units, not logits. One of
    `objects` says which object of the image each pixel belongs to: its output (B, 1, H, W) holds whole numbers from 1
    to 2**24 - 1, and 0 for none and where the image is not valid. If it has K classes, too, a number is 1 + the class
    of the object + a multiple of K.
    """

    name: str
    bands: tuple[str, ...]
    classes: tuple[ClassSpec, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore_index: int = IGNORE_INDEX
    values: tuple[ValueSpec, ...] = ()
    objects: bool = False

    def __post_init__(self) -> None:
        if self.values and (self.classes or self.objects):
            other = "classes" if self.classes else "objects"
            raise UserError(f"{self.name} has {other} and values; a model gives one of these, so keep one")

    @property
    def relative(self) -> bool:
        """Whether a model gives inverse depth, of unknown scale and shift for each image."""
        return bool(self.values) and self.values[0].inverse

    @property
    def outputs(self) -> int:
        """Channels that a model of this data gives, one for each class or value; one for objects."""
        return 1 if self.objects else len(self.values or self.classes)


class Sample(TypedDict):
    """One labelled image.

    `image`: float32 (C, H, W) in sensor units (reflectance for optical data), 0 where not valid; `mask`: int64 (H,
    W), IGNORE_INDEX where no label counts; `valid`: bool (H, W); `id`: stable name. `crs` (WKT) and `transform` (six
    affine numbers) where known; of slices and video frames, whose ids are CLIP/FRAME, `spacing` as in `ClipSample`.
    """

    image: Tensor
    mask: Tensor
    valid: Tensor
    id: str
    bands: tuple[str, ...]
    crs: NotRequired[str | None]
    transform: NotRequired[tuple[float, ...] | None]
    spacing: NotRequired[tuple[float | None, float | None, float | None]]


@runtime_checkable
class Samples(Protocol):
    """One split of a data set, without augmentation; index -> Sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class DataSource(Protocol):
    """An entry of conf/data: knows its spec and gives splits."""

    @property
    def spec(self) -> DataSpec:
        """Bands, classes and statistics."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def split(self, name: str) -> Samples:
        """The samples of "train", "val" or "test"."""
        ...


@runtime_checkable
class UnlabelledSource(Protocol):
    """An entry of conf/data without labels: images of any size, of which windows are read in place."""

    @property
    def spec(self) -> DataSpec:
        """Bands and statistics; no classes."""
        ...

    def prepare(self) -> None:
        """Make sure that the files are there (generate or check); idempotent."""
        ...

    def require(self, side: int) -> None:
        """Leave out images with a shorter side than `side` pixels; raises UserError where none is left."""
        ...

    def __len__(self) -> int: ...

    def window(self, index: int, side: int, draw: "Generator") -> tuple[Tensor, Tensor]:
        """A random square of image `index`: float32 (C, s, s) in sensor units and its valid pixels, bool (s, s).

        s is `side`, or the image's shorter side where that is less. The same generator gives the same square.
        """
        ...
