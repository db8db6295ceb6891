"""The LoRA family through Hugging Face PEFT (https://github.com/huggingface/peft, Apache-2.0).

Each entry of conf/adapter that names a `tuner` links its paper. PEFT is imported when an adapter is attached, which
takes seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vfmadapt.adapters import _peft_starts as starts
from vfmadapt.adapters._layers import resolve_layers
from vfmadapt.adapters._peft_layers import NAME, Keyed, shadow, stand_in, wrap
from vfmadapt.adapters._peft_runs import RUNS, prepare, run
from vfmadapt.adapters._peft_tuners import filled, known
from vfmadapt.contracts import Adapter, Backbone, BackboneSpec, Instead, Merger, Site, UserError

PLAIN = ("lora", "rslora", "eva")
"""Tuners whose layers, once trained, are y + s B A x and nothing else."""


class Peft(Adapter):
    """A tuner of PEFT at linear layers (or norms): the layers that PEFT makes, run in the place of the frozen ones.

    The backbone keeps its modules; PEFT's layers belong to the adapter, so that their dropout acts in training only.
    Block sizes, ranks of sparse updates and numbers of frequencies are the largest that a layer's widths allow, up to
    the setting. The identity when new, up to rounding. `vera` and `randlora` share projections drawn from a seed,
    which no file holds. Trained on ViT-B/16 at all four roles with PEFT's defaults: lora and its starts 1,179,648,
    dora 1,262,592, adalora 1,770,048, vera 95,232, randlora 921,600, loha 2,359,296, lokr 80,640, oft 999,936, boft
    340,992, hra 516,096, fourierft 48,000, waveft 124,416, shira 4,718,592, miss 5,308,416, c3a 331,776, road 82,944,
    ia3 82,944 (without `feedforward_modules`).

    Of PEFT's own behaviour not reproduced: name suffixes as targets ("proj" is also the patch embedding's); grids
    (B, h, w, C) refused by OFT; FourierFT and C3A changing the output when new; BOFT compiling a CUDA extension and
    falling back to another function without one. PEFT's DoRA normalises rows of the weight, the paper's columns.

    Args:
        spec: the backbone's.
        tuner: one of PEFT's, see conf/adapter.
        options: of the tuner, under PEFT's names; the others keep their defaults.
        roles: of the layers that it acts on; by default the tuner's, where the backbone has them.
        layers: blocks, negative ones counted from the last; all by default.

    Raises:
        UserError: an unknown tuner, option or role, or a value that the layers' widths do not allow.
    """

    unmergeable = ""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        tuner: str,
        options: Mapping[str, Any] | None = None,
        roles: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.tuner, self.options = tuner, filled(tuner, options or {})
        self.blocks = resolve_layers(layers, spec.depth, f"{tuner}: layers")
        self.roles = _roles(spec, known(tuner).roles) if roles is None else tuple(roles)
        if not self.roles:
            raise UserError(f"{tuner}: roles=[] leaves nothing to adapt; null for {', '.join(known(tuner).roles)}")
        self.places = {f"{i}/{role}": (role, i) for role in self.roles for i in self.blocks if role != "norm"}
        if "norm" in self.roles:
            self.places["0/norm"] = "norm", 0
        self.layers = nn.ModuleDict()

    def bind(self, backbone: Backbone) -> None:
        """Let PEFT make its layers; raises UserError for a role that is a part of a layer, or has no parameters."""
        self._backbone = (backbone,)  # for starts from data; in a tuple it is no part of this module
        modules = self._frozen(backbone)
        for key, layer in self._wrapped(modules):
            self._keep(key, layer, modules[key])

    def sites(self) -> Sequence[Site]:
        """One per layer, in its place."""
        return [
            Instead(role, index, partial(self.run, key), partial(self.pair, key) if self.tuner in PLAIN else None)
            for key, (role, index) in self.places.items()
        ]

    def run(self, key: str, x: Tensor) -> Tensor:
        """What the layer `key` gives for (..., in): (..., out)."""
        y = RUNS.get(self.tuner, run)(self.layers[key], x.reshape(x.shape[0], -1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def pair(self, key: str) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scale of a plain LoRA layer; None in training, where dropout may act."""
        layer: Any = self.layers[key]
        return None if self.training else (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME])

    def merge(self, into: Merger) -> None:
        """Read weight and bias off what a layer does with unit vectors and with zero."""
        for key, (role, index) in self.places.items():
            layer: Any = self.layers[key]
            if isinstance(layer.base_layer, nn.Linear):
                weight = layer.base_layer.weight
                units = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
                bias = self.run(key, torch.zeros_like(units[:1]))
                has_bias = layer.base_layer.bias is not None
                into.put(role, index, (self.run(key, units) - bias).T, bias[0] if has_bias else None)
            else:
                norm = layer.ln_tuning_layers[NAME]
                into.put(role, index, norm.weight, norm.bias)

    def _wrapped(self, modules: Mapping[str, nn.Module]) -> Keyed:
        """PEFT's layers; a subclass may start them otherwise."""
        return wrap(self.tuner, self.options, {key: stand_in(module) for key, module in modules.items()})

    def _made(self) -> list[Any]:
        """PEFT's layers, whose attributes no type tells."""
        return list(self.layers.values())

    def _keep(self, key: str, layer: Any, module: nn.Module) -> None:
        prepare(self.tuner, layer)
        layer.__dict__["base_layer"] = shadow(module)
        self.layers[key] = layer

    def _frozen(self, backbone: Backbone) -> dict[str, Any]:
        """The frozen modules by key; raises UserError for one that the tuner does not take."""
        found, norms = {}, self.tuner == "ln_tuning"
        for key, (role, index) in self.places.items():
            place = backbone.place(role, index)
            if place.rows is not None:
                raise UserError(
                    f"{self.tuner}: {role!r} of {backbone.spec.name} is a part of 'qkv', and PEFT takes whole layers; "
                    "use roles=[qkv]"
                )
            if isinstance(place.module, nn.Linear) == norms or getattr(place.module, "weight", None) is None:
                wanted = "norm" if norms else "linear layer"
                raise UserError(f"{self.tuner}: {role!r} of {backbone.spec.name} is no {wanted} with weights")
            found[key] = place.module
        return found


class Started(Peft):
    """LoRA whose A and B start from the frozen weights (`pissa`, `olora`), at linear layers.

    y = W x + s (B A x - B0 A0 x): the identity when new, up to rounding. PEFT takes s B0 A0 off the frozen weight, so
    that its files fit no other copy of the backbone; here the weight stays and the file holds A0 and B0, too.
    """

    def bind(self, backbone: Backbone) -> None:
        """Let PEFT make its layers, and keep what they add at the start."""
        self.starts = nn.ModuleDict()
        super().bind(backbone)

    def run(self, key: str, x: Tensor) -> Tensor:
        """What the layer `key` gives for (..., in): (..., out)."""
        y = super().run(key, x)
        return y - self.starts[key](x).to(y.dtype)

    def _wrapped(self, modules: Mapping[str, nn.Module]) -> Keyed:
        plain = any(p.is_meta for module in modules.values() for p in module.parameters())  # there is nothing to split
        stand_ins = {key: stand_in(module, clone=True) for key, module in modules.items()}
        return wrap(self.tuner, self.options, stand_ins, **({"init_lora_weights": True} if plain else {}))

    def _keep(self, key: str, layer: Any, module: nn.Module) -> None:
        super()._keep(key, layer, module)
        self.starts[key] = starts.Start(layer)


class StartedFromData(Started):
    """LoRA whose A and B start from the frozen weights and data (`corda`, `lora_ga`), at linear layers.

    Until `initialise` has seen data it is plain LoRA, whose B0 is zero. The identity when new, and after `initialise`
    up to rounding. `corda` decomposes every weight whole, minutes for ViT-B without a GPU, and holds in x in numbers
    for every layer meanwhile. `lora_ga` takes gradients of the mean square of the last block's features, since a start
    has no labels.
    """

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Start from normalised images (B, bands, H, W)."""
        (backbone,), start = self._backbone, {"corda": starts.corda, "lora_ga": starts.lora_ga}[self.tuner]
        for key, layer in start(backbone, self._frozen(backbone), batches, self.options):
            self.layers[key].load_state_dict(layer.state_dict())
            self.starts[key].load_state_dict(starts.Start(layer).state_dict())


class Eva(Peft):
    """EVA: LoRA whose A starts as the principal directions of each layer's inputs, and whose ranks follow them.

    The identity when new: B is zero. Until `initialise` has seen data it is plain LoRA of rank r * rho. Tensors always
    have round(r * rho) rows, so that a file fits whatever the data were; rows that a layer does not get are zero in A
    and B and stay so.
    """

    def initialise(self, batches: Iterable[Tensor]) -> None:
        """Start from normalised images (B, bands, H, W)."""
        (backbone,) = self._backbone
        found = starts.eva(backbone, self._frozen(backbone), batches, self.options["r"], self.options["rho"])
        with torch.no_grad():
            for key, rows in found.items():
                layer: Any = self.layers[key]
                layer.lora_A[NAME].weight.copy_(rows)
                layer.lora_B[NAME].weight.zero_()

    def _wrapped(self, modules: Mapping[str, nn.Module]) -> Keyed:
        rank = self.options["r"]
        rows = round(rank * self.options["rho"])
        options = {**self.options, "r": rows, "lora_alpha": self.options["lora_alpha"] * rows / rank}
        return wrap(self.tuner, options, {key: stand_in(module) for key, module in modules.items()})


class AdaLora(Peft):
    """AdaLoRA: updates B diag(E) A whose least important singular values are set to zero during training.

    The identity when new: E is zero. The importance starts anew when training is resumed, since it would make the
    file three times as large. `tinit` and `tfinal` are steps; the number of all steps comes from the trainer.
    """

    def bind(self, backbone: Backbone) -> None:
        """Let PEFT make its layers."""
        if self.options["target_r"] >= self.options["init_r"]:
            raise UserError(
                f"adalora: target_r={self.options['target_r']} must be below init_r={self.options['init_r']}"
            )
        super().bind(backbone)
        self._allocator: Any = None
        for layer in self._made():
            rank = float(layer.ranknum.pop(NAME))
            layer.ranknum[NAME] = rank  # a number for PEFT's formula, not a tensor to train or to save
            layer.register_buffer("kept", torch.ones_like(layer.lora_E[NAME], dtype=torch.bool))

    def aux_loss(self) -> Tensor:
        """orth_reg_weight times the mean of |A A^T - 1| and |B^T B - 1| over the layers (Frobenius norms)."""
        factors = [m for layer in self._made() for m in (layer.lora_A[NAME], layer.lora_B[NAME].T)]
        norms = [torch.linalg.norm(m @ m.T - torch.eye(len(m), device=m.device, dtype=m.dtype)) for m in factors]
        return self.options["orth_reg_weight"] * torch.stack(norms).mean()

    def after_step(self, step: int, total: int) -> None:
        """Take the gradients' importance into account and set to zero what is above the step's budget."""
        last = total - self.options["tfinal"]
        if self.options["tinit"] >= last:
            raise UserError(
                f"adalora: tinit={self.options['tinit']} and tfinal={self.options['tfinal']} leave none of {total} "
                "steps to shrink the ranks in; lower them"
            )
        if step <= last:
            allocator = self._allocated(total)
            if step == last and not allocator.ipt:  # the first step, or the first after a resume
                allocator.update_ipt(self.layers)
            _, masked = allocator.update_and_allocate(self.layers, step, force_mask=step == last)
            for layer in self._made() if masked else ():
                layer.kept.copy_(layer.lora_E[NAME] != 0)
        else:
            for layer in self._made():
                layer.lora_E[NAME].data.mul_(layer.kept)

    def _wrapped(self, modules: Mapping[str, nn.Module]) -> Keyed:
        steps = self.options["tinit"] + self.options["tfinal"] + 1  # PEFT wants a number; `after_step` knows it
        stand_ins = {key: stand_in(module) for key, module in modules.items()}
        return wrap(self.tuner, self.options, stand_ins, total_step=steps)

    def _allocated(self, total: int) -> Any:
        """PEFT's allocator of ranks, for a training of `total` steps."""
        if self._allocator is None:
            from peft import AdaLoraConfig
            from peft.tuners.adalora.layer import RankAllocator

            self._allocator = RankAllocator(self.layers, AdaLoraConfig(total_step=total, **self.options), NAME)
        self._allocator.set_total_step(total)
        return self._allocator


def _roles(spec: BackboneSpec, wanted: Sequence[str]) -> tuple[str, ...]:
    """The roles that a backbone has: q, k and v where they are layers of their own, without what it lacks."""
    apart = "qkv" not in spec.linears
    found = [part for role in wanted for part in (("q", "k", "v") if role == "qkv" and apart else (role,))]
    return tuple(role for role in found if role in spec.linears or role.startswith("norm"))
