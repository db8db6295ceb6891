"""MTLoRA: streams against a block run by hand for each task, one forward for all, and tasks on generated rooms."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vfmadapt
from vfmadapt import train
from vfmadapt.adapters.mtlora import MTLoRA
from vfmadapt.build import compose
from vfmadapt.contracts import Features, UserError
from vfmadapt.datasets.solids_synthetic import CLASSES, SolidsSynthetic
from vfmadapt.heads.multitask import MultiTaskHead
from vfmadapt.host import AdaptedBackbone
from vfmadapt.scene_targets import edges, normals
from vfmadapt.testing import adapted, perturb, vit_spec

LAST = 2
ONE_BLOCK = {"streams": [LAST], "norms": False, "rank": 4}


def streams(model: AdaptedBackbone, image: torch.Tensor) -> dict[str, torch.Tensor]:
    found = model(image, [LAST])
    return {task: found.of(task).grids[0] for task in ("segmentation", "depth")} | {"shared": found.grids[0]}


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_streams_are_those_of_the_equations(mode: str) -> None:
    """The last block of a ViT written out: attention once, then a stream for each task."""
    model = adapted("mtlora", settings={**ONE_BLOCK, "mode": mode})
    perturb(model, amount=0.1)
    image = torch.randn(2, 3, 32, 48)
    block = model.backbone.blocks()[LAST]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]), prepend=True),
        block.attn.proj.register_forward_pre_hook(lambda _m, args: seen.update(a=args[0])),
    ]
    with torch.no_grad():
        found = streams(model, image)
        for handle in handles:
            handle.remove()
        layers = model.adapters["main"].parted[str(LAST)]

        def linear(role: str, module: Any, x: torch.Tensor, own: torch.Tensor, task: int | None) -> torch.Tensor:
            layer, frozen = layers[role], F.linear(x, module.weight, module.bias)
            if task is None:
                return frozen + layer.shared(x)
            return frozen + layer.own[task](own) + (layer.shared(x) if mode == "matrixv2" else 0)

        def stream(task: int | None) -> torch.Tensor:
            shared = seen["x"] + linear("proj", block.attn.proj, seen["a"], seen["a"], None)
            mine = seen["x"] + linear("proj", block.attn.proj, seen["a"], seen["a"], task)
            n, n_mine = block.norm2(shared), block.norm2(mine)
            g = F.gelu(linear("fc1", block.mlp.fc1, n, n, None))
            g_mine = F.gelu(linear("fc1", block.mlp.fc1, n, n_mine, task))
            return mine + linear("fc2", block.mlp.fc2, g, g_mine, task)

        for name, task in (("shared", None), ("segmentation", 0), ("depth", 1)):
            want = stream(task)[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
            torch.testing.assert_close(found[name], want, atol=1e-5, rtol=1e-4)
    assert (found["depth"] - found["segmentation"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["vit", "dinov3", "samvit", "sam2_hiera"])
def test_streams_begin_as_the_shared_one_on_every_backbone(family: str) -> None:
    """Also where attention has windows and gives back another shape than its projection."""
    model = adapted("mtlora", family)
    image = torch.randn(2, 3, 64, 96)
    layers = list(range(model.spec.depth))
    with torch.no_grad():
        found = model(image, layers)
        frozen = model.detach()(image, layers)
    assert {index for _, index in found.streams} == set(layers[-4:])
    for (_, index), grid in found.streams.items():
        torch.testing.assert_close(grid, frozen.grids[index], atol=1e-4, rtol=1e-4)


def test_the_frozen_layers_run_once_for_all_tasks() -> None:
    model = adapted("mtlora", settings={"tasks": ["a", "b", "c"]})
    rows: dict[str, int] = {}
    for role in ("qkv", "fc1", "fc2"):
        module = model.backbone.place(role, 1).module
        module.register_forward_pre_hook(lambda _m, args, role=role: rows.update({role: len(args[0])}))
    with torch.no_grad():
        found = model(torch.randn(2, 3, 32, 32), [2])
    assert rows == dict.fromkeys(("qkv", "fc1", "fc2"), 2)
    assert len(found.streams) == 9


def test_what_one_task_learns_leaves_the_others_alone() -> None:
    model = adapted("mtlora")
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before = streams(model, image)
        for layers in model.adapters["main"].parted.values():
            for layer in layers.values():
                layer.own[1].up.normal_()
        after = streams(model, image)
    assert torch.equal(after["shared"], before["shared"])
    assert torch.equal(after["segmentation"], before["segmentation"])
    assert (after["depth"] - before["depth"]).abs().max() > 1e-3


def test_features_of_a_task_fall_back_on_the_shared() -> None:
    shared, own = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    features = Features((shared, shared), (shared, shared), (0, 1), (8, 8), streams={("depth", 1): own})
    assert torch.equal(features.of("depth").grids[0], shared)
    assert torch.equal(features.of("depth").grids[1], own)
    assert torch.equal(features.of("edges").grids[1], shared)
    assert features.rows(0, 1).only([1]).streams[("depth", 1)].shape == own.shape


def test_several_adapters_cannot_share_a_batch_with_streams() -> None:
    model = adapted("mtlora", settings={"norms": False})
    with pytest.raises(UserError, match="changes the batch's length"):
        model.each(torch.randn(1, 3, 32, 32), [0], [["main"]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 task_rank=4"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"tasks": []}, r"tasks=\[\]: name one or more"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"streams": [5]}, r"mtlora: streams=\[5\]"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MTLoRA(vit_spec(8), **settings)


def test_rooms_are_what_their_depth_says() -> None:
    """Floors are flat and upright rooms have upright walls: the normals of both agree with the camera's tilt."""
    samples = SolidsSynthetic(size=(64, 80)).split("test")
    sample = samples[3]
    assert torch.equal(sample["depth"], samples[3]["depth"])
    assert sample["image"].min() >= 0
    assert sample["image"].max() <= 1
    assert sample["depth"].min() > 0.1
    assert sample["mask"].max() < len(CLASSES)
    found = normals(sample["depth"][None], sample["intrinsics"][None])[0]
    flat = ~edges(sample["depth"][None])[0] & (sample["mask"] == 0)
    up = found[:, flat]
    assert flat.sum() > 100
    off = (up - up.median(1, keepdim=True).values).abs().amax(0)
    assert off.quantile(0.8) < 0.02  # all but next to what stands on it
    assert up[1].median() < -0.9  # towards the camera above: y points down
    with pytest.raises(UserError, match="choose one of train, val, test"):
        SolidsSynthetic().split("other")
    with pytest.raises(UserError, match=r"size=\[8, 8\]"):
        SolidsSynthetic(size=(8, 8))


def test_normals_and_edges_of_a_known_surface() -> None:
    matrix = torch.tensor([[[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]]])
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    rays = torch.stack([(x - 31.5) / 50, (y - 23.5) / 50, torch.ones_like(x)], -1)
    normal = F.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    plane = (-2 / (rays @ normal))[None]
    torch.testing.assert_close(normals(plane, matrix)[0, :, 5, 7], normal, atol=1e-3, rtol=0)
    assert not edges(plane).any()
    stepped = plane.clone()
    stepped[:, :, 30:] *= 1.5
    assert edges(stepped)[0, :, 29:31].all()
    assert not edges(stepped)[0, :, :28].any()


TINY = ["data.train=4", "data.val=1", "data.test=1", "data.size=[32,40]", "loader.batch_size=2", "previews=1"]
TINY += ["loader.steps_per_epoch=1", "trainer.max_steps=1", "trainer.log_every_n_steps=1", "adapter.rank=4"]


def test_all_four_tasks_in_one_training_step(tmp_path: Path) -> None:
    tasks = "[segmentation,depth,normals,edges]"
    result = train.main(
        compose(
            "train", ["task=multitask", *TINY, f"adapter.tasks={tasks}", f"head.tasks={tasks}", f"output={tmp_path}"]
        )
    )
    assert {"miou", "abs_rel", "normals_degrees", "edges_f1"} <= result.keys()
    assert Path(result["previews"][0]).is_file()
    model = vfmadapt.load(result["adapter_file"])
    image = torch.rand(1, 3, 32, 40)
    assert model(image).shape == (1, len(CLASSES), 32, 40)
    assert isinstance(model.head, MultiTaskHead)
    outputs = model.head.outputs(model.features(image), (32, 40))
    assert {task: values.shape[1] for task, values in outputs.items()} == {
        "segmentation": 5,
        "depth": 1,
        "normals": 3,
        "edges": 1,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.tasks=[depth]"], r"adapter\.tasks=\['segmentation', 'depth'\] and head\.tasks=\['depth'\]"),
        (["head=linear"], "needs head=multitask"),
        (["task.weights.depth=0"], r"task\.weights\.depth is missing or 0"),
        (["head.tasks=[depth,heat]"], "name one or more of segmentation, depth, normals, edges"),
    ],
)
def test_bad_input(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train.main(compose("train", ["task=multitask", *TINY, f"output={tmp_path}", *overrides]))
    assert "\n" not in str(caught.value)


def test_labels_of_one_class_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfmadapt.datasets.solids_synthetic.CLASSES", CLASSES[:1])
    overrides = ["task=multitask", *TINY, f"output={tmp_path}"]
    with pytest.raises(UserError, match="has one class, floor: a label map needs at least two") as caught:
        train.main(compose("train", overrides))
    assert "\n" not in str(caught.value)
    alone = ["adapter.tasks=[depth]", "head.tasks=[depth]"]
    assert "abs_rel" in train.main(compose("train", [*overrides, *alone]))
