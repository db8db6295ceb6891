"""Masked-image modelling of a backbone: python tools/pretrain.py steps=1000."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed in this Python; type: make install && .venv/bin/python tools/pretrain.py", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # worker processes import this file
    run("pretrain")
