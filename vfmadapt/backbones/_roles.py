"""Which module of a network plays which role; the only place that knows a library's names inside a block."""

from typing import Any

from torch import nn

from vfmadapt.contracts import LINEAR_ROLES, ROLES, Place, UserError

Net = Any
"""A network with `patch_embed`, `blocks` and maybe `norm`: nn.Module declares none of these."""

_OTHER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "proj_in", "fc2": "proj_out"}
"""What transformers calls parts of a block that timm has under the role's own name."""


def find_place(net: Net, role: str, index: int, name: str) -> Place:
    """The place of `role` in block `index`; `name` is the backbone's, for the message."""
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}: choose one of {', '.join(ROLES)}")
    if role in ("patch_embed", "norm"):
        module = getattr(net, role, None)
        place = Place(module) if isinstance(module, nn.Module) and not isinstance(module, nn.Identity) else None
    else:
        place = _in_block(net.blocks[index], role)
    if place is None:
        raise UserError(f"{name} has no {role!r} (block {index}), so this adapter does not fit it")
    return place


def _in_block(block: Net, role: str) -> Place | None:
    if role in ("norm1", "attn", "norm2", "mlp"):
        found = _part(block, role)
    elif role in ("fc1", "fc2"):
        found = _part(getattr(block, "mlp", None), role)
    elif role in ("q", "k", "v"):
        return _query_key_value(block, role)
    else:
        found = getattr(getattr(block, "attn", None), role, None)
    return Place(found) if isinstance(found, nn.Module) else None


def _part(module: Net, role: str) -> Net:
    return getattr(module, role, None) or getattr(module, _OTHER.get(role, role), None)


def patch_convolution(net: Net) -> nn.Conv2d:
    """The convolution that makes tokens of pixels."""
    found = getattr(net.patch_embed, "proj", None) or net.patch_embed.projection
    assert isinstance(found, nn.Conv2d)
    return found


def _query_key_value(block: Net, role: str) -> Place | None:
    attention = getattr(block, "attn", None)
    if isinstance(fused := getattr(attention, "qkv", None), nn.Linear):
        third, place = fused.out_features // 3, ("q", "k", "v").index(role)
        return Place(fused, (place * third, (place + 1) * third))
    single = getattr(attention, f"{role}_proj", None)
    return Place(single) if isinstance(single, nn.Module) else None


def linear_widths(net: Net) -> dict[str, tuple[tuple[int, int], ...]]:
    """`BackboneSpec.linears`: (in, out) per block of every role that all blocks have as a linear layer."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for role in LINEAR_ROLES:
        places = [_in_block(block, role) for block in net.blocks]
        linears = [p.module for p in places if p is not None and isinstance(p.module, nn.Linear)]
        if len(linears) < len(places):
            continue
        shares = [1 if p is None or p.rows is None else 3 for p in places]
        found[role] = tuple((m.in_features, m.out_features // n) for m, n in zip(linears, shares, strict=True))
    return found


def tensor_names(net: nn.Module, role: str, name: str, *, final_norm: bool) -> list[str]:
    """Names of the parameters of a role ("patch_embed", "biases", "norms", "cls_token", "all", "blocks.I") in `net`.

    Only what a forward reads: no pooling or classifier, and the final norm only where features come through it.
    """
    used = [key for key, _ in net.named_parameters() if _is_read(key, final_norm)]
    chosen = {
        "patch_embed": lambda key: key.startswith("patch_embed."),
        "biases": lambda key: key.endswith("bias"),
        "norms": lambda key: "norm" in key,
        "cls_token": lambda key: key == "cls_token",
        "all": lambda _key: True,
    }
    if role.startswith("blocks."):
        found = [key for key in used if key.startswith(f"{role}.")]
    elif role in chosen:
        found = [key for key in used if chosen[role](key)]
    else:
        raise UserError(f"{name} has no tensors of role {role!r}; choose one of {', '.join(chosen)}, blocks.I")
    return found


def _is_read(key: str, final_norm: bool) -> bool:
    head = key.split(".", 1)[0]
    if head in ("neck", "head", "fc_norm", "attn_pool", "mask_token"):
        return False
    return head != "norm" or final_norm


def rotary_attention(block: Net) -> Net | None:
    """A block's attention layer where it counts prefix tokens, because rotary embedding skips them."""
    attention = getattr(block, "attn", None)
    return attention if hasattr(attention, "num_prefix_tokens") else None


def unbypass(net: Net) -> None:
    """Make attention call its fused linear layer, so that hooks on it run: the same function, bias added after it."""
    for block in net.blocks:
        if hasattr(getattr(block, "attn", None), "qkv_bias_separate"):
            block.attn.qkv_bias_separate = True
