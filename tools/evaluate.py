"""Adapter file, labelled data -> metrics: python tools/evaluate.py adapter_file=FILE data=clouds_synthetic."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/evaluate.py\n"
    )
    sys.exit(2)

run("evaluate")
