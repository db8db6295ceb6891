"""The command line as a user meets it: exit status, one line, no traceback, answers at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(p.stem for p in (ROOT / "tools").glob("*.py") if "run(" in p.read_text())


def run(
    *args: str, cwd: Path = ROOT, safe_path: bool = True, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | (
        {"PYTHONSAFEPATH": "1"} if safe_path else {}
    )
    return subprocess.run([python, *args], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("safe_path", [True, False])
def test_unknown_adapter_names_the_known(safe_path: bool) -> None:
    done = run("tools/train.py", "task=cloudseg", "adapter=earht", safe_path=safe_path)
    assert_user_error(done, "adapter=earht", "did you mean earth?", "frozen")


def test_unknown_key_and_malformed_override() -> None:
    assert_user_error(run("tools/train.py", "sed=3"), "sed")
    assert_user_error(run("tools/train.py", "seed=[1"), "seed=[1")


def test_missing_input_is_one_line(tmp_path: Path) -> None:
    done = run(
        "tools/predict.py", "input=/nowhere.tif", "adapter_file=/nowhere.safetensors", f"output={tmp_path / 'o.tif'}"
    )
    assert_user_error(done, "/nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", ["adapters", "backbones", "heads", "tasks", "data"])
def test_list(group: str) -> None:
    done = run("-m", "vfmadapt.cli", "list", group, "format=json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[group]


def test_list_of_something_else() -> None:
    assert_user_error(run("-m", "vfmadapt.cli", "list", "horses"), "adapters")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, vfmadapt.cli\n"
        "try: vfmadapt.cli.main(['list', 'adapters'])\n"
        "except SystemExit: print(sorted({'torch', 'timm', 'lightning', 'rasterio'} & set(sys.modules)))"
    )
    done = run("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_help_and_composition(tool: str) -> None:
    from vfmadapt.build import compose
    from vfmadapt.cli import TOOLS as KNOWN

    assert tool in KNOWN
    assert compose(tool).format == "text"


def test_help() -> None:
    done = run("tools/train.py", "--help")
    assert done.returncode == 0
    assert "adapter: earth, frozen" in done.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_outside_the_environment_one_line_says_what_to_type(tool: str) -> None:
    done = run("-S", f"tools/{tool}.py")  # -S: no site-packages, as in a Python without vfmadapt
    assert_user_error(done, "make install")
