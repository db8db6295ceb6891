"""pyproject's lists against the folders on disk: what is not listed is missing from the wheel only."""

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
WHERE = SETUPTOOLS["package-dir"]


def folder(package: str) -> Path:
    return ROOT / WHERE.get(package, package.replace(".", "/"))


def test_every_package_on_disk_is_listed() -> None:
    listed = {folder(p) for p in SETUPTOOLS["packages"]}
    on_disk = {f.parent for d in WHERE.values() for f in (ROOT / d).rglob("__init__.py")}
    assert on_disk == listed, f"not in pyproject: {on_disk - listed}; gone: {listed - on_disk}"


def test_every_data_file_is_listed() -> None:
    listed = {
        f for package, patterns in SETUPTOOLS["package-data"].items() for p in patterns for f in folder(package).glob(p)
    }
    on_disk = {
        f
        for d in WHERE.values()
        for f in (ROOT / d).rglob("*")
        if f.is_file() and f.suffix not in {".py", ".pyc"} and "__pycache__" not in f.parts
    }
    assert on_disk == listed, f"not in package-data: {on_disk - listed}"


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.stem)
def test_no_tool_hides_a_standard_module(tool: Path) -> None:
    assert tool.stem not in sys.stdlib_module_names


def test_licence_and_changelog_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "0.1.0" in (ROOT / "CHANGELOG.md").read_text()
