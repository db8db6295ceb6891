"""The whole way from training to a map: python tools/quickstart.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed in this Python; type: make install && .venv/bin/python tools/quickstart.py", file=sys.stderr)
    sys.exit(2)

run("quickstart")
