"""Time an adapter against its direct formulation: python tools/benchmark.py adapter=earth."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: no {error.name} in this Python; type: make install && .venv/bin/python tools/benchmark.py\n"
    )
    sys.exit(2)

run("benchmark")
