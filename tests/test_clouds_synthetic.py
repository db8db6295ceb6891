import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch

from vfmadapt import check_data
from vfmadapt.contracts import ClassSpec, DataSource, DataSpec, Sample, Samples, UserError
from vfmadapt.datasets import _clouds_files as files
from vfmadapt.datasets import _clouds_sky as sky
from vfmadapt.datasets import _procedural as proc
from vfmadapt.datasets._clouds_scene import render_scene
from vfmadapt.datasets._clouds_sensor import TEST_PRESET, TRAIN_PRESETS
from vfmadapt.datasets._clouds_spectra import BANDS
from vfmadapt.datasets._clouds_surface import Sun
from vfmadapt.datasets.clouds_synthetic import CLASSES, CloudsSynthetic, scene_of, write_scene

SIZE = 96


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CloudsSynthetic:
    made = CloudsSynthetic(tmp_path_factory.mktemp("clouds"), train=8, val=1, test=3, size=SIZE, workers=1)
    made.prepare()
    return made


@pytest.fixture(scope="module")
def scenes() -> list:
    return [render_scene(seed, size=(96, 128)) for seed in range(40)]


def test_same_seed_same_pixels_other_seed_others() -> None:
    first, again, other = render_scene(5, size=(64, 80)), render_scene(5, size=(64, 80)), render_scene(6, size=(64, 80))
    assert np.array_equal(first.bands, again.bands)
    assert np.array_equal(first.label, again.label)
    assert not np.array_equal(first.bands, other.bands)


def test_pixels_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from vfmadapt.datasets._clouds_scene import render_scene as r;"
        "s = r(3, size=(48, 56)); print(hashlib.sha256(s.bands.tobytes() + s.label.tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_scene_is_consistent(scenes: list) -> None:
    for scene in scenes:
        assert scene.bands.shape == (6, 96, 128)
        assert scene.bands.dtype == np.float32
        assert np.isfinite(scene.bands).all()
        assert scene.bands.min() >= 0
        assert set(np.unique(scene.label)) <= {0, 1, 2, 3, 255}
        assert (scene.label[~scene.valid] == 255).all()
        assert (scene.bands[:, ~scene.valid] == 0).all()
        assert scene.valid.mean() > 0.3
        assert scene.names == BANDS
    counts = np.bincount(np.concatenate([s.label[s.valid] for s in scenes]), minlength=256)
    assert (counts[:4] / counts[:4].sum() > 0.04).all()
    assert counts[255] / counts.sum() < 0.20  # borders of doubt and the swath's edge; more where scenes are this small
    assert any(not s.valid.all() for s in scenes)


def test_test_sensor_is_not_in_train() -> None:
    assert TEST_PRESET not in TRAIN_PRESETS
    assert TEST_PRESET.name not in {p.name for p in TRAIN_PRESETS}
    assert {scene_of("test", i, size=32).preset for i in range(6)} == {TEST_PRESET.name}
    assert TEST_PRESET.name not in {scene_of(split, i, size=32).preset for split in ("train", "val") for i in range(12)}


def test_splits_share_no_scene() -> None:
    images = [scene_of(split, 0, size=32).bands for split in ("train", "val")]
    assert not np.array_equal(*images)


@pytest.mark.parametrize(
    ("azimuth", "direction"), [(0, (1, 0)), (90, (0, -1)), (180, (-1, 0)), (270, (0, 1)), (45, (1, -1))]
)
def test_shadow_falls_away_from_the_sun(azimuth: float, direction: tuple[int, int]) -> None:
    # one round cloud; the sun in the north throws its shadow southwards, down the image
    sun = Sun(np.deg2rad(azimuth), np.deg2rad(45))
    shift = (np.cos(sun.azimuth) * 20, -np.sin(sun.azimuth) * 20)
    size = (96, 96)
    canvas = (size[0] + int(abs(shift[0])) + 2, size[1] + int(abs(shift[1])) + 2)
    blank = sky.Layer(np.zeros(canvas, dtype=np.float32), shift, False)
    blank.tau[canvas[0] // 2 - 5 : canvas[0] // 2 + 5, canvas[1] // 2 - 5 : canvas[1] // 2 + 5] = 40
    seen = sky.cover(np.random.default_rng(0), np.full((6, *size), 0.2, dtype=np.float32), [blank], sun)
    y, x = np.mgrid[: size[0], : size[1]]

    def centre(weight: np.ndarray) -> np.ndarray:
        return np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()

    moved = centre(seen.missing) - centre(seen.cloud)
    expected = np.array(direction) / np.hypot(*direction) * 20
    assert np.allclose(moved, expected, atol=1.5)
    dark = seen.missing > 0.5
    assert (seen.shaded[1][dark] < 0.75 * seen.open[1][dark]).all()


def test_labelled_shadows_match_the_clouds_moved_by_the_scenes_shift(scenes: list) -> None:
    # over all scenes, a step along the shift leads from shadow back to cloud far more often than a step the other way
    forth = back = 0
    for scene in scenes:
        if len(scene.shifts) != 1:
            continue
        rows, columns = (round(s) for s in scene.shifts[0])
        cloud = ((scene.label == 1) | (scene.label == 2)).astype(np.float32)
        y, x = np.nonzero(scene.label == 3)
        for sign in (1, -1):
            ys, xs = y - sign * rows, x - sign * columns
            inside = (ys >= 0) & (ys < cloud.shape[0]) & (xs >= 0) & (xs < cloud.shape[1])
            share = cloud[ys[inside], xs[inside]].sum()
            forth, back = (forth + share, back) if sign == 1 else (forth, back + share)
    assert forth > 2 * back


def test_clouds_brighten_and_shadows_darken_the_ground() -> None:
    rng = np.random.default_rng(1)
    surface = np.full((6, 64, 64), 0.1, dtype=np.float32)
    layers = sky.draw_layers(np.random.default_rng(7), (64, 64), Sun(1.0, 0.8))
    seen = sky.cover(rng, surface, layers, Sun(1.0, 0.8))
    assert (seen.shaded <= seen.open + 1e-6).all()
    thick = seen.cloud > sky.THICK_FROM
    assert thick.any()
    assert seen.image[1][thick].mean() > 2 * seen.shaded[1][thick].mean()


def test_files_are_geotiffs(source: CloudsSynthetic) -> None:
    paths = sorted(source.folder.rglob("image_*.tif"))
    assert len(paths) == 12
    assert not list(source.folder.rglob(".*"))
    for path in paths:
        with rasterio.open(path) as image, rasterio.open(str(path).replace("image_", "label_")) as label:
            assert image.crs.is_projected
            assert image.crs == label.crs
            assert image.transform == label.transform
            assert 8 <= image.res[0] <= 30
            assert image.count == 6
            assert image.dtypes[0] == "uint16"
            assert image.nodata == 0
            assert image.descriptions == BANDS
            assert image.scales == (1e-4,) * 6
            assert (label.count, label.dtypes[0], label.nodata) == (1, "uint8", 255)
            assert label.colormap(1)[1][:3] == CLASSES[1].colour
            assert (label.read(1)[image.read_masks(1) == 0] == 255).all()


def test_samples_follow_the_contract(source: CloudsSynthetic) -> None:
    assert isinstance(source, DataSource)
    train = source.split("train")
    assert isinstance(train, Samples)
    assert [len(source.split(s)) for s in ("train", "val", "test")] == [8, 1, 3]
    for sample in (train[i] for i in range(len(train))):
        assert sample["image"].shape == (3, SIZE, SIZE)
        assert sample["image"].dtype == torch.float32
        assert sample["mask"].dtype == torch.int64
        assert (sample["mask"][~sample["valid"]] == 255).all()
        assert (sample["image"][:, ~sample["valid"]] == 0).all()
    with pytest.raises(IndexError):
        train[8]


def test_bands_are_chosen_by_name(source: CloudsSynthetic) -> None:
    scene = scene_of("train", 0, size=SIZE)
    for bands in (("nir",), ("swir2", "blue"), BANDS):
        other = CloudsSynthetic(source.folder.parent, train=8, val=1, test=3, size=SIZE, bands=bands)
        image = other.split("train")[0]["image"].numpy()
        wanted = scene.bands[[BANDS.index(b) for b in bands]]
        assert np.abs(image - wanted)[:, scene.valid].max() < 1.01e-4
        assert other.spec.bands == bands
        assert len(other.spec.mean) == len(bands)


def test_prepare_is_idempotent_repairs_and_leaves_no_traces(
    source: CloudsSynthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in source.folder.rglob("*")}
    source.prepare()
    assert before == {p: p.stat().st_mtime_ns for p in source.folder.rglob("*")}

    more = CloudsSynthetic(source.folder.parent, train=9, val=1, test=3, size=SIZE, workers=1)

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_scene", fails)
        with pytest.raises(OSError, match="disk full"):
            more.prepare()
    assert json.loads((source.folder / "done.json").read_text())["train"] == 8
    more.prepare()
    assert len(list(source.folder.rglob("image_*.tif"))) == 13
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.suffix == ".tif")


def test_a_broken_write_leaves_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = render_scene(0, size=(32, 32))
    monkeypatch.setattr(files, "COLOURS", {"not": "a colour table"})
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever rasterio raises
        write_scene(tmp_path / "image.tif", scene, label=tmp_path / "label.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["image.tif"]


def test_worker_processes_write_the_same_tiles(tmp_path) -> None:
    counts = {"train": 14, "val": 0, "test": 0}
    CloudsSynthetic(tmp_path / "a", size=32, workers=2, **counts).prepare()
    CloudsSynthetic(tmp_path / "b", size=32, workers=1, **counts).prepare()
    for one in (tmp_path / "a").rglob("*.tif"):
        with (
            rasterio.open(one) as first,
            rasterio.open(str(one).replace(str(tmp_path / "a"), str(tmp_path / "b"))) as second,
        ):
            assert np.array_equal(first.read(), second.read())


def test_user_errors_are_one_line(tmp_path) -> None:
    for settings, words in (
        ({"bands": ["red", "ultraviolet"]}, "ultraviolet"),
        ({"size": 4}, "size=4"),
        ({"train": -1}, "tiles"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            CloudsSynthetic(tmp_path, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split 'dev'"):
        CloudsSynthetic(tmp_path).split("dev")
    with pytest.raises(UserError, match="prepare"):
        CloudsSynthetic(tmp_path).split("val")[0]


def test_power_noise_has_the_slope_asked_for() -> None:
    rng = np.random.default_rng(0)
    for exponent in (1.0, 2.0):
        field = proc.power_noise(rng, (256, 256), exponent, outer=1e4)
        assert abs(field.mean()) < 1e-4
        assert abs(field.std() - 1) < 1e-4
        power = np.abs(np.fft.fft2(field)) ** 2
        f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None, :])
        bands = [power[(f > low) & (f < 1.1 * low)].mean() for low in (0.05, 0.2)]
        assert np.log(bands[0] / bands[1]) / np.log(4) == pytest.approx(2 * exponent, abs=0.2)


def test_power_noise_is_longer_along_its_angle() -> None:
    field = proc.power_noise(np.random.default_rng(0), (200, 200), 2.0, outer=40, anisotropy=5, angle=0.0)
    down, right = (np.abs(np.diff(field, axis=a)).mean() for a in (0, 1))
    assert down > 2 * right


def test_hillshade_lights_the_slope_that_faces_the_sun() -> None:
    ramp = np.tile(np.arange(32, dtype=np.float32), (32, 1))  # rises to the east: it faces west
    west, east = (proc.hillshade(ramp, np.deg2rad(a), 0.7, 0.3).mean() for a in (270, 90))
    assert west > 1 > east
    assert proc.hillshade(ramp * 0, 1.0, 0.7).mean() == pytest.approx(1, abs=1e-5)


def test_specks_go_to_their_neighbours() -> None:
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[5:7, 5:7] = 1
    labels[20:30, 20:30] = 2
    labels[24:26, 24:26] = 3
    cleaned = proc.remove_specks(labels, 4, 16)
    assert (cleaned[:15, :15] == 0).all()
    assert (cleaned[20:30, 20:30] == 2).all()


class _Toy:
    """Brightness tells class 1 from the rest, the second band tells class 2."""

    spec = DataSpec(
        "toy",
        ("red", "nir"),
        (ClassSpec("ground", (0, 0, 0)), ClassSpec("cloud", (255, 255, 255)), ClassSpec("x", (9, 9, 9))),
        (0, 0),
        (1, 1),
    )

    def prepare(self) -> None: ...

    def split(self, name: str) -> list[Sample]:
        rng = np.random.default_rng(len(name))
        samples = []
        for index in range(3):
            mask = rng.integers(0, 3, (20, 20))
            image = np.stack([(mask == 1) * 0.5 + 0.1, (mask == 2) * 0.5]) + rng.normal(0, 0.01, (2, 20, 20))
            mask[:2] = 255
            valid = np.ones((20, 20), dtype=bool)
            valid[-1] = False
            tensors = torch.from_numpy(image.astype(np.float32)), torch.from_numpy(mask), torch.from_numpy(valid)
            samples.append(
                Sample(image=tensors[0], mask=tensors[1], valid=tensors[2], id=str(index), bands=("red", "nir"))
            )
        return samples


def test_check_data_finds_what_single_pixels_tell() -> None:
    result = check_data.check(_Toy(), "test", None, (500, 500), np.random.default_rng(0))
    assert result["foreground"] == ["cloud"]
    assert result["threshold"]["iou"] > 0.98
    assert 0.1 < result["threshold"]["value"] < 0.6
    assert result["threshold"]["side"] == "above"
    assert result["threshold"]["iou_of_all_foreground"] == pytest.approx(1 / 3, abs=0.05)
    assert result["per_pixel"]["miou"] > 0.95
    assert sum(result["shares"]["train"][c] for c in ("ground", "cloud", "x")) == pytest.approx(1)
    assert result["shares"]["train"]["ignored"] == pytest.approx(2 / 19)
    json.dumps(result)


def test_check_data_takes_dark_foreground_and_named_classes() -> None:
    result = check_data.check(_Toy(), "test", ["ground", "x"], (300, 300), np.random.default_rng(0))
    assert result["threshold"]["side"] == "below"
    assert result["threshold"]["iou"] > 0.98
    with pytest.raises(UserError, match="has no class 'snow'"):
        check_data.foreground_classes(_Toy.spec, ["snow"])


def test_scores_match_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, jaccard_score

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    scores = check_data._scores(confusion_matrix(truth, guess), _Toy.spec, [1, 2])
    assert scores["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert scores["iou"] == pytest.approx(jaccard_score(truth > 0, guess > 0))
