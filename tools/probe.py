"""Linear probes of several checkpoints: python tools/probe.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/probe.py\n")
    sys.exit(2)

run("probe")
