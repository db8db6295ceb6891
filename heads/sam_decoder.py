"""SAM's mask decoder without prompts: one mask token per class.

What Conv-LoRA trains beside its adapter (Zhong et al. 2024, "Convolution Meets LoRA", https://arxiv.org/abs/2401.17868,
§3): the decoder is given no prompt and cut to the masks that are wanted. Differs from the release (AutoGluon),
which for one thing on a background trains one mask with a sigmoid and `structure_loss`, and for more classes gives the
mask tokens a classifier and trains with Mask2Former's loss: here masks are the classes' logits, with the task's loss.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from vfmadapt.contracts import BackboneSpec, Features, Head
from vfmadapt.heads._resize import to_image
from vfmadapt.heads._sam import (
    deepest_fine_layer,
    load_official,
    make_mask_decoder,
    make_neck,
    make_prompt_encoder,
)

_FRESH = ("mask_decoder.mask_tokens", "mask_decoder.output_hypernetworks_mlps", "mask_decoder.iou_prediction_head")


class SamDecoderHead(Head):
    """SAM's neck and mask decoder with a mask token per class; its logits are the classes'.

    The prompt encoder, which says that there is no prompt, stays as it is. The head that expects an IoU is left out:
    masks of classes are not ranked. With one class and the published sizes the decoder has 3,505,536 parameters.

    Args:
        spec: the backbone's.
        num_classes: masks.
        layers: the one block to read, by default the last with at most 16 pixels per cell.
        width: channels of embeddings and tokens (published: 256).
        mlp_width: inner width of the decoder's MLPs (published: 2048).
        heads: of its attention (published: 8).
        weights: a checkpoint of SAM, the file that backbone.weights names; mask tokens and what makes masks of them
            stay random. None: all is.
        train_neck: as published False, which needs weights.

    Raises:
        UserError: sizes that do not divide one another, or weights that do not fit.
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
    ) -> None:
        super().__init__()
        layer = deepest_fine_layer(spec, layers)
        self.layers, self.stride = (layer,), spec.strides[layer]
        self.neck = make_neck(spec.dims[layer], width)
        self.prompt_encoder = make_prompt_encoder(width).requires_grad_(False)
        self.mask_decoder = make_mask_decoder(width, mlp_width, heads, num_classes - 1)
        self.mask_decoder.iou_prediction_head = nn.Identity()
        if weights is not None:
            load_official(self, weights, fresh=_FRESH)
        self.neck.requires_grad_(train_neck)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of the one layer -> logits (B, K, H, W)."""
        embedding = self.neck(features.grids[0])
        cells = (embedding.shape[2], embedding.shape[3])
        sparse, dense = self.prompt_encoder(None, None, None)
        masks, _ = self.mask_decoder.predict_masks(
            # the decoder repeats one image's embedding for all prompts: the images come as what prompts add to it
            image_embeddings=embedding.new_zeros(1, *embedding.shape[1:]),
            image_pe=self.prompt_encoder.pe_layer(cells)[None],
            sparse_prompt_embeddings=sparse.expand(len(embedding), -1, -1),
            dense_prompt_embeddings=embedding + dense,
        )
        return to_image(masks, cells, self.stride, size)
