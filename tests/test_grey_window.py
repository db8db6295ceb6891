"""The values that the tracker sees black and white: as given, as trained, or as the clip tells."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vfmadapt.build import build_tracker, compose, entry
from vfmadapt.checkpoint import save
from vfmadapt.contracts import DataSpec
from vfmadapt.frames import open_clip
from vfmadapt.track import main, show, windows
from vfmadapt.track_evaluation import cases
from vfmadapt.tracking import baselines, overlay, tracker

nibabel = pytest.importorskip("nibabel")
# the smallest that still is SAM2's video model
TINY = [
    "backbone.pretrained=false", "backbone.size=64", "backbone.trunk.width=16", "backbone.trunk.blocks=[1,1,1,1]",
    "backbone.memory_layers=1", "backbone.hidden=64", "backbone.decoder_hidden=64", "device=cpu",
]  # fmt: skip
SOFT = (-160.0, 240.0)


def chest(padding: bool = False) -> np.ndarray:
    """Hounsfield units (T, H, W): air, fat, an organ, bone, a lesion of 40 HU more; beyond the scan -3024."""
    y, x = np.mgrid[:48, :48]
    slices = []
    for i in range(5):
        body = (y - 24) ** 2 / 400 + (x - 24) ** 2 / 480 <= 1
        values = np.where(body, -100, -1000)
        values[(y - 24) ** 2 + (x - 22) ** 2 <= 140] = 60
        values[(abs(y - 38) < 3) & (abs(x - 24) < 4)] = 900
        values[(y - 22) ** 2 + (x - 18 - i) ** 2 <= 16] = 100
        if padding:
            values[(y - 24) ** 2 + (x - 24) ** 2 > 27**2] = -3024
        slices.append(values + np.random.default_rng(i).integers(-8, 9, y.shape) * (values > -3024))
    return np.stack(slices).astype(np.int16)


def write(folder: Path, name: str, values: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.T, np.diag([0.8, 0.8, 3.0, 1.0])), folder / name)
    return folder / name


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    masks = (chest() > 80) & (chest() < 200)
    write(tmp_path / "set", "a_mask.nii.gz", masks.astype(np.uint8))
    return write(tmp_path / "set", "a.nii.gz", chest())


def adapter(path: Path, window: list[float] | None) -> Path:
    """An adapter file whose training data were shown by a window."""
    cfg = compose("track", TINY)
    spec = DataSpec(name="made", bands=(), classes=(), mean=(), std=())
    model = build_tracker({"backbone": cfg.backbone, "adapter": entry("adapter", "dd")}, spec)
    return save(path, model, training={"data": {"root": "x", "window": window}})


@pytest.mark.parametrize("padding", [False, True])
def test_ct_is_shown_as_soft_tissue(tmp_path: Path, padding: bool) -> None:
    assert open_clip(write(tmp_path / "a", "a.nii", chest(padding))).window() == SOFT
    low, high = open_clip(write(tmp_path / "a", "b.nii", chest(padding)[:, 15:30, 15:30])).window()
    assert (low, high) != SOFT  # nothing but body: its own values tell
    assert -130 < low < high < 130


def test_what_is_no_ct_keeps_its_own_values(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for name, values in (
        ("mr", noise.gamma(2, 200, (4, 20, 20)).astype(np.int16)),
        ("phase", noise.integers(-4096, 4096, (4, 20, 20)).astype(np.int16)),
        ("scaled", noise.normal(0, 1, (4, 20, 20)).astype(np.float32)),
    ):
        found = open_clip(write(tmp_path / "a", f"{name}.nii", values)).window()
        assert found == pytest.approx(np.percentile(values, (0.5, 99.5)))
    assert open_clip(write(tmp_path / "a", "c.nii", np.full((4, 9, 9), -2000, np.int16))).window()[0] == -2000
    assert open_clip(write(tmp_path / "a", "d.nii", chest().astype(np.uint8))).window() == (0, 255)


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[float, float]]]:
    """Windows that the tracker, optical flow and the overlay are given from here on."""
    found: dict[str, set[tuple[float, float]]] = {}

    def spy(original: Any, *args: Any) -> Any:
        found.setdefault(original.__module__.rpartition(".")[2], set()).add(args[1])
        return original(*args)

    for module, name in ((tracker, "pictures"), (baselines, "_grey"), (overlay, "_rgb")):
        monkeypatch.setattr(module, name, partial(spy, getattr(module, name)))
    return found


def test_all_see_what_the_adapter_was_trained_on(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = f"adapter_file={adapter(tmp_path / 'a.safetensors', [-155.0, 245.0])}"
    found = seen(monkeypatch)
    asked = [f"input={scan}", "prompt=[{frame: 2, box: [15,17,26,28]}]", f"output={tmp_path / 'o.gif'}"]
    main(compose("track", ["device=cpu", file, *asked]))
    assert found == {"tracker": {(-155, 245)}, "overlay": {(-155, 245)}}
    found.clear()
    main(compose("track", ["device=cpu", file, f"evaluate={scan.parent}"]))
    assert found == {"tracker": {(-155, 245)}, "baselines": {(-155, 245)}}


@pytest.mark.parametrize(
    ("given", "trained", "wanted"),
    [
        ("null", None, SOFT),
        ("null", [-155.0, 245.0], (-155, 245)),
        ("[-50,150.5]", [-155.0, 245.0], (-50, 150.5)),
        ("[100,0]", None, (100, 0)),
    ],
)
def test_given_goes_before_trained_before_the_clips_own(
    scan: Path, tmp_path: Path, given: str, trained: Any, wanted: tuple[float, float]
) -> None:
    file = adapter(tmp_path / "a.safetensors", trained)
    clip = open_clip(scan)
    show(clip, *windows(compose("track", [f"adapter_file={file}", f"window={given}"])))
    assert clip.window() == wanted


def test_a_window_of_hounsfield_units_is_not_for_eight_bits(tmp_path: Path) -> None:
    cfg = compose("track", [f"adapter_file={adapter(tmp_path / 'a.safetensors', [-160, 240])}"])
    clip = open_clip(write(tmp_path / "a", "a.nii", chest().clip(0, 255).astype(np.uint8)))
    show(clip, *windows(cfg))
    assert clip.window() == (0, 255)
    show(clip, None, (10.0, 200.0))
    assert clip.window() == (10, 200)
    show(clip, (-160.0, 240.0), None)
    assert clip.window() == (-160, 240)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [("window=null", (-155, 245)), ("data.window=[-9,90]", (-9, 90)), ("window=[1,2]", (1, 2))],
)
def test_a_data_source_says_how_its_clips_are_shown(scan: Path, tmp_path: Path, more: str, wanted: Any) -> None:
    file = adapter(tmp_path / "a.safetensors", [-155.0, 245.0])
    data = ["data=clip_folder", f"data.root={scan.parent}", "data.test=[a]", "evaluate=test", f"adapter_file={file}"]
    (case,) = cases(compose("track", [*data, more]))
    with case.open() as (clip, labels):
        assert clip.window() == wanted
        assert labels(2).any()
