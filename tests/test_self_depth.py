"""Self-supervised depth: geometry against points placed by hand, losses against torchmetrics, and the task's steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from vfmadapt import train
from vfmadapt.build import build_model, compose, data_source, instantiate
from vfmadapt.errors import UserError
from vfmadapt.self_depth.geometry import camera_matrix, coverage, look_up, pixels, pose_matrix, project
from vfmadapt.self_depth.losses import edge_aware, least, ssim
from vfmadapt.self_depth.networks import MotionNetwork, PairNetwork, along_axis
from vfmadapt.self_depth.objective import Camera, Neighbours
from vfmadapt.tasks.scenes import SceneData, collate, mirrored, shrunk
from vfmadapt.tasks.self_depth import path

MATRIX = torch.tensor([[40.0, 0, 19.5], [0, 40, 14.5], [0, 0, 1]])


def test_poses_turn_as_scipy_says() -> None:
    motion = torch.tensor([[0.3, -0.2, 0.5, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 4.0, 5.0, 6.0]])
    pose = pose_matrix(motion)
    want = Rotation.from_rotvec(motion[:, :3].numpy()).as_matrix()
    np.testing.assert_allclose(pose[:, :3, :3].numpy(), want, atol=1e-6)
    assert torch.equal(pose[:, :3, 3], motion[:, 3:])
    assert torch.equal(pose[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(2, 4))


def test_points_are_seen_where_the_second_camera_sees_them() -> None:
    depth = torch.full((1, 30, 40), 2.0)
    places, inside = project(depth, torch.eye(4)[None], MATRIX[None])
    torch.testing.assert_close(places[0], pixels((30, 40), depth), atol=1e-4, rtol=0)
    assert inside[0, 1:-1, 1:-1].all()
    aside = pose_matrix(torch.tensor([[0.0, 0, 0, 0.1, 0, 0]]))  # points move right by f t / z = 2 pixels
    places, inside = project(depth, aside, MATRIX[None])
    torch.testing.assert_close(
        places[0] - pixels((30, 40), depth), torch.tensor([2.0, 0]).expand(30, 40, 2), atol=1e-4, rtol=0
    )
    assert inside[0, 5, 30]
    assert not inside[0, :, -1].any()
    behind = pose_matrix(torch.tensor([[0.0, 0, 0, 0, 0, -3.0]]))
    assert not project(depth, behind, MATRIX[None])[1].any()


def test_a_frame_is_rebuilt_from_its_neighbour_with_the_true_depth() -> None:
    """A textured slanted plane seen by two cameras: the source looked up is the target, wherever it shows it."""

    def seen(pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Picture (1, 1, H, W) and depth (1, H, W) of the plane n . p = 4 from a camera; `pose`: world to camera."""
        normal, rays = (
            torch.tensor([0.2, -0.1, 1.0]),
            torch.nn.functional.pad(pixels((30, 40), pose), (0, 1), value=1.0),
        )
        to_world = torch.linalg.inv(pose[0])
        ways = rays @ torch.linalg.inv(MATRIX).T @ to_world[:3, :3].T
        depth = (4 - to_world[:3, 3] @ normal) / (ways @ normal)
        points = to_world[:3, 3] + ways * depth[..., None]
        return (points[..., :2] * 1.5).sin().prod(-1)[None, None], depth[None]

    pose = pose_matrix(torch.tensor([[0.02, -0.05, 0.03, 0.1, -0.05, 0.2]]))
    target, depth = seen(torch.eye(4)[None])
    source, _ = seen(pose)
    places, inside = project(depth, pose, MATRIX[None])
    rebuilt = look_up(source, places)
    assert inside.float().mean() > 0.7
    assert (rebuilt - target)[:, 0][inside].abs().max() < 0.02  # bilinear
    assert (source - target)[:, 0][inside].abs().max() > 0.2


def test_intrinsics_are_in_sizes_of_the_picture() -> None:
    matrix = camera_matrix(torch.tensor([[1.0, 1.5]]), torch.tensor([[0.5, 0.5]]), (30, 40))
    torch.testing.assert_close(matrix[0], torch.tensor([[40.0, 0, 19.5], [0, 45, 14.5], [0, 0, 1]]))


def test_what_moves_in_covers_what_it_meets() -> None:
    flow = torch.zeros(1, 2, 4, 6)
    assert torch.equal(coverage(flow), torch.ones(1, 4, 6))
    flow[:, 0] = 1.5
    want = torch.tensor([0, 0.5, 1, 1, 1, 1]).expand(1, 4, 6)
    torch.testing.assert_close(coverage(flow), want)


def test_ssim_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = torch.rand(2, 3, 20, 24), torch.rand(2, 3, 20, 24)
    b = 0.5 * a + 0.5 * b
    settings: dict[str, Any] = {
        "gaussian_kernel": False,
        "kernel_size": 3,
        "data_range": 1.0,
        "return_full_image": True,
    }
    _, want = structural_similarity_index_measure(a, b, **settings)
    torch.testing.assert_close(ssim(a, b)[..., 3:-3, 3:-3], want[..., 3:-3, 3:-3], atol=1e-4, rtol=1e-4)


def test_the_least_loss_counts_only_where_it_is_shown_and_moves() -> None:
    first, second = torch.tensor([[[1.0, 4.0, 3.0, 2.0]]]), torch.tensor([[[2.0, 1.0, 9.0, 2.0]]])
    shown = torch.tensor([[[True, True, False, False]]]), torch.tensor([[[True, True, True, False]]])
    still = torch.tensor([[[5.0, 0.5, 10.0, 10.0]]])
    # pixel 0: 1; pixel 1: fits better unmoved; pixel 2: only the second shows it, 9; pixel 3: nobody does
    assert least([first, second], shown, [still, still]) == pytest.approx((1 + 9) / 2)
    nobody = torch.zeros_like(shown[0])
    assert least([first], [nobody], [still]) == 0


def test_smoothness_spares_edges_of_the_picture() -> None:
    step = torch.zeros(1, 1, 4, 8)
    step[..., 4:] = 1
    flat, edge = torch.zeros(1, 3, 4, 8), 5 * step.expand(1, 3, 4, 8)
    assert edge_aware(step, edge) < 0.01 * edge_aware(step, flat)


def test_networks_begin_at_rest() -> None:
    a, b = torch.rand(2, 3, 33, 50), torch.rand(2, 3, 33, 50)
    motion, focal, centre = MotionNetwork(3, width=8, blocks=1)(a, b)
    assert motion.shape == (2, 6)
    assert motion.abs().max() < 0.1
    torch.testing.assert_close(focal, torch.full((2, 2), float(np.log(2) + 0.5)))
    torch.testing.assert_close(centre, torch.full((2, 2), 0.5))
    assert PairNetwork(3, 2, width=8, blocks=1)(a, b).abs().max() < 0.1
    eighteen = MotionNetwork(3, width=64, blocks=2).encoder
    striding = 64 * 64 + 2 * 64  # its first stage shrinks where ResNet pools
    assert sum(p.numel() for p in eighteen.parameters()) == 11_176_512 + 3 * 64 * 49 + striding  # of six channels
    with pytest.raises(UserError, match=r"task\.width=12"):
        PairNetwork(3, 2, width=12, blocks=1)


def test_cells_tell_of_roll_and_forward_motion() -> None:
    """What a camera's turn about its axis, or its step ahead, does to the points of a plane."""
    focal, centre = torch.tensor([[0.9, 1.2]]), torch.tensor([[0.45, 0.55]])
    size = (24, 32)
    matrix, depth = camera_matrix(focal, centre, size), torch.full((1, *size), 2.0)
    for motion, want in (([0, 0, 0.02, 0, 0, 0], (0.02, 0.0)), ([0, 0, 0, 0, 0, 0.04], (0.0, 0.02))):
        places, _ = project(depth, pose_matrix(torch.tensor([motion], dtype=torch.float32)), matrix)
        across, down = ((places - pixels(size, depth)) / matrix[:, None, None, [0, 1], [0, 1]]).unbind(-1)
        roll, away = along_axis(torch.stack([-down, across], 1), focal, centre)  # the turns that look the same
        assert (float(roll), float(away)) == pytest.approx(want, abs=2e-3)


def test_given_intrinsics_are_used_and_not_learnt() -> None:
    net = Neighbours(3, learned=False, appearance=False, width=8, blocks=1)
    camera = net.camera(torch.rand(1, 3, 30, 40), torch.rand(1, 3, 30, 40), MATRIX[None])
    torch.testing.assert_close(camera_matrix(camera.focal, camera.centre, (30, 40)), MATRIX[None])
    assert not any(p.requires_grad for p in net.motion.camera.parameters())


def sample(size: tuple[int, int] = (30, 40)) -> dict[str, Any]:
    poses = pose_matrix(torch.tensor([[0.1, 0.2, -0.1, 1, 2, 3], [-0.2, 0.1, 0.1, -1, 0.5, 2]]))
    depth = 3 + torch.rand(size)
    return {
        "image": torch.rand(3, *size),
        "sources": torch.rand(2, 3, *size),
        "depth": depth,
        "poses": poses,
        "id": "a",
    } | {"intrinsics": MATRIX.clone()}


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_mirrored_scene_is_a_scene(axis: str) -> None:
    """Projection commutes with the mirror, and two mirrors are none."""
    plain = sample()
    plain["intrinsics"][0, 2] += 3
    turned = mirrored(plain, axis)
    dim = {"x": 1, "y": 0}[axis]
    places, _ = project(plain["depth"][None], plain["poses"][:1], plain["intrinsics"][None])
    again, _ = project(turned["depth"][None], turned["poses"][:1], turned["intrinsics"][None])
    want = places[0].flip(dim).clone()
    want[..., 1 - dim] = plain["depth"].shape[dim] - 1 - want[..., 1 - dim]
    torch.testing.assert_close(again[0], want, atol=1e-3, rtol=1e-4)
    for key, value in mirrored(turned, axis).items():
        if key != "id":
            torch.testing.assert_close(value, plain[key])


def test_a_shrunk_scene_is_the_same_scene() -> None:
    plain = sample()
    plain["depth"] = torch.full((30, 40), 5.0)
    small = shrunk(plain | {"mask": torch.arange(1200).view(30, 40)}, 2)
    assert small["image"].shape == (3, 15, 20)
    assert small["mask"].shape == (15, 20)
    torch.testing.assert_close(small["sources"][1, 2, 3, 4], plain["sources"][1, 2, 6:8, 8:10].mean())
    large, _ = project(plain["depth"][None], plain["poses"][:1], plain["intrinsics"][None])
    places, _ = project(small["depth"][None], plain["poses"][:1], small["intrinsics"][None])
    middle = large[0].unflatten(0, (15, 2)).unflatten(2, (20, 2)).mean((1, 3))  # of the four pixels that are one
    torch.testing.assert_close(places[0], (middle + 0.5) / 2 - 0.5, atol=1e-2, rtol=0)


def test_camera_paths_begin_with_the_frame_before() -> None:
    poses = sample()["poses"]
    cameras = path(poses)
    assert torch.equal(cameras[1], torch.eye(4))
    torch.testing.assert_close(cameras[0] @ poses[0], torch.eye(4), atol=1e-5, rtol=0)


TINY = ["data.train=1", "data.val=1", "data.test=1", "data.frames=3", "data.size=[32,40]", "data.workers=1"]


def small_task(folder: Path, *overrides: str) -> tuple[Any, Any, dict[str, Any]]:
    """Task, data and one batch of a tiny experiment."""
    cfg = compose(
        "train",
        ["experiment=endodac", *TINY, f"data_root={folder}", "loader.shrink=1", "task.motion_first=0", *overrides],
    )
    source = data_source(cfg)
    source.prepare()
    task = instantiate(cfg.task, build_model(cfg, source.spec), packages=("vfmadapt.tasks.",))
    data = SceneData(source, needs=["sources"], batch_size=1)
    return task, data, next(iter(data.val_dataloader()))


def test_every_part_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _, batch = small_task(tmp_path)
    monkeypatch.setattr(task, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(task, "complete", lambda loss: loss)
    with torch.no_grad():  # where zeros would hide gradients
        for parameter in task.trained():
            parameter.add_(0.01 * torch.randn_like(parameter))
    task.model.train()
    task.training_step(batch, 0).backward()
    without = {name for name, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert {name.split(".")[-1] for name in without} <= {"inner", "outer"}  # the vectors' stage has not begun
    kept = {id(p) for p in task.trained()}
    assert {id(p) for p in task.parameters() if p.requires_grad} == kept


def test_the_flow_learns_nothing_from_the_depth(tmp_path: Path) -> None:
    net = Neighbours(3, learned=True, appearance=True, width=8, blocks=1)
    plain = collate([sample((32, 40))])
    depths = [torch.full((1, 1, 32, 40), 3.0, requires_grad=True)]
    net(plain["image"], plain["sources"], depths, plain["intrinsics"])["loss"].backward()
    flow = [p.grad.clone() for p in net.flow.parameters()]
    net.zero_grad()
    other = [torch.full((1, 1, 32, 40), 9.0)]
    net(plain["image"], plain["sources"], other, plain["intrinsics"])["loss"].backward()
    torch.testing.assert_close(flow, [p.grad for p in net.flow.parameters()])


def test_motions_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first share of the steps only the motion network learns, and from every pixel."""
    task, _, batch = small_task(tmp_path, "task.motion_first=0.5")
    monkeypatch.setattr(task, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(task, "complete", lambda loss: loss)
    monkeypatch.setattr(task, "_total_steps", lambda: 2)
    for step, learns in ((0, False), (1, True)):
        monkeypatch.setattr(type(task), "global_step", step)
        task.zero_grad()
        task.training_step(batch, 0).backward()
        assert any(p.grad is not None and p.grad.any() for p in task.neighbours.parameters())
        assert any(p.grad is not None and p.grad.any() for p in task.model.head.parameters()) is learns
    with pytest.raises(UserError, match=r"task\.motion_first=1"):
        small_task(tmp_path, "task.motion_first=1")


@pytest.mark.slow  # two processes import everything
def test_two_processes_train_through_all_phases(tmp_path: Path) -> None:
    """Motions, matrices, vectors: in each phase others are without a gradient."""
    keys = ["trainer=ddp", "trainer.max_steps=8", "loader.steps_per_epoch=8", "loader.batch_size=1", "loader.shrink=1"]
    keys += ["task.motion_first=0.25", "adapter.first_stage=0.75", "previews=0", "format=json", f"data_root={tmp_path}"]
    tool = Path(__file__).resolve().parents[1] / "tools" / "train.py"
    done = subprocess.run(
        [sys.executable, str(tool), "experiment=endodac", *TINY, "data.train=2", *keys, f"output={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 8
    state = load_file(result["adapter_file"])
    assert any(value.any() for name, value in state.items() if name.endswith(".up"))


def test_a_large_turn_is_found_from_all_pixels() -> None:
    texture = F.interpolate(torch.rand(1, 3, 10, 14), (30, 40), mode="bicubic").clamp(0, 1)
    true = pose_matrix(torch.tensor([[0.0, 0.12, 0, 0, 0, 0]]))
    depth, matrix = torch.ones(1, 30, 40), MATRIX[None]
    source = look_up(texture, project(depth, torch.linalg.inv(true), matrix)[0])

    net = Neighbours(3, learned=False, appearance=False, width=8, blocks=1)
    turn = torch.zeros(1, requires_grad=True)

    def camera(*_: Any) -> Camera:
        motion = torch.cat([torch.zeros(1), turn, torch.zeros(4)])[None]
        return Camera(motion, torch.tensor([[1.0, 40 / 30]]), torch.tensor([[0.5, 0.5]]))

    net.camera = camera  # type: ignore[method-assign]
    optimiser = torch.optim.Adam([turn], 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        net(texture, source[None], 4 * [depth[None]], matrix, phase="turns")["loss"].backward()
        optimiser.step()
    assert float(turn.detach()) == pytest.approx(0.12, abs=0.02)  # a degree


def test_stage_two_moves_the_vectors_in_a_real_training(tmp_path: Path) -> None:
    """The release's optimiser never has them; and a resumed training goes on exactly."""
    run = tmp_path / "run"
    common = ["experiment=endodac", *TINY, f"data_root={tmp_path}", f"output={run}", "loader.shrink=1", "previews=1"]
    common += [
        "task.motion_first=0",
        "loader.batch_size=1",
        "loader.steps_per_epoch=1",
        "trainer.log_every_n_steps=1",
        "adapter.necks=[]",
    ]
    found = {}
    for steps in (1, 2, 3):
        extra = ["resume=true"] if steps > 1 else []
        settings = [f"trainer.max_steps={steps}", "adapter.first_stage=0.3", "task.schedule=constant", *extra]
        result = train.main(compose("train", [*common, *settings]))
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        found[steps] = {k: v for k, v in state["state_dict"].items() if k.startswith("adapters.")}
        assert any(key.startswith("motion.") for key in state["neighbours"])
    moved = {key.split(".")[-1] for key, value in found[3].items() if not torch.equal(value, found[2][key])}
    assert moved == {"inner", "outer"}
    assert result["focal"] > 0
    assert {"abs_rel", "abs_rel_of_mean", "focal_error", "ate", "rpe_degrees"} <= result.keys()
    assert Path(result["previews"][0]).is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pairs=false"], "gives samples without sources"),
        (["head=dpt"], "take head=endodac"),
        (["loader.shrink=0"], "loader.shrink=0"),
        (["loader.flips=[z]"], r"flips among x and y"),
        (["data=clouds_synthetic"], "learns one depth"),
    ],
)
def test_bad_input(overrides: list[str], message: str, tmp_path: Path) -> None:
    small = [o for o in TINY if "data=clouds_synthetic" not in overrides]
    if not small:
        small = ["data.train=1", "data.val=1", "data.test=1", "data.size=64", "~data.pairs"]
    cfg = ["experiment=endodac", *small, f"data_root={tmp_path}", f"output={tmp_path}/run", "trainer.max_steps=1"]
    with pytest.raises(UserError, match=message) as caught:
        train.main(compose("train", [*cfg, "loader.batch_size=1", *overrides]))
    assert "\n" not in str(caught.value)
