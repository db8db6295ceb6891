"""Who may import whom: read from the source, so nothing is imported and no GPU is needed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"vfmadapt": "vfmadapt", **{f"vfmadapt.{d}": d for d in ("adapters", "heads", "datasets", "kernels")}}
SHADOWED = {"adapters", "heads", "datasets", "kernels", "conf", "tools", "tests"}
SEAMS = {"vfmadapt.contracts", "vfmadapt.errors"}
# layer -> what it may import of the project; the longest prefix wins; what is not listed may import anything
ALLOWED = {
    "vfmadapt.errors": set(),
    "vfmadapt.kernels": {"vfmadapt.errors"},
    "vfmadapt.contracts": {"vfmadapt.errors"},
    "vfmadapt.backbones": {*SEAMS, "vfmadapt.kernels"},
    "vfmadapt.adapters": {*SEAMS, "vfmadapt.kernels"},
    "vfmadapt.heads": {*SEAMS, "vfmadapt.kernels"},
    "vfmadapt.datasets": {*SEAMS, "vfmadapt.frames", "vfmadapt.raster"},
    "vfmadapt.files": {"vfmadapt.errors"},
    "vfmadapt.raster": {*SEAMS, "vfmadapt.files"},
    "vfmadapt.frames": {*SEAMS, "vfmadapt.files"},
    "vfmadapt.tracking": {
        *SEAMS,
        *(f"vfmadapt.{name}" for name in ("files", "frames", "host", "model", "raster.preview", "tracking_metrics")),
    },
    "vfmadapt.losses": SEAMS,
    "vfmadapt.metrics": SEAMS,
    "vfmadapt.surfaces": SEAMS,
    "vfmadapt.tracking_metrics": {*SEAMS, "vfmadapt.surfaces"},
    "vfmadapt.merging": SEAMS,
    "vfmadapt._hooks": {*SEAMS, "vfmadapt.kernels", "vfmadapt._streams"},
    "vfmadapt._streams": SEAMS,
    "vfmadapt.self_depth": SEAMS,
    "vfmadapt._shared_batch": SEAMS,
    "vfmadapt._sites": SEAMS,
    "vfmadapt._state": SEAMS,
    "vfmadapt.host": {
        *SEAMS,
        *(f"vfmadapt.{name}" for name in ("merging", "_hooks", "_shared_batch", "_sites", "_state")),
    },
    "vfmadapt.objectives": {*SEAMS, "vfmadapt.host", "vfmadapt.backbones.scratch"},
    "vfmadapt.model": {*SEAMS, "vfmadapt.host", "vfmadapt.feature_memory", "vfmadapt._state"},
    "vfmadapt.feature_memory": SEAMS,
}
# heavy library -> the only places that may import it
OWNERS = {
    # interop replays whole published blocks, muon takes the iteration of its optimiser
    "timm": ("vfmadapt.backbones", "vfmadapt.interop", "vfmadapt.tasks.muon"),
    "peft": tuple(
        f"vfmadapt.adapters.{name}" for name in ("peft", "_peft_layers", "_peft_runs", "_peft_starts", "_peft_tuners")
    ),
    "transformers": ("vfmadapt.backbones", "vfmadapt.heads", "vfmadapt.tracking"),
    "mmseg": ("vfmadapt.heads.mmseg",),
    "mmengine": ("vfmadapt.heads.mmseg",),
    "segment_anything": ("vfmadapt.backbones", "vfmadapt.heads", "vfmadapt.tracking"),
    "rasterio": ("vfmadapt.raster", "vfmadapt.datasets"),
    "triton": ("vfmadapt.kernels",),
    "lightning": ("vfmadapt.tasks", "vfmadapt.train"),
    "albumentations": ("vfmadapt.tasks.augment",),
}
# reachable before a tool has begun: --help, `list` and errors must not wait for heavy libraries
LIGHT = ("vfmadapt", "vfmadapt.cli", "vfmadapt.build", "vfmadapt.errors")
HEAVY = {"torch", "timm", "lightning", "torchmetrics", "rasterio", "albumentations", "sklearn", "scipy", "numpy"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join([package, *(p for p in parts if p != "__init__")]), file))
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write absolute imports"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def within(name: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports(name: str, path: Path) -> None:
    layer = max((p for p in ALLOWED if within(name, (p,))), key=len, default=None)
    for imported in imports(ast.parse(path.read_text())):
        top = imported.split(".")[0]
        assert top not in SHADOWED, f"{name}: write vfmadapt.{imported}"
        if top in OWNERS:
            assert within(name, OWNERS[top]), f"{name} imports {imported}; only {', '.join(OWNERS[top])} may"
        if layer != "vfmadapt.contracts" and within(imported, ("vfmadapt.contracts",)):
            assert imported.count(".") < 3, f"{name} imports {imported}; import it from vfmadapt.contracts"
        if layer and top == "vfmadapt" and "." in imported and not within(imported, (layer,)):
            assert within(imported, ALLOWED[layer]), (
                f"{name} imports {imported}; {layer} may import only {sorted(ALLOWED[layer])}"
            )


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    path = dict(modules())[name]
    body = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    for imported in imports(ast.Module(body, [])):
        assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}; import it where it is used"


def test_package_guards_are_the_same() -> None:
    for folder in ("adapters", "heads", "datasets", "kernels", "conf"):
        text = (ROOT / folder / "__init__.py").read_text()
        assert f'__name__ != "vfmadapt.{folder}"' in text
        assert "PYTHONSAFEPATH" in text
