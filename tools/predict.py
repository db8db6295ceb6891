"""Adapter file and raster -> georeferenced map: python tools/predict.py input=scene.tif adapter_file=a.safetensors."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    hint = "type: make install && .venv/bin/python tools/predict.py"
    print(f"error: {error.name} is not installed in this Python; {hint}", file=sys.stderr)
    sys.exit(2)

run("predict")
