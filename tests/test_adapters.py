"""The adapter contract: every entry of conf/adapter on backbones with 0, 1 and 5 prefix tokens."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vfmadapt.backbones._weights import weights_hash
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.backbones.timm_vit import TimmBackbone
from vfmadapt.build import adapter, entry, names
from vfmadapt.checkpoint import read_adapter, save
from vfmadapt.contracts import Adapter, AfterBlock
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2}
ADAPTERS = names("adapter")
TRAINED = [n for n in ADAPTERS if n != "frozen"]
IDENTITY_AT_START = {"frozen"}  # an adapter that is not says why in its docstring


def backbone(prefix: int) -> TimmBackbone:
    if prefix == 0:
        net = VisionTransformer(
            64, 16, class_token=False, global_pool="avg", num_classes=0, dynamic_img_size=True, **TINY
        )
        return TimmBackbone(net, name="no_prefix")
    name = {1: "vit_tiny_patch16_224", 5: "vit_small_patch14_reg4_dinov2"}[prefix]
    return timm_backbone(name, pretrained=False, settings=TINY)


def adapted(name: str, prefix: int = 1) -> AdaptedBackbone:
    frozen = backbone(prefix)
    return AdaptedBackbone(
        frozen, {"main": adapter(entry("adapter", name), frozen)}, config={"adapter": entry("adapter", name)}
    )


@pytest.fixture(params=ADAPTERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(48, 80), (17, 33), (5, 7)])
def test_any_size_and_prefix(name: str, prefix: int, size: tuple[int, int]) -> None:
    model = adapted(name, prefix)
    features = model(torch.randn(2, 3, *size), [1, 3])
    assert [g.shape[-2:] for g in features.grids] == [model.backbone.grid_size(*size)] * 2
    assert all(torch.isfinite(g).all() for g in features.grids)


def test_acts_or_says_that_it_does_not(name: str) -> None:
    model = adapted(name).eval()
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        with_adapter = model(image, [3]).grids[0]
        frozen = model.detach()(image, [3]).grids[0]
    same = torch.equal(with_adapter, frozen)
    assert same == (name in IDENTITY_AT_START)
    if not same:
        assert "identity" in type(next(iter(model.adapters.values()))).__doc__


def test_detach_gives_back_the_frozen_backbone(name: str) -> None:
    frozen = backbone(5)
    before, keys = weights_hash(frozen.net), list(frozen.state_dict())
    image = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        want = frozen(image, [3]).grids[0]
    model = AdaptedBackbone(frozen, {"main": adapter(entry("adapter", name), frozen)})
    train_a_little(model, image)
    assert model.detach() is frozen
    assert weights_hash(frozen.net) == before
    assert list(frozen.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(frozen(image, [3]).grids[0], want)


def train_a_little(model: AdaptedBackbone, image: torch.Tensor) -> None:
    parameters = model.trainable_parameters()
    if not parameters:
        return
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        model(image, [3]).grids[0].square().mean().backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_only_where_they_belong_and_everywhere_there(name: str) -> None:
    model = adapted(name, 5).train()
    model(torch.randn(2, 3, 70, 84), [0, 3]).grids[1].square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    without = [n for n, p in model.adapters.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_the_frozen_part_stays_frozen(name: str) -> None:
    model = adapted(name).train()
    assert not any(m.training for m in model.backbone.modules())
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_saves_and_loads(name: str, tmp_path: Path) -> None:
    image = torch.randn(1, 3, 48, 64)
    model = adapted(name)
    train_a_little(model, image)
    path = save(tmp_path / "a.safetensors", model)
    fresh = adapted(name)
    _, state = read_adapter(path, fresh.spec)
    fresh.load_adapter_state(state)
    with torch.no_grad():
        assert torch.equal(fresh(image, [3]).grids[0], model(image, [3]).grids[0])


def test_file_for_other_weights_is_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", adapted(name))
    other = timm_backbone("vit_tiny_patch16_224", pretrained=False, settings=TINY, seed=3)
    with pytest.raises(UserError, match="trained on vit_tiny_patch16_224 with weights"):
        read_adapter(path, other.spec)


def test_copies_and_pickles(name: str) -> None:
    model = adapted(name)
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        want = model(image, [3]).grids[0]
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(image, [3]).grids[0], want)
        assert torch.equal(pickled(image, [3]).grids[0], want)


def test_bfloat16(name: str) -> None:
    model = adapted(name)
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        want = model(image, [3]).grids[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(image, [3]).grids[0]
    # 8 bits of mantissa through four blocks: a few per cent of the features' own spread
    assert (got.float() - want).abs().mean() < 0.03 * want.std()


@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    image = torch.randn(1, 3, 48, 80)
    model = adapted(name)
    grads = []
    for saving in (False, True):
        model.backbone.gradient_checkpointing = saving
        model.zero_grad()
        model(image, [3]).grids[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.adapters.parameters()])
    torch.testing.assert_close(*grads)


def test_compiles_without_a_graph_break(name: str) -> None:
    model = adapted(name)
    image = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        want = model(image, [3]).grids[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")  # tracing is what is tested
        torch.testing.assert_close(compiled(image, [3]).grids[0], want)


def test_unknown_setting_names_the_known() -> None:
    with pytest.raises(UserError, match="has no setting 'dimm'; it has: dim"):
        adapter({**entry("adapter", "earth"), "dimm": 3}, backbone(1))


class Lost(Adapter):
    """Declares a site on a block that the backbone is made to skip."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def scale(self, grid: torch.Tensor) -> torch.Tensor:
        return grid * (1 + self.weight)

    def sites(self) -> list[AfterBlock]:
        return [AfterBlock(3, self.scale)]


def test_a_site_that_never_fires_is_refused() -> None:
    frozen = backbone(1)
    real = frozen.net.blocks
    frozen.blocks = lambda: [*list(real)[:3], torch.nn.Identity()]
    with pytest.raises(UserError, match=r"1 of 1 sites are never called.*block 3"):
        AdaptedBackbone(frozen, {"lost": Lost()})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is trainable"):
        AdaptedBackbone(backbone(1), {"main": Lost().requires_grad_(False)})


def test_the_inner_backbone_is_not_called_by_mistake() -> None:
    model = AdaptedBackbone(backbone(1), {"main": Lost()})
    with pytest.raises(RuntimeError, match="call the AdaptedBackbone"):
        model.backbone(torch.zeros(1, 3, 16, 16), [3])


def test_trained_patch_embedding_is_swapped_in_and_out() -> None:
    from vfmadapt.adapters.owned import TrainedTensors

    frozen = backbone(1)
    before = weights_hash(frozen.net)
    model = AdaptedBackbone(frozen, {"first": TrainedTensors(frozen.spec, role="patch_embed")})
    assert len(model.trainable_parameters()) == 2
    train_a_little(model, torch.randn(1, 3, 32, 48))
    assert weights_hash(frozen.net) != before
    assert weights_hash(model.detach().net) == before
