"""Continued pre-training on unlabelled images: python tools/pretrain.py."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/pretrain.py\n"
    )
    sys.exit(2)

run("pretrain")
