"""LoveDA, Potsdam and Vaihingen on tiny generated folders in the published layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rasterio.transform import from_origin

from vfmadapt.contracts import IGNORE_INDEX, DataSource, Samples, UserError
from vfmadapt.datasets._isprs import CLASSES
from vfmadapt.datasets.loveda import LoveDA
from vfmadapt.datasets.potsdam import Potsdam
from vfmadapt.datasets.vaihingen import Vaihingen

published = pytest.importorskip("torchgeo.datasets", reason="pip install 'vfmadapt[geo]' to run this test")
COLOURS = np.uint8([c.colour for c in CLASSES])


@pytest.fixture(scope="module")
def loveda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images of each scene, 48 x 40 pixels; value 0 is no data."""
    root, rng = tmp_path_factory.mktemp("loveda"), np.random.default_rng(0)
    number = 0
    for split, count in (("Train", 4), ("Val", 2)):
        for scene in ("Urban", "Rural"):
            for kind in ("images_png", "masks_png"):
                (root / split / scene / kind).mkdir(parents=True)
            for _ in range(count):
                image = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
                mask = rng.integers(0, 8, (48, 40), dtype=np.uint8)
                Image.fromarray(image).save(root / split / scene / "images_png" / f"{number}.png")
                Image.fromarray(mask).save(root / split / scene / "masks_png" / f"{number}.png")
                number += 1
    return root


def isprs(root: Path, write_tiff, *, kind: str, trains: int = 3) -> Path:
    """A folder of Potsdam's or Vaihingen's layout: 70 x 50 pixels, labels in columns of colours."""
    rng = np.random.default_rng(1)
    made = getattr(published, kind)
    (root / made.image_root).mkdir(parents=True)
    for split, count in (("train", trains), ("test", 1)):
        for name in made.splits[split][:count]:
            bands = 4 if kind == "Potsdam2D" else 3
            image = root / made.image_root / (f"{name}_RGBIR.tif" if bands == 4 else name)
            mask = root / (f"{name}_label.tif" if bands == 4 else name)
            place = {"transform": from_origin(1000, 2000, 0.05, 0.05), "crs": "EPSG:32633"}
            write_tiff(image, rng.integers(0, 256, (bands, 70, 50), dtype=np.uint8), **place)
            labels = np.broadcast_to(np.arange(50) % 6, (70, 50))
            write_tiff(mask, COLOURS[labels].transpose(2, 0, 1).copy(), **place)
    return root


@pytest.fixture(scope="module")
def potsdam(tmp_path_factory: pytest.TempPathFactory, write_tiff) -> Path:
    return isprs(tmp_path_factory.mktemp("potsdam"), write_tiff, kind="Potsdam2D")


@pytest.fixture(scope="module")
def vaihingen(tmp_path_factory: pytest.TempPathFactory, write_tiff) -> Path:
    return isprs(tmp_path_factory.mktemp("vaihingen"), write_tiff, kind="Vaihingen2D")


def check_contract(source: DataSource) -> None:
    assert isinstance(source, DataSource)
    source.prepare()
    assert isinstance(source.split("train"), Samples)
    ids = {source.split(s)[i]["id"] for s in ("train", "val", "test") for i in range(len(source.split(s)))}
    assert len(ids) == sum(len(source.split(s)) for s in ("train", "val", "test"))
    sample = source.split("test")[0]
    assert sample["image"].dtype == torch.float32
    assert sample["mask"].dtype == torch.int64
    assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
    assert sample["image"].shape[1:] == sample["mask"].shape == sample["valid"].shape
    assert len(source.spec.mean) == len(source.spec.bands) == len(sample["image"])
    assert source.spec.mean == pytest.approx([0.5] * len(source.spec.bands), abs=0.05)


def test_loveda(loveda: Path) -> None:
    source = LoveDA(root=loveda, val_fraction=0.4)
    check_contract(source)
    assert (len(source.split("train")) + len(source.split("val")), len(source.split("test"))) == (8, 4)
    assert len(source.split("val")) > 0
    theirs = published.LoveDA(str(loveda), split="val")
    for index in range(4):
        ours, other = source.split("test")[index], theirs[index]
        assert torch.allclose(ours["image"] * 255, other["image"])
        wanted = torch.where(other["mask"] == 0, IGNORE_INDEX, other["mask"] - 1)
        assert torch.equal(ours["mask"], wanted)
    names = [c.name for c in source.spec.classes]
    assert names[:-1] == list(theirs.classes[:6])
    assert names[-1].startswith("agricultur")


def test_loveda_as_towns_and_of_one_scene(loveda: Path) -> None:
    whole, towns = LoveDA(root=loveda, val_fraction=0), LoveDA(root=loveda, classes="urban", val_fraction=0)
    full, few = whole.split("train")[0]["mask"], towns.split("train")[0]["mask"]
    assert [c.name for c in towns.spec.classes] == ["other", "building", "road", "water"]
    for label in (1, 2, 3):
        assert torch.equal(full == label, few == label)
    assert torch.equal(full == IGNORE_INDEX, few == IGNORE_INDEX)
    assert len(LoveDA(root=loveda, scenes=["rural"], val_fraction=0).split("train")) == 4


def test_potsdam_in_parts(potsdam: Path) -> None:
    source = Potsdam(root=potsdam, tile=40, val_fraction=0.0, bands=["nir", "red"])
    check_contract(source)
    assert [len(source.split(s)) for s in ("train", "val", "test")] == [3 * 4, 0, 4]
    parts = [source.split("test")[i] for i in range(4)]
    assert [p["image"].shape for p in parts] == [(2, 35, 25)] * 4
    whole = published.Potsdam2D(str(potsdam), split="test")[0]

    def joined(key: str) -> torch.Tensor:
        return torch.cat([torch.cat([p[key] for p in parts[at : at + 2]], -1) for at in (0, 2)], -2)

    assert torch.allclose(joined("image") * 255, whole["image"][[3, 0]])
    assert torch.equal(joined("mask"), whole["mask"])
    assert parts[3]["transform"][2] == pytest.approx(1000 + 25 * 0.05)
    assert parts[3]["transform"][5] == pytest.approx(2000 - 35 * 0.05)
    assert parts[3]["crs"] is not None


def test_vaihingen(vaihingen: Path) -> None:
    source = Vaihingen(root=vaihingen, val_fraction=0.0)
    check_contract(source)
    assert source.spec.bands == ("nir", "red", "green")
    assert [c.name for c in source.spec.classes][1:3] == ["impervious surface", "building"]
    theirs = published.Vaihingen2D(str(vaihingen), split="test")[0]
    assert torch.equal(source.split("test")[0]["mask"], theirs["mask"])


def test_the_colour_code_is_torchgeos() -> None:
    for theirs in (published.Potsdam2D, published.Vaihingen2D):
        assert tuple(c.colour for c in CLASSES) == theirs.colormap


def test_black_is_ignored_greys_nearby_are_taken_and_other_colours_refused(tmp_path: Path, write_tiff) -> None:
    root = isprs(tmp_path, write_tiff, kind="Vaihingen2D", trains=1)
    mask = root / published.Vaihingen2D.splits["test"][0]
    labels = np.zeros((3, 70, 50), dtype=np.uint8)
    labels[:, :, 10:] = 252  # nearly white
    write_tiff(mask, labels)
    read = Vaihingen(root=root).split("test")[0]["mask"]
    assert (read[:, :10] == IGNORE_INDEX).all()
    assert (read[:, 10:] == 1).all()
    labels[:, 5, 5] = (255, 0, 255)
    write_tiff(mask, labels)
    with pytest.raises(UserError, match=r"holds the colour \[255, 0, 255\]") as caught:
        Vaihingen(root=root).split("test")[0]
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, loveda: Path, write_tiff) -> None:
    def refused(words: str, source: DataSource) -> None:
        with pytest.raises(UserError, match=words) as caught:
            source.prepare()
        assert "\n" not in str(caught.value)

    refused("no folder Train", LoveDA(root=tmp_path))
    (tmp_path / "Train" / "Urban").mkdir(parents=True)
    refused("lacks folders of LoveDA", LoveDA(root=tmp_path))
    (tmp_path / "4_Ortho_RGBIR").mkdir()
    refused("no image of the train split", Potsdam(root=tmp_path))
    root = isprs(tmp_path / "other", write_tiff, kind="Vaihingen2D", trains=1)
    first = published.Vaihingen2D.splits["train"][0]
    write_tiff(root / first, np.zeros((3, 60, 50), dtype=np.uint8))
    refused("they must be equal", Vaihingen(root=root))
    write_tiff(root / first, np.zeros((3, 70, 50), dtype=np.uint8))
    write_tiff(root / "top" / first, np.zeros((4, 70, 50), dtype=np.uint8))
    refused("has 4 bands", Vaihingen(root=root))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoveDA(root="x", scenes=["suburban"]), "data.scenes"),
        (lambda: LoveDA(root="x", classes="maps"), "data.classes=maps"),
        (lambda: LoveDA(root="x", val_fraction=1.0), "val_fraction=1.0"),
        (lambda: Potsdam(root="x", bands=["swir"]), "data.bands"),
        (lambda: Vaihingen(root="x", tile=8), "data.tile=8"),
    ],
)
def test_settings_out_of_range(make, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
