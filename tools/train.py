"""Train adapter and head: python tools/train.py task=cloudseg adapter=earth."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed in this Python; type: make install && .venv/bin/python tools/train.py", file=sys.stderr)
    sys.exit(2)

run("train")
