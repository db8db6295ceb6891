"""How hard is a data set: python tools/check_data.py data=clouds_synthetic."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/check_data.py\n"
    )
    sys.exit(2)

run("check_data")
