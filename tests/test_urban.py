from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation, center_of_mass

from vfmadapt import check_data
from vfmadapt.contracts import IGNORE_INDEX, DataSource, Samples, UserError
from vfmadapt.datasets import _aerial_canvas as aerial
from vfmadapt.datasets._aerial_canvas import BUILDING, NAMES, ROAD, WATER, Canvas, rectangle
from vfmadapt.datasets._aerial_files import write_tile
from vfmadapt.datasets._aerial_plan import draw_plan
from vfmadapt.datasets._aerial_scene import render_scene
from vfmadapt.datasets._aerial_solids import Building, Tree, draw_building, draw_solids, draw_tree
from vfmadapt.datasets._aerial_streets import draw_streets
from vfmadapt.datasets._clouds_surface import Sun
from vfmadapt.datasets._landcover import CLASS_SETS
from vfmadapt.datasets.geotiff_folder import GeotiffFolder
from vfmadapt.datasets.urban_synthetic import TEST_REGION, TRAIN_REGIONS, UrbanSynthetic

SIZE = 64
COUNTS = {"train": 4, "val": 1, "test": 2}
GREY, RED = np.float32([0.2, 0.2, 0.2]), np.float32([0.4, 0.2, 0.1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> UrbanSynthetic:
    made = UrbanSynthetic(tmp_path_factory.mktemp("urban"), size=SIZE, workers=1, **COUNTS)
    made.prepare()
    return made


def canvas(*, azimuth: float = 180.0, elevation: float = 45.0, lean: tuple[float, float] = (0, 0)) -> Canvas:
    """Grey ground of 80 x 80 m at 1 m, lit from the south."""
    sun = Sun(np.deg2rad(azimuth), np.deg2rad(elevation))
    made = Canvas(np.random.default_rng(0), (80, 80), 1.0, sun, np.float32(lean))
    made.colour[:] = 0.2
    return made


def house(roof: str = "flat", height: float = 10.0) -> Building:
    return Building(np.float32([0, 0]), 20, 10, 0.0, height, roof, np.deg2rad(35), RED, GREY)


def test_same_seed_same_pixels_other_seed_others() -> None:
    first, again, other = (render_scene(seed, size=(48, 64)) for seed in (5, 5, 6))
    assert (first.image.shape, first.labels.shape) == ((48, 64, 3), (48, 64))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)


def test_scenes_hold_every_class_and_no_hole() -> None:
    scenes = [render_scene(seed, size=(96, 96)) for seed in range(24)]
    shares = np.bincount(np.concatenate([s.labels.ravel() for s in scenes]), minlength=len(NAMES)) / (24 * 96 * 96)
    assert len(shares) == len(NAMES)
    assert (shares > 0.005).all(), dict(zip(NAMES, shares, strict=True))
    assert all(s.image.std() > 10 for s in scenes)
    assert {s.region for s in scenes} == {r.name for r in TRAIN_REGIONS}
    assert render_scene(0, size=(48, 48), test=True).region == TEST_REGION.name


def test_no_ground_is_left_unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vfmadapt.datasets import _aerial_scene

    seen: list[Canvas] = []
    build = _aerial_scene._build
    monkeypatch.setattr(_aerial_scene, "_build", lambda c, *rest: (seen.append(c), build(c, *rest)))
    for seed in range(12):
        render_scene(seed, size=(96, 96))
    bare = [float((c.colour.max(0) < 0.004).mean()) for c in seen]
    assert max(bare) < 0.01, bare


def test_the_test_region_mixes_roofs_as_no_training_region() -> None:
    for region in TRAIN_REGIONS:
        assert set(region.roofs) != set(TEST_REGION.roofs)
        assert set(region.halls) != set(TEST_REGION.halls)


@pytest.mark.parametrize(("azimuth", "away"), [(180, (-1, 0)), (0, (1, 0)), (90, (0, -1)), (270, (0, 1))])
def test_shadows_fall_away_from_the_sun_and_have_its_length(azimuth: float, away: tuple[int, int]) -> None:
    tile = canvas(azimuth=azimuth, elevation=45)
    tile.cast(rectangle(np.float32([0, 0]), 10, 10, 0.0), 12.0)
    dark = tile.shade > 0.5
    assert dark.sum() == pytest.approx(10 * (10 + 12), rel=0.15)
    row, column = center_of_mass(dark)
    assert np.sign([round(row - 39.5), round(column - 39.5)]).tolist() == list(away)
    assert tile.lit()[:, dark].mean() < 0.5 * tile.lit()[:, ~dark].mean()


def test_roofs_are_lit_by_their_slope_and_leave_no_shade_on_themselves() -> None:
    tile = canvas()
    draw_building(tile, house("gable"))
    facing, turned_away = tile.colour[0, 41:44, 32:48].mean(), tile.colour[0, 36:39, 32:48].mean()
    assert facing > 1.3 * turned_away
    assert tile.shade[36:44, 31:49].max() < 0.01
    assert tile.shade[25:34, 31:49].mean() > 0.9  # north of it


def test_a_building_is_labelled_with_its_facades() -> None:
    upright, leaning = canvas(), canvas(lean=(0.5, 0.0))
    for tile in (upright, leaning):
        draw_building(tile, house())
    seen, more = ((tile.labels == BUILDING).sum() for tile in (upright, leaning))
    assert seen == pytest.approx(20 * 10, abs=32)  # outlines are drawn half a pixel wide
    assert more - seen == pytest.approx(5 * 10, abs=12)


def test_what_stands_in_water_is_left_out() -> None:
    tile = canvas()
    tile.labels[:, 38:41] = WATER  # a stream between the corners of the house
    tree = Tree(np.float32([-0.5, 12]), 3, 8, GREY)
    draw_solids(tile, [house(), tree])
    assert not (tile.labels == BUILDING).any()
    assert tile.shade.max() == 0


def test_a_road_goes_on_under_crowns_and_cars() -> None:
    tile = canvas()
    plan = draw_plan(np.random.default_rng(1), 60, block=45, widths=(9, 7), straight=True)
    draw_streets(tile, plan, TRAIN_REGIONS[0], paved=True, parked=1.0)
    before = tile.labels.copy()
    assert 0.1 < (before == ROAD).mean() < 0.6
    middle = np.argwhere(before == ROAD)[100]
    draw_tree(tile, Tree(np.float32([middle[1] - 40, middle[0] - 40]), 4, 9, RED))
    assert np.array_equal(tile.labels, before)


def test_lesser_streets_end_at_water() -> None:
    plan = draw_plan(np.random.default_rng(1), 60, block=30, widths=(9, 7), straight=True)
    tile = canvas()
    tile.labels[:] = WATER
    draw_streets(tile, plan, TRAIN_REGIONS[0], paved=True, parked=0.0)
    bridges = (tile.labels == ROAD).mean()
    beside_a_bridge = binary_dilation(tile.labels == ROAD) & (tile.labels != ROAD)
    assert (tile.labels[beside_a_bridge] == WATER).mean() < 0.2  # a pavement, which is neither water nor road
    dry = canvas()
    draw_streets(dry, plan, TRAIN_REGIONS[0], paved=True, parked=0.0)
    assert 0.02 < bridges < 0.8 * (dry.labels == ROAD).mean()


def test_blocks_and_streets_fill_the_plan_and_never_overlap() -> None:
    plan = draw_plan(np.random.default_rng(3), 100, block=60, widths=(10, 6, 0), straight=True)
    edge = np.arange(-80, 80, 2.0)
    u, v = (grid.ravel() for grid in np.meshgrid(edge, edge))
    hits = sum(((u > b.left) & (u < b.right) & (v > b.top) & (v < b.bottom)).astype(int) for b in plan.blocks)
    assert hits.max() == 1
    for street in plan.streets:
        low = np.minimum(street.start, street.end) - street.width / 2
        high = np.maximum(street.start, street.end) + street.width / 2
        hits += ((u >= low[0]) & (u <= high[0]) & (v >= low[1]) & (v <= high[1])).astype(int)
    assert hits.min() >= 1


def test_turned_and_swept_shapes_keep_their_measures() -> None:
    shape = rectangle(np.float32([3, 4]), 8, 2, 0.7)
    assert np.hypot(*(shape[1] - shape[0])) == pytest.approx(8, abs=1e-4)
    assert shape.mean(0) == pytest.approx([3, 4], abs=1e-5)
    heading = np.arctan2(*(shape[1] - shape[0])[::-1])
    assert heading == pytest.approx(0.7, abs=1e-5)
    assert len(aerial.swept(shape, np.float32([1, 0]))) == 2 + 4


def test_files_and_samples(source: UrbanSynthetic) -> None:
    assert isinstance(source, DataSource)
    assert isinstance(source.split("train"), Samples)
    assert [len(source.split(s)) for s in COUNTS] == list(COUNTS.values())
    sample = source.split("test")[1]
    assert (sample["image"].shape, sample["image"].dtype) == ((3, SIZE, SIZE), torch.float32)
    assert (sample["mask"].shape, sample["mask"].dtype) == ((SIZE, SIZE), torch.int64)
    assert [c.name for c in source.spec.classes] == ["other", "building", "road", "water"]
    with pytest.raises(IndexError):
        source.split("val")[1]


def test_both_class_sets_share_the_tiles(source: UrbanSynthetic) -> None:
    cover = UrbanSynthetic(source.folder.parent, classes="landcover", size=SIZE, **COUNTS)
    assert cover.folder == source.folder
    assert [c.name for c in cover.spec.classes] == list(NAMES)
    merged = torch.tensor(CLASS_SETS["urban"].labels)
    for index in range(COUNTS["train"]):
        assert torch.equal(source.split("train")[index]["mask"], merged[cover.split("train")[index]["mask"]])
    folder = GeotiffFolder(root=str(source.folder), classes=list(NAMES))
    assert torch.equal(folder.split("test")[0]["mask"], cover.split("test")[0]["mask"])


def test_tiles_are_those_of_their_seeds(source: UrbanSynthetic) -> None:
    scene = render_scene(2_000_001, size=(SIZE, SIZE), test=True)
    assert np.array_equal(np.asarray(Image.open(source.folder / "test" / "images" / "00001.png")), scene.image)
    kept = (source.folder / "train" / "images" / "00002.png").read_bytes()
    write_tile(source._job, "train", 2)
    assert (source.folder / "train" / "images" / "00002.png").read_bytes() == kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"classes": "towns"}, "data.classes=towns"), ({"size": 16}, "size=16"), ({"val": -1}, "tiles")],
)
def test_user_errors_are_one_line(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        UrbanSynthetic(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_other_splits_and_unrendered_tiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        UrbanSynthetic(tmp_path).split("dev")
    with pytest.raises(UserError, match="prepare"):
        UrbanSynthetic(tmp_path).split("val")[0]


def test_colour_alone_does_not_solve_them(source: UrbanSynthetic) -> None:
    rng = np.random.default_rng(0)
    scores = check_data.check(source, "test", None, (20_000, 8_000), rng)
    assert scores["per_pixel"]["miou"] < 0.6
    assert sum(scores["shares"]["test"].values()) == pytest.approx(1)
    assert scores["shares"]["test"]["ignored"] == 0
    assert not any((source.split("test")[i]["mask"] == IGNORE_INDEX).any() for i in range(2))
