"""Visual prompt tuning: counts, where prompts go, what is refused."""

import pytest
import torch
from torch import nn

from vfmadapt.adapters.vpt import VPT
from vfmadapt.contracts import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.interop import load_published
from vfmadapt.testing import adapted, tiny_backbone, vit_spec

SPEC = vit_spec(16, 3)
IMAGE = (2, 3, 37, 52)


@pytest.mark.parametrize(("deep", "count"), [(True, 50 * 768 * 12), (False, 50 * 768)])
def test_published_parameter_counts(deep: bool, count: int) -> None:
    """ViT-B: 12 blocks of 768 channels."""
    with torch.device("meta"):
        adapter = VPT(vit_spec(768, 12), prompts=50, deep=deep)
    assert sum(p.numel() for p in adapter.parameters()) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prompts": 0}, "prompts=0"), ({"dropout": 1.0}, r"dropout=1\.0"), ({"dropout": -0.1}, r"dropout=-0\.1")],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"vpt: {message} must be at least") as caught:
        VPT(SPEC, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["samvit", "sam2_hiera"])
def test_windows_are_refused_when_built(family: str) -> None:
    with pytest.raises(UserError, match="attends within windows"):
        VPT(tiny_backbone(family).spec)


def test_initialisation_spans_the_published_range() -> None:
    bound = (6 / (3 * 16 * 16 + 64)) ** 0.5
    prompts = VPT(vit_spec(64, 12)).prompts
    assert 0.99 * bound < prompts.abs().max() <= bound


class Through(nn.Module):
    """A block in whose stead nothing happens, but the tokens are kept."""

    def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
        self.seen = tokens
        return tokens + 1


@pytest.mark.parametrize("deep", [True, False])
def test_where_prompts_go(deep: bool) -> None:
    """After the prefix tokens; new ones for each block, or what the first block's have become."""
    frozen = tiny_backbone("dinov2_reg")
    frozen.net.blocks = nn.ModuleList(Through() for _ in range(3))
    adapter = VPT(frozen.spec, prompts=2, deep=deep)
    model = AdaptedBackbone(frozen, {"main": adapter})
    with torch.no_grad():
        features = model(torch.zeros(1, 3, 28, 42), [2])
    assert features.prefix[0].shape[1] == 5
    assert features.grids[0].shape[-2:] == (2, 3)
    for i, block in enumerate(frozen.net.blocks):
        assert block.seen.shape[1] == 5 + 2 + 6
        want = adapter.prompts[i] if deep else adapter.prompts[0] + i
        torch.testing.assert_close(block.seen[0, 5:7], want)


def test_every_shallow_prompt_learns() -> None:
    model = adapted("vpt", settings={"deep": False})
    model(torch.randn(*IMAGE), [2]).grids[0].square().sum().backward()
    assert model.adapters["main"].prompts.grad.abs().amax(-1).all()


def test_rotary_attention_leaves_prompts_unrotated() -> None:
    """Attention does not care about the order of tokens that it does not rotate."""
    model = adapted("vpt", "dinov3", settings={"prompts": 3})
    attention = model.backbone.net.blocks[0].attn
    assert attention.num_prefix_tokens == 5 + 3
    image = torch.randn(*IMAGE)
    with torch.no_grad():
        before = model(image, [2]).grids[0]
        model.adapters["main"].prompts.copy_(model.adapters["main"].prompts.flip(1))
        torch.testing.assert_close(model(image, [2]).grids[0], before)
    model.use()
    assert attention.num_prefix_tokens == 5


def test_dropout_acts_in_training_only() -> None:
    adapter = VPT(SPEC, dropout=0.5)
    assert (adapter.new(0, None) == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(adapter.eval().new(0, None), adapter.prompts[0])


def test_official_weights() -> None:
    adapter = VPT(SPEC, prompts=2)
    first, others = torch.randn(1, 2, 16), torch.randn(2, 2, 16)
    state = {"transformer.prompt_embeddings": first, "transformer.deep_prompt_embeddings": others}
    load_published("vpt", adapter, {**state, "head.weight": first})
    assert torch.equal(adapter.prompts, torch.cat([first, others]))
    with pytest.raises(UserError, match="no 'deep_prompt_embeddings'"):
        load_published("vpt", adapter, {"prompt_embeddings": first})
    with pytest.raises(UserError, match="left over, first deep_prompt_embeddings"):
        load_published("vpt", VPT(SPEC, prompts=2, deep=False), state)
