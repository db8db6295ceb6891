"""Ten real bands all the way: labelled windows of a scene, training, the map of the whole scene."""

import numpy as np
import pytest
import rasterio
import torch
from rasterio.windows import Window

import vfmadapt
from vfmadapt import predict, train
from vfmadapt.build import compose

TINY = [
    "backbone=timm",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.pretrained=false",
    "+backbone.settings={embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8}",
    "backbone.train_patch_embed=true",
    "adapter.dim=4",
    "head=linear",
    "loader.crop=32",
    "loader.batch_size=2",
    "loader.steps_per_epoch=2",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "previews=1",
]
SIDE = 56  # pixels of a window: sixteen of them make the scene
SCALE = "1e-4"  # the file holds reflectance times 10000, as HLS does


@pytest.fixture(scope="module")
def scene(real_data):
    return real_data / "hls" / "hls_10band.tif"


@pytest.fixture(scope="module")
def trained(scene, write_tiff, tmp_path_factory):
    """Two steps on windows whose label is made up: is the fourth band above its median?"""
    folder = tmp_path_factory.mktemp("windows")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    with rasterio.open(scene) as source:
        values = source.read()
        labels = (values[3] > np.median(values[3])).astype(np.uint8)
        for row in range(0, source.height, SIDE):
            for column in range(0, source.width, SIDE):
                at = Window(column, row, SIDE, SIDE)
                place = {"crs": source.crs, "transform": source.window_transform(at)}
                image, mask = (a[..., row : row + SIDE, column : column + SIDE] for a in (values, labels))
                write_tiff(folder / "images" / f"{row}_{column}.tif", image, nodata=source.nodata, **place)
                write_tiff(folder / "masks" / f"{row}_{column}.tif", mask[None], **place)
    data = [f"data.root={folder}", "data.classes=[low,high]", f"data.scale={SCALE}", "data.val_fraction=0.3"]
    return train.main(compose("train", ["data=geotiff_folder", *data, *TINY, f"output={folder / 'run'}"]))


def mapped(trained, source, output):
    given = [f"adapter_file={trained['adapter_file']}", f"input={source}", f"output={output}", f"scale={SCALE}"]
    return predict.main(compose("predict", [*given, "tile=96", "overlap=16", "device=cpu"]))


def test_the_model_has_ten_bands_and_looks_at_each(trained, scene):
    assert trained["steps"] == 2
    model = vfmadapt.load(trained["adapter_file"])
    assert model.spec.bands == tuple(f"band{i}" for i in range(1, 11))
    assert model.backbone.spec.bands == 10
    with rasterio.open(scene) as source:
        image = torch.from_numpy(source.read(window=Window(0, 0, 64, 64))).float()[None] * float(SCALE)
    with torch.inference_mode():
        logits = model(image)
        for band in range(10):
            changed = image.clone()
            changed[:, band] *= 1.5
            assert not torch.equal(model(changed), logits), f"band {band + 1} changes nothing"


def test_the_map_lies_on_the_scene(trained, scene, tmp_path):
    result = mapped(trained, scene, tmp_path / "map.tif")
    with rasterio.open(scene) as source, rasterio.open(result["map"]) as made:
        assert source.count == 10
        assert (made.crs, made.transform, made.shape) == (source.crs, source.transform, source.shape)
        assert (made.count, made.dtypes, made.nodata) == (1, ("uint8",), 255)
        labels = made.read(1)
        void = source.dataset_mask() == 0
    np.testing.assert_array_equal(labels == 255, void)
    assert set(np.unique(labels[~void])) <= {0, 1}
    assert result["void"] == void.sum()
    assert result["area_km2"]["low"] + result["area_km2"]["high"] == pytest.approx((~void).sum() * 30 * 30 / 1e6)


def test_nodata_of_the_scene_is_nodata_of_the_map(trained, scene, tmp_path, write_tiff):
    with rasterio.open(scene) as source:
        values, place = source.read(), {"crs": source.crs, "transform": source.transform, "nodata": source.nodata}
    values[:, 20:70, 150:] = place["nodata"]
    result = mapped(trained, write_tiff(tmp_path / "holed.tif", values, **place), tmp_path / "map.tif")
    with rasterio.open(result["map"]) as made:
        void = made.read(1) == 255
    assert void[20:70, 150:].all()
    assert void.sum() == result["void"] == 50 * (224 - 150)


def test_a_scene_of_other_bands_is_refused(trained, scene, tmp_path, write_tiff):
    with rasterio.open(scene) as source:
        fewer = write_tiff(tmp_path / "three.tif", source.read([1, 2, 3]), crs=source.crs, transform=source.transform)
    with pytest.raises(vfmadapt.UserError, match=r"3 bands.*10"):
        mapped(trained, fewer, tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()
