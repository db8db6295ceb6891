"""Count what a choice trains: python tools/params.py adapter=earth backbone=dinov2_large."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/params.py\n")
    sys.exit(2)

run("params")
