"""Adapters give the numbers of the published implementations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vfmadapt import check_golden
from vfmadapt.build import compose
from vfmadapt.errors import UserError
from vfmadapt.interop import load_published, replays

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_published_numbers(path: Path) -> None:
    verdict, share, where = check_golden.check(path)
    assert verdict == "ok", f"{share:.2f} of the tolerance at {where}"


def test_every_replay_has_a_file() -> None:
    assert set(replays()) == {check_golden.read(path).method for path in FILES}


def rewritten(path: Path, to: Path, key: str, by: float) -> Path:
    golden = check_golden.read(path)
    tensors = load_file(path)
    tensors[key] = tensors[key] + by
    save_file(tensors, to, metadata={"method": golden.method, "settings": json.dumps(golden.settings)})
    return to


@pytest.mark.parametrize("key", ["output/y", "grad_param/scale"])
def test_another_number_is_a_failure(key: str, tmp_path: Path) -> None:
    source = next(p for p in FILES if p.stem.startswith("earth_freq"))
    assert check_golden.check(rewritten(source, tmp_path / "same.safetensors", key, 0.0))[0] == "ok"
    verdict, _, where = check_golden.check(rewritten(source, tmp_path / "other.safetensors", key, 1e-2))
    assert (verdict, where) == ("FAILED", key)


def test_tool_exits_with_1_and_lists_what_waits(tmp_path: Path) -> None:
    save_file({"input/x": torch.zeros(1)}, tmp_path / "new.safetensors", metadata={"method": "new", "settings": "{}"})
    cfg = compose("check_golden", [f"path={tmp_path}"])
    assert check_golden.main(cfg) == {"ok": [], "failed": [], "waiting": ["new.safetensors"]}
    source = next(p for p in FILES if p.stem.startswith("earth_plain"))
    rewritten(source, tmp_path / "wrong.safetensors", "output/y", 1.0)
    with pytest.raises(SystemExit) as stopped:
        check_golden.main(cfg)
    assert stopped.value.code == 1


def test_bad_folder_and_bad_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors file there"):
        check_golden.main(compose("check_golden", [f"path={tmp_path}"]))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no golden file"):
        check_golden.main(compose("check_golden", [f"path={tmp_path}"]))


def test_unknown_official_layout() -> None:
    with pytest.raises(UserError, match=r"no official layout is known for 'x'; there is one for: .*earth"):
        load_published("x", None, {})
