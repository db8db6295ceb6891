"""Losses of depth: what they ignore, what they see, and what unknown pixels do to them (nothing)."""

import pytest
import torch

from vfmadapt.depth_losses import gradient_matching, scale_and_shift_invariant, silog

LOSSES = (silog, scale_and_shift_invariant, gradient_matching)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(2, 1, 12, 17, generator=g) + 0.5 for _ in range(2))
    return found, truth, torch.rand(2, 1, 12, 17, generator=g) > 0.4


def test_silog_is_its_formula(maps) -> None:
    found, truth, known = maps
    gap = (found / truth).log()[known].double()
    assert silog(found, truth, known, variance=0.85).item() == pytest.approx(
        (gap.square().mean() - 0.85 * gap.mean() ** 2).sqrt().item(), abs=2e-3
    )
    assert silog(3 * found, truth, known, variance=1.0).item() == pytest.approx(
        silog(found, truth, known, variance=1.0).item(), abs=1e-5
    )
    assert silog(truth, truth, known).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_scale_and_shift_of_each_image_do_not_matter(maps, loss) -> None:
    found, truth, known = maps
    changed = found * torch.tensor([2.0, 5.0]).view(2, 1, 1, 1) + torch.tensor([-3.0, 40.0]).view(2, 1, 1, 1)
    assert loss(changed, truth, known).item() == pytest.approx(loss(found, truth, known).item(), rel=1e-3)
    assert loss(3 * truth + 1, truth, known).item() == pytest.approx(0, abs=1e-5)
    assert loss(found, truth, known) > 0.1
    assert loss(-truth, truth, known) > loss(truth, truth, known) + 0.5


def test_scale_and_shift_invariant_is_its_formula(maps) -> None:
    found, truth, known = maps
    expected = []
    for p, t, k in zip(found, truth, known, strict=True):
        p, t = ((x - x.median()) / (x - x.median()).abs().mean() for x in (p[k], t[k]))
        expected.append((p - t).abs().mean())
    assert torch.isclose(scale_and_shift_invariant(found, truth, known), torch.stack(expected).mean(), rtol=1e-4)


def test_gradient_matching_tells_rough_from_smooth_errors() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    truth, known = (x + y)[None], torch.ones(1, 16, 16).bool()
    rough = truth + 2 * ((x + y) % 2 - 0.5)
    smooth = truth + torch.where(x < 8, -1.0, 1.0) * torch.where(y < 8, -1.0, 1.0)
    pixels = [scale_and_shift_invariant(found, truth, known) for found in (rough, smooth)]
    assert pixels[0].item() == pytest.approx(pixels[1].item(), rel=0.2)
    edges = [gradient_matching(found, truth, known, scales=1) for found in (rough, smooth)]
    assert edges[0] > 2 * edges[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_pixels_count_nowhere(maps, loss) -> None:
    found, truth, known = maps
    found = found.clone().requires_grad_()
    value = loss(found, truth.masked_fill(~known, 1e9), known)
    value.backward()
    assert (found.grad[~known] == 0).all()
    assert found.grad[known].abs().sum() > 0
    worse = found.detach().masked_fill(~known, torch.nan)
    assert torch.isclose(loss(worse, truth.masked_fill(~known, torch.nan), known), value)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_image_without_a_known_pixel_counts_nowhere(maps, loss) -> None:
    found, truth, known = maps
    both = loss(found, truth, known)
    none = torch.zeros_like(known)
    found = found.clone().requires_grad_()
    value = loss(found, truth, none)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert (found.grad == 0).all()
    tripled = [torch.cat([x, x[:1]]) for x in (found.detach(), truth)]
    assert torch.isclose(loss(*tripled, torch.cat([known, none[:1]])), both)


@pytest.mark.parametrize("loss", LOSSES)
def test_sparse_truth_teaches(loss) -> None:
    """Forty points of a map, as a lidar gives them."""
    g = torch.Generator().manual_seed(1)
    truth = torch.rand(1, 20, 20, generator=g) + 1
    known = torch.zeros(1, 400).bool()
    known[0, torch.randperm(400, generator=g)[: 40 if loss is not gradient_matching else 300]] = True
    known = known.view(1, 20, 20)
    found = torch.ones(1, 20, 20) + 0.1 * torch.rand(1, 20, 20, generator=g)
    found.requires_grad_()
    optimiser = torch.optim.Adam([found], 0.02)
    first = loss(found, truth, known).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss(found, truth, known).backward()
        optimiser.step()
    assert loss(found, truth, known).item() < 0.5 * first
