"""Classes of the ISPRS benchmark of urban scenes, with its colour code, in TorchGeo's order.

Rottensteiner et al. 2012, "The ISPRS Benchmark on Urban Object Classification and 3D Building Reconstruction",
https://doi.org/10.5194/isprsannals-I-3-293-2012.
"""

from vfmadapt.contracts import ClassSpec

CLASSES = (
    ClassSpec("clutter", (255, 0, 0)),
    ClassSpec("impervious surface", (255, 255, 255)),
    ClassSpec("building", (0, 0, 255)),
    ClassSpec("low vegetation", (0, 255, 255)),
    ClassSpec("tree", (0, 255, 0)),
    ClassSpec("car", (255, 255, 0)),
)
