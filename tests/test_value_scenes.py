"""Generated heights and rooms: equal for equal seeds, values that fit the pictures, sources that keep their word."""

from functools import partial

import numpy as np
import pytest

from vfmadapt.contracts import ValueSource
from vfmadapt.datasets._aerial_scene import NAMES
from vfmadapt.datasets._aerial_scene import render_scene as render_aerial
from vfmadapt.datasets._rooms_scene import render_room
from vfmadapt.datasets._rooms_solids import FAR, Solid, rotation
from vfmadapt.datasets.height_synthetic import HeightSynthetic
from vfmadapt.datasets.rooms_synthetic import RoomsSynthetic
from vfmadapt.errors import UserError


def test_a_scene_is_a_function_of_its_seed() -> None:
    for render, key in (
        (partial(render_aerial, size=(64, 64)), "heights"),
        (partial(render_room, size=(32, 48)), "depth"),
    ):
        one, again, other = (render(seed) for seed in (3, 3, 4))
        assert np.array_equal(one.image, again.image)
        assert np.array_equal(getattr(one, key), getattr(again, key))
        assert not np.array_equal(one.image, other.image)


def test_buildings_have_heights_and_streets_none() -> None:
    scenes = [render_aerial(seed, size=(128, 128)) for seed in range(4)]
    labels, heights = (np.stack([getattr(s, key) for s in scenes]) for key in ("labels", "heights"))
    roofs, water = (labels == NAMES.index(name) for name in ("building", "water"))
    assert (heights[roofs] > 1).mean() > 0.98
    assert (heights[~roofs] == 0).mean() > 0.6
    assert heights[water].max(initial=0) < 40
    assert 8 < heights.max() < 60
    assert heights.min() == 0


def solid(kind: str, half=(1.0, 1.0, 1.0), turn=None) -> Solid:
    centre, grey = np.array([0, 0, 5], np.float32), np.ones(3, np.float32)
    return Solid(kind, centre, rotation(0) if turn is None else turn, np.asarray(half, np.float32), grey, 0, 1.0)


@pytest.mark.parametrize("kind", ["box", "ellipsoid", "cylinder", "room"])
def test_rays_meet_solids_where_these_are(kind) -> None:
    body = solid(kind, (0.8, 1.2, 0.6), rotation(0.7, 0.4, -0.2))
    rng = np.random.default_rng(0)
    origin = np.array([0, 0, 5] if kind == "room" else [0, 0, 0], np.float32)
    rays = np.concatenate([rng.normal(0, 0.12, (200, 2)), np.ones((200, 1))], 1).astype(np.float32)
    distance = body.meet(origin, rays)
    met = distance < FAR
    assert 0.3 < met.mean() <= 1
    inside = body.local(origin + rays[met] * distance[met, None])
    radius = {
        "ellipsoid": np.linalg.norm(inside, axis=1),
        "cylinder": np.maximum(np.hypot(inside[:, 0], inside[:, 2]), np.abs(inside[:, 1])),
    }.get(kind, np.abs(inside).max(1))
    assert np.allclose(radius, 1, atol=1e-3)
    normals = body.normals(origin + rays[met] * distance[met, None])
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)
    assert ((normals * rays[met]).sum(1) < 1e-4).all()  # they face the eye


def test_depth_of_a_room_is_within_its_walls() -> None:
    rooms = [render_room(seed, size=(32, 48)) for seed in range(6)]
    assert all(r.depth.min() > 0.05 and r.depth.max() < 12 for r in rooms)
    assert np.mean([r.depth[-1].mean() < r.depth[16].mean() for r in rooms]) > 0.6  # the floor comes near below


@pytest.mark.parametrize(("made", "size", "key"), [(HeightSynthetic, 64, "values"), (RoomsSynthetic, 48, "depth")])
def test_sources_of_generated_values(tmp_path, made, size, key) -> None:
    source = made(tmp_path, train=1, val=0, test=1, size=size, workers=1)
    assert isinstance(source, ValueSource)
    with pytest.raises(UserError, match="call prepare"):
        source.split("train")[0]
    source.prepare()
    sample = source.split("train")[0]
    assert sample["image"].shape[-1] == size
    assert sample[key].shape[-2:] == sample["image"].shape[-2:]
    assert len(source.split("val")) == 0
    with pytest.raises(UserError, match="no split 'dev'"):
        source.split("dev")
    with pytest.raises(UserError, match="must be >="):
        made(tmp_path, size=16)
