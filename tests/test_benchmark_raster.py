"""The measurement of mapping, at a tiny size."""

import json

from vfmadapt.benchmark import main
from vfmadapt.build import compose


def test_figures_of_a_tiny_raster(tmp_path):
    settings = [
        "what=raster",
        "sides=[300]",
        "model_side=64",
        "tile=64",
        "threads=1",
        f"output={tmp_path}/figures.json",
    ]
    result = main(compose("benchmark", settings))
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert result["empty"]["300"]["mpx_per_s"] > 0
    assert 0 < result["vfm_tiny"]["share_around_model"] < 1
