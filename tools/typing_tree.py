"""Make .typing/vfmadapt, a tree of links in which mypy, pyright and editors find the package as it is installed."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / ".typing" / "vfmadapt"


def link(name: str, target: Path) -> None:
    """Point TREE/name at `target`, whatever was there."""
    at = TREE / name
    at.unlink(missing_ok=True)
    at.symlink_to(target)


def main() -> None:
    """Link what lies in vfmadapt/ and the folders that pyproject maps into it."""
    where = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    TREE.mkdir(parents=True, exist_ok=True)
    for entry in (ROOT / "vfmadapt").iterdir():
        if entry.name != "__pycache__":
            link(entry.name, entry)
    for package, folder in where.items():
        if package != "vfmadapt":
            link(package.removeprefix("vfmadapt."), ROOT / folder)


if __name__ == "__main__":
    main()
