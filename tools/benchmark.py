"""Time an adapter's fast form against its direct form: python tools/benchmark.py adapter=earth."""

import sys

try:
    from vfmadapt.cli import run
except ModuleNotFoundError as error:
    hint = "type: make install && .venv/bin/python tools/benchmark.py"
    print(f"error: {error.name} is not installed in this Python; {hint}", file=sys.stderr)
    sys.exit(2)

run("benchmark")
