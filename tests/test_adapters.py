"""The adapter contract: every entry of conf/adapter, covered by being there."""

import copy
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from vfmadapt.backbones._weights import weights_hash
from vfmadapt.build import adapter, entry, names
from vfmadapt.checkpoint import read_adapter, save
from vfmadapt.contracts import Adapter, AfterBlock
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.testing import adapted, grids, loss, perturb, tiny_backbone

ADAPTERS = names("adapter")
TRAINED = [n for n in ADAPTERS if n != "frozen"]
FAMILIES = ("no_prefix", "vit", "dinov2_reg", "clip", "dinov3", "samvit", "sam2_hiera", "sam2_video")
# pairs that cannot work, and why
REFUSED: dict[tuple[str, str], str] = {
    ("vpt", "samvit"): "windows",
    ("vpt", "sam2_hiera"): "windows",
    ("vpt", "sam2_video"): "windows",
}
IMAGE = (2, 3, 37, 52)
COMPILED_WITH = {"conv_lora": {"experts": 2}}  # each expert is traced by itself, which takes seconds


@pytest.fixture(params=ADAPTERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def train_a_little(model: AdaptedBackbone, image: torch.Tensor, steps: int = 2) -> None:
    parameters = model.trainable_parameters()
    if not parameters:
        return
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        loss(model, image).backward()
        optimiser.step()
        model.after_step(step + 1, steps)
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads_everywhere(name: str, family: str, tmp_path: Path) -> None:
    if why := REFUSED.get((name, family)):
        with pytest.raises(UserError, match=why):
            adapted(name, family)
        return
    model = adapted(name, family)
    train_a_little(model, torch.randn(*IMAGE), steps=1)
    image = torch.randn(1, 3, 17, 71)
    with torch.no_grad():
        want = grids(model, image)
        assert all(torch.isfinite(g).all() for g in want)
        path = save(tmp_path / "a.safetensors", model)
        fresh = adapted(name, family, seed=1)
        fresh.load_adapter_state(read_adapter(path, fresh.spec)[1])
        assert all(torch.equal(a, b) for a, b in zip(grids(fresh, image), want, strict=True))


def test_is_the_identity_at_the_start_or_says_why_not(name: str) -> None:
    model = adapted(name)
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        with_adapter = grids(model, image)
        frozen = model.detach()(image, [0, 2]).grids
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(with_adapter, frozen, strict=True))
    told = re.search(r"\bidentity\b", " ".join(type(next(iter(model.adapters.values()))).__doc__.split()))
    assert same or told


def test_detach_gives_back_the_frozen_backbone(name: str) -> None:
    frozen = tiny_backbone("dinov2_reg")
    before, keys, modules = weights_hash(frozen.net), list(frozen.state_dict()), list(frozen.modules())
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        want = frozen(image, [2]).grids[0]
    model = AdaptedBackbone(frozen, {"main": adapter(entry("adapter", name), frozen)})
    train_a_little(model, image)
    assert model.detach() is frozen
    assert weights_hash(frozen.net) == before
    assert list(frozen.state_dict()) == keys
    assert all(a is b for a, b in zip(frozen.modules(), modules, strict=True))
    with torch.no_grad():
        assert torch.equal(frozen(image, [2]).grids[0], want)


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(name: str) -> None:
    model = adapted(name, "dinov2_reg").train()
    perturb(model)
    waiting = {n for n, p in model.adapters.named_parameters() if p.requires_grad}
    for step in range(64):  # methods that draw experts or ranks, or train in stages, need several
        loss(model, torch.randn(*IMAGE)).backward()
        waiting -= {n for n, p in model.adapters.named_parameters() if p.grad is not None and p.grad.any()}
        if not waiting:
            break
        model.after_step(step + 1, 64)
    assert not waiting
    own = {id(p) for p in model.adapters.parameters()}
    assert all(p.grad is None for p in model.backbone.parameters() if id(p) not in own)


def test_the_frozen_part_stays_frozen(name: str) -> None:
    model = adapted(name).train()
    assert not any(m.training for m in model.backbone.net.modules())
    own = {id(p) for p in model.adapters.parameters()}
    assert not any(p.requires_grad for p in model.backbone.parameters() if id(p) not in own)


def test_copies_and_pickles(name: str) -> None:
    model = adapted(name)
    image = torch.randn(*IMAGE)
    loss(model, image)  # what a forward leaves behind must not be in the way
    with torch.no_grad():
        want = grids(model, image)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()
        for other in (copied, pickled):
            assert all(torch.equal(a, b) for a, b in zip(grids(other, image), want, strict=True))


def test_bfloat16(name: str) -> None:
    model = adapted(name)
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        want = grids(model, image)[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = grids(model, image)[-1]
    # 8 bits of mantissa through three blocks: a few per cent of the features' own spread
    assert (got.float() - want).abs().mean() < 0.03 * want.std()


@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    image = torch.randn(*IMAGE)
    model = adapted(name)
    perturb(model)
    grads = []
    for saving in (False, True):
        model.backbone.gradient_checkpointing = saving
        model.zero_grad()
        loss(model, image).backward()
        grads.append([p.grad.clone() for p in model.trainable_parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_compiles_without_a_graph_break(name: str) -> None:
    model = adapted(name, "two_blocks", settings=COMPILED_WITH.get(name))
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        want = grids(model, image)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(image, [0, 1]).grids
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["earth", "lora", "ssf"])
def test_inductor_gives_the_same(name: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler (g++) on a CPU")
    model = adapted(name)
    perturb(model)
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        want = grids(model, image)
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True)(image, [0, 2]).grids
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["vit", "dinov2_reg"])
def test_merges_into_a_plain_checkpoint_or_says_why_not(name: str, family: str) -> None:
    model = adapted(name, family)
    perturb(model)
    made = next(iter(model.adapters.values()))
    if made.unmergeable:
        with pytest.raises(UserError, match="cannot be merged"):
            model.merge()
        return
    plain = tiny_backbone(family)
    plain.net.load_state_dict(model.merge().state_dict())
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        for ours, merged in zip(grids(model, image), plain(image, [0, 2]).grids, strict=True):
            assert (ours - merged).abs().max() <= 1e-5 * max(1, ours.abs().max())


def test_switches_off_and_on_again(name: str) -> None:
    model = adapted(name)
    perturb(model)
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        on = grids(model, image)[-1]
        model.use()
        off = grids(model, image)[-1]
        assert torch.equal(off, tiny_backbone("vit")(image, [2]).grids[0])
        model.use("main")
        assert torch.equal(grids(model, image)[-1], on)


def test_file_for_other_weights_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", adapted("earth"))
    with pytest.raises(UserError, match="trained on vit_tiny_patch16_224 with weights"):
        read_adapter(path, tiny_backbone("vit", seed=3).spec)


def test_unknown_setting_names_the_known() -> None:
    with pytest.raises(UserError, match="has no setting 'dimm'; it has: dim"):
        adapter({**entry("adapter", "earth"), "dimm": 3}, tiny_backbone("vit"))


class Lost(Adapter):
    """Declares a site on a block that the backbone is made to skip."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def scale(self, grid: torch.Tensor) -> torch.Tensor:
        return grid * (1 + self.weight)

    def sites(self) -> list[AfterBlock]:
        return [AfterBlock(2, self.scale)]


def test_a_site_that_never_fires_is_refused() -> None:
    frozen = tiny_backbone("vit")
    real = frozen.net.blocks
    frozen.blocks = lambda: [*list(real)[:2], nn.Identity()]
    with pytest.raises(UserError, match=r"1 of 1 sites are never called.*AfterBlock at block 2"):
        AdaptedBackbone(frozen, {"lost": Lost()})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is trainable"):
        AdaptedBackbone(tiny_backbone("vit"), {"main": Lost().requires_grad_(False)})


def test_the_inner_backbone_is_not_called_by_mistake() -> None:
    model = AdaptedBackbone(tiny_backbone("vit"), {"main": Lost()})
    with pytest.raises(RuntimeError, match="call the AdaptedBackbone"):
        model.backbone(torch.zeros(1, 3, 16, 16), [2])


def test_trained_patch_embedding_is_swapped_in_and_out() -> None:
    from vfmadapt.adapters.owned import TrainedTensors

    frozen = tiny_backbone("vit")
    before = weights_hash(frozen.net)
    model = AdaptedBackbone(frozen, {"first": TrainedTensors(frozen.spec, role="patch_embed")})
    assert len(model.trainable_parameters()) == 2
    train_a_little(model, torch.randn(*IMAGE))
    assert weights_hash(frozen.net) != before
    assert weights_hash(model.detach().net) == before
