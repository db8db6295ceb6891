"""The tool `track`: prompts as they are written, files out, evaluation, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vfmadapt.build import build_model, build_tracker, compose, entry
from vfmadapt.checkpoint import save
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.frames import Clip, open_clip
from vfmadapt.frames.labelled import labelled_clips
from vfmadapt.track import main
from vfmadapt.track_evaluation import METHODS, truth_prompts
from vfmadapt.tracking.asking import read_prompts
from vfmadapt.tracking.tracker import StepResult
from vfmadapt.tracking_metrics import MEANS

ROOT = Path(__file__).resolve().parents[1]
SIZE = (48, 40)
SPACING = np.array([0.5, 0.8, 3.0])  # column, row, slice
# the smallest that still is SAM2's video model
TINY = [
    "backbone.pretrained=false", "backbone.size=64", "backbone.trunk.width=16", "backbone.trunk.blocks=[1,1,1,1]",
    "backbone.memory_layers=1", "backbone.hidden=64", "backbone.decoder_hidden=64", "device=cpu",
]  # fmt: skip


def scene(frames: int = 7, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masks: a textured disc that moves `step` columns a frame and is gone in the last two; a square."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    noise = np.random.default_rng(0).normal(0, 4, SIZE)
    images, masks = [], []
    for i in range(frames):
        disc = ((y - 18) ** 2 + (x - 12 - step * i) ** 2 <= 49) & (i < frames - 2)
        square = (abs(y - 40) < 5) & (abs(x - 30) < 5)
        images.append(60 + noise + disc * (120 + 10 * np.sin(x - step * i)) + square * 70)
        masks.append(disc * 2 + square * 5)
    return np.stack(images).astype(np.uint8), np.stack(masks).astype(np.uint8)


def write_npz(path: Path, **more: Any) -> Path:
    images, masks = scene()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"imgs": images, "gts": masks, "spacing": SPACING} | more)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "scan.npz")


def track(*overrides: str) -> dict[str, Any]:
    result = main(compose("track", [*TINY, *overrides]))
    json.dumps(result, allow_nan=False)
    return result


def test_a_folder_gets_all_files_that_fit(volume: Path, tmp_path: Path) -> None:
    import nibabel

    result = track(f"input={volume}", f"prompt={volume}", f"output={tmp_path / 'out'}")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["frames.csv", "masks.nii.gz", "overlay.mp4"]
    assert result["outputs"] == [str(tmp_path / "out" / n) for n in ("masks.nii.gz", "overlay.mp4", "frames.csv")]
    assert [(s["name"], s["label"]) for s in result["structures"]] == [("2", 2), ("5", 5)]
    assert result["frames"] == 7
    assert result["frames_per_second"] == pytest.approx(7 / result["seconds"])
    image = nibabel.load(tmp_path / "out" / "masks.nii.gz")
    assert image.header.get_zooms() == pytest.approx(SPACING)
    found, (_, masks) = np.asarray(image.dataobj).transpose(2, 1, 0), scene()
    at = result["structures"][0]["prompt_frame"]
    assert set(np.unique(found)) <= {0, 2, 5}
    assert (found[at] == masks[at]).mean() > 0.95  # the mask that was given, at the model's resolution


def test_a_file_is_written_alone_and_names_are_kept(volume: Path, tmp_path: Path) -> None:
    result = track(
        f"input={volume}",
        "prompt=[{frame: 2, object: tumour, box: [8,10,22,26]}, {frame: 2, object: node, points: [[30,40]]}]",
        f"output={tmp_path / 'o' / 't.csv'}",
    )
    assert [s["name"] for s in result["structures"]] == ["tumour", "node"]
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["t.csv"]
    assert (tmp_path / "o" / "t.csv").read_text().count("tumour,1") == 7


def test_dicom_in_gives_a_dicom_segmentation(dicom_series: Path, tmp_path: Path) -> None:
    result = track(f"input={dicom_series}", "prompt=[{frame: 1, box: [2,2,9,9]}]", f"output={tmp_path / 'o'}")
    assert result["outputs"][-1].endswith("masks.dcm")


def test_one_frame_sixteen_bits_and_nan(tmp_path: Path) -> None:
    images = scene()[0].astype(np.float32) * 200
    images[0, :3] = np.nan
    np.savez(tmp_path / "float.npz", imgs=images[:1])
    np.savez(tmp_path / "deep.npz", imgs=images[1:3].astype(np.uint16))
    for name, frames in (("float", 1), ("deep", 2)):
        given = f"input={tmp_path / name}.npz", "prompt=[{frame: 0, box: [5,10,20,26]}]"
        assert track(*given, f"output={tmp_path / name}.nii.gz")["frames"] == frames


def test_whole_frames_are_followed_without_focus(volume: Path, tmp_path: Path) -> None:
    asked = [f"input={volume}", "prompt=[{frame: 1, box: [1,2,9,9]}]", f"output={tmp_path / 'o.csv'}"]
    assert track(*asked, "focus=null")["frames"] == track(*asked, "focus=2")["frames"]


def test_an_adapter_file_says_which_model(volume: Path, tmp_path: Path) -> None:
    cfg = compose("track", [*TINY, "backbone.train_decoder=true"])
    spec = DataSpec(name="made", bands=(), classes=(ClassSpec("tumour", (9, 9, 9)),), mean=(), std=())
    model = build_tracker({"backbone": cfg.backbone, "adapter": entry("adapter", "dd")}, spec)
    model.net.mask_decoder.pred_obj_score_head.proj_out.bias.data -= 100  # it sees no object anywhere
    save(tmp_path / "a.safetensors", model)
    given = f"input={volume}", "prompt=[{frame: 3, box: [8,10,22,26]}]", f"output={tmp_path / 'o.csv'}"
    frozen, adapted = (track(*given, *file) for file in ([], [f"adapter_file={tmp_path / 'a.safetensors'}"]))
    assert frozen["structures"][0]["frames_present"] > adapted["structures"][0]["frames_present"] == 0


def test_an_adapter_file_of_a_model_without_memory(volume: Path, tmp_path: Path) -> None:
    classes = ClassSpec("a", (1, 1, 1)), ClassSpec("b", (2, 2, 2))
    spec = DataSpec("made", ("r", "g", "b"), classes, (0.0,) * 3, (1.0,) * 3)
    cfg = compose("train", ["backbone=vfm_tiny", "adapter=frozen", "head=linear"])
    save(tmp_path / "a.safetensors", build_model(cfg, spec))
    with pytest.raises(UserError, match="follows no objects"):
        track(f"input={volume}", f"prompt={volume}", f"adapter_file={tmp_path / 'a.safetensors'}")


def by_object(given: Any) -> dict[int, Any]:
    return {prompt.object: prompt for prompt in read_prompts(given).prompts}


def test_prompts_from_mask_files(volume: Path, tmp_path: Path) -> None:
    masks = scene()[1]
    found = by_object(str(volume))
    assert set(found) == {2, 5}
    np.testing.assert_array_equal(found[2].mask, masks[found[2].frame] == 2)
    palette = Image.fromarray(masks[1], mode="P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 200, 30, 40, 1, 1, 1, 2, 2, 2, 90, 80, 70])
    palette.save(tmp_path / "m.png")
    found = by_object([{"mask": str(tmp_path / "m.png"), "frame": 1}])
    assert {label: prompt.frame for label, prompt in found.items()} == {2: 1, 5: 1}
    np.testing.assert_array_equal(found[5].mask, masks[1] == 5)
    one = by_object([{"mask": str(volume), "frame": 3, "object": 9}])
    np.testing.assert_array_equal(one[9].mask, masks[3] > 0)


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_prompts_from_a_list_in_a_file(volume: Path, tmp_path: Path, name: str) -> None:
    listed = [
        {"frame": 1, "object": "liver", "points": [[3, 4], [5, 6]], "labels": [1, 0]},
        {"frame": 0, "object": 1, "box": [1, 2, 3, 4]},
        {"frame": 2, "object": "liver", "points": [[7, 8]]},
        {"frame": 1, "object": "lesion", "mask": "scan.npz"},  # beside the list
    ]
    (tmp_path / name).write_text(json.dumps(listed))
    asked = read_prompts(str(tmp_path / name))
    assert asked.names == {1: "1", 2: "liver", 3: "lesion"}
    assert [(p.frame, p.object) for p in asked.prompts] == [(1, 2), (0, 1), (2, 2), (1, 3)]
    assert (asked.prompts[0].labels, asked.prompts[1].box) == ((1, 0), (1, 2, 3, 4))


def test_prompts_that_cannot_be_meant(volume: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", gts=np.zeros((7, *SIZE), np.uint8))
    (tmp_path / "bad.yaml").write_text("[{frame: ")
    (tmp_path / "word.yaml").write_text("frame: 1")
    for given, text in (
        ("nowhere.png", "no such file"),
        (str(tmp_path / "bad.yaml"), "cannot be read"),
        (str(tmp_path / "word.yaml"), "wanted is a list"),
        (str(tmp_path / "empty.npz"), "holds no object there"),
        ([{"mask": str(volume), "frame": 70}], "there is no frame 70"),
        ([{"frame": 0, "object": [1], "box": [1, 2, 3, 4]}], "an object a label from 1 or a name"),
        ([{"frame": "a", "box": [1, 2, 3, 4]}], "a frame is a whole number"),
        (
            [{"frame": 1, "points": [[2, 3]]}, {"frame": 1, "box": [1, 2, 3, 4]}],
            "object 1 is prompted twice in frame 1",
        ),
        ([{"frame": 0, "boxes": [1, 2, 3, 4]}], "unknown key 'boxes'"),
        ([], "wanted is a list"),
    ):
        with pytest.raises(UserError, match=text) as raised:
            read_prompts(given)
        assert "\n" not in str(raised.value)


def cut_video(folder: Path) -> Path:
    import av

    with av.open(str(folder / "whole.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for image in scene()[0]:
            frame = av.VideoFrame.from_ndarray(np.repeat(image[..., None], 3, 2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    return folder / "cut.mp4"


def sizes_differ(folder: Path) -> Path:
    (folder / "images").mkdir()
    for i, size in enumerate((SIZE, (30, 30))):
        Image.fromarray(np.zeros(size, np.uint8)).save(folder / "images" / f"{i}.png")
    return folder / "images"


def empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def no_frames(folder: Path) -> Path:
    return write_npz(folder / "empty.npz", imgs=np.zeros((0, *SIZE), np.uint8))


def whole(folder: Path) -> Path:
    return write_npz(folder / "scan.npz")


@pytest.mark.parametrize(
    ("make", "override", "text"),
    [
        (cut_video, "", "cut.mp4 is not a readable video"),
        (sizes_differ, "", "must be of one size"),
        (empty_folder, "", "neither images"),
        (no_frames, "", "shape (0, 48, 40)"),
        (whole, "input=null", "input= is missing"),
        (whole, "prompt=null", "prompt= is missing"),
        (whole, "prompt=[{frame: 9, box: [1,2,9,9]}]", "there are 7 frames"),
        (whole, "prompt=[{frame: 1, box: [1,2,41,9]}]", "(41, 9) lies outside the frame"),
        (whole, "prompt=[{frame: 1, object: 300, box: [1,2,9,9]}]", "from 1 to 255"),
        (whole, "output=o.jpg", "allowed are a folder and files that end in .nii.gz"),
        (whole, "output=o.dcm", "refers to the slices of a DICOM volume"),
        (whole, "adapter_file=nowhere.safetensors", "no such adapter file"),
        (whole, "reader={key: other}", "has the keys imgs, gts, spacing"),
        (whole, "ejection_fraction=lv", "no such structure"),
        (whole, "backbone.pretrained=null", "has no weights"),
        (whole, "prompt=3", "null or a text or a list"),
        (whole, "focus=0.5", "at least as wide as the prompts"),
        (whole, "window=[3,3]", "give the values that are black and white"),
        (whole, "window=[3]", "give the values that are black and white"),
        (whole, "data=camus", "write evaluate=test beside it"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, make: Any, override: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vfmadapt.backbones.sam2_video.SHIPPED", tmp_path)
    given = {"input": str(make(tmp_path)), "prompt": "[{frame: 1, box: [1,2,9,9]}]", "output": "o.csv"}
    key, _, value = override.partition("=")
    overrides = [f"{k}={v}" for k, v in (given | ({key: value} if key else {})).items()]
    with pytest.raises(UserError) as raised:
        track(*overrides)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("o.*"))


def test_the_command_line_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "track.py"), f"input={cut_video(tmp_path)}", "prompt=m.png"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_clips_with_masks_are_found_by_their_names(tmp_path: Path) -> None:
    import nibabel

    images, masks = (a.transpose(2, 1, 0) for a in scene())
    for name in ("a.nii.gz", "images/b_0000.nii.gz", "imagesTr/c.nii", "p/images/p_frames.nii", "lonely.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(images, np.eye(4)), tmp_path / name)
    for name in ("a_gt.nii.gz", "masks/b.nii.gz", "labelsTr/c.nii", "p/targets/p_labels.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(masks, np.eye(4)), tmp_path / name)
    (tmp_path / "d").mkdir()
    (tmp_path / "d_masks").mkdir()
    for i, (image, mask) in enumerate(zip(*scene(), strict=True)):
        Image.fromarray(image).save(tmp_path / "d" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "d_masks" / f"{i}.png")
    write_npz(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", imgs=scene()[0])
    found = labelled_clips(tmp_path)
    assert [clip.id for clip in found] == ["a", "d", "e", "images/b_0000", "imagesTr/c", "p/images/p_frames"]
    for labelled in found:
        clip, truth = labelled.open()
        with clip, truth:
            np.testing.assert_array_equal(truth.frame(2)[0], scene()[1][2])


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", gts=scene()[1][1:])
    with pytest.raises(UserError, match="6 masks of 48 x 40 pixels for 7 frames"):
        track(f"evaluate={tmp_path}")
    write_npz(tmp_path / "a.npz", gts=scene()[1] * 0.5)
    with pytest.raises(UserError, match=r"holds 2\.5; labels are whole numbers"):
        track(f"evaluate={tmp_path}")
    for images, masks in ((scene()[0], scene()[1] * 0), (scene()[0][:1], scene()[1][:1])):
        write_npz(tmp_path / "a.npz", imgs=images, gts=masks)
        with pytest.raises(UserError, match="nothing can be followed"):
            track(f"evaluate={tmp_path}")
    with pytest.raises(UserError, match="allowed are middle and first"):
        track(f"evaluate={tmp_path}", "prompt=last")
    with pytest.raises(UserError, match="no such folder"):
        track("evaluate=nowhere")
    with pytest.raises(UserError, match="no clip with masks"):
        track(f"evaluate={empty_folder(tmp_path)}")


def test_the_true_masks_that_prompt() -> None:
    masks = scene()[1]
    masks[:5] = np.where(masks[:5] == 5, 0, masks[:5])  # the square appears in frame 5, the disc is gone in it
    places = {place: truth_prompts(masks.__getitem__, range(7), place) for place in ("middle", "first")}
    assert [(p.object, p.frame) for p in places["middle"]] == [(2, 3), (5, 5)]
    assert [(p.object, p.frame) for p in places["first"]] == [(2, 0), (5, 5)]
    np.testing.assert_array_equal(places["middle"][1].mask, masks[5] == 5)
    some = truth_prompts(masks.__getitem__, [1, 4], "middle", ignored=5)
    assert [(p.object, p.frame) for p in some] == [(2, 4)]


def perfect(model: object, clip: Clip, prompts: Any, **_: Any) -> Iterator[tuple[int, StepResult]]:
    with open_clip(clip.info.path, key="gts") as masks:
        for index, labels in masks.iterate():
            logits = torch.stack([torch.from_numpy((labels[0] == p.object) - 0.5).float() for p in prompts])
            yield index, StepResult(logits, torch.ones(len(prompts)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A volume with both structures, one of another pace with the disc alone."""
    write_npz(tmp_path / "set" / "a.npz")
    images, masks = scene(step=2)
    write_npz(tmp_path / "set" / "b.npz", imgs=images, gts=np.where(masks == 2, 2, 0))
    return tmp_path / "set"


def test_evaluation_of_a_perfect_tracker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfmadapt.tracking.tracker.track", perfect)
    result = track(f"evaluate={folder}", "prompt=middle")
    for name in ("dice3d", "dice", "j", "f", "jf"):
        assert result[name] == 1
        assert result["confidence"][name] == [1, 1]
    for name in ("hd95", "asd", "centre_distance", "false_positive_frames", "missed_frames"):
        assert result[name] == 0
    assert result["unit"] == "mm"
    assert [v["id"] for v in result["volumes"]] == ["a", "b"]
    assert list(result["structures"]) == ["2", "5"]
    assert {name + method for name in MEANS for method in METHODS} <= set(result["volumes"][0])


def test_evaluation_of_the_baselines_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfmadapt.tracking.tracker.track", perfect)
    result = track(f"evaluate={folder}")
    second, disc = result["volumes"][1], scene(step=2)[1] == 2
    others = [i for i in range(7) if i != 3]
    shared = sum((disc[i] & disc[3]).sum() for i in others)
    assert second["dice3d_copy"] == pytest.approx(2 * shared / sum(disc[i].sum() + disc[3].sum() for i in others))
    assert second["false_positive_frames_copy"] == 2
    assert second["dice3d_copy"] < second["dice3d_flow"] < 1
    assert second["dice_flow"] > 0.9  # the disc's own texture carries it along
    first = result["volumes"][0]
    assert first["structures"]["5"]["dice_copy"] == 1
    both = [first["structures"][label]["dice_copy"] for label in ("2", "5")]
    assert first["dice_copy"] == pytest.approx(np.mean(both))
    assert result["dice_copy"] == pytest.approx((first["dice_copy"] + second["dice_copy"]) / 2)
    assert result["structures"]["5"]["confidence"]["dice_copy"] is None  # of one clip


def test_evaluation_with_the_model_itself_and_unknown_spacing(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", imgs=scene()[0], gts=scene()[1])
    write_npz(tmp_path / "b.npz")
    result = track(f"evaluate={tmp_path}", "prompt=first")
    assert [v["unit"] for v in result["volumes"]] == ["px", "mm"]
    assert result["unit"] is None
    assert result["hd95"] is result["hd95_copy"] is None  # millimetres and pixels have no mean
    assert 0 <= result["dice3d"] <= 1
    assert result["seconds_per_frame"] > 0
    assert result["volumes"][0]["structures"]["2"]["prompt_frame"] == 0


def test_baselines_on_real_volumes(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfmadapt.tracking.tracker.track", perfect)
    result = track(f"evaluate={real_data / 'ct_lesions'}", "prompt=middle")
    assert len(result["volumes"]) == 4
    assert result["dice"] == 1
    assert result["dice_copy"] == pytest.approx(0.70, abs=0.01)
    assert result["dice_flow"] == pytest.approx(0.77, abs=0.015)
