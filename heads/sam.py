"""SAM's prompt encoder and mask decoder on any backbone: one mask per object that points, boxes or masks single out.

Kirillov et al. 2023, "Segment Anything", https://arxiv.org/abs/2304.02643.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, MaskPrompts, PointGrid, PromptedMasks, PromptHead, UserError
from vfmadapt.heads._detail import Detail, Objectwise
from vfmadapt.heads._resize import to_image
from vfmadapt.heads._sam import (
    DRAWN,
    deepest_fine_layer,
    draw_prompts,
    load_official,
    make_mask_decoder,
    make_neck,
    make_prompt_encoder,
    place_in_grid,
)

PARTS = ("neck", "prompt_encoder", "mask_decoder")
FINER = 4  # mask features have 4 x 4 values for each cell of the embedding


class SamHead(PromptHead):
    """SAM's neck, prompt encoder and mask decoder, for any number of objects in any number of images at once.

    The published sizes are the defaults, so that official weights load. Positions are relative to the padded image,
    like the encoder's own, so that images may have any size.

    Args:
        spec: the backbone's.
        num_classes: not used, the masks have no class.
        layers: the one block to read, by default the last with at most 16 pixels per cell.
        width: channels of embeddings and tokens (published: 256).
        mlp_width: inner width of the decoder's MLPs (published: 2048).
        heads: of its attention (published: 8).
        masks: alternatives for a prompt that means several things (published: 3).
        draw: show points and boxes in the mask prompt, too. Trained from scratch, the decoder needs many thousand steps
            to learn what their codes mean for a pixel (SAM had 90,000); drawn, it starts from the box.
        detail: let the masks see the image, too, through a small U-Net and, with the prompt drawn, for each object
            (see `Detail`, `Objectwise`), and the expected IoU how sure the mask's pixels are (`expected_iou`).
        points: per side of an image, to ask for all objects; this and the next two as `PointGrid` has them.
        quality: least IoU that the model must then expect of a mask.
        stability: least IoU of such a mask drawn wider with the same drawn tighter.
        weights: a checkpoint of SAM, the file that backbone.weights names; `detail` stays random. None: all is.
        frozen: parts that are not trained, of neck, prompt_encoder, mask_decoder.

    Raises:
        UserError: a setting out of its range, or weights that do not fit.
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
        masks: int = 3,
        draw: bool = False,
        detail: bool = False,
        points: int = 32,
        quality: float = 0.88,
        stability: float = 0.95,
        weights: str | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if unknown := sorted({*frozen} - {*PARTS}):
            raise UserError(f"head.frozen={[*frozen]}: no part is named {unknown[0]}; there are {', '.join(PARTS)}")
        if masks < 2:
            raise UserError(f"head.masks={masks}: give at least 2 (published: 3)")
        self.grid = PointGrid(points, quality, stability)
        layer = deepest_fine_layer(spec, layers)
        self.layers, self.stride, self.draw = (layer,), spec.strides[layer], draw
        self.neck = make_neck(spec.dims[layer], width)
        self.prompt_encoder = make_prompt_encoder(width)
        self.mask_decoder = make_mask_decoder(width, mlp_width, heads, masks)
        self.detail = Detail(spec.bands, width, self.stride) if detail else None
        self.objectwise = Objectwise(width // 8) if detail else None
        self.trust = nn.Linear(1, 1) if detail else None
        if self.trust is not None:  # at first the pixels are believed
            nn.init.ones_(self.trust.weight)
            nn.init.zeros_(self.trust.bias)
        if weights is not None:
            load_official(self, weights, fresh=("detail", "objectwise", "trust"))
        for part in frozen:
            self.get_submodule(part).requires_grad_(False)

    def embed(self, features: Features) -> Tensor:
        """Features of the one layer -> image embedding (B, width, h, w); with detail (B, 3 width, h, w)."""
        embedding: Tensor = self.neck(features.grids[0])
        if self.detail is None:
            return embedding
        detail = self.detail(embedding, features.image)
        return torch.cat([embedding, F.pixel_unshuffle(detail, FINER)], 1)

    def decode(self, embedding: Tensor, prompts: MaskPrompts, size: tuple[int, int], *, several: bool) -> PromptedMasks:
        """Image embedding of `embed` and prompts for M objects each -> their masks, of images of `size` (H, W).

        `several`: the alternatives (T = `masks`), else the one mask for prompts that mean one thing (T = 1).
        """
        width = self.prompt_encoder.embed_dim
        embedding, detail = embedding[:, :width], embedding[:, width:]
        images, _, *grid = embedding.shape
        cells = (int(grid[0]), int(grid[1]))
        sparse, dense, drawn = self._encode(prompts, cells)
        objects = len(sparse) // images
        # the decoder repeats one image's embedding for all prompts; added to the prompts' own, each object has its own
        dense = embedding.repeat_interleave(objects, 0) + dense
        with self._detailed(detail.repeat_interleave(objects, 0), drawn):
            coarse, scores = self.mask_decoder(
                image_embeddings=embedding.new_zeros(1, width, *cells),
                image_pe=self.prompt_encoder.pe_layer(cells)[None],
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=several,
            )
        if self.trust is not None:
            scores = scores + self.trust(expected_iou(coarse.detach())[..., None])[..., 0]
        coarse = coarse.unflatten(0, (images, objects))
        logits = to_image(coarse.flatten(0, 1), cells, self.stride, size).unflatten(0, (images, objects))
        return PromptedMasks(logits=logits, scores=scores.unflatten(0, (images, objects)), coarse=coarse)

    @contextmanager
    def _detailed(self, detail: Tensor, drawn: Tensor | None) -> Iterator[None]:
        """The decoder makes masks of its upscaled embedding plus the detail (B * M, 2 width or 0, h, w).

        `drawn`: the mask prompt (B * M, 1, 4h, 4w), where there is one.
        """
        objectwise = self.objectwise
        if objectwise is None:
            yield
            return
        fine = F.pixel_shuffle(detail, FINER)
        prompt = fine.new_zeros(len(fine), 1, *fine.shape[2:]) if drawn is None else (drawn / DRAWN).tanh()

        def add(_module: nn.Module, _inputs: Any, upscaled: Tensor) -> Tensor:
            both = upscaled + fine
            added: Tensor = both + objectwise(both, prompt)
            return added

        handle = self.mask_decoder.output_upscaling.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _encode(self, prompts: MaskPrompts, cells: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prompts -> sparse (B * M, tokens, width) and dense (B * M, width, h, w) embeddings, or dense of 1 x 1.

        The third is the mask prompt (B * M, 1, 4h, 4w), where there is one.
        """
        padded = (cells[0] * self.stride, cells[1] * self.stride)
        points = boxes = masks = None
        if prompts.points is not None and prompts.labels is not None:
            points = place_in_grid(prompts.points.flatten(0, 1), padded), prompts.labels.flatten(0, 1)
        if prompts.boxes is not None:
            boxes = place_in_grid(prompts.boxes.reshape(-1, 2, 2), padded).reshape(-1, 4)
        seen = draw_prompts(prompts, cells, self.stride) if self.draw else prompts.masks
        if seen is not None:
            masks = seen.flatten(0, 1).unsqueeze(1)
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        return sparse, dense, masks


def expected_iou(logits: Tensor) -> Tensor:
    """The IoU of masks (..., H, W), logits above 0, with the truth if pixels are as sure as they say: (...), 0..1.

    Expected intersection over expected union. SAM's own prediction comes from the decoder's token, which has not seen
    the detail that the mask is made with.
    """
    sure, inside = logits.sigmoid(), logits > 0
    both = (sure * inside).sum((-2, -1))
    return both / (inside.sum((-2, -1)) + (sure * ~inside).sum((-2, -1))).clamp_min(1e-6)
