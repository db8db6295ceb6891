"""Map one raster with this project and with TerraTorch's `tiled_inference`, in turns, each run in its own process.

python tools/compare_terratorch.py PEER, where PEER is the Python of an environment with terratorch==1.2.11 (of the same
Python version as this one: it borrows this environment's packages, after its own, for the models). Both sides get the
same raster, model, tile, stride, batch and threads. TerraTorch wants the image in memory: reading it and writing the
map are done as its user would, with rasterio. Writes one JSON object.
"""

import argparse
import json
import resource
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

_TILE, _STRIDE, _BATCH = 512, 384, 4
_BLOCK = 8192  # pixels: all of the raster, so that both sides forward the same tiles; neighbouring blocks share some


def main() -> None:
    """Compare, or be one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="Python with terratorch")
    parser.add_argument("--side", type=int, default=8000, help="pixels")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; medians are reported")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--models", nargs="+", default=["convolution", "vfm_tiny"])
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)  # side, model, raster, packages: a run of one side
    args = parser.parse_args()
    if args.run:
        answer = _measured(*args.run, threads=args.threads)
    else:
        answer = {"side": args.side, "tile": _TILE, "stride": _STRIDE, "batch": _BATCH, "threads": args.threads}
        answer |= {model: _compared(args, model) for model in args.models}
    sys.stdout.write(json.dumps(answer, indent=None if args.run else 1) + "\n")


def _compared(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Medians of both sides; ratios above 1 are in favour of this project."""
    from vfmadapt.raster.repeated import repeated_raster

    pythons = {"vfmadapt": sys.executable, "terratorch": args.peer}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        raster = str(repeated_raster(Path(folder), args.side))
        for _ in range(args.repeats):
            for name, python in pythons.items():
                run = ["--run", name, model, raster, sysconfig.get_path("purelib"), f"--threads={args.threads}"]
                command = [python, __file__, args.peer, *run]
                made = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[name].append(json.loads(made.stdout.splitlines()[-1]))
    found = {name: {key: round(median(r[key] for r in of), 3) for key in of[0]} for name, of in runs.items()}
    ours, theirs = found["vfmadapt"], found["terratorch"]
    ratios = {key: round(theirs[key] / ours[key], 2) for key in ours}
    ratios["tiled_inference alone"] = round(theirs["seconds_in_tiled_inference"] / ours["seconds"], 2)
    return found | {"ratios": ratios}


def _measured(side: str, model: str, raster: str, packages: str, *, threads: int) -> dict[str, float]:
    """One run: seconds, those of all cores, and the peak memory beyond that of libraries and model, in GB."""
    if packages not in sys.path:
        site.addsitedir(packages)  # reads .pth files too, so that an editable install is found
    import rasterio  # noqa: F401 - before memory is measured
    import torch

    torch.set_num_threads(threads)
    network = _model(model)
    run = _ours if side == "vfmadapt" else _theirs
    run(network, raster, warm_up=True)  # what is loaded once is not the raster's
    before, start, start_cpu = _peak_gb(), time.perf_counter(), time.process_time()
    inside = run(network, raster)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    found = {"seconds": seconds, "cpu_seconds": cpu, "memory_gb": _peak_gb() - before}
    return found | ({"seconds_in_tiled_inference": inside} if inside else {})


def _ours(model: Any, raster: str, *, warm_up: bool = False) -> None:
    from vfmadapt.raster.predict import predict_raster

    window = [0, 0, _TILE, 2 * _TILE] if warm_up else None
    how: dict[str, Any] = {
        "tile": _TILE,
        "overlap": _TILE - _STRIDE,
        "batch": _BATCH,
        "block": _BLOCK,
        "window": window,
    }
    predict_raster(model, raster, Path(raster).with_name("ours.tif"), **how)


def _theirs(model: Any, raster: str, *, warm_up: bool = False) -> float:
    import rasterio
    import torch
    from rasterio.windows import Window
    from terratorch.tasks.tiled_inference import tiled_inference

    def forward(image: torch.Tensor) -> torch.Tensor:
        return model(image, torch.ones(len(image), *image.shape[2:], dtype=torch.bool))

    with rasterio.open(raster) as source:
        window = Window(0, 0, 2 * _TILE, _TILE) if warm_up else None
        image = torch.from_numpy(source.read(window=window)).float() / 255
        place = {"crs": source.crs, "transform": source.transform}
    start = time.perf_counter()
    scores = tiled_inference(forward, image[None], crop=_TILE, stride=_STRIDE, batch_size=_BATCH)[0]
    seconds = time.perf_counter() - start
    labels = scores.argmax(0).to(torch.uint8).numpy()
    height, width = labels.shape
    shape = {"driver": "COG", "count": 1, "height": height, "width": width, "dtype": "uint8"}
    with rasterio.open(Path(raster).with_name("theirs.tif"), "w", compress="deflate", **shape, **place) as made:
        made.write(labels, 1)
    return seconds


def _model(name: str) -> Any:
    import torch

    from vfmadapt.benchmark_raster import SPEC, vfm_tiny

    torch.manual_seed(0)
    if name == "vfm_tiny":
        return vfm_tiny()

    class Convolution(torch.nn.Conv2d):
        spec = SPEC

        def forward(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            return super().forward(image)

    return Convolution(4, 4, 1).eval()


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux gives KiB


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
