import subprocess
import sys

import numpy as np
import pytest
import torch

from vfmadapt.errors import UserError
from vfmadapt.tasks.augment import Augment, jitter, to_display

PLAIN = {"scale": (1, 1), "flips": False, "affine": 0, "radiometric": 0, "display": 0}


def make_sample(height=40, width=56, bands=3, value=None):
    g = torch.Generator().manual_seed(0)
    image = (
        torch.rand(bands, height, width, generator=g) if value is None else torch.full((bands, height, width), value)
    )
    mask = torch.randint(0, 4, (height, width), generator=g)
    return {
        "image": image,
        "mask": mask,
        "valid": torch.ones(height, width, dtype=torch.bool),
        "id": "a",
        "bands": ("x",) * bands,
    }


def draw(augment, sample, seed=0):
    return augment(sample, np.random.default_rng(seed))


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7, 13])
@pytest.mark.parametrize("size", [(40, 56), (9, 100), (16, 16)], ids=str)
def test_shapes_and_types_for_any_bands_and_sizes(bands, size):
    augment = Augment(crop=24)
    sample = make_sample(*size, bands)
    before = {k: v.clone() for k, v in sample.items() if isinstance(v, torch.Tensor)}
    for seed in range(12):
        out = draw(augment, sample, seed)
        assert out["image"].shape == (bands, 24, 24)
        assert out["image"].dtype == torch.float32
        assert out["mask"].shape == out["valid"].shape == (24, 24)
        assert (out["mask"].dtype, out["valid"].dtype) == (torch.int64, torch.bool)
        assert out["image"].isfinite().all()
        assert set(out["mask"].unique().tolist()) <= {0, 1, 2, 3, 255}
        assert (out["mask"][~out["valid"]] == 255).all()
        assert (out["image"][:, ~out["valid"]] == 0).all()
        assert out["valid"].any()
    assert all(torch.equal(sample[k], v) for k, v in before.items())


def test_a_function_of_the_generator_alone():
    augment, sample = Augment(crop=24), make_sample()
    first = [draw(augment, sample, s) for s in range(6)]
    again = [draw(Augment(crop=24), sample, s) for s in reversed(range(6))][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])
    assert len({a["image"].sum().item() for a in first}) == 6


def test_without_any_change_a_window_is_cut():
    sample = make_sample(bands=2)
    sample["image"] = sample["image"] * 20 - 10  # not 0..1: nothing may be clipped
    out = draw(Augment(crop=16, **PLAIN), sample, 3)
    windows = sample["image"].unfold(1, 16, 1).unfold(2, 16, 1)
    same = (windows == out["image"][:, None, None]).all(-1).all(-1).all(0)
    assert same.sum() == 1
    top, left = same.nonzero()[0].tolist()
    assert torch.equal(out["mask"], sample["mask"][top : top + 16, left : left + 16])


def test_image_mask_and_validity_move_together():
    """The image holds each pixel's label and 0 where not valid: after any geometry both must agree."""
    sample = make_sample(64, 64, 1)
    coarse = (
        torch.randint(1, 4, (8, 8), generator=torch.Generator().manual_seed(1))
        .repeat_interleave(8, 0)
        .repeat_interleave(8, 1)
    )
    sample["mask"], sample["valid"][:, 40:] = coarse.clone(), False
    sample["mask"][:, 40:] = 255
    sample["image"] = (coarse * sample["valid"])[None].float()
    augment = Augment(crop=32, radiometric=0, display=0)
    agree, seen_void = [], False
    for seed in range(30):
        out = draw(augment, sample, seed)
        counted = out["mask"] != 255
        agree.append(((out["image"][0].round() == out["mask"]) & counted).sum() / counted.sum())
        seen_void |= not out["valid"].all()
        # nodata never bleeds in: valid pixels hold values of valid pixels only
        assert out["image"][:, out["valid"]].min() >= 1 - 1e-5
    assert np.mean(agree) > 0.9
    assert seen_void


def test_all_orientations_and_scales_occur():
    sample = make_sample(32, 32, 1, 0.0)
    sample["image"][0, :16, :4] = 1
    corners = {
        tuple(draw(Augment(crop=32, **{**PLAIN, "flips": True}), sample, s)["image"][0, ::31, ::31].flatten().tolist())
        for s in range(40)
    }
    assert len(corners) == 4  # a bar at each of the four corners; each twice, along either side
    striped = make_sample(256, 256, 1, 0.0)
    striped["image"][0, :, ::2] = 1
    flat = draw(Augment(crop=64, **{**PLAIN, "scale": (0.5, 0.5)}), striped)["image"]
    assert (flat - 0.5).abs().max() < 1e-5  # twice two columns are averaged: shrinking does not alias


def test_windows_with_labels_are_preferred():
    sample = make_sample(100, 100)
    sample["mask"][:, 30:] = 255
    shares = [(draw(Augment(crop=24, **PLAIN), sample, s)["mask"] != 255).float().mean().item() for s in range(100)]
    assert np.mean([s >= 0.25 for s in shares]) > 0.6  # a third of all windows hold that much


def test_small_image_is_filled_up_as_void():
    out = draw(Augment(crop=32, **PLAIN), make_sample(20, 50), 1)
    assert out["valid"][:20].all()
    assert not out["valid"][20:].any()


def everywhere(image):
    return np.ones(image.shape[1:], dtype=bool)


def test_radiometry_covers_real_pictures():
    """Dark land (0.04) with one cloud in ten (0.7): the values must reach what 8-bit pictures hold and no more."""
    scene = np.full((2, 40, 40), 0.04, dtype=np.float32)
    scene[:, :4] = 0.7
    pictures = [to_display(scene, everywhere(scene), np.random.default_rng(s)) for s in range(300)]
    land, cloud = np.array([(p[:, 20].mean(), p[:, 0].mean()) for p in pictures]).T
    assert land.min() < 0.15
    assert land.max() > 0.42  # the Landsat 8 picture of forest
    assert land.max() < 0.8
    assert (cloud > land + 0.1).mean() > 0.97
    assert 0.02 < (cloud > 0.999).mean() < 0.6
    jittered = [jitter(scene, everywhere(scene), np.random.default_rng(s)) for s in range(300)]
    assert min(j[:, 0].mean() for j in jittered) < 0.5
    assert 1.0 < max(j[:, 0].mean() for j in jittered) < 1.6


def test_bright_land_does_not_turn_white():
    """Of an image that is bright already, as a picture is: its land stays below white, whatever the draw."""
    scene = np.linspace(0.3, 0.7, 32 * 32, dtype=np.float32).reshape(1, 32, 32).repeat(3, 0)
    for s in range(200):
        assert np.median(to_display(scene, everywhere(scene), np.random.default_rng(s))) < 0.92


def test_display_holds_8_bit_values():
    image = make_sample()["image"].numpy()
    out = to_display(image, everywhere(image), np.random.default_rng(0)) * 255
    assert np.abs(out - np.rint(out)).max() < 1e-3
    assert 0 <= out.min() <= out.max() <= 255


def test_strength_zero_changes_no_value_and_signs_survive():
    image = np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 4, 4)
    assert jitter(image, everywhere(image), np.random.default_rng(0), 0.0) == pytest.approx(image, abs=1e-6)
    strong = [jitter(image, everywhere(image), np.random.default_rng(s), 1.0) for s in range(20)]
    assert all((s[0] < 0.2).all() for s in strong)


def test_nothing_valid_in_the_window():
    sample = make_sample()
    sample["valid"][:], sample["mask"][:] = False, 255
    for seed in range(5):
        out = draw(Augment(crop=16), sample, seed)
        assert (out["image"] == 0).all()
        assert (out["mask"] == 255).all()


def test_draws_of_different_transforms_are_not_linked():
    """With one seed for all transforms the sign of the turn would tell the strength of the blur, and so on."""
    augment = Augment(crop=24, affine=0.5)
    sample = make_sample()
    turned = [bool((~draw(augment, sample, s)["valid"]).any()) for s in range(60)]
    assert 10 < sum(turned) < 50


@pytest.mark.parametrize(
    "wrong", [{"crop": 0}, {"scale": (2, 1)}, {"scale": (0, 1)}, {"affine": 2}, {"radiometric": -1}]
)
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match="augment"):
        Augment(**{"crop": 8, **wrong})


def test_import_does_not_ask_the_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.create_connection = socket.getaddrinfo = refuse\n"
        "from vfmadapt.tasks.augment import Augment\n"
        "import sys; assert 'albumentations' not in sys.modules\n"
        "Augment(crop=8); assert 'albumentations' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
