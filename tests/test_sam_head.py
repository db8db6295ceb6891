"""SAM's prompt encoder and mask decoder on our features, and its decoder without prompts."""

from dataclasses import replace

import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from vfmadapt import params
from vfmadapt.backbones.timm_models import timm_backbone
from vfmadapt.build import build_model, compose, data_source
from vfmadapt.contracts import Features, MaskPrompts, PromptedMasks
from vfmadapt.errors import UserError
from vfmadapt.heads._sam import DRAWN, draw_prompts
from vfmadapt.heads.sam import SamHead, expected_iou
from vfmadapt.heads.sam_decoder import SamDecoderHead
from vfmadapt.losses import mask_iou
from vfmadapt.testing import perturb, vit_spec

SMALL = {"width": 32, "mlp_width": 64, "heads": 2}


def make_spec():
    return replace(vit_spec(24, 2), strides=(8, 8))


def make_head(**settings) -> SamHead:
    torch.manual_seed(0)
    return SamHead(make_spec(), num_classes=3, **{**SMALL, **settings})


def make_features(images=2, cells=(4, 6)):
    made = torch.Generator().manual_seed(1)
    grid = torch.randn(images, 24, *cells, generator=made)
    return Features((grid,), (grid.new_zeros(images, 0, 24),), (1,), (8,))


def some_prompts(images=2, objects=3) -> MaskPrompts:
    made = torch.Generator().manual_seed(2)
    points = 30 * torch.rand(images, objects, 2, 2, generator=made)
    labels = torch.tensor([1.0, 0.0]).expand(images, objects, 2)
    low = 15 * torch.rand(images, objects, 2, generator=made)
    boxes = torch.cat([low, low + 5 + 10 * torch.rand(images, objects, 2, generator=made)], -1)
    return MaskPrompts(points=points, labels=labels, boxes=boxes)


def official_sam(size=64) -> Sam:
    """segment-anything's own model, tiny."""
    torch.manual_seed(3)
    encoder = ImageEncoderViT(
        img_size=size,
        embed_dim=24,
        depth=2,
        num_heads=2,
        out_chans=32,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    cells = (size // 16, size // 16)
    prompts = PromptEncoder(32, image_embedding_size=cells, input_image_size=(size, size), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=2)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=32)
    return Sam(encoder, prompts, decoder, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3).eval()


def test_official_weights_answer_as_segment_anythings_predictor(tmp_path):
    sam = official_sam()
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    settings = {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "img_size": 64,
        "window_size": 2,
        "global_attn_indexes": (1,),
    }
    file = str(tmp_path / "sam.pth")
    backbone = timm_backbone("samvit_base_patch16", weights=file, settings={**settings, "neck_chans": 32})
    head = SamHead(backbone.spec, num_classes=1, weights=file, **SMALL).eval()
    image = torch.rand(1, 3, 64, 64)
    predictor = SamPredictor(sam)
    predictor.set_torch_image(image, (64, 64))
    points, labels = torch.tensor([[[10.0, 40.0], [50.0, 7.0]]]), torch.tensor([[1, 0]])
    box = torch.tensor([[5.0, 9.0, 44.0, 61.0]])
    with torch.no_grad():
        embedding = head.embed(backbone(image, head.layers))
        for given in ((points, None), (None, box), (points, box)):
            for several in (True, False):
                theirs, scores, coarse = predictor.predict_torch(
                    given[0], None if given[0] is None else labels, given[1], None, several, return_logits=True
                )
                asked = MaskPrompts(
                    points=None if given[0] is None else points[None],
                    labels=None if given[0] is None else labels[None].float(),
                    boxes=None if given[1] is None else box[None],
                )
                ours = head.decode(embedding, asked, (64, 64), several=several)
                torch.testing.assert_close(ours.coarse[0], coarse, atol=2e-3, rtol=2e-3)  # LayerNorm's eps, see timm
                torch.testing.assert_close(ours.scores[0], scores, atol=2e-3, rtol=2e-3)
                torch.testing.assert_close(ours.logits[0], theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_official_weights_that_do_not_fit_are_named(change, tmp_path):
    state = official_sam().state_dict()
    key = "mask_decoder.iou_token.weight"
    if change == "missing":
        state.pop(key)
    elif change == "left over":
        state["mask_decoder.other"] = torch.ones(1)
    else:
        state[key] = torch.ones(3)
    torch.save(state, tmp_path / "sam.pth")
    wanted = {
        "missing": "iou_token.weight is missing",
        "left over": "other is left over",
        "shape": r"is \(3,\), needed",
    }
    with pytest.raises(UserError, match=wanted[change]) as raised:
        make_head(weights=str(tmp_path / "sam.pth"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no such file"):
        make_head(weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize("size", [(32, 48), (29, 41)], ids=str)
@pytest.mark.parametrize("several", [True, False])
def test_shapes(size, several):
    head = make_head()
    answer = head.decode(head.embed(make_features()), some_prompts(), size, several=several)
    count = 3 if several else 1
    assert answer.logits.shape == (2, 3, count, *size)
    assert answer.scores.shape == (2, 3, count)
    assert answer.coarse.shape == (2, 3, count, 16, 24)


def test_images_and_objects_of_a_batch_are_independent():
    head, features, prompts = make_head().eval(), make_features(), some_prompts()
    embedding = head.embed(features)
    together = head.decode(embedding, prompts, (32, 48), several=True)
    for image in range(2):
        for item in range(3):
            at = (slice(image, image + 1), slice(item, item + 1))
            one = MaskPrompts(points=prompts.points[at], labels=prompts.labels[at], boxes=prompts.boxes[at])
            alone = head.decode(embedding[image : image + 1], one, (32, 48), several=True)
            torch.testing.assert_close(alone.logits[0, 0], together.logits[image, item], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone.scores[0, 0], together.scores[image, item], atol=1e-5, rtol=1e-4)


def test_every_kind_of_prompt_changes_the_answer_and_trains_its_part():
    head, prompts = make_head(), some_prompts()
    embedding = head.embed(make_features())
    plain = head.decode(embedding, prompts, (32, 48), several=False)
    other = [
        replace(prompts, points=prompts.points + 5),
        replace(prompts, labels=1 - prompts.labels),
        replace(prompts, boxes=prompts.boxes + 5),
        replace(prompts, masks=plain.coarse[:, :, 0].detach() + 1),
    ]
    answers = [head.decode(embedding, p, (32, 48), several=several) for p in other for several in (True, False)]
    assert all(not torch.allclose(a.logits[:, :, :1], plain.logits) for a in answers[1::2])
    alone = head.decode(embedding, MaskPrompts(points=prompts.points, labels=prompts.labels), (32, 48), several=True)
    sum(a.logits.square().mean() + a.scores.square().mean() for a in [*answers, plain, alone]).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_place_without_a_point_is_no_point():
    """A padded list answers as the same list whose padding lies elsewhere."""
    head, prompts = make_head().eval(), some_prompts()
    embedding, labels = head.embed(make_features()), prompts.labels.clone()
    labels[..., 1] = -1
    moved = prompts.points.clone()
    moved[:, :, 1] += 11
    first, second = (
        head.decode(embedding, MaskPrompts(points=p, labels=labels), (32, 48), several=False).logits
        for p in (prompts.points, moved)
    )
    torch.testing.assert_close(first, second)


def test_best_takes_the_highest_score():
    logits = torch.arange(2 * 3 * 2.0).reshape(1, 2, 3, 1, 2)
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.8, 0.2, 0.1]]])
    best = PromptedMasks(logits=logits, scores=scores, coarse=logits).best()
    assert best.scores.flatten().tolist() == pytest.approx([0.9, 0.8])
    assert torch.equal(best.logits[0, :, 0], torch.stack([logits[0, 0, 1], logits[0, 1, 0]]))
    assert torch.equal(best.coarse, best.logits)


def test_frozen_parts_and_wrong_settings():
    head = make_head(frozen=["neck", "prompt_encoder"])
    assert {n.split(".")[0] for n, p in head.named_parameters() if p.requires_grad} == {"mask_decoder"}
    for settings, message in (
        ({"frozen": ["decoder"]}, "no part is named decoder"),
        ({"width": 40}, "multiple of 16"),
        ({"heads": 5}, "twice the heads"),
        ({"masks": 1}, "at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            make_head(**settings)
    with pytest.raises(UserError, match=r"task=promptable.*set_image"):
        head(make_features(), (32, 48))


def test_conv_lora_and_the_decoder_have_the_published_counts():
    wanted = ["backbone=samvit_huge", "adapter=conv_lora", "head=sam_decoder", "head.train_neck=false", "classes=1"]
    result = params.main(compose("params", wanted))
    assert result["head_params"] == 3_505_536
    assert result["adapter_params"] + result["head_params"] == 4_020_096


def test_the_decoder_without_prompts_reads_all_but_its_masks(tmp_path):
    torch.save(official_sam().state_dict(), tmp_path / "sam.pth")
    head = SamDecoderHead(make_spec(), num_classes=4, weights=str(tmp_path / "sam.pth"), **SMALL)
    state = official_sam().state_dict()
    assert torch.equal(head.neck[0].weight, state["image_encoder.neck.0.weight"])
    assert torch.equal(head.mask_decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])
    assert head.mask_decoder.mask_tokens.weight.shape == (4, 32)


def test_conv_lora_trains_decoder_and_balance_on_sam_tiny():
    chosen = compose("train", ["experiment=sam_conv_lora"])
    model = build_model(chosen, data_source(chosen).spec).train()
    perturb(model.backbone)
    logits = model(torch.rand(2, len(model.spec.bands), 40, 72))
    balance = model.backbone.aux_loss()
    assert balance > 0
    (logits.square().mean() + balance).backward()
    assert [n for n, p in model.head.mask_decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.backbone.backbone.parameters())
    assert any(key.startswith("head.mask_decoder") for key in model.adapter_state())


def test_drawn_prompts_lie_where_they_are_meant():
    boxes = torch.tensor([[[8.0, 4.0, 23.0, 19.0]]])  # columns 8 .. 23: values 4 .. 11 of two pixels each
    box = draw_prompts(MaskPrompts(boxes=boxes), (4, 6), 8)[0, 0]
    assert box.shape == (16, 24)
    assert (box[2:10, 4:12] == DRAWN).all()
    assert (box == DRAWN).sum() == 64
    assert (box == -DRAWN).sum() == 16 * 24 - 64
    points = torch.tensor([[[[10.0, 10.0], [40.0, 20.0], [1.0, 1.0]]]])
    labels = torch.tensor([[[1.0, 0.0, -1.0]]])
    dots = draw_prompts(MaskPrompts(points=points, labels=labels), (4, 6), 8)[0, 0]
    assert dots[5, 5] == DRAWN
    assert dots[10, 20] == -DRAWN
    assert dots[0, 0] == 0
    assert dots.abs().sum() < 2 * DRAWN * 40
    earlier = torch.randn(1, 1, 16, 24)
    both = draw_prompts(MaskPrompts(points=points, labels=labels, masks=earlier), (4, 6), 8)
    torch.testing.assert_close(both[0, 0], dots + earlier[0, 0])


def test_drawn_prompts_reach_the_decoder():
    head, prompts = make_head(draw=True).eval(), some_prompts()
    embedding = head.embed(make_features())
    drawn = head.decode(embedding, prompts, (32, 48), several=False)
    head.draw = False
    assert not torch.allclose(drawn.logits, head.decode(embedding, prompts, (32, 48), several=False).logits)


def test_masks_see_the_image_for_detail() -> None:
    head = make_head(detail=True)
    features = make_features()
    image = torch.randn(2, 3, 30, 45, requires_grad=True)
    head.eval()  # batch norm would let images see one another
    embedding = head.embed(replace(features, image=image))
    answer = head.decode(embedding, some_prompts(), (30, 45), several=False)
    answer.logits[0].square().mean().backward()
    assert image.grad is not None
    assert image.grad[0].any()
    assert not image.grad[1].any()  # every object sees its own image
    plain = head.decode(
        torch.cat([embedding[:, :32], 0 * embedding[:, 32:]], 1), some_prompts(), (30, 45), several=False
    )
    assert not torch.allclose(plain.logits, answer.logits)


def test_detail_is_looked_at_for_each_object_where_its_prompt_is():
    head = make_head(detail=True, draw=True).eval()
    embedding = head.embed(replace(make_features(), image=torch.randn(2, 3, 32, 48)))
    at_first = head.decode(embedding, some_prompts(), (32, 48), several=False).logits
    torch.nn.init.normal_(head.objectwise.last.weight)
    assert not torch.allclose(at_first, head.decode(embedding, some_prompts(), (32, 48), several=False).logits)
    seen = []
    handle = head.objectwise.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    head.decode(embedding, MaskPrompts(boxes=torch.tensor([[[8.0, 8.0, 23.0, 15.0]]] * 2)), (32, 48), several=False)
    handle.remove()
    inside = torch.zeros(16, 24, dtype=torch.bool)  # two pixels per value
    inside[4:8, 4:12] = True
    assert torch.equal(seen[0][0, 0] > 0, inside)


def test_expected_iou_is_that_of_pixels_drawn_as_they_are_sure():
    made = torch.Generator().manual_seed(0)
    for spread in (4.0, 0.5):
        logits = spread * torch.randn(60, 60, generator=made)
        drawn = torch.rand(300, 60, 60, generator=made) < logits.sigmoid()
        found = mask_iou(logits > 0, drawn, torch.ones(60, 60, dtype=torch.bool))
        assert expected_iou(logits) == pytest.approx(float(found.mean()), abs=0.01)
