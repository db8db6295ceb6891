"""SAM2's video model trained from random weights: python tools/pretrain_tracker.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/pretrain_tracker.py\n"
    )
    sys.exit(2)

run("pretrain_tracker")
