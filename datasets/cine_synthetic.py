"""`cine_synthetic`: procedural cine-MR, cardiac and echo-like clips, and CT-like stacks of slices, with masks.

Not patients: solids of tissue that breathe and beat, or are cut slice by slice, seen by imitated scanners. Styles:
"ct", slices of a trunk with a lesion and a nodule that appear and vanish; "mr", a breathing trunk cut along its length;
"cardiac", a beating heart cut across; "echo", an apical view of one by ultrasound; "lesion", slices as in "ct", close
to the lesion, which few of them cut.

Four more are drawn only where they are named: "mr_through", as "mr", but breath also moves the body through the plane,
so that a lesion leaves and comes back; "bolus" and "perfusion", contrast agent that arrives in a trunk and in a heart;
"shadow", as "echo", but a rib or an instrument passes and hides what is behind it. What is not seen is not labelled.
"""

from collections.abc import Sequence
from pathlib import Path

from vfmadapt.datasets._cine_clips import GeneratedClips
from vfmadapt.datasets._cine_scene import CLASS_NAMES, EVENT_STYLES, STYLES, VERSION, Cine, render_clip

__all__ = ["CLASS_NAMES", "EVENT_STYLES", "STYLES", "VERSION", "Cine", "CineSynthetic", "render_clip"]

_STATISTICS = (0.21, 0.25)  # over six clips of each style; frozen with VERSION 1


class CineSynthetic(GeneratedClips):
    """Data source of generated clips; `prepare` renders those that are not there yet.

    Args:
        root: folder of the clips; each generator version and setting has its own folder below.
        train: number of training clips.
        val: number of validation clips.
        test: number of test clips.
        frames: frames of each clip.
        size: side of a frame in pixels.
        styles: of training and validation clips, in turn; None for the five of `STYLES`.
        test_styles: of test clips; None: those of training.
        seed: another seed, other clips.
        workers: processes that render; 0 takes one per core, at most 8.

    Raises:
        UserError: an unknown style, or a number out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: int = 400,
        val: int = 8,
        test: int = 24,
        frames: int = 16,
        size: int = 256,
        styles: Sequence[str] | None = None,
        test_styles: Sequence[str] | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(
            root,
            name="cine_synthetic",
            version=VERSION,
            classes=CLASS_NAMES,
            statistics=_STATISTICS,
            known=(*STYLES, *EVENT_STYLES),
            styles=styles or STYLES,
            test_styles=test_styles,
            counts={"train": train, "val": val, "test": test},
            frames=frames,
            size=size,
            seed=seed,
            workers=workers,
        )
