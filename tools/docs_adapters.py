"""Write docs/adapters.md from conf/adapter, docs/adapters.yaml and the measured docs/adapters_cost.json; --check."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from vfmadapt import params
from vfmadapt.build import compose, names
from vfmadapt.contracts import Owned
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, grids

ROOT = Path(__file__).resolve().parents[1]
PAGE, FACTS, COST = (ROOT / "docs" / name for name in ("adapters.md", "adapters.yaml", "adapters_cost.json"))


def sites(model: AdaptedBackbone) -> str:
    """Kinds of site and their roles, shortest form."""
    found: dict[str, set[str]] = {}
    for site in model.sites("main"):
        roles = found.setdefault(type(site).__name__, set())
        if role := getattr(site, "role", ""):
            roles.add(role)
    return ", ".join(f"{kind} {' '.join(sorted(roles))}".strip() for kind, roles in found.items()) or "replaced layers"


def identity(model: AdaptedBackbone) -> str:
    """Whether a new adapter changes nothing."""
    image = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = grids(model, image)
        theirs = model.detach()(image, [0, model.spec.depth - 1]).grids
    return "yes" if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True)) else "no"


def count(name: str) -> str:
    """Trained parameters on DINOv2-L, without a head."""
    model = params.build(compose("params", [f"adapter={name}", "backbone=dinov2_large"]))
    found = params.counts(model.backbone)
    copies = any(isinstance(site, Owned) for site in model.backbone.sites("main"))
    return f"{found['adapter_params'] + found['unfrozen_params']:,}" + (" (own weights included)" if copies else "")


def row(name: str, facts: dict[str, Any], cost: dict[str, Any]) -> str:
    """The table's line of one adapter."""
    arxiv, licence, figure = facts[name]
    model = adapted(name)
    merges = "yes" if not next(iter(model.adapters.values())).unmergeable else "no"
    where = sites(model) if name != "frozen" else "–"
    measured = cost.get(name, {})
    ratios = [f"{measured[key]:.2f}" if key in measured else "–" for key in ("forward", "train", "memory")]
    source = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–"
    total = count(name) if name != "frozen" else "0"
    cells = [f"`{name}`", where, identity(model), total, *ratios, merges, source, licence or "–", figure or "–"]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The page as it should be."""
    facts = yaml.safe_load(FACTS.read_text())
    cost = json.loads(COST.read_text()) if COST.exists() else {"setup": {}, "adapters": {}}
    known = names("adapter")
    if wrong := sorted(set(known) ^ set(facts["methods"])):
        raise UserError(f"docs/adapters.yaml and conf/adapter differ: {', '.join(wrong)}")
    setup = ", ".join(f"{key} {value}" for key, value in cost["setup"].items())
    head = [
        "| adapter | acts at | identity when new | trained on DINOv2-L | forward | step | memory | merges | paper | "
        "its code's licence | the paper's figure (theirs, not ours) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    left = [f"| {title} | {why} |" for title, why in facts["left_out"]]
    text = (ROOT / "docs" / "adapters_head.md").read_text().replace("SETUP", setup)
    return "\n".join(
        [
            text,
            *head,
            *(row(name, facts["methods"], cost["adapters"]) for name in known),
            "",
            "## Considered and left out",
            "",
            "| title | why |",
            "|---|---|",
            *left,
            "",
        ]
    )


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        fresh = PAGE.exists() and PAGE.read_text() == text
        sys.exit(0 if fresh else "docs/adapters.md is out of date; type: python tools/docs_adapters.py")
    PAGE.write_text(text)
