"""Adapter file and labelled data -> metrics: python tools/evaluate.py adapter_file=a.safetensors data=geotiff_folder data.root=DIR."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed in this Python; type: make install && .venv/bin/python tools/evaluate.py", file=sys.stderr)
    sys.exit(2)

run("evaluate")
