"""The whole way from training to a map: python tools/quickstart.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/quickstart.py\n"
    )
    sys.exit(2)

run("quickstart")
