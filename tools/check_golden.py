"""Check adapters against published numbers: python tools/check_golden.py FOLDER."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/check_golden.py\n"
    )
    sys.exit(2)

run("check_golden")
