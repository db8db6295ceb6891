"""Video or volume, prompt -> masks: python tools/track.py input=scan.nii.gz prompt=mask.png adapter_file=FILE."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/track.py\n")
    sys.exit(2)

run("track")
