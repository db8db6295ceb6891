"""The generated clips: equal for equal seeds, what each style promises, and the data sources over them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vfmadapt.contracts import ClipSource, DataSource
from vfmadapt.datasets._anatomy import Bend, Moment, Solid, paint
from vfmadapt.datasets._cine_scene import CLASS_NAMES, EVENT_STYLES, ORGAN_STYLES, STYLES, Cine, render_clip
from vfmadapt.datasets._cine_sensors import EchoSensor, Occluder
from vfmadapt.datasets.cine_synthetic import CineSynthetic
from vfmadapt.datasets.organs_synthetic import CLASSES, OrgansSynthetic
from vfmadapt.errors import UserError
from vfmadapt.frames.labelled import labelled_clips

SIZE = 96
LABEL = {name: index for index, name in enumerate(CLASS_NAMES)}


def areas(labels: np.ndarray, name: str) -> list[int]:
    return [int((frame == LABEL[name]).sum()) for frame in labels]


@pytest.mark.parametrize("style", [*STYLES, *ORGAN_STYLES, *EVENT_STYLES])
def test_a_clip_is_a_function_of_its_seed(style: str) -> None:
    one, again, other = (render_clip(seed, style=style, frames=2, size=SIZE) for seed in (3, 3, 4))
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape == one.labels.shape == (2, SIZE, SIZE)
    assert (one.seconds is None) == (style in ("ct", "lesion", *ORGAN_STYLES)) == (one.spacing[0] is not None)


FROZEN = {
    "ct": (1.732883387, 90.277, {1: 384, 2: 4, 5: 860, 6: 571, 7: 332}),
    "mr": (2.935074439, 88.809, {1: 54, 3: 3174, 4: 820, 5: 628, 6: 712, 7: 988}),
    "cardiac": (1.883146096, 96.791, {3: 269, 7: 194, 8: 802, 9: 1356, 10: 892}),
    "echo": (1.708416486, 21.928, {8: 1418, 9: 685, 10: 3006, 11: 401}),
    "lesion": (0.998698829, 133.604, {1: 705, 3: 3515, 6: 2547}),
}  # pixel in mm, mean grey, pixels by label of seed 3: what the shipped weights of sam2_mini were trained on


@pytest.mark.parametrize("style", STYLES)
def test_clips_of_version_2_do_not_change(style: str) -> None:
    clip = render_clip(3, style=style, frames=2, size=SIZE)
    pixel, grey, counts = FROZEN[style]
    assert clip.spacing[1] == pytest.approx(pixel)
    assert clip.image.mean() == pytest.approx(grey, abs=0.05)  # processors round differently
    found = {label: int((clip.labels == label).sum()) for label in counts}
    assert found == pytest.approx(counts, abs=3)
    assert {0, *counts} == set(np.unique(clip.labels).tolist())


def test_lesions_of_ct_stacks_appear_and_vanish() -> None:
    for seed in (5, 6, 12):  # slices far enough apart to leave the lesion at both ends
        found = np.array(areas(render_clip(seed, style="ct", frames=12, size=64).labels, "lesion"))
        present = np.flatnonzero(found)
        assert found[0] == found[-1] == 0
        assert len(present) == present[-1] - present[0] + 1 >= 4
        assert max(found[present[0]], found[present[-1]]) < 0.7 * found.max()


def test_a_close_up_shows_a_lesion_that_most_slices_do_not_cut() -> None:
    for seed in (2, 4, 6):
        clip = render_clip(seed, style="lesion", frames=12, size=64)
        found = np.array(areas(clip.labels, "lesion"))
        present = np.flatnonzero(found)
        assert 2 <= len(present) == present[-1] - present[0] + 1 < 12
        largest = clip.labels[found.argmax()] == LABEL["lesion"]
        wide = max(int(largest.any(axis).sum()) for axis in (0, 1))
        assert 64 / 8 <= wide <= 64 / 2
        assert clip.spacing[1] * 64 >= 50


def test_hearts_beat_and_the_wall_keeps_around_the_cavity() -> None:
    for style in ("cardiac", "echo"):
        clip = render_clip(1, style=style, frames=24, size=64)
        cavity = areas(clip.labels, "left ventricle")
        assert min(cavity) < 0.85 * max(cavity)
        assert min(areas(clip.labels, "myocardium")) > 0


def test_breath_moves_the_liver_but_hardly_the_spine() -> None:
    clip = render_clip(2, style="mr", frames=12, size=64)
    rows = [np.nonzero(frame == LABEL["liver"])[0].min() for frame in clip.labels]
    assert (max(rows) - min(rows)) * clip.spacing[1] > 4  # mm


def test_labels_of_ultrasound_lie_inside_the_sector() -> None:
    clip = render_clip(0, style="echo", frames=2, size=SIZE)
    outside = clip.image.max(0) == 0
    assert outside[0, 0]
    assert outside[0, -1]
    assert not clip.labels[:, 0, :20].any()


def comes_back(clip: Cine) -> bool:
    """Whether a structure of some size is there, then gone, and there again."""
    shown = [np.flatnonzero(areas(clip.labels, name)) for name in CLASS_NAMES[1:] if max(areas(clip.labels, name)) > 7]
    return any(len(at) <= at[-1] - at[0] for at in shown)


def change_of_grey(clip: Cine) -> float:
    """By how much, of 255, the mean grey of a structure changes that is there all the time: the largest of these."""
    changes = [0.0]
    for name in CLASS_NAMES[1:]:
        if min(areas(clip.labels, name)) > 7:
            means = [image[labels == LABEL[name]].mean() for image, labels in zip(clip.image, clip.labels, strict=True)]
            changes.append(max(means) - min(means))
    return max(changes)


@pytest.mark.parametrize(("style", "low", "high"), [("mr_through", 0.7, 1), ("shadow", 0.7, 1), ("mr", 0, 0.2)])
def test_structures_vanish_and_come_back(style: str, low: float, high: float) -> None:
    found = [comes_back(render_clip(seed, style=style, frames=16, size=SIZE)) for seed in range(6)]
    assert low <= np.mean(found) <= high


@pytest.mark.parametrize(("style", "low", "high"), [("bolus", 0.9, 1), ("perfusion", 0.9, 1), ("cardiac", 0, 0.3)])
def test_contrast_agent_changes_the_grey_of_structures(style: str, low: float, high: float) -> None:
    changes = [change_of_grey(render_clip(seed, style=style, frames=8, size=64)) for seed in range(8)]
    assert low <= np.mean(np.array(changes) > 50) <= high


def test_the_right_ventricle_brightens_before_the_left() -> None:
    clip = render_clip(0, style="perfusion", frames=20, size=64)
    peaks = [
        np.argmax([image[labels == LABEL[f"{side} ventricle"]].mean()
                   for image, labels in zip(clip.image, clip.labels, strict=True)])
        for side in ("right", "left")
    ]  # fmt: skip
    assert peaks[0] < peaks[1]


def test_what_an_occluder_hides_is_dark_and_not_visible() -> None:
    sensor = EchoSensor(np.random.default_rng(0), (96, 96), 2.0, Occluder(40, 0.2, -1.0, 0.5))
    plane = Bend(()).plane((96, 96), (0, 0), 2.0, 0.0)
    for frame in range(4):
        shown = sensor(np.full((96, 96), 0.3, np.float32), plane.x, plane.y)
        hidden = sensor.inside & ~sensor.visible(frame)
        assert 0.05 < hidden.sum() / sensor.inside.sum() < 0.5
        assert not hidden[:15].any()
        assert np.median(shown[hidden]) == 0 < np.median(shown[sensor.visible(frame)])


def test_styles_with_events_are_drawn_only_by_name(tmp_path: Path) -> None:
    assert "v2_ct-mr-cardiac-echo-lesion_to_ct-mr-cardiac-echo-lesion_" in CineSynthetic(tmp_path).folder.name
    assert "v2_shadow_to_bolus_" in CineSynthetic(tmp_path, styles=["shadow"], test_styles=["bolus"]).folder.name


def test_a_solid_is_cut_where_it_lies_and_shows_in_part_at_its_ends() -> None:
    ball = Solid("liver", (0, 0, 0), (10, 10, 10), label=3)
    plane = Bend(()).plane((41, 41), (-20, -20), 1.0, 0.0)
    palette, flat = {"air": 0.0, "liver": 1.0}, np.zeros((41, 41), np.float32)
    middle = paint([ball], palette, plane, Moment(), contrast=1, texture=flat)
    assert (middle.labels == 3).sum() == pytest.approx(np.pi * 100, rel=0.03)
    assert middle.brightness.sum() == pytest.approx(np.pi * 100, rel=0.02)
    end = paint([ball], palette, plane, Moment(z=10.0), contrast=1, texture=flat, thickness=5)
    assert 0.1 < end.brightness[20, 20] < 0.9
    assert not paint([ball], palette, plane, Moment(z=11), contrast=1, texture=flat).labels.any()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CineSynthetic:
    data = CineSynthetic(
        tmp_path_factory.mktemp("cine"), train=2, val=1, test=2, frames=3, size=64, styles=["mr", "echo"],
        test_styles=["ct"], workers=1,
    )  # fmt: skip
    data.prepare()
    return data


def test_training_and_test_clips_have_their_styles(source: CineSynthetic) -> None:
    assert isinstance(source, ClipSource)
    assert isinstance(source, DataSource)
    train, test = source.clips("train"), source.clips("test")
    assert [train[i]["id"] for i in range(2)] == ["train/mr_00000", "train/echo_00001"]
    assert [test[i]["id"] for i in range(2)] == ["test/ct_00000", "test/ct_00001"]
    clip = test[0]
    assert clip["image"].shape == (3, 1, 64, 64)
    assert clip["image"].dtype == torch.float32
    assert 0 <= clip["image"].min() < clip["image"].max() <= 1
    assert clip["mask"].shape == (3, 64, 64)
    assert clip["spacing"][0] is not None
    assert train[0]["spacing"][0] is None


def test_some_frames_are_those_of_the_whole_clip(source: CineSynthetic) -> None:
    clips = source.clips("train")
    whole, part = clips[1], clips.read(1, [2, 0])
    assert torch.equal(part["image"], whole["image"][[2, 0]])
    assert torch.equal(part["mask"], whole["mask"][[2, 0]])


def test_frames_are_samples_in_order(source: CineSynthetic) -> None:
    frames = source.split("train")
    assert [frames[i]["id"] for i in (0, 2, 3)] == [
        "train/mr_00000/0000", "train/mr_00000/0002", "train/echo_00001/0000",
    ]  # fmt: skip
    assert frames[4]["image"].shape == (1, 64, 64)
    assert frames[4]["spacing"] == source.clips("train")[1]["spacing"]


def test_generated_folders_can_be_evaluated_as_they_are(source: CineSynthetic) -> None:
    assert [clip.id for clip in labelled_clips(source.folder / "test")] == ["ct_00000", "ct_00001"]


def test_every_class_of_the_organs_is_cut_often(tmp_path: Path) -> None:
    data = OrgansSynthetic(tmp_path, train=16, val=0, test=1, slices=4, size=128, workers=1)
    data.prepare()
    clips = data.clips("train")
    cut = torch.stack([F.one_hot(clips[i]["mask"], len(CLASSES)).flatten(1, 2).any(1) for i in range(16)])
    slices, volumes = (dict(zip(CLASSES, found.float().mean(0).tolist(), strict=True)) for found in
                       (cut.flatten(0, 1), cut.any(1)))  # fmt: skip
    assert min(volumes[name] for name in CLASSES[3:]) > 0.9
    assert min(slices[name] for name in CLASSES[3:]) > 0.4
    assert min(volumes[name] for name in ("lesion", "nodule")) > 0.5
    assert min(slices[name] for name in ("lesion", "nodule")) > 0.1
    assert data.spec.mean[0] == pytest.approx(np.mean([clips[i]["image"].mean() for i in range(16)]), abs=0.03)


@pytest.mark.parametrize("slices", [1, 4, 20])
def test_slices_span_the_abdomen_whatever_their_number(slices: int) -> None:
    step = render_clip(5, style="organs_mr", frames=slices, size=64).spacing[0]
    assert step is not None
    assert 120 <= step * slices <= 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"styles": ["pet"]}, "no style pet; choose from ct, mr"), ({"frames": 0}, "frames=0 >= 1"), ({"size": 8}, "64")],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CineSynthetic("x", **settings)  # type: ignore[arg-type]


def test_unknown_splits(source: CineSynthetic) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        source.clips("dev")
