"""A batch that several adapters share: whose rows are whose."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vfmadapt.contracts import Features

Rows = dict[str, tuple[int, int]]
"""By adapter: its samples, (first, last + 1)."""


def rows_of_copies(groups: Sequence[Sequence[str]], batch: int) -> Rows:
    """Each group of adapters has a copy of the batch to itself."""
    return {name: (k * batch, (k + 1) * batch) for k, group in enumerate(groups) for name in group}


def rows_of_samples(groups: Sequence[Sequence[str]]) -> Rows:
    """Sample i goes through the adapters `groups[i]`; samples of one group must follow one another."""
    routes: Rows = {}
    for sample, group in enumerate(groups):
        for name in group:
            first, last = routes.get(name, (sample, sample))
            if last != sample:
                raise ValueError(f"samples of adapter {name} do not follow one another")
            routes[name] = first, sample + 1
    return routes


@contextmanager
def repeated(module: nn.Module, copies: int) -> Iterator[None]:
    """While entered, the batch is repeated `copies` times on its way into `module`."""
    handle = module.register_forward_pre_hook(partial(_repeat, copies), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def of_each_copy(features: Features, image: Tensor, copies: int) -> list[Features]:
    """Features of a repeated batch -> those of each copy; `image` is the batch before it was repeated."""
    batch = image.shape[0]
    whole = replace(
        features,
        grids=tuple(_whole(grid, copies * batch) for grid in features.grids),
        prefix=tuple(_whole(prefix, copies * batch) for prefix in features.prefix),
    )
    return [replace(whole.rows(k * batch, (k + 1) * batch), image=image) for k in range(copies)]


def _whole(tensor: Tensor, samples: int) -> Tensor:
    """Features from before the batch was repeated serve every copy."""
    return tensor.repeat(samples // tensor.shape[0], *(1,) * (tensor.ndim - 1))


def _repeat(copies: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].repeat(copies, *(1,) * (args[0].ndim - 1)), *args[1:])
