"""The LoRA family: the same functions as PEFT's own layers, its traps, starts from weights and data, ranks, files."""

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from vfmadapt import train
from vfmadapt.adapters._peft_layers import NAME, _undisturbed, stand_in, wrap
from vfmadapt.adapters._peft_runs import RUNS, prepare
from vfmadapt.adapters._peft_tuners import TUNERS, fitted
from vfmadapt.adapters.owned import TrainedTensors
from vfmadapt.adapters.peft import AdaLora, Peft
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.build import adapter, build_model, compose, data_source, entry, instantiate, names
from vfmadapt.contracts import BackboneSpec, Place, UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, grids, loss, perturb, tiny_backbone, vit_spec

STARTS = ("corda", "lora_ga")
IMAGE = (2, 3, 37, 52)
ALL_LINEAR = {"roles": ["qkv", "proj", "fc1", "fc2"]}
# PEFT's defaults on ViT-B/16, as counted on PEFT itself
PUBLISHED: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    **dict.fromkeys(("lora", "rslora", "pissa", "olora", "eva", *STARTS), (1_179_648, {})),
    "dora": (1_262_592, {}),
    "adalora": (1_770_048, {}),
    "vera": (95_232, {}),
    "randlora": (921_600, {}),
    "loha": (2_359_296, {}),
    "lokr": (80_640, {}),
    "oft": (999_936, {}),
    "boft": (340_992, {}),
    "hra": (516_096, {}),
    "fourierft": (48_000, {}),
    "waveft": (124_416, {}),
    "shira": (4_718_592, {}),
    "miss": (5_308_416, {}),
    "c3a": (331_776, {}),
    "road": (82_944, {}),
    "ia3": (82_944, {**ALL_LINEAR, "options": {"feedforward_modules": []}}),
}
# that fit every layer of a ViT of width 32, as PEFT's single config for a whole network must
SMALL: Mapping[str, Mapping[str, Any]] = {
    "oft": {"oft_block_size": 8},
    "waveft": {"n_frequency": 100},
    "shira": {"r": 4},
    "miss": {"r": 12},
    "c3a": {"block_size": 8},
    "road": {"group_size": 8},
    "pissa": {"init_lora_weights": "pissa"},
}
MODULES = {
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
}


@pytest.fixture(scope="module")
def vit_base() -> TimmBackbone:
    with torch.device("meta"):
        return timm_backbone("vit_base_patch16_224", pretrained=False, settings={"depth": 1})


def main_adapter(model: AdaptedBackbone) -> Any:
    return model.adapters["main"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str, vit_base: TimmBackbone) -> None:
    count, settings = PUBLISHED[name]
    node = {**entry("adapter", name), **settings}
    with torch.device("meta"):
        made = adapter(node, vit_base)
        made.bind(vit_base)
    assert 12 * sum(p.numel() for p in made.parameters() if p.requires_grad) == count


def test_published_count_of_norms() -> None:
    settings = {"embed_dim": 192, "depth": 2, "num_heads": 3}
    frozen = timm_backbone("vit_tiny_patch16_224", pretrained=False, settings=settings, final_norm=True)
    made = Peft(frozen.spec, tuner="ln_tuning", roles=["norm1", "norm2", "norm"])
    model = AdaptedBackbone(frozen, {"main": made})
    assert sum(p.numel() for p in model.trainable_parameters()) == 1_920


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", sorted(set(TUNERS) - {"eva", *STARTS}))
def test_same_function_as_the_network_that_peft_changes(name: str) -> None:
    model = adapted(name, settings={"options": SMALL.get(name, {})})
    perturb(model, amount=0.1)
    ours, tuner = main_adapter(model), TUNERS[name]
    roles = {role for role, _ in ours.places.values()}
    regex = {role: rf"blocks\.\d+\.{MODULES[role]}" for role in roles}
    kind = getattr(peft, tuner.config)
    known = {f.name for f in dataclasses.fields(kind)}
    settings = {k: v for k, v in {**ours.options, **tuner.fixed}.items() if k in known}
    settings |= {"total_step": 9} if name == "adalora" else {}
    settings |= {"feedforward_modules": regex["fc2"]} if name == "ia3" else {}
    net = tiny_backbone("vit").net
    with _undisturbed():
        peft.get_peft_model(net, kind(target_modules="|".join(regex.values()), **settings))
    for key, layer in ours.layers.items():
        index, role = key.split("/")
        theirs = net.get_submodule(f"blocks.{index}.{MODULES[role]}")
        assert set(theirs.load_state_dict(layer.state_dict(), strict=False).unexpected_keys) <= {"kept"}  # ours
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        want = TimmBackbone(net, name="theirs")(image, [2]).grids[0]
        torch.testing.assert_close(grids(model, image)[-1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(33, 48), (48, 35), (12, 96)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("boft", {}), ("hra", {}), ("shira", {}), ("waveft", {}), ("waveft", {"wavelet_family": "db3"})],
)
def test_what_we_run_ourselves_is_what_peft_runs(name: str, options: dict[str, Any], sizes: tuple[int, int]) -> None:
    options = {**TUNERS[name].options, **options}
    layer: Any = dict(wrap(name, options, {"0/fc1": stand_in(nn.Linear(*sizes))}))["0/fc1"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
        x = torch.randn(2, 7, sizes[0])
        want = layer(x)
        prepare(name, layer)
        torch.testing.assert_close(RUNS[name](layer, x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["fourierft", "c3a"])
def test_peft_starts_these_elsewhere_than_at_the_identity(name: str) -> None:
    assert not any(p.any() for p in main_adapter(adapted(name)).parameters())


def test_the_patch_embedding_is_no_proj() -> None:
    model = adapted("lora")
    assert len(main_adapter(model).layers) == 4 * 3
    assert isinstance(model.backbone.net.patch_embed.proj, nn.Conv2d)


def test_length_of_dora_is_per_output() -> None:
    layer = main_adapter(adapted("dora")).layers["0/qkv"]
    assert layer.lora_magnitude_vector[NAME].weight.shape == (96,)


def test_boft_compiles_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.boft import layer as boft

    monkeypatch.setattr("torch.utils.cpp_extension.load", pytest.fail)
    adapted("boft")
    assert boft._FBD_CUDA is None


def test_shared_projections_are_not_in_the_file() -> None:
    for name in ("vera", "randlora"):
        model, other = adapted(name), adapted(name, seed=1)
        state = model.adapter_state()
        assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.trainable_parameters())
        shared = [[b for _, b in main_adapter(m).named_buffers()] for m in (model, other)]
        assert shared[0]
        assert all(torch.equal(a, b) for a, b in zip(*shared, strict=True))


def test_dropout_acts_in_training_only() -> None:
    model = adapted("lora", settings={"options": {"lora_dropout": 0.5}})
    perturb(model, amount=0.1)
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        one, other = grids(model, image), grids(model, image)
        assert torch.equal(one[-1], other[-1])
        model.train()
        assert not torch.equal(grids(model, image)[-1], one[-1])


# --- several adapters on one backbone --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "samvit"])
def test_two_on_one_backbone_take_turns_and_share_a_batch(family: str) -> None:
    frozen = tiny_backbone(family)
    pair = {name: adapter(entry("adapter", name), frozen) for name in ("lora", "oft")}
    model = AdaptedBackbone(frozen, {"lora": pair["lora"]})
    model.add("oft", pair["oft"])
    model.use("lora", "oft")
    perturb(model, amount=0.2)
    image = torch.randn(1, 3, 37, 52)
    with pytest.raises(UserError, match="lora and oft both stand in for qkv of block 0: use one at a time"):
        model(image, [2])
    model.use("lora")
    together = model.each(image, [2], [["lora"], ["oft"], []])
    for name, got in zip(("lora", "oft", None), together, strict=True):
        model.use(*([name] if name else []))
        with torch.no_grad():
            torch.testing.assert_close(got.grids[0], model(image, [2]).grids[0])
    assert not torch.allclose(together[0].grids[0], together[1].grids[0])


def test_sees_trained_copies_of_frozen_tensors() -> None:
    frozen = tiny_backbone("vit")
    biases = TrainedTensors(frozen.spec, role="biases")
    model = AdaptedBackbone(frozen, {"lora": adapter(entry("adapter", "lora"), frozen), "biases": biases})
    with torch.no_grad():
        for parameter in biases.parameters():
            parameter.add_(0.1)
        image = torch.randn(*IMAGE)
        both = grids(model, image)
        model.use("biases")
        assert torch.equal(both[-1], grids(model, image)[-1])


# --- starts from weights and data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_from_the_weights_and_leaves_them(name: str) -> None:
    frozen = tiny_backbone("vit")
    before = frozen.net.blocks[1].mlp.fc1.weight.clone()
    model = AdaptedBackbone(
        frozen, {"main": adapter({**entry("adapter", name), "options": SMALL.get(name, {})}, frozen)}
    )
    assert torch.equal(frozen.net.blocks[1].mlp.fc1.weight, before)
    start = main_adapter(model).starts["1/fc1"]
    if name == "pissa":
        u, s, v = torch.linalg.svd(before)
        torch.testing.assert_close(start.up @ start.down, u[:, :8] * s[:8] @ v[:8], rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(start.up.T @ start.up, torch.eye(8), rtol=0, atol=1e-5)


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*IMAGE, generator=generator) for _ in range(count)]


def inputs(frozen: TimmBackbone, module: nn.Module) -> Tensor:
    """Everything that a module of the bare backbone gets from the batches: (N, in)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for image in batches():
            frozen(image, [2])
    handle.remove()
    return torch.cat(seen)


def test_eva_starts_from_the_principal_inputs() -> None:
    model = adapted("eva")
    model.initialise(batches())
    frozen = tiny_backbone("vit")
    x = inputs(frozen, frozen.net.blocks[1].mlp.fc1)
    _, _, v = torch.linalg.svd(x - x.mean(0))
    layer = main_adapter(model).layers["1/fc1"]
    rows = layer.lora_A[NAME].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-3)
    assert ((rows[:2] @ v[:2].T).abs().diagonal() > 0.99).all()  # the incremental estimate: leading directions agree
    assert not layer.lora_B[NAME].weight.any()


def test_eva_needs_as_many_tokens_as_ranks() -> None:
    with pytest.raises(UserError, match=r"eva: .*; larger batches or images give more tokens"):
        adapted("eva").initialise([torch.randn(1, 3, 16, 32)])


def test_ranks_of_eva_move_and_stay() -> None:
    model = adapted("eva", settings={"options": {"rho": 2.0}})
    layers = main_adapter(model).layers.values()
    assert {layer.scaling[NAME] for layer in layers} == {1.0}
    model.initialise(batches())
    ranks = [int(layer.lora_A[NAME].weight.any(1).sum()) for layer in layers]
    assert sum(ranks) == 8 * len(ranks)
    assert len(set(ranks)) > 1
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    for image in batches():
        optimiser.zero_grad()
        loss(model, image).backward()
        optimiser.step()
    assert [int(layer.lora_A[NAME].weight.any(1).sum()) for layer in layers] == ranks


def test_corda_starts_where_peft_starts() -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = adapted("corda")
    single = [image[:1] for image in batches()]  # all that PEFT takes
    model.initialise(single)
    frozen = tiny_backbone("vit")
    config = peft.LoraConfig(
        target_modules=r"blocks\.1\.mlp\.fc1", init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    )
    preprocess_corda(frozen.net, config, lambda: [frozen(image, [2]) for image in single])
    peft.inject_adapter_in_model(config, frozen.net)
    theirs = frozen.net.blocks[1].mlp.fc1
    layer, start = (part["1/fc1"] for part in (main_adapter(model).layers, main_adapter(model).starts))
    product = layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
    torch.testing.assert_close(product, theirs.lora_B[NAME].weight @ theirs.lora_A[NAME].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(start.up @ start.down, product)


@pytest.mark.filterwarnings("ignore:Full backward hook")  # PEFT's own counting of batches
def test_lora_ga_starts_where_peft_starts() -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    model = adapted("lora_ga", settings={"options": {"r": 4}})
    model.initialise(batches())
    frozen = tiny_backbone("vit")
    config = peft.LoraConfig(
        r=4, target_modules=r"blocks\.1\.mlp\.fc1", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    config.lora_alpha = 8
    preprocess_loraga(
        frozen.net, config, lambda: [frozen(image, [2]).grids[0].square().mean().backward() for image in batches()]
    )
    peft.inject_adapter_in_model(config, frozen.net)
    theirs, ours = frozen.net.blocks[1].mlp.fc1, main_adapter(model).layers["1/fc1"]
    for half in ("lora_A", "lora_B"):  # singular vectors are known up to their sign
        one, other = (getattr(layer, half)[NAME].weight.detach().abs() for layer in (ours, theirs))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * float(other.max()))


@pytest.mark.parametrize("family", ["vit", "samvit", "sam2_hiera"])
@pytest.mark.parametrize("name", ["eva", *STARTS])
def test_data_move_the_start_but_neither_output_nor_backbone(name: str, family: str) -> None:
    model = adapted(name, family, settings={"options": {"r": 2}})
    model.backbone.gradient_checkpointing = True
    tensors = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    keys = [set(vars(module)) for module in model.backbone.modules()]
    before, new = grids(model, batches()[0]), copy.deepcopy(model.adapter_state())
    model.initialise(batches())
    torch.testing.assert_close(grids(model, batches()[0])[-1], before[-1], rtol=1e-4, atol=1e-4)
    changed = [k for k, v in model.adapter_state().items() if not torch.equal(v, new[k])]
    assert any("lora_A" in k for k in changed)
    assert all(torch.equal(v, tensors[k]) for k, v in model.backbone.state_dict().items())
    assert keys == [set(vars(module)) for module in model.backbone.modules()]
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    assert model.active == ("main",)
    fresh = adapted(name, family, seed=1, settings={"options": {"r": 2}})
    fresh.load_adapter_state(model.adapter_state())
    with torch.no_grad():
        assert torch.equal(grids(fresh, batches()[0])[-1], grids(model, batches()[0])[-1])


@pytest.mark.parametrize("name", ["eva", "lora"])
def test_training_begins_with_a_look_at_the_data_where_the_adapter_wants_one(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", image=rng.random((8, 32, 48, 3), np.float32), mask=rng.integers(0, 2, (8, 32, 48)))
    tiny = [f"+backbone.settings.{k}={v}" for k, v in (("embed_dim", 32), ("depth", 2), ("num_heads", 2))]
    keys = ["backbone=timm", "backbone.name=vit_tiny_patch16_224", "backbone.pretrained=false", "head=linear", *tiny]
    keys += ["data=npz_stack", f"data.path={tmp_path / 'a.npz'}", "trainer.accelerator=cpu", f"adapter={name}"]
    cfg = compose("train", [*keys, "loader.crop=32", "loader.batch_size=2"])
    source = data_source(cfg)
    task = instantiate(cfg.task, build_model(cfg, source.spec), packages=("vfmadapt.tasks.",))
    train.start_from_data(train.make_trainer(cfg, tmp_path, []), task, train.make_data(cfg, source))
    rows = main_adapter(task.model.backbone).layers["0/qkv"].lora_A[NAME].weight
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-3) == (name == "eva")  # principal directions
    assert train.run_folder(cfg).name == f"cloudseg-{name}"


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------


def steps(model: AdaptedBackbone, first: int, last: int, total: int) -> None:
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    for step in range(first, last + 1):
        optimiser.zero_grad()
        loss(model, torch.randn(*IMAGE)).backward()
        optimiser.step()
        model.after_step(step, total)


def ranks(model: AdaptedBackbone) -> list[int]:
    return [int((layer.lora_E[NAME] != 0).sum()) for layer in main_adapter(model).layers.values()]


def test_ranks_shrink_to_the_target_and_stay_after_a_resume() -> None:
    settings = {"options": {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3}}
    model = adapted("adalora", settings=settings)
    steps(model, 1, 2, 10)
    assert ranks(model) == [6] * 12
    steps(model, 3, 8, 10)
    kept = ranks(model)
    assert sum(kept) <= 3 * 12
    assert sum(kept) > 2 * 12
    resumed = adapted("adalora", settings=settings)
    resumed.load_adapter_state(model.adapter_state())
    for run in (model, resumed):
        steps(run, 9, 10, 10)
        assert ranks(run) == kept


def test_orthogonality_is_asked_for() -> None:
    made = main_adapter(adapted("adalora"))
    assert isinstance(made, AdaLora)
    with torch.no_grad():
        for layer in made.layers.values():
            layer.lora_A[NAME].copy_(torch.eye(12, 32)[:, : layer.in_features].repeat(1, layer.in_features // 32))
            layer.lora_B[NAME].zero_()
            layer.lora_A[NAME].div_((layer.in_features / 32) ** 0.5)
    assert made.aux_loss().item() == pytest.approx(0.5 * 12**0.5 / 2)  # A A^T is 1, B^T B is 0


def test_schedules_of_ranks_that_cannot_be() -> None:
    with pytest.raises(UserError, match="target_r=12 must be below init_r=12"):
        adapted("adalora", settings={"options": {"target_r": 12}})
    model = adapted("adalora", settings={"options": {"tinit": 5}})
    loss(model, torch.randn(*IMAGE)).backward()
    with pytest.raises(UserError, match="leave none of 5 steps"):
        model.after_step(1, 5)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lora", {"tuner": "lorra"}, "unknown tuner='lorra'; known: lora, dora"),
        ("lora", {"options": {"rank": 3}}, "lora has no option 'rank'; it has: r, lora_alpha, lora_dropout"),
        ("lora", {"options": {"r": 2.5}}, "lora: r=2.5 must be of the kind of 8"),
        ("lora", {"options": {"r": 0}}, "lora at 0/qkv: PEFT says `r` should be a positive"),
        ("lora", {"roles": []}, "roles=[] leaves nothing"),
        ("lora", {"roles": ["q"]}, "'q' of vit_tiny_patch16_224 is a part of 'qkv'"),
        ("lora", {"roles": ["norm1"]}, "'norm1' of vit_tiny_patch16_224 is no linear layer"),
        ("adalora", {"roles": ["patch_embed"]}, "'patch_embed' of vit_tiny_patch16_224 is no linear layer"),
        ("lora", {"roles": ["nose"]}, "unknown role 'nose'"),
        ("lora", {"layers": [3]}, "lora: layers=[3] must be whole numbers from -3 to 2"),
        ("ln_tuning", {"roles": ["qkv"]}, "is no norm with weights"),
        ("pissa", {"options": {"r": 33}}, "pissa: r=33 is above the rank of a layer of 32 x 96"),
        ("lora_ga", {"options": {"r": 17}}, "lora_ga: r=34 is above the rank"),
        ("hra", {"options": {"r": 3}}, "hra: r=3 must be even"),
        ("vera", {"options": {"r": True}}, "vera: r=True must be of the kind of 256"),
        ("waveft", {"options": {"wavelet_family": "db0"}}, "waveft at 0/qkv: PEFT says Wavelet family db0"),
    ],
)
def test_refused_in_one_line(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        adapted(name, settings=settings)
    assert "\n" not in str(raised.value)


def test_a_norm_without_weights_is_refused() -> None:
    frozen = tiny_backbone("vit")
    frozen.net.blocks[1].norm2 = nn.Identity()
    with pytest.raises(UserError, match="'norm2' of vit_tiny_patch16_224 is no norm with weights"):
        AdaptedBackbone(frozen, {"main": adapter(entry("adapter", "ln_tuning"), frozen)})


def test_options_are_reached_from_the_command_line() -> None:
    cfg = compose("train", ["adapter=lora", "adapter.options.r=3", "+adapter.options.lora_dropout=0.1"])
    made: Any = instantiate(cfg.adapter, vit_spec(16))
    assert made.options == {"r": 3, "lora_alpha": 8, "lora_dropout": 0.1}


@pytest.mark.parametrize(("name", "width"), [("oft", 37), ("boft", 37), ("road", 33)])
def test_widths_that_cannot_be_split_are_refused(name: str, width: int) -> None:
    with pytest.raises(UserError, match=rf"{name}: a layer's width of {width} "):
        dict(wrap(name, TUNERS[name].options, {"0/fc1": nn.Linear(width, width)}))


@pytest.mark.parametrize(
    ("name", "option", "fits"),
    [
        ("oft", "oft_block_size", 20),
        ("boft", "boft_block_size", 4),
        ("c3a", "block_size", 20),
        ("road", "group_size", 60),
        ("miss", "r", 40),
        ("shira", "r", 24),
        ("fourierft", "n_frequency", 1000),
        ("waveft", "n_frequency", 2400),
    ],
)
def test_block_sizes_are_the_largest_that_fit(name: str, option: str, fits: int) -> None:
    assert fitted(name, TUNERS[name].options, 40, 60)[option] == fits


class Apart:
    """A backbone whose q, k and v are layers of their own, and whose MLP is gated."""

    def __init__(self) -> None:
        self.linear = nn.Linear(8, 8)
        whole = vit_spec(8)
        linears = {role: whole.linears[role] for role in ("q", "k", "v", "proj", "fc2")}
        self.spec: BackboneSpec = dataclasses.replace(whole, linears=linears)

    def place(self, role: str, index: int) -> Place:
        return Place(self.linear)


def test_roles_are_those_that_the_backbone_has() -> None:
    frozen: Any = Apart()
    made = Peft(frozen.spec, tuner="lora")
    made.bind(frozen)
    assert list(made.layers) == ["0/q", "0/k", "0/v", "0/proj", "0/fc2"]


def test_every_tuner_has_an_entry() -> None:
    assert {entry("adapter", name)["tuner"] for name in names("adapter") if "tuner" in entry("adapter", name)} == set(
        TUNERS
    )
