"""Published weights and published numbers: official state dicts -> ours, golden files -> agreement.

One module per family. What a module offers is found by name, there is nothing to register:

- `load_METHOD(adapter, state)` copies an official state dict (published names) into our adapter, strictly;
- `replay_METHOD(golden)` computes with our code what a golden file of that method holds, key by key.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vfmadapt.errors import UserError

if TYPE_CHECKING:
    from vfmadapt.check_golden import Golden
    from vfmadapt.contracts import Adapter


def _offered(prefix: str) -> dict[str, Callable[..., Any]]:
    found = {}
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for name in vars(module):
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = getattr(module, name)
    return found


def replays() -> dict[str, Callable[["Golden"], Mapping[str, Tensor]]]:
    """{method of a golden file: function that computes its contents with our code}."""
    return _offered("replay_")


def load_published(method: str, adapter: "Adapter", state: Mapping[str, Tensor]) -> None:
    """Copy an official state dict into our adapter.

    Args:
        method: "earth", "cloud", ...: one of the methods whose official layout is known.
        adapter: ours, of the same sizes.
        state: tensors under their published names.

    Raises:
        UserError: an unknown method, or a key that is missing or left over, by name.
    """
    known = _offered("load_")
    known.pop("published", None)
    if method not in known:
        raise UserError(f"no official layout is known for {method!r}; there is one for: {', '.join(sorted(known))}")
    known[method](adapter, state)


class Strict:
    """A state dict of which every key must be taken, once.

    Args:
        state: tensors under their published names.
        method: for the messages.
    """

    def __init__(self, state: Mapping[str, Tensor], method: str) -> None:
        self._left, self._method = dict(state), method

    def take(self, key: str) -> Tensor:
        """The tensor of a key; raises UserError where it is missing."""
        if key not in self._left:
            close = [k for k in self._left if k.split(".")[-1] == key.split(".")[-1]][:3]
            raise UserError(f"{self._method} weights: no {key!r}; left with that ending: {', '.join(close) or 'none'}")
        return self._left.pop(key)

    def copy(self, target: Tensor, key: str, *, transpose: bool = False) -> None:
        """Copy a key into `target`; raises UserError where the shapes differ."""
        tensor = self.take(key)
        tensor = tensor.T if transpose else tensor
        if tensor.shape != target.shape:
            raise UserError(
                f"{self._method} weights: {key} is {tuple(tensor.shape)}, this adapter has {tuple(target.shape)}"
            )
        target.data.copy_(tensor)

    def done(self) -> None:
        """Raises UserError where keys are left."""
        if self._left:
            raise UserError(f"{self._method} weights: {len(self._left)} tensors are left over, first {min(self._left)}")
