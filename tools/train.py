"""Train adapter and head: python tools/train.py task=cloudseg adapter=earth."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/train.py\n")
    sys.exit(2)

run("train")
