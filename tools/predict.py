"""GeoTIFF -> georeferenced map: python tools/predict.py adapter_file=FILE input=scene.tif."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/predict.py\n"
    )
    sys.exit(2)

run("predict")
