"""DV-LoRA: counts, what each of its two stages trains, and a stage that survives a resume."""

import pytest
import torch

from vfmadapt._state import load_state
from vfmadapt.adapters.dv_lora import DVLoRA
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, loss, perturb, vit_spec

MATRICES, VECTORS = {"down", "up"}, {"inner", "outer"}


def test_published_counts() -> None:
    with torch.device("meta"):
        adapter = DVLoRA(vit_spec(768, 12))
    assert sum(p.numel() for p in adapter.necks.parameters()) == 929_280
    sizes = {
        kind: sum(p.numel() for n, p in adapter.updates.named_parameters() if n.split(".")[-1] in kind_of)
        for kind, kind_of in (("matrices", MATRICES), ("vectors", VECTORS))
    }
    assert sizes == {"matrices": 368_640, "vectors": 46_176}
    assert list(adapter.necks) == ["2", "5", "8", "11"]


def moved_in_steps(model: AdaptedBackbone, first: int, last: int, total: int = 4) -> set[str]:
    """Last parts of the names of the adapter's tensors that steps `first` .. `last` - 1 change."""
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.adapters.named_parameters()}
    model.train()
    for step in range(first, last):
        optimiser.zero_grad()
        loss(model, torch.randn(2, 3, 32, 48)).backward()
        optimiser.step()
        model.after_step(step + 1, total)
    return {n.split(".")[-1] for n, p in model.adapters.named_parameters() if not torch.equal(p, before[n])}


def test_the_first_stage_trains_the_matrices_and_the_second_the_vectors() -> None:
    """The release's second stage moves nothing but necks: its optimiser never gets the vectors."""
    model = adapted("dv_lora", settings={"necks": [], "first_stage": 0.5})
    perturb(model)
    assert moved_in_steps(model, 0, 2) == MATRICES
    assert moved_in_steps(model, 2, 4) == VECTORS


def test_one_optimiser_serves_both_stages() -> None:
    """Neither momentum nor weight decay moves what a stage leaves alone."""
    model = adapted("dv_lora", settings={"necks": [], "first_stage": 0.5})
    perturb(model)
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    seen = []
    for step in range(6):
        before = {n: p.detach().clone() for n, p in model.adapters.named_parameters()}
        optimiser.zero_grad()
        loss(model, torch.randn(2, 3, 32, 48)).backward()
        optimiser.step()
        model.after_step(step + 1, 6)
        seen.append({n.split(".")[-1] for n, p in model.adapters.named_parameters() if not torch.equal(p, before[n])})
    assert seen == [MATRICES] * 3 + [VECTORS] * 3


def test_the_stage_is_kept_by_checkpoints_and_not_by_files() -> None:
    model, other = adapted("dv_lora"), adapted("dv_lora")
    model.after_step(9, 10)
    load_state(other.training_state(), model.training_state())
    assert other.adapters["main"].in_second
    assert not any("second" in key for key in model.adapter_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 alpha"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"first_stage": 0.0}, r"first_stage=0\.0"),
        ({"necks": [7]}, r"dv_lora: necks=\[7\] must be"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DVLoRA(vit_spec(8), **settings)


def test_merges_without_necks_only() -> None:
    assert not DVLoRA(vit_spec(8), necks=[]).unmergeable
    assert "necks" in DVLoRA(vit_spec(8)).unmergeable
