"""Which blocks a setting names."""

from collections.abc import Sequence

from vfmadapt.contracts import UserError


def resolve_layers(layers: Sequence[int] | None, depth: int, setting: str) -> list[int]:
    """Sorted indices from 0, negative ones counted from the end; None for all blocks.

    Args:
        layers: as given.
        depth: number of blocks.
        setting: what the message calls it ("cloud: layers").

    Raises:
        UserError: a block that is not there, or none at all.
    """
    if layers is None:
        return list(range(depth))
    if not layers or any(not isinstance(i, int) or not -depth <= i < depth for i in layers):
        raise UserError(
            f"{setting}={list(layers)} must be whole numbers from {-depth} to {depth - 1} ({depth} blocks), at least "
            "one; null for all"
        )
    return sorted({i % depth for i in layers})


def evenly_spaced(depth: int, count: int = 4) -> list[int]:
    """The last block of each of `count` equal parts (2, 5, 8 and 11 of 12); where there are fewer blocks, each once."""
    return sorted({-(-depth * (i + 1) // count) - 1 for i in range(count)})
