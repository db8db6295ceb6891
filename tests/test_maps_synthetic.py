import json
from colorsys import rgb_to_hsv
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from scipy.ndimage import binary_dilation, distance_transform_edt

from vfmadapt import predict, train
from vfmadapt.build import compose
from vfmadapt.contracts import DataSource, Samples, UserError
from vfmadapt.datasets import _maps_curves as curves
from vfmadapt.datasets._maps_areas import draw_houses
from vfmadapt.datasets._maps_family import mixed_style, own_style, training_style
from vfmadapt.datasets._maps_files import write_tile
from vfmadapt.datasets._maps_lettering import _font, _hidden, _straight, _Writer
from vfmadapt.datasets._maps_lines import draw_railway, draw_river, draw_roads, draw_walls
from vfmadapt.datasets._maps_plates import NAMES, Plates
from vfmadapt.datasets._maps_scan import ORDER, scan
from vfmadapt.datasets._maps_sheet import _branch, _free
from vfmadapt.datasets._maps_styles import Road, Style
from vfmadapt.datasets.geotiff_folder import GeotiffFolder
from vfmadapt.datasets.maps_synthetic import CLASSES, STYLES, TEST_STYLE, TRAIN_STYLES, MapsSynthetic, render_sheet

SIZE = 96
COUNTS = {"train": 5, "val": 1, "test": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> MapsSynthetic:
    made = MapsSynthetic(tmp_path_factory.mktemp("maps"), size=SIZE, workers=1, **COUNTS)
    made.prepare()
    return made


def plates(style: str = "atlas", size: tuple[int, int] = (80, 100), seed: int = 0, **changes) -> Plates:
    return Plates(np.random.default_rng(seed), size, replace(STYLES[style], **changes))


def level(row: float) -> np.ndarray:
    """A straight line from left to right."""
    return curves.resample(np.float32([[-10, row], [110, row]]))


def upright(column: float) -> np.ndarray:
    return curves.resample(np.float32([[column, -10], [column, 90]]))


def test_same_seed_same_pixels_other_seed_others() -> None:
    first, again, other = (render_sheet(seed, size=(64, 80)) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)


def test_every_style_draws_every_class() -> None:
    for style in STYLES.values():
        sheets = [render_sheet(seed, size=(96, 128), style=style) for seed in range(8)]
        for sheet in sheets:
            assert (sheet.image.shape, sheet.image.dtype) == ((96, 128, 3), np.uint8)
            assert (sheet.labels.shape, sheet.labels.dtype) == ((96, 128), np.uint8)
            assert sheet.style == style.name
            assert sheet.image.std() > 12  # neither blank nor all ink
        counts = np.bincount(np.concatenate([s.labels.ravel() for s in sheets]), minlength=len(NAMES))
        assert len(counts) == len(NAMES)
        assert (counts > 50).all(), dict(zip(NAMES, counts, strict=True))


def test_styles_of_training_and_testing_share_no_palette_line_or_face() -> None:
    assert TEST_STYLE not in TRAIN_STYLES
    for held_out in (TEST_STYLE, STYLES["field"]):
        for style in TRAIN_STYLES:
            assert style.paper != held_out.paper
            assert all(style.inks[ink] != held_out.inks[ink] for ink in ORDER)
            assert not set(style.railways) & set(held_out.railways)
            assert not set(style.roads) & set(held_out.roads)
            assert style.vineyards != held_out.vineyards
        seen = {face for style in TRAIN_STYLES for face in style.faces}
        assert not set(TEST_STYLE.faces) & seen


def test_training_sheets_mix_the_signs_of_the_training_styles() -> None:
    drawn = [mixed_style(np.random.default_rng(seed)) for seed in range(60)]
    for field in fields(Style):
        if field.name != "name":
            known = [getattr(style, field.name) for style in TRAIN_STYLES]
            assert all(getattr(style, field.name) in known for style in drawn)
            assert all(value in [getattr(style, field.name) for style in drawn] for value in known)
    assert all(style.inks in [s.inks for s in TRAIN_STYLES if s.paper == style.paper] for style in drawn)
    assert len({(style.vineyards, style.houses, style.woods) for style in drawn}) > len(TRAIN_STYLES)


def test_training_sheets_are_of_their_own_mixed_or_of_the_series_like_the_real_one() -> None:
    rng = np.random.default_rng(0)
    names = [training_style(rng).name for _ in range(400)]
    shares = {name: names.count(name) / len(names) for name in set(names)}
    assert shares == pytest.approx({"own": 0.5, "mixed": 0.2, "atlas": 0.3}, abs=0.08)
    assert render_sheet(0, size=(64, 64)).style in {"own", "mixed", "atlas"}


def hue(colour: tuple[float, float, float]) -> float:
    return 360 * rgb_to_hsv(*colour)[0]


def test_styles_drawn_anew_have_nothing_of_those_that_are_held_out() -> None:
    drawn = [own_style(np.random.default_rng(seed)) for seed in range(300)]
    assert len({style.inks["blue"] for style in drawn}) == len(drawn)
    assert len({style.vineyards for style in drawn}) > 100
    for held_out in (TEST_STYLE, STYLES["field"]):
        for name, tint in {**held_out.inks, "paper": held_out.paper}.items():
            for style in drawn:
                own = style.paper if name == "paper" else style.inks[name]
                away = abs(hue(own[0]) - np.array([hue(colour) for colour in tint]))
                assert np.minimum(away, 360 - away).min() >= 2, (name, own, tint)
        for style in drawn:
            assert held_out.vineyards != style.vineyards
            assert not set(held_out.railways) & set(style.railways)
            assert not set(held_out.roads) & set(style.roads)
            assert not set(TEST_STYLE.faces) & set(style.faces)
        blocks = [railway for style in drawn for railway in style.railways if railway.kind == "blocks"]
        assert blocks
        assert all(max(r.period) < 18 or min(r.period) > 26 for r in blocks)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_railways_label_covers_its_ink_and_what_lies_between(style: str) -> None:
    for railway in STYLES[style].railways:
        sheet = plates(style)
        draw_railway(sheet, level(40), railway)
        label = sheet.labels == NAMES.index("railway")
        ink = sheet.covers["black"] > 0.5
        assert not (ink & ~binary_dilation(label)).any()
        wide = label[:, 20:80].sum(axis=0)
        assert railway.width[0] - 1 <= wide.min() <= wide.max() <= max(railway.width[1], 9) + 2.5  # ink runs
        if railway.kind == "rails":  # two lines, and paper between them
            changes = np.abs(np.diff(ink[:, 50].astype(int))).sum()
            assert changes == 4


def test_what_is_drawn_later_lies_above() -> None:
    sheet = plates()
    sheet.label("vineyard", np.ones(sheet.size, dtype=np.float32))
    draw_river(sheet, level(20), 12.0)
    draw_roads(sheet, [(upright(30), Road((10, 10), (1, 1), (1, 1)))])
    draw_railway(sheet, level(50), STYLES["atlas"].railways[0])
    at = {place: NAMES[sheet.labels[place]] for place in ((5, 60), (20, 60), (20, 30), (5, 30), (50, 60), (50, 30))}
    assert list(at.values()) == ["vineyard", "river", "road", "road", "railway", "railway"]
    assert sheet.covers["blue"][20, 28:33].max() == 0  # the bridge's deck is free of water
    assert sheet.covers["black"][8:32, 30].max() == 0  # and of its own casings


def test_roads_open_into_one_another() -> None:
    sheet = plates()
    road = Road((10, 10), (1, 1), (1, 1))
    draw_roads(sheet, [(level(40), road), (upright(50), road)])
    assert sheet.covers["black"][40, :].max() == 0
    assert sheet.covers["black"][:, 50].max() == 0
    assert sheet.covers["black"][40 - 5, 10:40].min() > 0.4


def test_a_branch_leaves_its_road_on_the_sheet_and_steeply() -> None:
    sheet, cosines = plates(size=(200, 200)), []
    for _ in range(12):
        branch = _branch(sheet, curves.resample(np.float32([[-10, 70], [210, 70]])))
        assert branch[0, 1] == 70
        assert 0 < branch[0, 0] < 200
        along = branch[min(15, len(branch) - 1)] - branch[0]
        cosines.append(abs(along[0]) / np.hypot(*along))
    assert np.median(cosines) < 0.35  # any direction: 0.71


def test_free_lines_shun_other_lines_and_lakes() -> None:
    sheet = plates(size=(200, 200))
    sheet.lake[:80] = True
    line = curves.resample(np.float32([[-10, 120], [210, 120]]))

    def share(made: np.ndarray) -> float:
        return float(((made[:, 1] < 80) | (abs(made[:, 1] - 120) < 18)).mean())

    free = np.mean([share(_free(sheet, [line], step=24, turn=0.14)) for _ in range(30)])
    any_curve = np.mean([share(curves.curve(sheet.rng, sheet.size, step=24, turn=0.14)) for _ in range(60)])
    assert free < any_curve - 0.2


def test_no_house_stands_on_a_line() -> None:
    for seed in range(6):
        sheet = plates(size=(200, 200), seed=seed)
        roads = [level(60), level(140)]
        taken = curves.stroke(sheet.size, roads, 18)
        draw_houses(sheet, roads, taken)
        houses = sheet.labels == NAMES.index("built-up")
        assert houses.sum() > 100
        assert not houses[(60, 140), :].any()


def test_a_name_goes_where_it_hides_the_fewest_lines() -> None:
    sheet = plates()
    sheet.label("road", curves.stroke(sheet.size, [level(40)], 10))
    assert _hidden(sheet, level(44)) > 40
    assert _hidden(sheet, level(70)) == 0


def test_no_rock_stands_in_a_lake() -> None:
    sheet = plates()
    sheet.lake[:] = True
    for _ in range(8):
        draw_walls(sheet, [level(40)])
    assert not any(cover.any() for cover in sheet.covers.values())


def test_lines_end_at_a_lake() -> None:
    sheet = plates()
    sheet.lake[:, 40:60] = True
    draw_railway(sheet, level(40), STYLES["atlas"].railways[0])
    draw_river(sheet, level(20), 2.0)
    assert (sheet.labels[:, 44:56] == 0).all()
    assert (sheet.labels[:, 65:95] > 0).any()


def test_a_stream_is_labelled_wider_than_its_ink() -> None:
    sheet = plates()
    draw_river(sheet, level(40), 1.5)
    assert (sheet.labels[:, 20:80] == NAMES.index("river")).sum(axis=0).min() >= 5
    assert 1 <= (sheet.covers["blue"][:, 50] > 0.5).sum() <= 3


def test_parallel_curves_dashes_and_bars_have_their_measures() -> None:
    line = curves.curve(np.random.default_rng(3), (200, 200), step=30, turn=0.05)
    steps = np.hypot(*np.diff(line, axis=0).T)
    assert steps == pytest.approx(curves.STEP, abs=0.05)
    for distance in (8, -8):
        away = np.hypot(*(curves.beside(line, distance)[:, None] - line[None]).transpose(2, 0, 1)).min(axis=1)
        assert away[5:-5] == pytest.approx(8, abs=0.5)
    assert curves.beside(level(40), 8)[:, 1] == pytest.approx(32)  # left of a line to the right is up
    pieces = curves.dashes(line, 8, 6)
    assert all(len(p) == 5 for p in pieces)
    assert len(pieces) == pytest.approx(len(line) * curves.STEP / 14, abs=2)
    assert all(np.hypot(*(bar[1] - bar[0])) == pytest.approx(5, abs=1e-3) for bar in curves.bars(line, 10, 2, 3))


def test_letters_follow_the_line_and_never_run_into_others() -> None:
    sheet = plates(size=(120, 300))
    writer = _Writer(sheet)
    writer.write("Matt", _straight((20, 60), 0.0), "STIXGeneral.ttf", 24, 2)
    first = writer.cover()
    rows = np.flatnonzero(first.max(axis=1) > 0.5)
    assert 38 <= rows.min() < rows.max() <= 60  # on its base line
    writer.write("Unterwald", _straight((30, 66), 0.2), "STIXGeneral.ttf", 24, 2)
    assert np.array_equal(writer.cover(), first)
    writer.write("Berg", _straight((160, 110), np.pi / 4), "cmti10.ttf", 24, 2)
    added = (writer.cover() - first) > 0.5
    y, x = np.nonzero(added)
    assert np.polyfit(x, y, 1)[0] == pytest.approx(-1, abs=0.35)


def test_type_faces_are_there() -> None:
    names = {_font(face, 20).getname() for style in STYLES.values() for face in style.faces}
    assert len(names) >= 10


def test_worn_sheets_are_printed_out_of_register() -> None:
    def shift(wear: float, seed: int) -> float:
        sheet = plates(seed=seed, wear=(wear, wear))
        sheet.covers["blue"][30:50, 30:70] = 1
        red = scan(sheet)[..., 0].astype(float)
        y, x = np.nonzero(red < (red.min() + red.max()) / 2)
        return float(np.hypot(y.mean() - 39.5, x.mean() - 49.5))

    fresh, worn = (np.mean([shift(wear, seed) for seed in range(6)]) for wear in (0.0, 1.0))
    assert fresh < 0.6
    assert worn > 2 * fresh


def test_labels_lie_where_the_ink_lies_on_the_paper() -> None:
    square = np.zeros((80, 100), dtype=np.float32)
    square[25:55, 30:70] = 1
    missed, ignorant = [], []
    for seed in range(8):
        sheet = plates(seed=seed, wear=(0.8, 0.8))
        sheet.draw("blue", square)
        label = sheet.label("lake", square, "blue")
        red = scan(sheet)[..., 0].astype(float)
        found = red < (np.median(red[label]) + np.median(red[~label])) / 2
        missed.append((found ^ label).mean())
        ignorant.append((found ^ (square > 0)).mean())
    assert np.mean(missed) < 0.6 * np.mean(ignorant)  # what a label of the plate itself would miss


def test_lines_break_relief_as_far_as_the_style_does() -> None:
    def paper(halo: float) -> int:
        sheet = plates(halo=(halo, halo))
        sheet.covers["brown"][:] = 1
        draw_roads(sheet, [(level(40), Road((10, 10), (1, 1), (1, 1)))])
        return int((sheet.covers["brown"][:, 50] < 0.5).sum())

    assert paper(3.0) - paper(0.0) == 6


def test_files_and_samples(source: MapsSynthetic) -> None:
    assert isinstance(source, DataSource)
    assert isinstance(source.split("train"), Samples)
    assert [len(source.split(s)) for s in COUNTS] == list(COUNTS.values())
    assert not list(source.folder.rglob(".*"))
    for split in COUNTS:
        for sample in (source.split(split)[i] for i in range(COUNTS[split])):
            assert (sample["image"].shape, sample["image"].dtype) == ((3, SIZE, SIZE), torch.float32)
            assert (sample["mask"].shape, sample["mask"].dtype) == ((SIZE, SIZE), torch.int64)
            assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
            assert sample["valid"].all()
            assert sample.get("crs") is None
    assert [c.name for c in CLASSES if c.line] == ["railway", "road", "river"]
    with pytest.raises(IndexError):
        source.split("val")[1]


def test_folder_reader_reads_the_same(source: MapsSynthetic) -> None:
    folder = GeotiffFolder(root=str(source.folder), classes=[c.name for c in CLASSES])
    for split in ("train", "test"):
        ours, theirs = source.split(split)[0], folder.split(split)[0]
        assert torch.allclose(ours["image"], theirs["image"])
        assert torch.equal(ours["mask"], theirs["mask"])


def test_prepare_writes_what_is_missing_alone(source: MapsSynthetic) -> None:
    before = {p: p.stat().st_mtime_ns for p in source.folder.rglob("*.png")}
    assert len(before) == 2 * sum(COUNTS.values())
    gone = source.folder / "train" / "masks" / "00002.png"
    kept = gone.read_bytes()
    gone.unlink()
    (source.folder / "done.json").unlink()
    source.prepare()
    assert gone.read_bytes() == kept
    del before[gone]
    changed = [p for p, time in before.items() if p.stat().st_mtime_ns != time]
    assert changed == [source.folder / "train" / "images" / "00002.png"]


def test_worker_processes_write_the_same_tiles(tmp_path: Path) -> None:
    counts = {"train": 13, "val": 0, "test": 1}
    made = MapsSynthetic(tmp_path, size=64, workers=2, **counts)
    made.prepare()
    files = sorted(made.folder.rglob("*.png"))
    assert len(files) == 28
    bytes_of = {p: p.read_bytes() for p in files}
    for split, index in (("train", 12), ("test", 0)):
        write_tile(made._job, split, index)
    assert bytes_of == {p: p.read_bytes() for p in files}


def test_one_style_for_all_splits(tmp_path: Path, source: MapsSynthetic) -> None:
    field = MapsSynthetic(tmp_path, size=64, style="field", train=1, val=0, test=1)
    assert field.folder.name != MapsSynthetic(tmp_path, size=64).folder.name
    field.prepare()
    for split, seed in (("train", 0), ("test", 2_000_000)):
        wanted = render_sheet(seed, size=(64, 64), style=STYLES["field"])
        assert np.array_equal(np.asarray(Image.open(field.folder / split / "images" / "00000.png")), wanted.image)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"style": "baroque"}, "data.style=baroque"), ({"size": 16}, "size=16"), ({"val": -1}, "tiles")],
)
def test_user_errors_are_one_line(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        MapsSynthetic(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_other_splits_and_unrendered_tiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        MapsSynthetic(tmp_path).split("dev")
    with pytest.raises(UserError, match="prepare"):
        MapsSynthetic(tmp_path).split("val")[0]


def run(folder: Path, name: str, *more: str) -> dict:
    small = ["loader.batch_size=2", "loader.crop=32", "loader.steps_per_epoch=1", "trainer.max_steps=1", "previews=0"]
    data = [f"data_root={folder}", f"data.size={SIZE}", "data.train=3", "data.val=1", "data.test=1", "data.workers=1"]
    return train.main(compose("train", ["experiment=maps", *small, *data, f"output={folder / name}", *more]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("run"), "first")


def test_training_measures_lines(trained: dict) -> None:
    json.dumps(trained, allow_nan=False)
    for kind in ("completeness", "correctness", "quality", "skeleton_recall"):
        assert list(trained[kind]) == ["railway", "road", "river"]


def test_few_shot_training_goes_on_from_a_file(trained: dict, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    still = ["data.style=field", "data.shots=2", "task.lr=1e-12", "task.weight_decay=0"]
    again = run(tmp_path, "again", f"adapter_file={trained['adapter_file']}", *still)
    one, other = load_file(trained["adapter_file"]), load_file(again["adapter_file"])
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)
    with pytest.raises(UserError, match="no such adapter file"):
        run(tmp_path, "none", f"adapter_file={tmp_path / 'none.safetensors'}")
    with pytest.raises(UserError, match="does not fit"):
        run(tmp_path, "other", f"adapter_file={trained['adapter_file']}", "head=linear")


@pytest.mark.parametrize("place", ["none", "world file", "control points"])
def test_a_scans_place_is_carried_through(trained: dict, tmp_path: Path, place: str) -> None:
    sheet = render_sheet(1, size=(100, 140))
    scanned, mapped = tmp_path / "sheet.png", tmp_path / "map.tif"
    transform, points = Affine(1.25, 0, 600_000, 0, -1.25, 200_000), []
    if place == "control points":
        scanned = tmp_path / "sheet.tif"
        corners = ((0, 0), (0, 140), (100, 140), (100, 0))
        points = [GroundControlPoint(r, c, 6e5 + 1.3 * c, 2e5 - 1.2 * r, id=str(i)) for i, (r, c) in enumerate(corners)]
        shape = {"height": 100, "width": 140, "count": 3, "dtype": "uint8", "gcps": points, "crs": "EPSG:21781"}
        with rasterio.open(scanned, "w", driver="GTiff", **shape) as file:
            file.write(sheet.image.transpose(2, 0, 1))
    else:
        Image.fromarray(sheet.image).save(scanned)
    if place == "world file":
        a, b, c, d, e, f = transform[:6]
        numbers = (a, d, b, e, c + a / 2, f + e / 2)  # of the first pixel's centre
        scanned.with_suffix(".pgw").write_text("\n".join(map(str, numbers)))
    settings = [f"input={scanned}", f"adapter_file={trained['adapter_file']}", f"output={mapped}", "tile=64"]
    result = predict.main(compose("predict", [*settings, "overlap=16", "device=cpu", "preview=false"]))
    assert sum(result["pixels_per_class"].values()) == 100 * 140
    with rasterio.open(mapped) as file:
        assert file.shape == (100, 140)
        assert file.crs is None
        assert file.transform == (transform if place == "world file" else Affine.identity())
        found, crs = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert (crs and crs.to_epsg()) == (21781 if points else None)


def test_scale_and_palette_are_those_of_a_real_sheet(real_data: Path) -> None:
    folder = real_data / "maps"
    mask = np.asarray(Image.open(folder / "siegfried_railway_mask.png")) > 0
    width = 2 * np.quantile(distance_transform_edt(mask)[mask], 0.99) - 1
    atlas = STYLES["atlas"]
    assert atlas.railways[0].width[0] - 1 <= width <= atlas.railways[0].width[1] + 1
    real = np.asarray(Image.open(folder / "siegfried_railway.png").convert("RGB"), dtype=float)
    drawn = np.stack([render_sheet(seed, style=atlas).image for seed in range(5)]).astype(float)
    for measure in (lambda p: np.median(p, (-3, -2)), lambda p: p.std((-3, -2))):
        assert (measure(real) >= measure(drawn).min(0) - 15).all()
        assert (measure(real) <= measure(drawn).max(0) + 15).all()
