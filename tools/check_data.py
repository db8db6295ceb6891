"""How hard is a data set: python tools/check_data.py data=clouds_synthetic."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed in this Python; type: make install && .venv/bin/python tools/check_data.py", file=sys.stderr)
    sys.exit(2)

run("check_data")
