"""Automatic masks: what a grid of points finds in a tile, and how tiles make one map of objects."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import shapely
import torch
from rio_cogeo import cog_validate
from scipy import ndimage
from torch import nn

import vfmadapt
from vfmadapt.automatic import ObjectMapper, grid_of_points, kept, stability
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec, PointGrid, PromptedMasks
from vfmadapt.errors import UserError
from vfmadapt.predict import main
from vfmadapt.raster.blocks import compress, decompress
from vfmadapt.raster.objects import agreeing, numbering
from vfmadapt.raster.predict import Settings, merge_parts, predict_part, predict_raster

GREY = DataSpec("grey", ("grey",), (), (0.5,), (0.2,), objects=True)
SMALL = {"tile": 64, "overlap": 16, "block": 512}
LEVELS = (80, 160, 240)  # grey values of objects; those that touch have different ones


class Regions(nn.Module):
    """Stands for a model: the connected regions of each grey value, numbered within the tile."""

    spec = GREY

    def forward(self, image, valid):
        found = np.zeros(image.shape, dtype=np.float32)
        for tile, values in zip(found[:, 0], np.rint(image[:, 0].numpy() * 255), strict=True):
            for level in LEVELS:
                regions, _ = ndimage.label(values == level)
                tile[regions > 0] = tile.max() + regions[regions > 0]
        return torch.from_numpy(found) * valid[:, None]


def disc(size, centre, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def mapped(write_tiff, folder, values, model=None, **settings):
    path = write_tiff(folder / "scene.tif", values[None], nodata=255)
    return predict_raster(model or Regions(), path, folder / "map.tif", **SMALL | settings)


def numbers_of(path):
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.fixture(scope="module")
def scene(write_tiff, tmp_path_factory):
    """600 x 1100 pixels: 120 discs of 4 to 60 pixels that do not touch, or touch one of another grey; a void strip."""
    rng, size = np.random.default_rng(0), (600, 1100)
    values = np.zeros(size, dtype=np.uint8)
    for _ in range(120):
        radius = rng.uniform(4, 60)
        place, level = disc(size, rng.uniform((0, 0), size), radius), rng.choice(LEVELS)
        near = ndimage.binary_dilation(place, iterations=2)
        if not values[place].any() and not (values[near] == level).any():
            values[place] = level
    values[:, 700:703] = 255
    return write_tiff(tmp_path_factory.mktemp("scene") / "scene.tif", values[None], nodata=255), values


@pytest.fixture(scope="module")
def reference(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.tif"
    return predict_raster(Regions(), scene[0], path, **SMALL, polygons="gpkg")


@pytest.mark.parametrize("radius", [20, 100], ids=["over four tiles", "over many tiles"])
def test_a_disc_over_four_tiles_and_four_blocks_is_one_object(write_tiff, tmp_path, radius):
    truth = disc((1024, 1024), (512, 512), radius)
    result = mapped(write_tiff, tmp_path, truth * np.uint8(80), polygons="gpkg")
    assert result.objects == 1
    np.testing.assert_array_equal(numbers_of(result.path), truth)
    assert result.pixels == {"none": (~truth).sum(), "object": truth.sum()}
    import geopandas

    table = geopandas.read_file(result.polygons)
    assert table[["object", "pixels"]].values.tolist() == [[1, truth.sum()]]
    assert table.area[0] == pytest.approx(truth.sum() * 100)


def test_two_discs_that_touch_stay_two(write_tiff, tmp_path):
    """Where they touch four tiles and four blocks meet."""
    first, second = disc((1024, 1024), (512, 451), 60), disc((1024, 1024), (512, 572), 60)
    values = first * np.uint8(80) + (second & ~first) * np.uint8(160)
    result = mapped(write_tiff, tmp_path, values)
    assert result.objects == 2
    np.testing.assert_array_equal(numbers_of(result.path), first + 2 * (second & ~first))


def test_objects_are_the_regions_of_the_whole_raster(scene, reference):
    found, count = numbers_of(reference.path), 0
    for level in LEVELS:
        regions, some = ndimage.label(scene[1] == level)
        count += some
        for region in range(1, some + 1):
            inside = np.unique(found[regions == region])
            assert len(inside) == 1
            assert inside[0] > 0
            assert (found == inside[0]).sum() == (regions == region).sum()
    assert reference.objects == count > 40
    assert set(np.unique(found)) == set(range(count + 1))
    assert (found[~np.isin(scene[1], LEVELS)] == 0).all()
    assert reference.void == (scene[1] == 255).sum()


def test_the_map_is_a_cog_and_its_polygons_are_its_objects(reference):
    assert cog_validate(reference.path, strict=True) == (True, [], [])
    found = numbers_of(reference.path)
    with rasterio.open(reference.path) as made, rasterio.open(reference.path, overview_level=0) as half:
        assert (made.dtypes, made.nodata, made.descriptions) == (("uint32",), 0, ("object",))
        assert made.tags()["OBJECTS"] == str(reference.objects)
        np.testing.assert_array_equal(half.read(1), found[::2, ::2])
        transform = made.transform
    import geopandas

    table = geopandas.read_file(reference.polygons)
    pixels = table.groupby("object").pixels.sum()
    np.testing.assert_array_equal(pixels.sort_index(), np.bincount(found.ravel())[1:])
    drawn = rasterio.features.rasterize(
        zip(table.geometry, table.object, strict=True), found.shape, transform=transform
    )
    np.testing.assert_array_equal(drawn, found)


@pytest.mark.parametrize(("tile", "overlap"), [(64, 15), (100, 60), (256, 64)])
def test_any_tiles(scene, reference, tmp_path, tile, overlap):
    result = predict_raster(Regions(), scene[0], tmp_path / "map.tif", tile=tile, overlap=overlap, block=512)
    pairs = np.unique(np.stack([numbers_of(result.path), numbers_of(reference.path)]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == reference.objects + 1 == result.objects + 1


@pytest.mark.parametrize("settings", [{"block": 1024}, {"block": 4096}, {"batch": 3}], ids=str)
def test_numbers_depend_neither_on_blocks_nor_on_batches(scene, reference, tmp_path, settings):
    predict_raster(Regions(), scene[0], tmp_path / "map.tif", **SMALL | settings)
    assert (tmp_path / "map.tif").read_bytes() == reference.path.read_bytes()


class Stopped(Regions):
    """Interrupted at its call number `at`."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, image, valid):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(image, valid)


Stopped.__qualname__ = Regions.__qualname__


def test_an_interrupted_run_and_parts_give_the_same_bytes(scene, reference, tmp_path):
    whole = tmp_path / "whole.tif"
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Stopped(80), scene[0], whole, **SMALL)
    assert list(tmp_path.glob("whole.tif.blocks/*/*.block"))
    predict_raster(Regions(), scene[0], whole, **SMALL)
    for index in (2, 0, 1):
        predict_part(Regions(), scene[0], tmp_path / "parts.tif", Settings(**SMALL), index=index, of=3)
    merged = merge_parts(tmp_path / "parts.tif", polygons="gpkg")
    assert whole.read_bytes() == (tmp_path / "parts.tif").read_bytes() == reference.path.read_bytes()
    assert merged.objects == reference.objects


def test_a_window_holds_the_objects_inside(scene, reference, tmp_path):
    top, left, height, width = 100, 300, 333, 444
    result = predict_raster(Regions(), scene[0], tmp_path / "map.tif", **SMALL, window=[top, left, height, width])
    part = numbers_of(reference.path)[top : top + height, left : left + width]
    pairs = np.unique(np.stack([numbers_of(result.path), part]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == len(np.unique(part)) == result.objects + 1


@pytest.mark.parametrize("value", [0, 255], ids=["no object", "no data"])
def test_nothing_to_find(write_tiff, tmp_path, value):
    result = mapped(write_tiff, tmp_path, np.full((600, 600), value, dtype=np.uint8), polygons="gpkg")
    assert (result.objects, result.pixels["object"]) == (0, 0)
    assert result.void == (360_000 if value else 0)
    assert not numbers_of(result.path).any()


class Shifted(nn.Module):
    """Finds one square, in the second tile `shift` pixels farther to the right than in the first."""

    spec = GREY

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, image, valid):
        found = torch.zeros_like(image)
        for one, tile in zip(found, image, strict=True):
            place = int(tile[0, 0, 0] * 255)  # the raster holds its own tile's first column
            start = 52 - place + (self.shift if place else 0)
            one[0, 20:40, max(start, 0) : start + 12] = 1
        return found


@pytest.mark.parametrize(("shift", "objects"), [(0, 1), (5, 1), (7, 2)])
def test_tiles_agree_where_more_than_half_is_shared(write_tiff, tmp_path, shift, objects):
    """Twelve columns up to the end of the overlap; moved by 5 pixels the tiles share 7 of them, moved by 7 pixels 5."""
    values = np.repeat(np.arange(112, dtype=np.uint8)[None], 64, axis=0)
    result = mapped(write_tiff, tmp_path, values, Shifted(shift))
    assert result.objects == objects


def test_agreeing_against_counting():
    rng = np.random.default_rng(0)
    first = ndimage.zoom(rng.integers(0, 4, (6, 5)), 4, order=0) * 10
    second = np.where(rng.random(first.shape) < 0.25, rng.integers(0, 4, first.shape), first // 10) * 7
    expected = {
        (int(a), int(b))
        for a in np.unique(first[first > 0])
        for b in np.unique(second[second > 0])
        if ((first == a) & (second == b)).sum() > 0.5 * ((first == a) | (second == b)).sum()
    }
    assert set(map(tuple, agreeing(first, second).tolist())) == expected
    assert len(expected) == 3
    assert agreeing(first[:0], second[:0]).shape == (0, 2)


def test_numbers_go_by_the_first_key_and_through_what_lies_outside():
    keys = np.array([3, 5, 8, 9, 20])
    made = numbering(keys, np.array([[9, 100], [100, 3], [20, 8], [70, 71]]))
    assert made(np.array([[3, 5, 8, 9, 20, 0, 100]])).tolist() == [[1, 2, 3, 1, 3, 0, 0]]
    assert made.count == 3
    none = numbering(np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64))
    assert (none.count, none(keys).tolist()) == (0, [0] * 5)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_tiles_of_numbers(dtype):
    tile = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (512, 512), dtype=dtype)
    np.testing.assert_array_equal(decompress(compress(tile), dtype), tile)
    assert compress(np.zeros((512, 512), dtype=dtype)) == b""
    assert not decompress(b"", dtype).any()


@pytest.mark.parametrize("settings", [{"tta": "d4"}, {"layers": ["entropy"]}, {"overlap": 0}], ids=str)
def test_what_objects_do_not_go_with(scene, tmp_path, settings):
    with pytest.raises(UserError, match="leave all three out"):
        predict_raster(Regions(), scene[0], tmp_path / "map.tif", **SMALL | settings)


class Pointed(nn.Module):
    """Stands for a promptable model: the region of one grey value that a point lies on, with a score of its own.

    Before it, with `whole`, comes all that is not ground around the point, with that score.
    """

    def __init__(self, grid, scores=None, edge=8.0, whole=None):
        super().__init__()
        self.asked = SimpleNamespace(grid=grid, decode=self.decode)
        self.scores, self.edge, self.whole = scores or {}, edge, whole
        self.spec = DataSpec("grey", ("grey",), (ClassSpec("lake", (0, 0, 0)),), (0.5,), (0.2,))
        self.points = 0

    def encode(self, image, valid):
        return image

    def decode(self, embedding, prompts, size, *, several):
        assert several
        values = embedding[0, 0].numpy()
        masks, scores = [], []
        for x, y in prompts.points[0, :, 0].round().int().tolist():
            alike = [values == values[y, x]] if self.whole is None else [(values > 0) == (values[y, x] > 0)] * 2
            alike[-1] = values == values[y, x]
            regions = [ndimage.label(one)[0] for one in alike]
            masks.append(np.stack([np.where(one == one[y, x], self.edge, -self.edge) for one in regions]))
            scores.append([self.whole, self.scores.get(float(values[y, x]), 0.9)][-len(regions) :])
        self.points += len(masks)
        return PromptedMasks(torch.from_numpy(np.stack(masks))[None], torch.tensor(scores)[None], torch.zeros(1))


def picture():
    """Ground 0 with a lake of 1, on which lies an island of 2, and a lake of 3."""
    values = torch.zeros(1, 1, 48, 64)
    values[..., 4:30, 4:30] = 1
    values[..., 12:20, 12:20] = 2
    values[..., 30:46, 40:60] = 3
    return values, torch.ones(1, 48, 64, dtype=torch.bool)


def test_each_object_is_found_once_and_small_ones_lie_on_top():
    image, valid = picture()
    model = Pointed(PointGrid(points=12, quality=0.5, stability=0.5), scores={0.0: 0.2})
    found = ObjectMapper(model)(image, valid)
    assert found.shape == (1, 1, 48, 64)
    for value in (1, 2, 3):
        inside = found[image == value]
        assert inside.unique().numel() == 1
        assert inside[0] > 0
    assert found[image == 0].max() == 0  # the model does not expect much of it
    assert found.unique().numel() == 4
    assert model.points == 144


def test_an_object_that_is_a_points_second_best_mask_is_found_too():
    """For a point of the island the lake with the island comes first, and the island by itself second."""
    image, valid = picture()
    model = Pointed(PointGrid(points=12, quality=0.5, stability=0.5), scores={0.0: 0.2, 1.0: 0.3}, whole=0.95)
    found = ObjectMapper(model)(image, valid)
    numbers = [found[image == value].unique() for value in range(4)]
    assert [one.numel() for one in numbers] == [1] * 4
    assert torch.cat(numbers).unique().numel() == 4
    _, lake, island, _ = numbers
    assert (lake % 2, island % 2) == (1, 0)  # first and second mask of their points
    sure = ObjectMapper(model, quality=0.92)(image, valid)
    assert sure[image == 2].unique() == sure[image == 1].unique()


class Drawn(nn.Module):
    """Stands for a promptable model: three smooth random masks for each point, of growing size, and random scores."""

    spec = GREY

    def __init__(self, points):
        super().__init__()
        rng = np.random.default_rng(0)
        noise = ndimage.gaussian_filter(rng.normal(size=(points**2, 3, 48, 64)), (0, 0, 6, 6))
        y, x = (np.stack(np.meshgrid(*(np.arange(points) + 0.5,) * 2, indexing="ij")) / points).reshape(2, -1, 1, 1, 1)
        rows, columns = np.ogrid[:48, :64]
        apart = np.hypot(rows - 48 * y, columns - 64 * x) - np.array([2, 4, 10])[:, None, None]
        steep = np.exp(rng.uniform(0, 4, (points**2, 3, 1, 1)))
        self.logits = torch.from_numpy(steep * (60 * noise - apart)).float()
        self.scores = torch.from_numpy(rng.uniform(0.7, 1, (points**2, 3))).float()
        self.asked = SimpleNamespace(grid=PointGrid(points=points), decode=self.decode)
        self.asked_before = 0

    def encode(self, image, valid):
        return image

    def decode(self, embedding, prompts, size, *, several):
        at = slice(self.asked_before, self.asked_before + prompts.points.shape[1])
        self.asked_before = at.stop
        return PromptedMasks(self.logits[None, at], self.scores[None, at], self.logits[None, at])


def test_masks_are_those_of_the_published_generator(monkeypatch):
    """But for its boxes, which end at the middle of the last pixel: those of masks of one row or column are empty."""
    from segment_anything import SamAutomaticMaskGenerator, automatic_mask_generator

    box = automatic_mask_generator.batched_mask_to_box
    monkeypatch.setattr(automatic_mask_generator, "batched_mask_to_box", lambda m: box(m) + torch.tensor([0, 0, 1, 1]))
    model = Drawn(points=10)
    found = ObjectMapper(model)(torch.zeros(1, 1, 48, 64), torch.ones(1, 48, 64, dtype=torch.bool))[0, 0]
    official = SimpleNamespace(image_encoder=SimpleNamespace(img_size=64), mask_threshold=0.0)
    generator = SamAutomaticMaskGenerator(official, points_per_side=10)
    answers = zip(model.logits.split(64), model.scores.split(64), strict=True)
    generator.predictor = SimpleNamespace(
        model=official,
        device="cpu",
        transform=SimpleNamespace(apply_coords=lambda points, size: points),
        set_image=lambda image: None,
        reset_image=lambda: None,
        predict_torch=lambda *_, **__: (*next(answers), None),
    )
    published = generator.generate(np.zeros((48, 64, 3), dtype=np.uint8))
    drawn = np.zeros((48, 64), dtype=int)
    for number, mask in enumerate(sorted(published, key=lambda one: -one["area"]), start=1):
        drawn[mask["segmentation"]] = number
    pairs = np.unique(np.stack([found.numpy().astype(int), drawn]).reshape(2, -1), axis=1)
    assert pairs.shape[1] == len(np.unique(drawn)) == found.unique().numel() > 20
    assert [0, 0] in pairs.T.tolist()
    assert len({(int(number) - 1) // 3 for number in found.unique() if number}) < found.unique().numel() - 1


def test_points_where_the_image_is_not_valid_are_not_asked():
    image, valid = picture()
    valid[:, :, 32:] = False
    model = Pointed(PointGrid(points=8, quality=0.0, stability=0.0))
    found = ObjectMapper(model)(image, valid)
    assert model.points == 32
    assert not found[..., 32:].any()
    assert found[..., :32].all()
    assert not ObjectMapper(model)(image, torch.zeros_like(valid)).any()
    assert model.points == 32


def test_images_of_a_batch_do_not_matter_to_each_other():
    image, valid = picture()
    mapper = ObjectMapper(Pointed(PointGrid(points=8)))
    both = mapper(torch.cat([image, image.flip(-1)]), valid.expand(2, -1, -1))
    assert torch.equal(both[:1], mapper(image, valid))
    assert torch.equal(both[1:], mapper(image.flip(-1), valid))


def test_unsure_and_unstable_masks_do_not_count():
    image, valid = picture()
    grid = PointGrid(points=12, quality=0.95, stability=0.5)
    assert not ObjectMapper(Pointed(grid))(image, valid).any()
    assert ObjectMapper(Pointed(grid), quality=0.9)(image, valid).any()
    assert not ObjectMapper(Pointed(grid, edge=0.9), quality=0.9)(image, valid).any()  # gone when the threshold is 1


def test_stability_and_repeated_masks():
    logits = torch.tensor([[3.0, 2.0, 0.5, -0.5, -2.0], [-5.0] * 5])[:, None]
    assert stability(logits).tolist() == [0.5, 0.0]
    masks = torch.zeros(4, 20, 20, dtype=torch.bool)
    masks[0, :10, :10] = masks[1, :10, :9] = masks[2, :3, :3] = masks[3, 12, 12] = True
    assert kept(masks, torch.tensor([0.5, 0.9, 0.8, 0.7])) == [1, 2, 3]
    assert kept(masks[:0], torch.zeros(0)) == []


def test_the_grid_lies_in_the_middle_of_its_cells():
    points = grid_of_points(4, torch.ones(1, 16, 32))
    assert points.shape == (16, 2)
    assert points[:4].tolist() == [[3.5, 1.5], [11.5, 1.5], [19.5, 1.5], [27.5, 1.5]]
    assert grid_of_points(9, torch.ones(1, 2, 2)).min() >= 0


@pytest.mark.parametrize("settings", [{"points": 0}, {"quality": 1.5}, {"stability": -0.1}], ids=str)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match="points is at least 1, the others are from 0 to 1"):
        ObjectMapper(Pointed(PointGrid()), **settings)


@pytest.fixture(scope="module", params=["sam_tiny", "sam_auto"])
def adapter_file(request, tmp_path_factory):
    """A promptable model with random weights."""
    torch.manual_seed(0)
    spec = DataSpec("fake", ("red", "green", "blue"), (ClassSpec("lake", (0, 0, 9)),), (0.5,) * 3, (0.2,) * 3)
    small = ["++head.width=32", "++head.mlp_width=64", "++head.heads=2"]
    cfg = compose("train", ["adapter=frozen", f"head={request.param}", *small])
    model = build_model(cfg, spec)
    model.head.mask_decoder.iou_prediction_head.layers[-1].bias.data.fill_(0.5)
    return vfmadapt.save(tmp_path_factory.mktemp("model") / "adapter.safetensors", model)


def test_the_tool(adapter_file, write_tiff, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (3, 100, 140), dtype=np.uint8)
    source = write_tiff(tmp_path / "scene.tif", values)
    given = [f"input={source}", f"adapter_file={adapter_file}", "tile=64", "overlap=32", "polygons=gpkg"]
    loose = ["objects.points=4", "objects.quality=0", "objects.stability=0"]
    result = main(compose("predict", [*given, *loose, f"output={tmp_path / 'map.tif'}"]))
    json.dumps(result)
    found = numbers_of(result["map"])
    assert result["objects"] == found.max() > 0
    from PIL import Image

    assert Image.open(result["preview"]).width > 300
    assert len(shapely.from_wkb(_geometries(result["polygons"]))) >= result["objects"]
    strict = main(compose("predict", [*given, "objects.quality=1", f"output={tmp_path / 'none.tif'}"]))
    assert strict["objects"] == 0
    for wrong, message in (("points=0", "points is at least 1"), ("points=a", "whole number"), ("quality=x", "number")):
        with pytest.raises(UserError, match=message):
            main(compose("predict", [*given, f"objects.{wrong}", f"output={tmp_path / 'wrong.tif'}"]))


def _geometries(path):
    import geopandas

    return geopandas.read_file(path).geometry.to_wkb()


def test_sam_auto_is_sam_with_the_published_grid():
    made = compose("train", ["head=sam_auto"]).head
    assert {**made, **compose("train", ["head=sam"]).head} == dict(made)
    assert PointGrid() == PointGrid(made.points, made.quality, made.stability)
