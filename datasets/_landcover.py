"""Class sets of aerial images: land cover as LoveDA labels it, and the three classes of towns within it."""

from collections.abc import Mapping
from dataclasses import dataclass

from vfmadapt.contracts import ClassSpec
from vfmadapt.errors import UserError


@dataclass(frozen=True)
class ClassSet:
    """Classes, and how they follow from LoveDA's seven.

    `labels`: the label of each of the seven, from background on.
    """

    classes: tuple[ClassSpec, ...]
    labels: tuple[int, ...]


_LANDCOVER = (  # the order and the colours of LoveDA, https://arxiv.org/abs/2110.08733
    ClassSpec("background", (255, 255, 255)),
    ClassSpec("building", (255, 0, 0)),
    ClassSpec("road", (255, 255, 0), line=True),
    ClassSpec("water", (0, 0, 255)),
    ClassSpec("barren", (159, 129, 183)),
    ClassSpec("forest", (0, 255, 0)),
    ClassSpec("agricultural", (255, 195, 128)),
)
CLASS_SETS: Mapping[str, ClassSet] = {
    "landcover": ClassSet(_LANDCOVER, (0, 1, 2, 3, 4, 5, 6)),
    "urban": ClassSet((ClassSpec("other", (255, 255, 255)), *_LANDCOVER[1:4]), (0, 1, 2, 3, 0, 0, 0)),
}


def class_set(name: str) -> ClassSet:
    """The named class set.

    Raises:
        UserError: there is none of that name.
    """
    if name not in CLASS_SETS:
        raise UserError(f"data.classes={name}: choose one of {', '.join(CLASS_SETS)}")
    return CLASS_SETS[name]
