"""Radar scenes: what a seed gives, what a sensor that looks from one side sees, and that brightness does not tell."""

import numpy as np
import pytest

from vfmadapt.contracts import DataSource, UserError
from vfmadapt.datasets import _radar_scene as radar
from vfmadapt.datasets._radar_scene import FOREST, NAMES, WATER, render_scene
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


def test_water_is_the_darkest_and_forest_depolarises_within_a_scene(scenes):
    vv = _differences(scenes, 0, WATER) / 255 * 31
    ratio = _differences(scenes, 2, FOREST) / 255 * 19
    assert vv.mean() < -2
    assert ratio.mean() < -0.7


def _differences(scenes, band, label):
    """By how much a class is above the rest of its scene, for each scene that has both."""
    inside = [(s.image[..., band].astype(float), s.labels == label) for s in scenes]
    return np.array([v[m].mean() - v[~m].mean() for v, m in inside if 200 < m.sum() < m.size - 200])


def test_brightness_alone_does_not_tell(scenes):
    """Gains differ by decibels between scenes, bands apart, as in products that are not calibrated."""
    means = np.array([s.image.reshape(-1, 3).mean(0) for s in scenes]) / 255 * (31, 31, 19)
    assert (means[:, :2].std(0) > 1.5).all()
    assert np.corrcoef(means[:, 0], means[:, 1])[0, 1] < 0.8


@pytest.mark.parametrize("towards", [-1, 1])
def test_a_house_is_bright_towards_the_sensor_and_has_its_shadow_behind(monkeypatch, towards):
    border = np.zeros((32, 64), dtype=np.float32)
    border[10:20, 25:40] = 9
    monkeypatch.setattr(radar.proc, "parcels", lambda *_: (np.zeros((32, 64), dtype=np.int32), border))
    town = radar._houses(np.random.default_rng(0), (32, 64), 0.0, towards)
    walls, shadows = (np.flatnonzero(m.any(0)) for m in (town > 3, town < -5))
    assert walls.tolist() == ([38, 39] if towards == 1 else [25, 26])
    assert shadows.max() == 24 if towards == 1 else shadows.min() == 40
    assert 4 <= len(shadows) <= 8


def test_speckle_is_that_of_the_looks():
    power = np.ones((200, 200, 2), dtype=np.float32)
    blurred = radar._speckled(np.random.default_rng(0), power)
    assert blurred.mean() == pytest.approx(1, abs=0.02)
    assert 6 < blurred.mean() ** 2 / blurred.var() < 16  # resampling averages a little


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
    np.testing.assert_allclose(pixels.mean(0), spec.mean, atol=0.05)
    np.testing.assert_allclose(pixels.std(0), spec.std, atol=0.05)
