"""Many adapter files on one frozen backbone: switched in place, several on one image, one per sample."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt._sites import first_block
from vfmadapt._state import load_state
from vfmadapt.contracts import DataSpec, Features, Head, Owned
from vfmadapt.errors import UserError
from vfmadapt.host import AdaptedBackbone
from vfmadapt.model import AdaptedModel, in_units, normalise


class Bank(nn.Module):
    """Models that share one frozen backbone, which is in memory once. For inference; see `vfmadapt.load_many`.

    Args:
        backbone: the frozen backbone with the adapters of all models.
        adapters: by model, the names of its adapters, and of its head where that acts in the blocks (`serve`).
        heads: by model.
        specs: by model: its bands, classes, mean and std.
    """

    def __init__(
        self,
        backbone: AdaptedBackbone,
        adapters: Mapping[str, Sequence[str]],
        heads: Mapping[str, Head],
        specs: Mapping[str, DataSpec],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapters = {name: tuple(group) for name, group in adapters.items()}
        self.heads = nn.ModuleDict(heads)
        self.specs = dict(specs)
        for name, spec in specs.items():
            self.register_buffer(f"mean_{name}", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
            self.register_buffer(f"std_{name}", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)
        self.current = next(iter(self.adapters))
        self.use(self.current)
        self.eval()

    def names(self) -> tuple[str, ...]:
        """The models, in order."""
        return tuple(self.adapters)

    def use(self, name: str) -> None:
        """Switch to a model in place; raises UserError with the known ones."""
        self._check([name])
        self.backbone.use(*self.adapters[name])
        self.current = name

    @torch.no_grad()
    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Image (B, C, H, W) in sensor units -> logits (B, K, H, W) of the model in use."""
        self.use(self.current)
        features = self.backbone(self._normalise(self.current, image, valid), self._head(self.current).layers)
        return self._answer(self.current, features, image)

    @torch.no_grad()
    def each(self, image: Tensor, names: Iterable[str] | None = None, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (B, K, H, W) of several models (all by default) on the same images (B, C, H, W) in sensor units.

        The blocks before the first adapted one run once, the others on a batch of all models; models that normalise
        otherwise have a batch of their own.

        Raises:
            UserError: an unknown name, or an adapter that cannot share a batch.
        """
        chosen = self.names() if names is None else tuple(names)
        self._check(chosen)
        found: dict[str, Tensor] = {}
        for together in self._alike(chosen):
            layers = tuple(sorted({i for name in together for i in self._head(name).layers}))
            inside = self._normalise(together[0], image, valid)
            groups = [self.adapters[name] for name in together]
            for name, features in zip(together, self.backbone.each(inside, layers, groups), strict=True):
                found[name] = self._answer(name, features.only(self._head(name).layers), image)
        return {name: found[name] for name in chosen}

    @torch.no_grad()
    def routed(self, image: Tensor, names: Sequence[str], valid: Tensor | None = None) -> list[Tensor]:
        """Logits (K_i, H, W) of sample i of images (B, C, H, W) under model `names[i]`, in one batch.

        Raises:
            UserError: an unknown name, another number of names than of images, an adapter that cannot share a batch.
        """
        self._check(names)
        if len(names) != image.shape[0]:
            raise UserError(f"{len(names)} names for a batch of {image.shape[0]} images; give one name per image")
        order = sorted(range(len(names)), key=lambda i: self.names().index(names[i]))
        inside = torch.cat(
            [self._normalise(names[i], image[i : i + 1], None if valid is None else valid[i : i + 1]) for i in order]
        )
        layers = tuple(sorted({i for name in names for i in self._head(name).layers}))
        features = self.backbone.routed(inside, layers, [self.adapters[names[i]] for i in order])
        found: dict[int, Tensor] = {}
        place = 0
        for name, group in groupby(order, key=lambda i: names[i]):
            samples = list(group)
            mine = features.rows(place, place + len(samples)).only(self._head(name).layers)
            logits = self._answer(name, mine, image)
            found |= dict(zip(samples, logits, strict=True))
            place += len(samples)
        return [found[i] for i in range(len(names))]

    @torch.no_grad()
    def in_turn(self, image: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Logits (B, K, H, W) of each model on the same images (B, C, H, W) in sensor units, bit for bit as alone.

        Adapters of every kind. The blocks before the first adapted one run once for models that normalise alike.
        """
        found: dict[str, Tensor] = {}
        for together in self._alike(self.names()):
            with _once(self._shared(together)):
                for name in together:
                    self.use(name)
                    found[name] = self(image, valid)
        return [found[name] for name in self.names()]

    def parts(self, name: str) -> nn.Module:
        """What a model consists of: its `spec`, the frozen backbone, its adapters and head; not to be called."""
        self.backbone.use()  # else a trained copy may stand in the frozen backbone
        parts = nn.ModuleDict({"backbone": self.backbone.backbone, "head": self._head(name)})
        own = (adapter for adapter in self.adapters[name] if adapter in self.backbone.adapters)  # not a head with sites
        parts["adapters"] = nn.ModuleList(self.backbone.adapters[adapter] for adapter in own)
        parts.spec = self.specs[name]  # type: ignore[assignment]  # mypy takes module attributes for tensors
        return parts

    def _alike(self, names: Iterable[str]) -> list[list[str]]:
        """The names in groups of models that normalise alike."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            groups.setdefault((self.specs[name].mean, self.specs[name].std), []).append(name)
        return list(groups.values())

    def _shared(self, names: Iterable[str]) -> list[nn.Module]:
        """The modules that see and do the same in all models: the patch embedding and blocks before the first site."""
        sites = [site for name in names for adapter in self.adapters[name] for site in self.backbone.sites(adapter)]
        frozen = self.backbone.backbone
        first = first_block(sites) if sites else len(frozen.blocks())
        if first < 0 or any(isinstance(site, Owned) for site in sites):
            return []
        return [frozen.place("patch_embed", 0).module, *frozen.blocks()[:first]]

    def _normalise(self, name: str, image: Tensor, valid: Tensor | None) -> Tensor:
        return normalise(image, valid, self.get_buffer(f"mean_{name}"), self.get_buffer(f"std_{name}"))

    def _answer(self, name: str, features: Features, image: Tensor) -> Tensor:
        """A model's logits or values (B, K, H, W) from its head's features of images (B, C, H, W)."""
        return in_units(self._head(name)(features, (image.shape[-2], image.shape[-1])), self.specs[name].values)

    def _head(self, name: str) -> Head:
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def _check(self, names: Iterable[str]) -> None:
        if unknown := [n for n in names if n not in self.adapters]:
            raise UserError(f"no model {unknown[0]!r} is loaded; there are: {', '.join(self.adapters)}")


def load_many(files: Mapping[str, str | Path]) -> Bank:
    """Load several adapter files onto one frozen backbone.

    Args:
        files: {name: adapter file}; all trained on the same frozen weights and bands.

    Raises:
        UserError: no file, a file that is no adapter file, or one that was trained on other weights.
    """
    from vfmadapt.build import adapters as build_adapters
    from vfmadapt.build import head as build_head
    from vfmadapt.checkpoint import check_hash, data_spec, load, read_file

    if not files or any("." in name for name in files):
        raise UserError(f"names {list(files)}: give {{name: adapter file}}, at least one, names without a dot")
    model: AdaptedModel = load(next(iter(files.values())))
    host = AdaptedBackbone(model.backbone.detach(), {}, config=model.backbone.config)
    adapters: dict[str, tuple[str, ...]] = {}
    heads: dict[str, Head] = {}
    specs: dict[str, DataSpec] = {}
    for name, path in files.items():
        header, state = read_file(path)
        check_hash(path, header, host.spec)
        if header["data"] is None:
            raise UserError(f"{path} holds an adapter without a head; load_many takes whole models")
        config, spec = header["config"], data_spec(header["data"])
        made = build_adapters(config, host.backbone)
        head = build_head(config["head"], host.spec, spec)
        own = {f"head.{k}": v for k, v in head.state_dict().items()}
        for part, module in made.items():
            host.add(f"{name}/{part}", module)
            own |= {f"adapters.{part}.{k}": v for k, v in module.state_dict().items()}
        load_state(own, state)
        heads[name], specs[name] = head, spec
        adapters[name] = host.serve(head, name=f"{name}/head", adapters=[f"{name}/{part}" for part in made])
    return Bank(host, adapters, heads, specs)


@contextmanager
def _once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While entered, each module computes at its first call, and gives that again at every other one."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.forward = _first(module.forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _first(forward: Callable[..., Any]) -> Callable[..., Any]:
    kept: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    return call
