"""One module for every linear layer of some roles."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

from torch import nn

from vfmadapt.contracts import BackboneSpec

Made = TypeVar("Made", bound=nn.Module)


class PerLinear(nn.ModuleDict, Generic[Made]):
    """{role: a module for each block}, sized by the layers, which may differ in width.

    Args:
        spec: the backbone's.
        roles: linear layers that get a module, in every block.
        make: (in, out) -> the module of a layer of that size.

    Raises:
        UserError: a role that the backbone lacks.
    """

    def __init__(self, spec: BackboneSpec, roles: Iterable[str], make: Callable[[int, int], Made]) -> None:
        super().__init__({role: nn.ModuleList(make(*widths) for widths in spec.widths(role)) for role in roles})

    def each(self) -> Iterator[tuple[str, int, Made]]:
        """(role, block, module) of every layer."""
        for role, modules in self.items():
            for index, module in enumerate(cast(nn.ModuleList, modules)):
                yield role, index, cast(Made, module)
