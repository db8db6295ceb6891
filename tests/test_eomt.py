"""EoMT: the published model's forward, matching and losses by other means, queries in the blocks, objects."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EomtConfig, EomtForUniversalSegmentation
from transformers.models.eomt import modeling_eomt as published

from vfmadapt.adapters.frozen import Frozen
from vfmadapt.adapters.rein import Rein
from vfmadapt.adapters.vpt import VPT
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.contracts import ClassSpec, DataSpec
from vfmadapt.errors import UserError
from vfmadapt.heads._mask_loss import MaskTargets, mask_loss, mask_targets, match, pairwise
from vfmadapt.heads.eomt import EomtHead
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel
from vfmadapt.testing import tiny_backbone

SPEC = DataSpec(
    name="two classes",
    bands=("red", "green", "blue"),
    classes=(ClassSpec("a", (0, 0, 0)), ClassSpec("b", (255, 0, 0))),
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
)


def make_model(family="vit", adapter=None, **settings) -> AdaptedModel:
    frozen = tiny_backbone(family)
    backbone = AdaptedBackbone(frozen, {"main": adapter(frozen.spec) if adapter else Frozen(frozen.spec)})
    return AdaptedModel(backbone, EomtHead(frozen.spec, num_classes=2, queries=5, blocks=2, **settings), spec=SPEC)


def official() -> EomtForUniversalSegmentation:
    config = EomtConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_blocks=2,
        num_queries=5,
        num_upscale_blocks=2,
        num_labels=2,
    )
    torch.manual_seed(1)
    return EomtForUniversalSegmentation(config).eval()


def from_official(model: EomtForUniversalSegmentation) -> AdaptedModel:
    """The same weights in timm's ViT and our head."""
    tiny = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 16, "img_size": 64}
    frozen = timm_backbone("vit_small_patch14_reg4_dinov2", pretrained=False, settings=tiny)
    theirs = model.state_dict()
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "reg_token": theirs["embeddings.register_tokens"],
        "pos_embed": theirs["embeddings.position_embeddings.weight"][None],
    }
    layers = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        **{
            f"blocks.{i}.{ours}": f"layers.{i}.{name}"
            for i in range(3)
            for ours, name in {
                "norm1": "norm1",
                "norm2": "norm2",
                "attn.proj": "attention.out_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
        },
    }
    for i in range(3):
        for part in ("weight", "bias"):
            qkv = [theirs[f"layers.{i}.attention.{n}_proj.{part}"] for n in "qkv"]
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
        for n in (1, 2):
            state[f"blocks.{i}.ls{n}.gamma"] = theirs[f"layers.{i}.layer_scale{n}.lambda1"]
    state |= {
        f"{ours}.{part}": theirs[f"{name}.{part}"] for ours, name in layers.items() for part in ("weight", "bias")
    }
    frozen.net.load_state_dict(state)
    head = EomtHead(frozen.spec, num_classes=2, queries=5, blocks=2)
    names = {"norm": "layernorm", "classifier": "class_predictor"}
    names |= {f"embed.{2 * i}": f"mask_head.fc{i + 1}" for i in range(3)}
    for i in range(2):
        names |= {f"upsample.{i}.0": f"upscale_block.block.{i}.conv1"}
        names |= {f"upsample.{i}.3": f"upscale_block.block.{i}.layernorm2d"}
    own = {f"{ours}.{part}": theirs[f"{name}.{part}"] for ours, name in names.items() for part in ("weight", "bias")}
    own |= {f"upsample.{i}.2.weight": theirs[f"upscale_block.block.{i}.conv2.weight"] for i in range(2)}
    head.load_state_dict(own | {"query": theirs["query.weight"], "shares": theirs["attn_mask_probs"]})
    return AdaptedModel(AdaptedBackbone(frozen, {"main": Frozen(frozen.spec)}), head, spec=SPEC).eval()


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["annealed", "masked"])
def test_forward_of_the_published_model(share):
    theirs = official()
    with torch.no_grad():
        theirs.attn_mask_probs.fill_(share)
        theirs.layernorm.weight.uniform_(0.5, 2)
        ours, image = from_official(theirs), torch.randn(2, 3, 64, 64)
        want = theirs(image)
        features = ours.features(image)
        classes, masks = ours.head.predict(features.prompts[2], features.grids[-1])
        torch.testing.assert_close(classes, want.class_queries_logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(masks, want.masks_queries_logits, atol=2e-5, rtol=1e-4)
        assert masks.std() > 0.01
        logits = ours(image)
    inside = F.interpolate(want.masks_queries_logits.sigmoid(), (64, 64), mode="bilinear")
    scores = torch.einsum("bqk,bqhw->bkhw", want.class_queries_logits.softmax(-1)[..., :-1], inside)
    assert (logits.argmax(1) == scores.argmax(1)).float().mean() > 0.97  # ours mixes before it scales up


def test_losses_of_the_published_model():
    masks, truth = torch.randn(4, 6, 5), (torch.rand(3, 6, 5) > 0.5).float()
    targets = MaskTargets(truth, torch.tensor([0, 1, 1]), torch.ones(6, 5))
    ce, dice = pairwise(masks, targets)
    theirs = masks.flatten(1), truth.flatten(1)
    torch.testing.assert_close(ce, published.pair_wise_sigmoid_cross_entropy_loss(*theirs))
    torch.testing.assert_close(dice, published.pair_wise_dice_loss(*theirs))
    classes = torch.randn(4, 3)
    queries, found = match(classes, masks, targets)
    loss = mask_loss(classes[None], masks[None], [targets])
    pairs = masks[queries].flatten(1), truth[found].flatten(1)
    torch.testing.assert_close(loss["mask"], published.sigmoid_cross_entropy_loss(*pairs, 3))
    torch.testing.assert_close(loss["dice"], published.dice_loss(*pairs, 3))
    chosen = torch.full((4,), 2)
    chosen[queries] = targets.classes[found]
    weighted = nn.CrossEntropyLoss(torch.tensor([1, 1, 0.1]))
    torch.testing.assert_close(loss["class"], weighted(classes, chosen))
    torch.testing.assert_close(loss["loss"], 5 * loss["mask"] + 5 * loss["dice"] + 2 * loss["class"])


def test_matching_is_the_cheapest_of_all():
    masks, classes = torch.randn(4, 3, 3), torch.randn(4, 3)
    targets = MaskTargets((torch.rand(3, 3, 3) > 0.5).float(), torch.tensor([0, 1, 0]), torch.rand(3, 3))
    ce, dice = pairwise(masks, targets)
    cost = 5 * ce + 5 * dice - 2 * classes.softmax(-1)[:, targets.classes]
    best = min(permutations(range(4), 3), key=lambda queries: sum(cost[q, m] for m, q in enumerate(queries)))
    queries, found = match(classes, masks, targets)
    assert sorted(zip(found.tolist(), queries.tolist(), strict=True)) == list(enumerate(best))


def test_targets_are_shares_of_what_counts():
    labels = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 1], [0, 0, 255, 255], [1, 1, 255, 255]])
    targets = mask_targets(labels, (2, 2), ignore_index=255, regions=False)
    assert targets.classes.tolist() == [0, 1]
    torch.testing.assert_close(targets.weight, torch.tensor([[0.75, 1], [1, 0]]))
    torch.testing.assert_close(targets.masks, torch.tensor([[[1.0, 0], [0.5, 0]], [[0, 1], [0.5, 0]]]))
    regions = mask_targets(labels, (4, 4), ignore_index=255, regions=True)
    assert regions.classes.tolist() == [0, 1, 1]  # the two corners of class 1 are objects of their own
    assert [int(m.sum()) for m in regions.masks] == [5, 4, 2]


def test_ignored_pixels_get_no_gradient():
    labels = torch.full((8, 8), 255)
    labels[:, :4] = torch.tensor([0, 0, 1, 1])
    targets = [mask_targets(labels, (4, 4), ignore_index=255, regions=False)]
    targets.append(mask_targets(torch.full((8, 8), 255), (4, 4), ignore_index=255, regions=True))
    masks, classes = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    mask_loss(classes, masks, targets)["loss"].backward()
    assert (masks.grad[0, ..., 2:] == 0).all()
    assert masks.grad[0, ..., :2].any()
    assert (masks.grad[1] == 0).all()
    assert (classes.grad[1] == 0).all()
    assert classes.grad[0].any()


@pytest.mark.parametrize("family", ["no_prefix", "dinov2_reg", "clip", "dinov3"])
def test_queries_join_the_last_blocks_of_every_plain_vit(family):
    """The frozen blocks see prefix, queries, patches; all that is trained gets a gradient; any H x W."""
    model, seen = make_model(family).train(), []
    keys = list(model.backbone.backbone.state_dict())
    for block in model.backbone.backbone.blocks():
        block.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    image = torch.randn(2, 3, 40, 70)
    grid = model.backbone.backbone.grid_size(40, 70)
    tokens = model.backbone.spec.prefix_tokens + grid[0] * grid[1]
    features = model.features(image)
    assert seen == [tokens, tokens + 5, tokens + 5]
    labels = torch.randint(0, 2, (2, 40, 70))
    loss = model.head.loss(features, labels, ignore_index=255)["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    assert model(image).shape == (2, 2, 40, 70)
    assert keys == list(model.backbone.backbone.state_dict())
    assert model.backbone.active == ("main", "head")


def test_prompts_of_an_adapter_and_queries_do_not_mix():
    model = make_model("dinov3", adapter=lambda spec: VPT(spec, prompts=3)).eval()
    features = model.features(torch.randn(1, 3, 32, 48))
    assert {block: tuple(p.shape) for block, p in features.prompts.items()} == {1: (1, 5, 32), 2: (1, 5, 32)}
    attention = [block.attn.num_prefix_tokens for block in model.backbone.backbone.blocks()]
    model.backbone.use()
    bare = [block.attn.num_prefix_tokens for block in model.backbone.backbone.blocks()]
    assert [a - b for a, b in zip(attention, bare, strict=True)] == [3, 8, 8]


def test_masked_attention_binds_queries_to_their_masks():
    """Patches outside a query's mask cannot change it; once the binding has faded, they can."""
    model = make_model(doublings=0).eval()
    grid = torch.randn(1, 2, 3, 32)
    seen = model.head.attended(0, torch.randn(1, 5, 32), grid)
    assert seen.shape == (1, 5, 2, 3)
    assert 0 < seen.float().mean() < 1
    image = torch.randn(1, 3, 32, 48)
    masked = model.features(image).prompts[2]
    model.head.after_step(10, 10)
    assert (model.head.shares == 0).all()
    assert model.head.attended(0, torch.randn(1, 5, 32), grid) is None
    assert not torch.allclose(masked, model.features(image).prompts[2])


def test_binding_fades_from_the_first_block_to_the_last():
    head = make_model().head
    shares = [head.after_step(step, 8) or head.shares.tolist() for step in range(9)]
    assert shares[:3] == [[1, 1]] * 3  # two blocks: four parts, in the first of which nothing fades
    assert shares[4] == [0, 1]
    assert shares[6] == shares[8] == [0, 0]
    assert shares[3] == pytest.approx([0.5**0.9, 1])


def test_objects_surest_first():
    head = EomtHead(tiny_backbone("vit").spec, num_classes=2, queries=3)
    classes = torch.tensor([[[2.0, 0, 0], [0, 5, 0], [0, 0, 9]]])
    masks = torch.full((1, 3, 4, 4), -8.0)
    masks[0, 0, :2], masks[0, 1, 2:], masks[0, 2] = 8, 8, 8
    head.predict = lambda *_: (classes, masks)
    features = make_model().features(torch.randn(1, 3, 16, 16))
    (found,) = head.instances(features, (16, 10))
    assert found.classes.tolist() == [1, 0]  # the third means nothing
    assert found.masks.shape == (2, 16, 10)
    assert found.masks[1, :4].all()
    assert not found.masks[0, :4].any()
    probability = classes.softmax(-1)[0, [1, 0], [1, 0]]
    torch.testing.assert_close(found.scores, probability, atol=0.1, rtol=0)
    assert found.scores[0] > found.scores[1]


def test_queries_of_rein():
    rein = {"adapter": lambda spec: Rein(spec, tokens=7, rank=2, link_queries=True, query_dim=32)}
    model = make_model(**rein, linked=True).train()
    features = model.features(torch.randn(1, 3, 32, 48))
    assert features.prompts[2].shape == (1, 7, 32)
    model.head.loss(features, torch.randint(0, 2, (1, 32, 48)), ignore_index=255)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.adapters.parameters())
    assert not any("adapters" in name or "source" in name for name in model.head.state_dict())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, "no adapter has queries"),
        (lambda spec: Rein(spec), "link_queries=true"),
        (lambda spec: Rein(spec, link_queries=True, query_dim=24), "adapter.query_dim=32"),
    ],
)
def test_links_that_do_not_fit(adapter, message):
    with pytest.raises(UserError, match=message) as caught:
        make_model(adapter=adapter, linked=True)
    assert "\n" not in str(caught.value)


def test_one_head_in_the_blocks_at_a_time():
    model = make_model()
    with pytest.raises(UserError, match="a head acts in these blocks already"):
        AdaptedModel(model.backbone, model.head, spec=SPEC)


def test_learns_to_tell_objects_apart():
    """Two squares of one class, elsewhere in each image: a mask for each."""
    torch.manual_seed(0)
    model = make_model("vit", regions=True).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3)
    image, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)
    for i, columns in enumerate([(0, 32), (16, 48)]):
        for column in columns:
            image[i, :, 16:32, column : column + 16], labels[i, 16:32, column : column + 16] = 3, 1
    for step in range(60):
        loss = model.head.loss(model.features(image), labels, ignore_index=255)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.head.after_step(step + 1, 60)
    for i, objects in enumerate(model.eval().instances(image)):
        squares = objects.masks[(objects.classes == 1) & (objects.scores > 0.5)]
        regions = mask_targets(labels[i], (64, 64), ignore_index=255, regions=True).masks[1:].bool()
        both, either = ((squares[:, None] & regions).sum((2, 3)), (squares[:, None] | regions).sum((2, 3)))
        assert len(squares) == 2
        assert ((both / either) > 0.6).sum(0).tolist() == [1, 1]  # the bare features of equal squares are alike
