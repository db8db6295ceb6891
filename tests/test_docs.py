"""The page of all adapters keeps up with them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vfmadapt.build import names

ROOT = Path(__file__).resolve().parents[1]


def test_every_adapter_is_on_the_page() -> None:
    facts = yaml.safe_load((ROOT / "docs" / "adapters.yaml").read_text())
    page = (ROOT / "docs" / "adapters.md").read_text()
    assert sorted(facts["methods"]) == names("adapter")
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == names("adapter")


def test_every_head_is_on_its_page() -> None:
    page = (ROOT / "docs" / "heads.md").read_text()
    assert sorted(line.split("`")[1] for line in page.splitlines() if line.startswith("| `")) == names("head")


@pytest.mark.slow
def test_the_page_is_as_generated() -> None:
    command = [sys.executable, str(ROOT / "tools" / "docs_adapters.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
