"""`organs_synthetic`: procedural abdomens and their organs in slices, from the anatomy of `cine_synthetic`.

Styles: "organs_ct" in Hounsfield units seen through a soft-tissue window, "organs_mr" as MR magnitude. The slices of a
volume, however many, divide 120 to 150 mm from liver and spleen down to the kidneys evenly; files tell their spacing.
"""

from collections.abc import Sequence
from pathlib import Path

from vfmadapt.datasets._cine_clips import GeneratedClips
from vfmadapt.datasets._cine_scene import CLASS_NAMES, ORGAN_STYLES, ORGANS_VERSION

CLASSES = CLASS_NAMES[: CLASS_NAMES.index("aorta") + 1]

_STATISTICS = (0.19, 0.26)  # over twenty volumes of each style; frozen with ORGANS_VERSION 3


class OrgansSynthetic(GeneratedClips):
    """Data source of generated volumes of a few slices; `prepare` renders those that are not there yet.

    Args:
        root: folder of the volumes; each generator version and setting has its own folder below.
        train: number of training volumes.
        val: number of validation volumes.
        test: number of test volumes.
        slices: slices of each volume, so far apart that they span the abdomen.
        size: side of a slice in pixels.
        styles: of training and validation volumes, in turn; None for all.
        test_styles: of test volumes; None: those of training.
        seed: another seed, other volumes.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown style, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 150,
        val: int = 8,
        test: int = 20,
        slices: int = 4,
        size: int = 256,
        styles: Sequence[str] | None = None,
        test_styles: Sequence[str] | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(
            root,
            name="organs_synthetic",
            version=ORGANS_VERSION,
            classes=CLASSES,
            statistics=_STATISTICS,
            known=ORGAN_STYLES,
            styles=styles,
            test_styles=test_styles,
            counts={"train": train, "val": val, "test": test},
            frames=slices,
            size=size,
            seed=seed,
            workers=workers,
        )
