"""Radar scenes: what a seed gives, that levels are those of the classes, and that one pixel does not tell."""

import numpy as np
import pytest

from vfmadapt.contracts import DataSource, UserError
from vfmadapt.datasets import _radar_scene as radar
from vfmadapt.datasets._radar_scene import BUILT, FOREST, NAMES, OPEN, WATER, render_scene
from vfmadapt.datasets.radar_synthetic import CLASSES, RadarSynthetic


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed, size=(96, 96)) for seed in range(24)]


def test_same_seed_same_pixels_other_seed_others():
    first, again, other = (render_scene(seed, size=(48, 64)) for seed in (5, 5, 6))
    assert (first.image.shape, first.labels.shape) == ((48, 64, 3), (48, 64))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)


def test_scenes_hold_every_class(scenes):
    shares = np.bincount(np.concatenate([s.labels.ravel() for s in scenes]), minlength=len(NAMES)) / (24 * 96 * 96)
    assert len(shares) == len(NAMES) == len(CLASSES)
    assert (shares > 0.02).all(), dict(zip(NAMES, shares, strict=True))


def test_water_is_dark_towns_are_bright_forest_depolarises(scenes):
    pixels, labels = (np.concatenate([getattr(s, n).reshape(96 * 96, -1) for s in scenes]) for n in ("image", "labels"))
    vv = pixels[:, 0] / 255 * 25 - 25
    vh = pixels[:, 1] / 255 * 27 - 32
    means = {c: (vv[labels[:, 0] == c].mean(), vh[labels[:, 0] == c].mean()) for c in range(len(NAMES))}
    assert means[WATER][0] < means[OPEN][0] < means[FOREST][0] < means[BUILT][0]
    assert means[FOREST][0] - means[FOREST][1] < means[OPEN][0] - means[OPEN][1]


def test_speckle_is_that_of_the_looks():
    power = np.ones((200, 200, 2), dtype=np.float32)
    blurred = radar._speckled(np.random.default_rng(0), power)
    assert blurred.mean() == pytest.approx(1, abs=0.02)
    assert 4.4 < blurred.mean() ** 2 / blurred.var() < 12  # resampling averages a little


def test_source_gives_tiles_and_refuses_others(tmp_path):
    source = RadarSynthetic(tmp_path, train=1, val=0, test=1, size=64, workers=1)
    assert isinstance(source, DataSource)
    source.prepare()
    sample = source.split("train")[0]
    assert sample["image"].shape == (3, 64, 64)
    assert not np.array_equal(sample["mask"], source.split("test")[0]["mask"])
    with pytest.raises(UserError, match="size=8"):
        RadarSynthetic(tmp_path, size=8)


def test_statistics_are_those_of_the_scenes():
    pixels = np.concatenate([render_scene(9_000_000 + i).image.reshape(-1, 3) for i in range(24)]) / 255
    spec = RadarSynthetic("nowhere").spec
    np.testing.assert_allclose(pixels.mean(0), spec.mean, atol=0.03)
    np.testing.assert_allclose(pixels.std(0), spec.std, atol=0.03)
