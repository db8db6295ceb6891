"""Segmentation of medical frames: metrics of volumes, training, and labels that lie exactly on their source."""

import json
import multiprocessing
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vfmadapt import evaluate, predict, train
from vfmadapt.build import compose
from vfmadapt.checkpoint import load
from vfmadapt.datasets.clip_folder import ClipFolder
from vfmadapt.errors import UserError
from vfmadapt.frames import Clip
from vfmadapt.tasks import windows
from vfmadapt.tasks.windows import whole_image
from vfmadapt.volume_metrics import VolumeMetrics, volume_table

nibabel = pytest.importorskip("nibabel")
monai_metrics = pytest.importorskip("monai.metrics")

STEPS = [
    "loader.batch_size=2", "loader.crop=64", "loader.steps_per_epoch=2", "trainer.max_steps=2", "previews=1",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
TINY = [
    "experiment=medseg", "data.train=2", "data.val=1", "data.test=2", "data.slices=2", "data.size=64", "data.workers=1",
    *STEPS,
]  # fmt: skip


def counted(found: torch.Tensor, true: torch.Tensor, spacing: tuple[float | None, ...] | None) -> dict[str, Any]:
    """Metrics of volumes (V, T, H, W)."""
    metrics = VolumeMetrics(["background", "one", "two"])
    for index in range(len(found)):
        for p, t in zip(found[index], true[index], strict=True):
            metrics.update(p[None], t[None])
            metrics.add_frame(p, t, clip=str(index), spacing=spacing)
    return metrics.compute() | metrics.details()


def test_dice_and_hd95_agree_with_monai_over_volumes() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(2, 6, 24, 20, dtype=torch.int64)
    true[:, 1:5, 4:12, 4:14], true[0, 2:4, 14:20, 6:15] = 1, 2
    noise = torch.rand(true.shape, generator=generator)
    found = torch.where(noise < 0.02, 1, true.roll(1, dims=3))
    spacing = (5.0, 1.5, 0.8)
    result = counted(found, true, spacing)
    for label, name in ((1, "one"), (2, "two")):
        p, t = (labels[:, None] == label for labels in (found, true))
        there = t.flatten(1).any(1)
        dice = monai_metrics.compute_dice(p.float(), t.float())[there]
        assert result["dice3d"][name] == pytest.approx(dice.mean().item(), abs=1e-6)
        hd95 = monai_metrics.compute_hausdorff_distance(
            p[there].float(), t[there].float(), percentile=95, spacing=spacing
        )
        assert result["hd95_mm"][name] == pytest.approx(hd95.mean().item(), rel=1e-5)
        for kind, wanted in (("dice3d", dice[:, 0]), ("hd95_mm", hd95[:, 0])):
            listed = [v[kind][name] for v in result["volumes"] if v[kind][name] is not None]
            assert listed == pytest.approx(wanted.tolist(), rel=1e-5), kind
    assert [(v["id"], v["frames"]) for v in result["volumes"]] == [("0", 6), ("1", 6)]
    assert result["volumes"][1]["hd95_mm"]["two"] is None
    assert result["mean_dice3d"] == pytest.approx(sum(result["dice3d"].values()) / 2)


def test_frames_in_time_are_measured_in_their_plane() -> None:
    true = torch.zeros(1, 3, 20, 20, dtype=torch.int64)
    true[..., 5:10, 5:10] = 1
    found = true.roll(4, dims=3)
    assert counted(found, true, (None, 2.0, 0.5))["hd95_mm"]["one"] == pytest.approx(2.0)
    unknown = counted(found, true, None)
    assert unknown["hd95_mm"] == {"one": None, "two": None}
    assert unknown["hd95_px"] == {"one": pytest.approx(4.0), "two": None}
    assert counted(found, true, (None, 2.0, 0.5))["hd95_px"] == {"one": None, "two": None}


def test_ignored_pixels_and_absent_structures_do_not_count() -> None:
    true = torch.full((1, 1, 8, 8), 255)
    true[..., :4] = 0
    result = counted(torch.ones_like(true).where(true == 255, 0), true, (1.0, 1.0, 1.0))
    assert result["dice3d"] == {"one": None, "two": None}


def test_intervals_are_those_of_resampled_volumes() -> None:
    """A direct bootstrap of all means; the second structure is in few of the volumes."""
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(40, 1, 12, 12, dtype=torch.int64)
    true[:, :, 2:7, 2:7] = 1
    true[::3, :, 8:11, 8:11] = 2
    found = true.where(torch.rand(true.shape, generator=generator) < torch.rand(40, 1, 1, 1, generator=generator), 0)
    result = counted(found, true, None)
    values = np.array([[v["dice3d"][name] for name in ("one", "two")] for v in result["volumes"]], dtype=float)
    rng = np.random.default_rng(1)
    drawn = np.stack([np.nanmean(values[rng.integers(40, size=40)], axis=0) for _ in range(4000)])
    direct = {"one": drawn[:, 0], "two": drawn[:, 1], "mean": drawn.mean(1)}
    ours = result["confidence"]["dice3d"] | {"mean": result["confidence"]["mean_dice3d"]}
    for name, samples in direct.items():
        low, high = np.percentile(samples, (2.5, 97.5))
        assert ours[name] == pytest.approx([low, high], abs=0.12 * (high - low)), name
    assert ours["mean"][0] < result["mean_dice3d"] < ours["mean"][1]
    alone = counted(found[:1], true[:1], None)
    assert alone["confidence"]["dice3d"] == {"one": None, "two": None}
    assert alone["confidence"]["mean_dice3d"] is None


def test_the_table_tells_means_and_intervals_of_what_is_known() -> None:
    true = torch.zeros(2, 3, 20, 20, dtype=torch.int64)
    true[..., 5:10, 5:10] = 1
    found = true.clone()
    found[1] = found[1].roll(5, dims=2)
    lines = volume_table(counted(found, true, (3.0, 1.0, 1.0))).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "2 volumes Dice (95 % interval) HD95 mm (95 % interval)",
        "one 0.500 (0.000 to 1.000) 2.500 (0.000 to 5.000)",
        "two - -",
        "mean 0.500 (0.000 to 1.000) 2.500 (0.000 to 5.000)",
    ]
    assert "HD95 px" in volume_table(counted(found, true, None))


def one_of_two(rank: int, store: str) -> list[Any]:
    """What both processes of a distributed run find, what one alone does, and why slices cannot be shared."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found, true = torch.randint(0, 3, (2, 5, 12, 14), generator=torch.Generator().manual_seed(0))

    def measured(ids: str, indices: range) -> VolumeMetrics:
        metrics = VolumeMetrics(["background", "one", "two"])
        for index in indices:
            metrics.update(found[index][None], true[index][None])
            metrics.add_frame(found[index], true[index], clip=ids[index], spacing=None)
        return metrics

    try:
        shared, alone = measured("abcde", range(rank, 5, 2)), measured("abcde", range(5))
        shared.sync()
        with pytest.raises(UserError) as refused:
            measured("aabbc", range(rank, 5, 2)).sync()
        return [*(m.compute() | m.details() for m in (shared, alone)), str(refused.value)]
    finally:
        torch.distributed.destroy_process_group()


def test_processes_share_images_but_no_volume(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:  # as all is imported here already
        turns = [(rank, str(tmp_path / "store")) for rank in range(2)]
        results = pool.starmap_async(one_of_two, turns, chunksize=1).get(timeout=120)
    for shared, alone, refusal in results:
        assert shared == alone
        assert [v["id"] for v in shared["volumes"]] == list("abcde")
        assert refusal == "task=medseg measures whole volumes, in one process; set trainer.devices=1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("medseg")
    return train.main(compose("train", [*TINY, f"data_root={folder}", f"output={folder / 'run'}"]))


def test_training_measures_volumes(run: dict[str, Any]) -> None:
    assert 0 <= run["mean_dice3d"] <= 1
    structures = set(run["iou"]) - {"background"}
    assert set(run["dice3d"]) == set(run["hd95_mm"]) == structures
    assert Path(run["previews"][0]).is_file()
    written = json.loads((Path(run["run"]) / "metrics.json").read_text())
    assert [v["frames"] for v in written["volumes"]] == [2, 2]
    assert all(set(v["dice3d"]) == set(v["hd95_mm"]) == structures for v in written["volumes"])
    low, high = written["confidence"]["mean_dice3d"]
    assert low <= written["mean_dice3d"] <= high


def test_evaluation_measures_volumes_as_training_does(run: dict[str, Any], tmp_path: Path) -> None:
    trained = json.loads((Path(run["run"]) / "metrics.json").read_text())
    settings = [setting for setting in TINY if setting.startswith("data.")]
    root = Path(run["run"]).parent
    again = [f"adapter_file={run['adapter_file']}", "data=organs_synthetic", *settings, f"data_root={root}"]
    evaluate.main(compose("evaluate", [*again, f"output={tmp_path}"]))
    found = json.loads((tmp_path / "metrics.json").read_text())
    volumes, measured = (
        ("volumes", "confidence"),
        ("iou", "dice3d", "mean_dice3d", "hd95_mm", "mean_hd95_mm", "hd95_px"),
    )
    assert {key: found[key] for key in (*volumes, *measured)} == {key: trained[key] for key in (*volumes, *measured)}


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A mask with a block of ones at a place that the seed draws."""
    mask = np.zeros(shape, np.uint8)
    places = [np.random.default_rng([seed, axis]).integers(size // 2) for axis, size in enumerate(shape)]
    mask[tuple(slice(at, at + size // 2) for at, size in zip(places, shape, strict=True))] = 1
    return mask


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Colour images and masks NAME.png in the folders images and masks: red where the structure is, else green."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for seed, (name, size) in enumerate(sizes.items()):
        mask = blob(size, seed)
        image = np.where(mask[..., None], (200, 60, 60), (60, 200, 60)) + np.random.default_rng(seed).integers(0, 40, 3)
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def trained(folder: Path, data: str, *overrides: str) -> dict[str, Any]:
    enough = ["loader.steps_per_epoch=12", "trainer.max_steps=12", "task.lr=0.02"]  # until structures are found
    settings = [f"data={data}", "task=medseg", *STEPS, *enough, f"output={folder / 'run'}", *overrides]
    return train.main(compose("train", settings))


def test_images_of_no_clip_are_measured_one_by_one(tmp_path: Path) -> None:
    for split, sizes in {
        "train": {"a": (64, 64), "b": (64, 64)},
        "val": {"c": (64, 64)},
        "test": {"d": (48, 64), "e": (48, 64), "f": (64, 80), "g": (64, 80)},
    }.items():
        write_pictures(tmp_path / "data" / split, sizes)
    classes = "data.classes=[background,polyp]"
    result = trained(tmp_path, "geotiff_folder", f"data.root={tmp_path / 'data'}", classes)
    assert [(v["id"], v["frames"]) for v in result["volumes"]] == [(name, 1) for name in "defg"]
    model = load(result["adapter_file"]).eval()
    wanted = []
    for name in "defg":
        image, mask = (
            np.asarray(Image.open(tmp_path / "data" / "test" / kind / f"{name}.png")) for kind in ("images", "masks")
        )
        shown = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits = whole_image(model, shown, torch.ones(1, *mask.shape, dtype=torch.bool), side=512)
        found = logits[0].argmax(0).numpy() == 1
        wanted.append(2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum()))
    assert min(wanted) > 0.1
    assert [v["dice3d"]["polyp"] for v in result["volumes"]] == pytest.approx(wanted)
    assert result["dice3d"]["polyp"] == pytest.approx(np.mean(wanted))
    assert result["hd95_mm"] == {"polyp": None}


def test_training_on_nifti_pairs(tmp_path: Path) -> None:
    zooms = (0.8, 0.9, 5.0)
    for index in range(3):
        mask = blob((64, 72, 4), index)
        scan = (mask * 200.0 + np.random.default_rng(index).normal(0, 30, mask.shape)).astype(np.int16)
        for name, values in ((f"p{index}", scan), (f"p{index}_mask", mask)):
            path = tmp_path / "data" / ("train", "val", "test")[index] / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.diag([*zooms, 1.0])), path)
    result = trained(tmp_path, "clip_folder", f"data.root={tmp_path / 'data'}", "data.window=[-100,300]")
    (volume,) = result["volumes"]
    assert (volume["id"], volume["frames"]) == ("test/p2", 4)
    assert result["dice3d"] == volume["dice3d"]
    assert result["hd95_px"] == {"structure": None}
    scan = tmp_path / "data" / "test" / "p2.nii.gz"
    out = nibabel.load(labelled(result, scan, tmp_path)["map"])
    found, true = (
        np.asarray(nibabel.load(p).dataobj) == 1 for p in (tmp_path / "out.nii.gz", str(scan)[:-7] + "_mask.nii.gz")
    )
    assert out.header.get_zooms() == pytest.approx(zooms)
    assert 0 < 2 * (found & true).sum() / (found.sum() + true.sum()) == pytest.approx(volume["dice3d"]["structure"])
    distance = monai_metrics.compute_hausdorff_distance(
        *(torch.from_numpy(m)[None, None].float() for m in (found, true)), percentile=95, spacing=zooms
    )
    assert volume["hd95_mm"]["structure"] == pytest.approx(distance.item(), rel=1e-4)


def test_colour_is_learnt_and_mapped(tmp_path: Path) -> None:
    """Clips of photographs, folders of PNG files; a grey file among them counts as colour, too."""
    for split in ("train", "val", "test"):
        folder = tmp_path / "data" / split / "clip"
        write_pictures(tmp_path / split, {"0": (64, 64), "1": (64, 64)})
        folder.parent.mkdir(parents=True)
        (tmp_path / split / "images").rename(folder)
        (tmp_path / split / "masks").rename(folder.with_name("clip_mask"))
    np.savez(
        tmp_path / "data" / "train" / "grey.npz", imgs=np.full((1, 64, 64), 51, np.uint8), gts=blob((64, 64), 5)[None]
    )
    root = f"data.root={tmp_path / 'data'}"
    result = trained(tmp_path, "clip_folder", root, "data.bands=rgb")
    model = load(result["adapter_file"])
    assert model.spec.bands == ("red", "green", "blue")
    assert result["dice3d"]["structure"] > 0.5  # red and green are equally bright
    clips = ClipFolder(str(tmp_path / "data"), bands=["red", "green", "blue"])
    photograph, grey = clips.split("train")[0], clips.split("train")[2]
    wanted = np.asarray(Image.open(tmp_path / "data" / "train" / "clip" / "0.png")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(photograph["image"], wanted, atol=1e-6)
    assert photograph["bands"] == model.spec.bands
    assert torch.equal(grey["image"], torch.full((3, 64, 64), 0.2))
    assert clips.spec.mean[0] != clips.spec.mean[2]
    plain = ClipFolder(str(tmp_path / "data"))
    assert plain.spec.bands == ("grey",)
    np.testing.assert_allclose(plain.split("train")[0]["image"], wanted.mean(0, keepdims=True), atol=1e-6)

    picture = tmp_path / "data" / "test" / "clip" / "0.png"
    settings = [f"input={picture}", f"adapter_file={result['adapter_file']}", f"output={tmp_path / 'out.tif'}"]
    mapped = predict.main(compose("predict", [*settings, "device=cpu", "tile=64", "overlap=0"]))
    sample = clips.split("test")[0]
    with torch.inference_mode():
        logits = whole_image(model.eval(), sample["image"][None], sample["valid"][None], side=512)
    found = np.asarray(Image.open(mapped["map"]))
    np.testing.assert_array_equal(found, logits[0].argmax(0).numpy())
    again = evaluate.main(
        compose("evaluate", [f"adapter_file={result['adapter_file']}", "data=clip_folder", root, "device=cpu"])
    )
    assert again["miou"] == pytest.approx(result["miou"])


def test_what_is_no_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.bands=cmyk: .* grey or rgb; write data\.bands=rgb"):
        ClipFolder(str(tmp_path), bands="cmyk")
    four = np.zeros((1, 8, 8, 4), np.uint8)
    np.savez(tmp_path / "a.npz", imgs=four, gts=four[..., 0])
    with pytest.raises(UserError, match=r"4 channels; colour has three: leave out data\.bands=rgb"):
        ClipFolder(str(tmp_path), bands="rgb", test=["a"]).split("test")[0]


def labelled(run: dict[str, Any], source: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    settings = [f"input={source}", f"adapter_file={run['adapter_file']}", f"output={folder / 'out.nii.gz'}"]
    return predict.main(compose("predict", [*settings, "device=cpu", *overrides]))


def test_labels_lie_on_their_nifti(run: dict[str, Any], tmp_path: Path) -> None:
    affine = np.array([[0, -0.9, 0, 12], [-0.7, 0, 0.1, -30], [0, 0, 4.0, 8], [0, 0, 0, 1]])
    scan = np.random.default_rng(0).normal(40, 200, (70, 45, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(scan, affine), tmp_path / "scan.nii.gz")
    result = labelled(run, tmp_path / "scan.nii.gz", tmp_path, "scale=0.0025", "offset=0.4")
    out = nibabel.load(result["map"])
    assert out.shape == scan.shape
    np.testing.assert_allclose(out.affine, affine, atol=1e-5)
    values = np.asarray(out.dataobj)
    assert values.dtype == np.uint8
    shares = np.bincount(values.ravel(), minlength=8) / values.size
    np.testing.assert_allclose(list(result["shares"].values()), shares)
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000
    assert sum(result["millilitres"].values()) == pytest.approx((values > 0).sum() * voxel, rel=0.02)
    assert Path(result["preview"]).is_file()


def test_a_volume_is_labelled_slice_by_slice(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly more than one of its slices is held, nor of their scores, and 60 take no more memory than 4."""
    given: dict[Any, list[weakref.ref[Any]]] = {}
    most: dict[Any, int] = {}

    def watched(function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            if not tracemalloc.is_tracing():  # the model is loaded by now
                tracemalloc.start()
            made = function(*args, **settings)
            given.setdefault(function, []).append(weakref.ref(made))
            alive = sum(one() is not None for one in given[function])
            most[function] = max(most.get(function, 0), alive)
            return made

        return call

    def peak(slices: int) -> int:
        scan = np.random.default_rng(0).integers(-200, 200, (64, 64, slices), dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(scan, np.diag([1, 1, 3, 1])), tmp_path / f"{slices}.nii")
        labelled(run, tmp_path / f"{slices}.nii", tmp_path, "scale=0.0025", "offset=0.5")
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    monkeypatch.setattr(Clip, "frame", watched(Clip.frame))
    monkeypatch.setattr(windows, "whole_image", watched(windows.whole_image))
    peak(2)  # imports what is imported late
    short, long = peak(4), peak(60)
    assert len(given) == 2
    assert all(len(made) > 60 for made in given.values())
    assert max(most.values()) <= 3
    assert long - short < 64 * 64 * 60 / 2  # bytes: half of the labels, an eighth of the volume as float32


def test_slices_are_labelled_as_they_are_alone(run: dict[str, Any], tmp_path: Path) -> None:
    scan = np.random.default_rng(0).integers(0, 255, (3, 40, 50)).astype(np.uint8)
    np.savez(tmp_path / "all.npz", imgs=scan, spacing=[1.0, 1.0, 3.0])
    np.savez(tmp_path / "one.npz", imgs=scan[1:2], spacing=[1.0, 1.0, 3.0])
    first = np.asarray(nibabel.load(labelled(run, tmp_path / "all.npz", tmp_path / "a")["map"]).dataobj)
    alone = np.asarray(nibabel.load(labelled(run, tmp_path / "one.npz", tmp_path / "b")["map"]).dataobj)
    assert first.shape == (50, 40, 3)
    np.testing.assert_array_equal(first[:, :, 1:2], alone)


def test_labels_of_a_dicom_series_keep_the_place_of_a_missing_slice(run: dict[str, Any], tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    (tmp_path / "s").mkdir()
    series = pydicom.uid.generate_uid()
    for index, z in enumerate((0.0, 3.0, 9.0, 12.0)):  # none at 6
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.InstanceNumber = series, index + 1
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [-20, -30, z], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.WindowCenter, data.WindowWidth = [0.9, 0.7], 40, 400
        data.PixelData = np.random.default_rng(index).normal(40, 150, (40, 48)).astype(np.int16).tobytes()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.save_as(tmp_path / "s" / f"{index}.dcm", enforce_file_format=True)
    out = nibabel.load(labelled(run, tmp_path / "s", tmp_path)["map"])
    assert out.shape == (48, 40, 5)
    np.testing.assert_allclose(out.affine, [[-0.7, 0, 0, 20], [0, -0.9, 0, 30], [0, 0, 3, 0], [0, 0, 0, 1]], atol=1e-5)
    assert not np.asarray(out.dataobj)[:, :, 2].any()


def test_what_is_for_rasters_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(UserError, match="polygons= is for rasters"):
        labelled(run, tmp_path / "a.npz", tmp_path, "polygons=gpkg")
    with pytest.raises(UserError, match=r"written as \.nii"):
        labelled(run, tmp_path / "a.npz", tmp_path, f"output={tmp_path / 'a.tif'}")
