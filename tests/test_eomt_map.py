"""Maps of objects with classes: what a mask-transformer head finds in each tile, put together over tiles."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from scipy import ndimage
from torch import nn

import vfmadapt
from vfmadapt.automatic import InstanceMapper
from vfmadapt.build import build_model, compose
from vfmadapt.contracts import ClassSpec, DataSpec, Instances, ValueSpec
from vfmadapt.errors import UserError
from vfmadapt.predict import main
from vfmadapt.raster.objects import numbering
from vfmadapt.raster.planning import Settings
from vfmadapt.raster.predict import merge_parts, predict_part, predict_raster

NAMES = ("ground", "tree", "house")
SMALL = {"tile": 64, "overlap": 32}
CELLS = """
.TTTT.
......
.H..H.
.H..H.
.H....
...TT.
"""


def spec_of(bands):
    classes = tuple(ClassSpec(name, (80 * i, 0, 0)) for i, name in enumerate(NAMES))
    return DataSpec("toy", bands, classes, (0.5,) * len(bands), (0.3,) * len(bands))


class Told(nn.Module):
    """Stands for a model: an instance for each connected region of a class, which the grey values tell."""

    spec = spec_of(("grey",))

    def __init__(self, scores=(0.9, 0.9, 0.9), regions=True):
        super().__init__()
        self.scores, self.head = scores, type("Told", (), {"regions": regions})()

    def instances(self, image, valid):
        return [self._of(values) for values in np.rint(image[:, 0].numpy() * 255 / 80).astype(int)]

    def _of(self, labels):
        found = [np.zeros((0, *labels.shape), dtype=bool)]
        classes = []
        for label in range(len(NAMES)):
            regions, count = ndimage.label(labels == label)
            found.append(regions == np.arange(1, count + 1)[:, None, None])
            classes += [label] * count
        classes = torch.tensor(classes)
        return Instances(torch.from_numpy(np.concatenate(found)), classes, torch.tensor(self.scores)[classes])


def labels():
    """96 x 96 pixels, of which four tiles of 64 share the middle: two trees and two houses, all over a border."""
    rows = [[".TH".index(cell) for cell in line] for line in CELLS.split()]
    return np.kron(np.array(rows), np.ones((16, 16), dtype=int))


def numbers_of(path):
    with rasterio.open(path) as file:
        return file.read(1), file.tags()


@pytest.fixture
def scene(write_tiff, tmp_path):
    return write_tiff(tmp_path / "scene.tif", (labels() * 80).astype(np.uint8)[None])


def test_objects_over_tiles_have_one_number_and_their_class(scene, tmp_path):
    mapper = InstanceMapper(Told(), ["tree", "house"])
    result = predict_raster(mapper, scene, tmp_path / "map.tif", **SMALL, polygons="gpkg")
    found, tags = numbers_of(result.path)
    assert result.objects == 4
    assert result.objects_per_class == json.loads(tags["CLASS_OBJECTS"]) == {"tree": 2, "house": 2}
    np.testing.assert_array_equal(found > 0, labels() > 0)
    table = geopandas.read_file(result.polygons)
    assert list(table.columns) == ["object", "class", "name", "pixels", "area_m2", "geometry"]
    for _, row in table.iterrows():
        assert np.unique(labels()[found == row.object]).tolist() == [row["class"]]
        assert (row["name"], row.pixels) == (NAMES[row["class"]], (found == row.object).sum())
    assert sorted(table.pixels // 256) == [2, 2, 3, 4]


def test_only_sure_objects_of_the_classes_count(scene, tmp_path):
    houses = predict_raster(InstanceMapper(Told(), ["house"]), scene, tmp_path / "houses.tif", **SMALL)
    assert (houses.objects, houses.objects_per_class) == (2, {"house": 2})
    doubtful = InstanceMapper(Told(scores=(0.9, 0.6, 0.9)), NAMES, quality=0.7)
    sure = predict_raster(doubtful, scene, tmp_path / "sure.tif", **SMALL)
    assert sure.objects_per_class == {"ground": 1, "house": 2}  # the small ones lie on the ground
    none = predict_raster(InstanceMapper(Told(), NAMES, quality=1.0), scene, tmp_path / "none.tif", **SMALL)
    assert (none.objects, none.objects_per_class) == (0, {})


def test_parts_say_the_same(scene, tmp_path):
    mapper = InstanceMapper(Told(), NAMES)
    whole = predict_raster(mapper, scene, tmp_path / "whole.tif", **SMALL)
    predict_part(mapper, scene, tmp_path / "parts.tif", Settings(**SMALL), index=0, of=1)
    merged = merge_parts(tmp_path / "parts.tif", polygons="parquet")
    assert merged.objects_per_class == whole.objects_per_class == {"ground": 1, "tree": 2, "house": 2}
    assert merged.path.read_bytes() == whole.path.read_bytes()
    assert set(geopandas.read_parquet(merged.polygons).name) == set(NAMES)


def test_what_is_not_valid_belongs_to_no_object():
    image, valid = torch.full((1, 1, 8, 8), 80 / 255), torch.ones(1, 8, 8, dtype=torch.bool)
    valid[..., :4] = False
    found = InstanceMapper(Told(), NAMES)(image, valid)
    assert found.shape == (1, 1, 8, 8)
    assert (found[..., :4] == 0).all()
    assert (found[..., 4:] == 2).all()  # 1 + the class of the first instance
    assert not InstanceMapper(Told(), NAMES)(image, valid & False).any()


def test_most_tiles_say_the_class():
    """Of class 2, 1 and 1; of 2 and 0; of 1 alone."""
    numbers = np.array([3, 5, 2, 6, 1, 2])
    keys = (np.arange(6) << 24) + numbers
    made = numbering(keys, np.stack([keys[[0, 1, 3]], keys[[1, 2, 4]]], axis=1))
    assert made.classes(3).tolist() == [1, 0, 1]


class Valued(Told):
    spec = DataSpec("height", ("grey",), (), (0.5,), (0.3,), values=(ValueSpec("height", "m"),))


@pytest.mark.parametrize(
    ("model", "classes", "quality", "message"),
    [
        (Told(regions=False), ["tree"], 0.5, "train with head=eomt head.regions=true"),
        (Valued(regions=False), [], 0.5, "train with head=eomt head.regions=true"),
        (Told(), ["car"], 0.5, "no class 'car'; the model has ground, tree, house"),
        (Told(), [], 0.5, "no class; the model has ground"),
        (Told(), ["tree"], 1.5, "from 0 to 1"),
    ],
)
def test_what_cannot_be_mapped(model, classes, quality, message):
    with pytest.raises(UserError, match=message) as caught:
        InstanceMapper(model, classes, quality=quality)
    assert "\n" not in str(caught.value)


TINY = {
    "backbone": {
        "_target_": "vfmadapt.backbones.timm_models.timm_backbone",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "settings": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    },
    "adapter": {"_target_": "vfmadapt.adapters.frozen.Frozen"},
}
EOMT = {"_target_": "vfmadapt.heads.eomt.EomtHead", "queries": 8, "blocks": 2, "regions": True}


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    """A head that has learned the four tiles."""
    torch.manual_seed(0)
    model = build_model(TINY | {"head": EOMT}, spec_of(("red", "green", "blue"))).train()
    truth = torch.from_numpy(labels())
    places = [(row, column) for row in (0, 32) for column in (0, 32)]
    mask = torch.stack([truth[row : row + 64, column : column + 64] for row, column in places])
    image = (mask[:, None] * 80 / 255).expand(-1, 3, -1, -1).float()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3)
    for step in range(80):
        loss = model.head.loss(model.features(image), mask, ignore_index=255)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.head.after_step(step + 1, 80)
    return vfmadapt.save(tmp_path_factory.mktemp("model") / "adapter.safetensors", model)


def predict(source, adapter, folder, *given):
    values = [f"input={source}", f"adapter_file={adapter}", f"output={folder / 'map.tif'}"]
    return main(compose("predict", ["tile=64", "overlap=32", "device=cpu", *values, *given]))


@pytest.fixture
def colours(write_tiff, tmp_path):
    return write_tiff(tmp_path / "colours.tif", np.repeat((labels() * 80).astype(np.uint8)[None], 3, axis=0))


def test_the_tool_with_a_trained_head(adapter_file, colours, tmp_path):
    result = predict(colours, adapter_file, tmp_path, "objects.classes=[tree,house]", "polygons=gpkg")
    json.dumps(result)
    found, _ = numbers_of(result["map"])
    assert (result["objects"], result["objects_per_class"]) == (4, {"tree": 2, "house": 2})
    truth, count = ndimage.label(labels() > 0)
    for i in range(1, count + 1):
        number = np.bincount(found[truth == i]).argmax()
        both, either = ((truth == i) & (found == number)).sum(), ((truth == i) | (found == number)).sum()
        assert number > 0
        assert both / either > 0.6
    assert set(geopandas.read_file(result["polygons"]).name) == {"tree", "house"}
    every = predict(colours, adapter_file, tmp_path, "objects.classes=all", "objects.quality=0.9", "preview=false")
    assert every["objects_per_class"].get("ground")
    plain = predict(colours, adapter_file, tmp_path, "preview=false")
    assert (plain["objects"], tuple(plain["shares"])) == (None, NAMES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("objects.classes=[tree,car]", "no class 'car'"),
        ("objects.classes=3", "or a text or a list in brackets"),
        ("objects.points=8 objects.classes=all", "objects has no setting 'points'"),
        ("objects.classes=all layers=[entropy]", "leave all three out"),
    ],
)
def test_settings_that_do_not_fit(adapter_file, colours, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        predict(colours, adapter_file, tmp_path, *given.split())


def test_only_one_model_and_only_rasters(adapter_file, colours, tmp_path):
    with pytest.raises(UserError, match="goes with one adapter_file"):
        predict(colours, f"[{adapter_file},{adapter_file.parent}/b.safetensors]", tmp_path, "objects.classes=all")
    scan = tmp_path / "scan.nii.gz"
    scan.touch()
    with pytest.raises(UserError, match="= is for rasters"):
        predict(scan, adapter_file, tmp_path, "objects.classes=all")
