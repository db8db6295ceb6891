"""MapSAM: SAM's mask decoder for label maps, with prompts that are made from the features instead of given by a user.

Xia et al. 2024, "MapSAM: Adapting Segment Anything Model for Automated Feature Detection in Historical Maps",
https://arxiv.org/abs/2411.06971.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head, UserError
from vfmadapt.heads._detail import Detail
from vfmadapt.heads._mapsam import attended_cells, make_generator, mean_where, select_points, two_way
from vfmadapt.heads._resize import resolve_layers, to_image
from vfmadapt.heads._sam import (
    deepest_fine_layer,
    load_official,
    make_mask_decoder,
    make_neck,
    make_prompt_encoder,
    place_in_grid,
)
from vfmadapt.heads._specks import without_specks

STATES = 3  # blocks before the last one that coarse logits are made from, as published
_FRESH = (
    "detail",
    "generators",
    "mask_decoder.mask_tokens",
    "mask_decoder.output_hypernetworks_mlps",
    "mask_decoder.iou_prediction_head",
)


class MapSamHead(Head):
    """Coarse logits from four blocks, and SAM's decoder with a mask token per class that is prompted from them.

    The mean of the four blocks' coarse logits says of each class where its two likeliest and its two unlikeliest pixels
    are: points for SAM's prompt encoder. The mean of the image embedding over the cells where the class is the
    likeliest is added to the tokens (the positional-semantic prompt), and they attend to these cells alone: in the
    first layer those of the coarse logits, in the second those that fit the class's token best. None of these choices
    passes a gradient, so the generator learns from the coarse logits, which are compared with the labels as the masks
    are (`supervised`), both at the image's resolution and with the task's loss (the release: at a quarter of it, with
    0.2 focal + 0.8 Dice).

    Published for one thing on a background, with one mask and a sigmoid. Here a class holds where it exceeds the others
    (a softmax), and all classes' tokens go through the decoder together; the published case is a label map of two
    classes, the background with a mask and points of its own. `num_classes=1` has the release's one mask, but a
    segmentation task refuses to train it: a softmax over one class learns nothing. The token of SAM's expected IoU and
    the end of the points belong to all classes. What no label map needs of SAM (expected IoU, boxes, mask prompts) is
    kept, so that names and counts are the published ones, but not trained: with one class and the published sizes there
    are 3,714,257 parameters beside the neck, of which 3,577,220 are trained.

    Differences from github.com/Xue-Xia/MapSAM: the mask acts before the softmax (`published=True` has it act after it,
    with a second softmax, which leaves the cells inside almost equal); a class that is nowhere the likeliest attends
    everywhere; points are right in images that are not square, and rounding does not choose among pixels that are as
    likely (`published=True` lets it).

    Args:
        spec: the backbone's.
        num_classes: masks.
        layers: blocks to read, of one width and stride; the last one's features are decoded. By default the last with
            at most 16 pixels per cell and three before it, a third of the depth apart.
        width: channels of embeddings and tokens (published: 256).
        mlp_width: inner width of the decoder's MLPs (published: 2048).
        heads: of its attention (published: 8).
        weights: a checkpoint of SAM, the file that backbone.weights names; the prompt generator, mask tokens and what
            makes masks of them stay random. None: all is.
        train_neck: as published False, which needs weights.
        published: mask the attention and choose among pixels that are as likely as the release does.
        detail: let the masks see the image, too, through a small U-Net (see `Detail`): for lines of a few pixels.
        smallest: outside training, regions of a class with fewer pixels get the next likely class (see
            `without_specks`); 0 for none.

    Raises:
        UserError: sizes that do not divide one another, blocks that differ, or weights that do not fit.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        num_classes: int,
        layers: Sequence[int] | None = None,
        width: int = 256,
        mlp_width: int = 2048,
        heads: int = 8,
        weights: str | None = None,
        train_neck: bool = True,
        published: bool = False,
        detail: bool = False,
        smallest: int = 0,
    ) -> None:
        super().__init__()
        if smallest < 0:
            raise UserError(f"head.smallest={smallest}: a number of pixels, 0 to keep every region")
        self.smallest = smallest
        self.layers, self.published = _choose_layers(spec, layers), published
        self.stride = spec.strides[self.layers[-1]]
        self.neck = make_neck(spec.dims[self.layers[-1]], width)
        self.prompt_encoder = make_prompt_encoder(width)
        self.mask_decoder = make_mask_decoder(width, mlp_width, heads, num_classes - 1)
        self.generators = nn.ModuleList(make_generator(width, num_classes) for _ in self.layers)
        self.detail = Detail(spec.bands, width, self.stride) if detail else None
        if weights is not None:
            load_official(self, weights, fresh=_FRESH)
        self.neck.requires_grad_(train_neck)
        corners = self.prompt_encoder.point_embeddings[2:]
        for unused in (corners, self.prompt_encoder.mask_downscaling, self.mask_decoder.iou_prediction_head):
            unused.requires_grad_(False)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of `layers` -> logits (B, K, H, W)."""
        logits, _ = self.supervised(features, size)
        return without_specks(logits, self.smallest) if self.smallest and not self.training else logits

    def supervised(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features of `layers` -> logits and coarse logits, (B, K, H, W) each."""
        states = [self.neck(grid) for grid in features.grids]
        found = [generator(state) for generator, state in zip(self.generators, states, strict=True)]
        coarse = torch.stack(found).mean(0)
        cells = (coarse.shape[2], coarse.shape[3])
        wide = to_image(coarse, cells, self.stride, size)
        masks = self._decode(states[-1], coarse.detach(), wide.detach(), features.image)
        return to_image(masks, cells, self.stride, size), wide

    def _decode(self, embedding: Tensor, coarse: Tensor, wide: Tensor, pixels: Tensor | None) -> Tensor:
        """Image embedding (B, C, h, w), coarse logits (B, K, h, w) and (B, K, H, W) -> masks (B, K, 4 h, 4 w).

        `pixels`: the normalised image, for `detail`.
        """
        decoder, (batch, classes, *grid) = self.mask_decoder, coarse.shape
        points, labels = select_points(wide, published=self.published)
        padded = (grid[0] * self.stride, grid[1] * self.stride)
        places = place_in_grid(points.flatten(1, 2).float(), padded)
        prompts, dense = self.prompt_encoder((places, labels.flatten(1)), None, None)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(batch, -1, -1)
        owners = _owners(classes, points.shape[2]).to(embedding.device)
        attended = attended_cells(coarse)
        tokens, image = two_way(
            decoder.transformer,
            (embedding + dense).flatten(2).mT,
            self.prompt_encoder.pe_layer(grid).flatten(1).mT,
            torch.cat([own, prompts], dim=1),
            owners @ mean_where(attended, embedding.detach()),
            owners=owners,
            cells=attended,
            published=self.published,
        )
        decoded = image.mT.unflatten(-1, grid)
        upscaled = decoder.output_upscaling(decoded)
        if self.detail is not None:
            upscaled = upscaled + self.detail(decoded, pixels)
        each = zip(decoder.output_hypernetworks_mlps, tokens[:, 1 : 1 + classes].unbind(1), strict=True)
        return torch.einsum("bkc,bchw->bkhw", torch.stack([make(token) for make, token in each], dim=1), upscaled)


def _choose_layers(spec: BackboneSpec, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks to read; raises UserError where those asked for differ in width or stride."""
    last = deepest_fine_layer(spec, layers)
    kind = (spec.dims[last], spec.strides[last])
    alike = [i for i in range(last + 1) if (spec.dims[i], spec.strides[i]) == kind]
    if layers is None:
        return tuple(sorted({*(alike[i * len(alike) // STATES] for i in range(STATES)), last}))
    chosen = resolve_layers(spec, tuple(layers))
    if not {*chosen} <= {*alike}:
        raise UserError(
            f"head.layers={[*layers]}: one neck reads them all, so they have one width and stride; like block {last} "
            f"are {', '.join(map(str, alike))}"
        )
    return chosen


def _owners(classes: int, points: int) -> Tensor:
    """Share of each class in each token (Q, K): the expected IoU, masks, points, end of the points."""
    shared, single = torch.full((1, classes), 1 / classes), torch.eye(classes)
    return torch.cat([shared, single, single.repeat_interleave(points, 0), shared])
