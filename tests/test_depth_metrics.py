"""Errors of depth, paths and focal lengths against their formulas and SciPy; alignment is a choice that is reported."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vfmadapt.depth_metrics import (
    DepthMetrics,
    ValueMetrics,
    aligned,
    as_table,
    focal_error,
    plane_fit,
    trajectory_error,
)
from vfmadapt.errors import UserError


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 9, 7, generator=g) * 50 + 5
    found = truth * (1 + 0.3 * torch.randn(2, 9, 7, generator=g)).clamp_min(0.1)
    return found, truth, torch.rand(2, 9, 7, generator=g) > 0.3


def measured(found, truth, known, **settings):
    metrics = DepthMetrics(**settings)
    metrics.update(found, truth, known)
    return metrics.compute()


def test_depth_errors_are_their_formulas(maps) -> None:
    found, truth, known = maps
    result = measured(found, truth, known)
    pairs = [(p[k].double().numpy(), t[k].double().numpy()) for p, t, k in zip(found, truth, known, strict=True)]
    formulas = {
        "abs_rel": lambda p, t: np.mean(np.abs(p - t) / t),
        "sq_rel": lambda p, t: np.mean((p - t) ** 2 / t),
        "rmse": lambda p, t: np.sqrt(np.mean((p - t) ** 2)),
        "rmse_log": lambda p, t: np.sqrt(np.mean((np.log(p) - np.log(t)) ** 2)),
        "delta1": lambda p, t: np.mean(np.maximum(p / t, t / p) < 1.25),
        "delta3": lambda p, t: np.mean(np.maximum(p / t, t / p) < 1.25**3),
    }
    for key, formula in formulas.items():
        assert result[key] == pytest.approx(np.mean([formula(p, t) for p, t in pairs])), key
    assert result["images"] == 2


def test_alignment_is_what_it_says(maps) -> None:
    found, truth, known = maps
    assert measured(4 * truth, truth, known)["abs_rel"] == pytest.approx(3)
    halved = measured(0.25 * truth, truth, known, align="median")
    assert halved["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert halved["scale"] == pytest.approx(4)
    assert halved["align"] == "median"
    assert measured(3 * truth + 9, truth, known, align="least_squares")["rmse"] == pytest.approx(0, abs=1e-4)
    assert measured(3 * truth + 9, truth, known, align="median")["rmse"] > 1
    slope, summand = np.polyfit(found[0].flatten(), truth[0].flatten(), 1)
    _, scale, shift = aligned(found[0].flatten().double(), truth[0].flatten().double(), "least_squares")
    assert (scale, shift) == (pytest.approx(slope, rel=1e-4), pytest.approx(summand, rel=1e-4))
    assert "alignment: median" in as_table(halved)


def test_inverse_depth_is_aligned_as_such(maps) -> None:
    _, truth, known = maps
    result = measured(0.5 / truth + 2, truth, known, align="least_squares", found_inverse=True)
    assert result["abs_rel"] == pytest.approx(0, abs=1e-4)
    both = measured(7 * truth - 3, truth, known, align="least_squares", found_inverse=True, truth_inverse=True)
    assert both["abs_rel"] == pytest.approx(0, abs=1e-4)
    backwards = measured(-1 / truth, truth, known, found_inverse=True)  # below 0: cut at the greatest depth
    assert backwards["rmse_log"] < np.log(55 / 5)


def test_unknown_pixels_and_images_are_left_out(maps) -> None:
    found, truth, known = maps
    result = measured(found, truth.masked_fill(~known, torch.nan), known)
    assert result == measured(found.masked_fill(~known, torch.inf), truth.masked_fill(~known, -1), known)
    alone = measured(found[:1], truth[:1], known[:1])
    known[1] = False
    assert measured(found, truth, known) == alone
    nothing = measured(found, truth, torch.zeros_like(known))
    assert nothing["abs_rel"] is None
    assert nothing["images"] == 0


def test_another_alignment_is_refused() -> None:
    with pytest.raises(UserError, match="align=mean: allowed are none, median, least_squares"):
        DepthMetrics(align="mean")


def test_errors_of_values_count_pixels_over_the_set() -> None:
    g = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(3, 2, 5, 6, generator=g) for _ in range(2))
    known = torch.rand(3, 2, 5, 6, generator=g) > 0.5
    metrics = ValueMetrics(("height", "biomass"))
    for i in range(3):
        metrics.update(found[i : i + 1], truth[i : i + 1].masked_fill(~known[i : i + 1], torch.nan), known[i : i + 1])
    result, keep = metrics.compute(), known[:, 0]
    gap = (found - truth)[:, 0][keep]
    assert result["rmse"] == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-5)
    assert result["bias"] == pytest.approx(gap.mean().item(), rel=1e-4)
    wanted = 1 - gap.square().sum() / (truth[:, 0][keep] - truth[:, 0][keep].mean()).square().sum()
    assert result["r2"] == pytest.approx(wanted.item(), rel=1e-4)
    assert result["values"]["biomass"]["mae"] == pytest.approx((found - truth)[:, 1][known[:, 1]].abs().mean().item())
    assert ValueMetrics(("height",)).compute()["rmse"] is None


def path(seed: int, frames: int = 8) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(rng.normal(0, 0.4, (frames, 3))).as_matrix()
    poses[:, :3, 3] = rng.normal(0, 5, (frames, 3)).cumsum(0)
    return torch.from_numpy(poses)


def test_a_path_is_compared_up_to_a_similarity() -> None:
    truth, found = path(0), path(0)
    turn = torch.from_numpy(Rotation.from_rotvec([0.5, -1, 2]).as_matrix())
    found[:, :3, :3] = turn @ truth[:, :3, :3]
    found[:, :3, 3] = 0.2 * truth[:, :3, 3] @ turn.T + torch.tensor([3.0, 4, 5], dtype=torch.float64)
    error = trajectory_error(found, truth)
    assert error["ate"] == pytest.approx(0, abs=1e-9)
    assert error["rpe_translation"] == pytest.approx(0, abs=1e-9)
    assert error["rpe_degrees"] == pytest.approx(0, abs=1e-4)
    assert error["scale"] == pytest.approx(5)


def test_errors_of_a_path_are_seen() -> None:
    truth, found = path(0), path(0)
    found[4, :3, :3] = found[4, :3, :3] @ torch.from_numpy(Rotation.from_euler("x", 10, degrees=True).as_matrix())
    error = trajectory_error(found, truth)
    assert error["rpe_degrees"] == pytest.approx(10 * np.sqrt(2 / 7), rel=1e-6)
    assert error["ate"] == pytest.approx(0, abs=1e-9)
    other = path(1)
    here, there = (p[:, :3, 3] - p[:, :3, 3].mean(0) for p in (other, truth))
    scale = trajectory_error(other, truth)["scale"]
    rotation = Rotation.align_vectors(there.numpy(), here.numpy())[0].as_matrix()
    expected = np.sqrt(((scale * here.numpy() @ rotation.T - there.numpy()) ** 2).sum(1).mean())
    assert trajectory_error(other, truth)["ate"] == pytest.approx(expected)
    with pytest.raises(UserError, match="camera to world"):
        trajectory_error(truth[:1], truth[:1])


def test_focal_length_and_plane() -> None:
    assert focal_error(92.0, 80.0) == pytest.approx(0.15)
    with pytest.raises(UserError, match="above 0"):
        focal_error(1.0, 0.0)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    truth, known = 2 * x - 3 * y + 4, torch.rand(6, 9) > 0.4
    fitted = plane_fit(truth.masked_fill(~known, torch.nan), known)
    assert torch.allclose(fitted, truth.double())
