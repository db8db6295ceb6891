"""The command line: `vfmadapt TOOL key=value ...`, `vfmadapt list GROUP`, and the same tools as tools/*.py.

Hydra does the parsing (--help, --cfg job, --multirun work as everywhere); here user errors become one line and exit
status 2, where Hydra alone would exit with 1 and a traceback.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from vfmadapt.build import compose, names
from vfmadapt.errors import UserError

TOOLS = {
    "train": "train adapter and head on a data set",
    "evaluate": "adapter file + labelled data -> metrics",
    "predict": "adapter file + GeoTIFF -> georeferenced map",
    "track": "adapter file + video or volume + prompt -> masks of every frame",
    "pretrain": "unlabelled images -> a backbone that knows them (ExPLoRA, MAE, DINOv2)",
    "probe": "linear probes of several checkpoints, with seeds",
    "pretrain_tracker": "SAM2's video model trained from random weights on generated clips",
    "benchmark": "time an adapter's fast path against its direct formulation",
    "doctor": "which implementation each kernel takes here, and why not the others",
    "check_data": "how hard a data set is: class shares and per-pixel baselines",
    "params": "what a choice of backbone, adapter and head trains and stores",
    "check_golden": "do the adapters give the published numbers?",
    "quickstart": "train, compare with the frozen backbone, map a generated GeoTIFF",
    "demo_tracking": "adapt a tracker to a domain that it never saw, follow clips, compare with the frozen model",
}
GROUPS = {
    "adapters": "adapter",
    "backbones": "backbone",
    "heads": "head",
    "tasks": "task",
    "data": "data",
    "experiments": "experiment",
}
USER_ERROR = 2
POSITIONAL = {"check_golden": "path", "benchmark": "what"}
"""Tools whose first argument may come without its key."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["list"]:
        sys.exit(_list(args[1:]))
    if args and args[0] in TOOLS:
        run(args[0], args[1:])
    wanted = "" if not args or args[0] in ("-h", "--help") else f"unknown command {args[0]!r}; "
    print(
        f"{wanted}usage: vfmadapt TOOL key=value ...   or   vfmadapt list {'|'.join(GROUPS)}",
        file=sys.stderr if wanted else sys.stdout,
    )
    for name, text in TOOLS.items():
        print(f"  {name:<18}{text}", file=sys.stderr if wanted else sys.stdout)
    sys.exit(USER_ERROR if wanted else 0)


def _list(args: Sequence[str]) -> int:
    as_json = "format=json" in args
    wanted = [a for a in args if "=" not in a]
    if len(wanted) != 1 or wanted[0] not in GROUPS:
        print(f"error: vfmadapt list takes one of: {', '.join(GROUPS)}", file=sys.stderr)
        return USER_ERROR
    found = names(GROUPS[wanted[0]])
    print(json.dumps({wanted[0]: found}) if as_json else "\n".join(found))
    return 0


def run(tool: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a tool with Hydra overrides and exit: 0, 2 for a user's error, 130 for Ctrl-C.

    With format=json the last line of standard output is one JSON object.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if tool in POSITIONAL and args and "=" not in args[0] and not args[0].startswith("-"):
        args[0] = f"{POSITIONAL[tool]}={args[0]}"
    logging.basicConfig(level=logging.INFO if _speaks() else logging.WARNING, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)  # tells of every weights file
    try:
        if not _sweeps(args):
            flags = any(a.startswith("-") for a in args)  # --cfg job: "job" is no override
            compose(tool, [a for a in args if "=" in a and a[0] != "-"] if flags else args)
        _hydra(tool, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _speaks() -> bool:
    """Of the processes of a distributed training only the first talks to the user."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _sweeps(args: Sequence[str]) -> bool:
    return not {"-m", "--multirun"}.isdisjoint(args)


def _hydra(tool: str, args: Sequence[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig

    before = sys.argv

    def job(cfg: Any) -> None:
        sys.argv = before  # what a distributed training starts its other processes with
        try:
            if _sweeps(args):  # each job has values of its own
                compose(tool, HydraConfig.get().overrides.task)
            result = import_module(f"vfmadapt.{tool}").main(cfg)
        except UserError as error:  # as SystemExit, because Hydra turns any Exception into status 1
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(USER_ERROR) from None
        if cfg.get("format") == "json" and _speaks():
            print(json.dumps(result), flush=True)

    sys.argv = [tool, *args]
    try:
        hydra.main(version_base="1.3", config_path="pkg://vfmadapt.conf", config_name=tool)(job)()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
