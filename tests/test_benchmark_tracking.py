"""The measurement of tracking, at a tiny size, in a Python without sam2."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vfmadapt.benchmark import main
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.interop.sam2 import predictor
from vfmadapt.testing_tracking import tiny_tracker


@pytest.fixture(autouse=True)
def without_sam2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where it is not installed; the number of threads, which a measurement sets, is put back."""
    monkeypatch.setitem(sys.modules, "sam2", None)  # so that its import fails
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_figures_of_a_tiny_video_without_the_peer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ["what=tracking", "video=sam2_mini", "video_size=64", "frames=2", "memory_frames=3", "threads=1"]
    with caplog.at_level(logging.INFO):
        result = main(compose("benchmark", [*settings, f"output={tmp_path / 'new' / 'figures.json'}"]))
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == result
    assert (result["video"], result["size"], result["threads"]) == ("sam2_mini", 64, 1)
    assert set(result["objects"]) == {"1", "16"}
    for figures in result["objects"].values():
        assert 0 < figures["encoder_ms"] < figures["ms"]
        assert figures["sam2_ms"] is figures["ratio"] is figures["max_difference"] is None
    one, many = result["objects"]["1"], result["objects"]["16"]
    assert result["object_ms"] == pytest.approx(one["ms"] - one["encoder_ms"], abs=0.02)
    line = one["encoder_ms"] + 16 * (one["ms"] - one["encoder_ms"])
    assert result["linear_ratio"] == pytest.approx(many["ms"] / line, abs=0.02)
    assert result["memory"]["frames"] == 3
    assert result["memory"]["ratio"] >= 1
    assert caplog.text.count("no sam2 in this Python") == 2


def test_the_peer_itself_says_how_to_install_it() -> None:
    with pytest.raises(UserError, match=r"^there is no sam2 in this Python; .* pip install .* sam2==1\.1\.0$"):
        predictor(tiny_tracker())
