"""The command line as a user meets it: exit status, one line, no traceback, answers at once."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfmadapt._settings import check_arguments
from vfmadapt.build import compose, names, plain
from vfmadapt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(p.stem for p in (ROOT / "tools").glob("*.py") if "import run\n" in p.read_text())


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


@pytest.mark.parametrize(
    "args",
    [
        ("tools/train.py", "loader.crop=abc"),
        ("tools/train.py", "loader.crop=-3"),  # out of range, told by the class that takes it
        ("tools/train.py", "--cfg", "job", "loader.crop=abc"),
        ("-m", "vfmadapt.cli", "predict", "tile=abc"),
    ],
)
def test_wrong_values_on_the_command_line(args: tuple[str, ...]) -> None:
    done = run(*args)
    key = re.split("[=.]", args[-1])[-2]
    assert_user_error(done, key, "abc" if "abc" in args[-1] else "-3", "wanted" if "abc" in args[-1] else ">= 1")


def test_a_setting_without_which_nothing_can_start_is_asked_for() -> None:
    from vfmadapt.train import make_data

    with pytest.raises(UserError, match=r"loader\.crop is missing; write loader\.crop="):
        make_data(compose("train", ["~loader.crop"]), None)


def test_a_sweep_checks_the_values_of_each_job(tmp_path: Path) -> None:
    done = run(str(ROOT / "tools" / "train.py"), "-m", "loader.crop=abc,64", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: loader.crop=abc: ")
    assert "Traceback" not in done.stderr


WRONG = [
    ("train", "task.lr=abc", "a number", "task.lr=0.0"),
    ("train", "trainer.max_steps=abc", "a number", "trainer.max_steps="),
    ("train", "augment.scale=3", "each item a number", "augment.scale=["),
    ("train", "augment.scale=[a,2]", "each item a number", ""),
    ("train", "augment={scale: 3}", "augment.scale=3", ""),
    ("train", "augment.flips=3", "true or false", "augment.flips=true"),
    ("train", "loader.batch_size=two", "a number", ""),
    ("train", "loader=3", "a mapping", ""),
    ("train", "data.bands=red", "a list", "data.bands=["),
    ("train", "output=2024", "a text", "'output=\"2024\"'"),
    ("train", "early_stop=abc", "null or a whole number", ""),
    ("train", "seed=null", "a whole number", ""),
    ("train", "seed=-1", "0 and more", "seed=0"),
    ("train", "previews=-1", "0 and more", ""),
    ("train", "task.window=0", "1 and more", ""),
    ("train", "format=xml", "one of text, json", ""),
    ("train", "data=null", "data=null", ""),
    ("train", "~task", "cannot be removed", "task=VALUE"),
    ("train", "~loader", "cannot be removed", "loader=VALUE"),
    ("predict", "tile=abc", "a whole number", "tile=256"),
    ("predict", "overlap=[1]", "a whole number", ""),
    ("predict", "bands=red", "each item a whole number", ""),
    ("predict", "scale=abc", "a number", ""),
    ("predict", "preview=abc", "true or false", ""),
    ("evaluate", "window=abc", "a whole number", ""),
    ("check_data", "foreground=cloud", "a list", ""),
    ("check_data", "fit_pixels=0", "1 and more", ""),
    ("benchmark", "tokens=32", "each item a whole number", "tokens=[32,32]"),
    ("pretrain", "objective.mask_ratio=2", "0 to 1", ""),
    ("pretrain", "cache_mb=abc", "a whole number", ""),
    ("quickstart", "scene.size=big", "each item a number", ""),
]


@pytest.mark.parametrize(("tool", "override", "allowed", "advice"), WRONG)
def test_a_value_of_the_wrong_kind_says_what_is_allowed(tool: str, override: str, allowed: str, advice: str) -> None:
    with pytest.raises(UserError) as raised:
        compose(tool, [override])
    said = str(raised.value)
    assert "\n" not in said
    assert override in said or allowed in override + said
    assert allowed in said
    assert advice in said


@pytest.mark.parametrize(
    "override",
    [
        "task.lr=1",  # a whole number is a number
        "augment.scale=[1,2]",
        "output='\"2024\"'",
        "trainer.devices=auto",
        "trainer.precision=16",
        "trainer.gradient_clip_val=null",
        "loader.steps_per_epoch=null",
        "early_stop=3",
        "resume=true",
        "resume=some.ckpt",
        "loader.crop=${data.size}",
        "+trainer.limit_val_batches=0.5",
        "~augment.flips",
        "hydra.run.dir=x",
    ],
)
def test_values_that_are_meant_pass(override: str) -> None:
    compose("train", [override])


def test_arguments_are_checked_against_the_signature() -> None:
    def called(
        *, size: tuple[int, int] = (1, 2), rate: float | None = None, names: list[str] | None = None
    ) -> None: ...

    check_arguments(called, "it", {"size": [3, 4], "rate": 1, "names": ["a", 2]})
    for settings, text in (
        ({"size": [3]}, r"it.size=\[3\]: wanted is a list of 2: .*for instance it.size=\[1,2\]"),
        ({"size": None}, "it.size=null"),
        ({"rate": "fast"}, "it.rate=fast: wanted is null or a number"),
        ({"names": "a"}, "each item a text"),
        ({"horses": 1}, "it has no setting 'horses'; it has: size, rate, names"),
    ):
        with pytest.raises(UserError, match=text):
            check_arguments(called, "it", settings)


def annotated() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every node of conf/ whose keys are the arguments of something, with that."""
    from hydra.utils import get_object
    from lightning.pytorch import Trainer

    from vfmadapt.tasks.augment import Augment
    from vfmadapt.tasks.data import SegmentationData

    for group in ("adapter", "backbone", "data", "head"):
        for name in names(group):
            node = plain(compose("train", [f"{group}={name}"])[group])
            yield f"{group}={name}", node, get_object(node["_target_"])
    for chosen in ([], *([f"experiment={name}"] for name in names("experiment"))):
        cfg = compose("train", chosen)
        for key, made in (("augment", Augment), ("loader", SegmentationData), ("trainer", Trainer)):
            yield " ".join([*chosen, key]), plain(cfg[key]), made
        yield " ".join([*chosen, "task"]), plain(cfg.task), get_object(cfg.task._target_)


def test_defaults_are_of_the_kind_that_is_taken() -> None:
    """The early check goes by the defaults, so they must not be of another kind than the signatures have."""
    for name, node, made in annotated():
        known = inspect.signature(made).parameters
        check_arguments(made, name, {k: v for k, v in node.items() if k in known and v != "???"})


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
    from vfmadapt.cli import TOOLS as KNOWN

    assert tool in KNOWN
    assert compose(tool).format == "text"


def test_help() -> None:
    done = run("tools/train.py", "--help")
    assert done.returncode == 0
    assert any(line.startswith("adapter: ") and "earth" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("tool", TOOLS)
def test_outside_the_environment_one_line_says_what_to_type(tool: str) -> None:
    done = run("-S", f"tools/{tool}.py")  # -S: no site-packages, as in a Python without vfmadapt
    assert_user_error(done, "make install")
