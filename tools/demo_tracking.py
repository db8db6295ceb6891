"""A tracker adapted to a domain that it never saw: python tools/demo_tracking.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/demo_tracking.py\n"
    )
    sys.exit(2)

run("demo_tracking")
