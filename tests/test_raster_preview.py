"""Pictures for the eye."""

import numpy as np

from vfmadapt.contracts import ClassSpec
from vfmadapt.raster.preview import VOID_COLOUR, overlay, panel, quicklook

CLASSES = (
    ClassSpec("clear", (34, 102, 51)),
    ClassSpec("thick cloud", (255, 255, 255)),
    ClassSpec("thin cloud", (120, 190, 255)),
    ClassSpec("shadow", (90, 40, 120)),
)


def test_overlay_mixes_known_labels_only():
    image = np.full((1, 4, 3), 100, dtype=np.uint8)
    mixed = overlay(image, np.array([[0, 1, 255, -1]]), CLASSES, alpha=0.5)
    assert mixed[0].tolist() == [[67, 101, 76], [178, 178, 178], [100] * 3, [100] * 3]
    assert (image == 100).all()
    np.testing.assert_array_equal(overlay(image, np.zeros((1, 4), dtype=np.uint8), CLASSES, alpha=0), image)


def test_quicklook_stretches_over_valid_pixels():
    image = np.linspace(0, 3000, 3 * 40 * 40, dtype=np.float32).reshape(3, 40, 40)
    image[:, 0, 0] = 1e9
    valid = np.ones((40, 40), dtype=bool)
    valid[0, 0] = False
    seen = quicklook(image, valid, ["a", "b", "c"])
    assert tuple(seen[0, 0]) == VOID_COLOUR
    assert seen[valid].min() == 0
    assert seen[valid].max() == 255
    assert quicklook(image[:1], valid, ["a"]).shape == (40, 40, 3)
    assert (quicklook(image[:1] * 0, valid, ["a"])[valid] == 0).all()
    assert (quicklook(image, ~np.ones((40, 40), dtype=bool), ["a", "b", "c"]) == VOID_COLOUR).all()


def test_quicklook_finds_red_green_blue():
    image = np.zeros((4, 10, 10), dtype=np.float32)
    image[3, :, 5:] = 1
    seen = quicklook(image, np.ones((10, 10), dtype=bool), ["blue", "green", "nir", "red"])
    assert seen[0, 9].tolist() == [255, 0, 0]


def test_panel_holds_pictures_titles_and_every_class():
    picture = np.full((60, 90, 3), 7, dtype=np.uint8)
    classes = [ClassSpec(f"class number {i}", (i * 8, 50, 200)) for i in range(30)]
    sheet = np.asarray(panel([("one", picture), ("two", picture)], classes))
    colours = {tuple(c) for c in sheet.reshape(-1, 3)}
    assert all(c.colour in colours for c in classes)
    assert (7, 7, 7) in colours
    assert np.asarray(panel([("one", picture)], [])).ndim == 3
