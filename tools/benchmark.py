"""Time an adapter's fast path against its direct formulation: `vfmadapt benchmark`."""

from vfmadapt.cli import run

run("benchmark")
