"""Muon for weights of linear and convolution layers, AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
STEPS = 5  # of Newton and Schulz
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal: True` step by Muon instead.

    The momentum of a weight (O, I, ...), as a matrix (O, I x ...), is replaced by the nearest matrix whose singular
    values are alike, times 0.2 sqrt(max(rows, columns)), so that learning rate and weight decay mean what they mean to
    AdamW. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the factor: Liu et al. 2025,
    https://arxiv.org/abs/2502.16982, eq. 4. The iteration is timm's, in 32 bits: torch.optim.Muon and timm.optim.Muon
    iterate in bfloat16, which takes CPUs without such arithmetic many times as long, and torch's takes no convolutions.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change all parameters that have a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group.get("orthogonal"):
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group.get("orthogonal")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        from timm.optim.muon import zeropower_via_newtonschulz

        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            ahead = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
            alike[ahead.shape].append((weight, ahead))
        for shape, pairs in alike.items():  # one batch per shape: heads have dozens of small ones
            stacked = torch.stack([ahead.float() for _, ahead in pairs])
            updates = zeropower_via_newtonschulz(stacked, STEPS, COEFFICIENTS, dtype=torch.float32)
            size = 0.2 * max(shape) ** 0.5
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.reshape(weight.shape).to(weight.dtype), alpha=-group["lr"] * size)


def layer_weights(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The weights that Muon is for: of linear and convolution layers that map several channels to several.

    So neither depthwise ones nor those to or from a single number, and no tokens, embeddings, norms and biases.
    """
    layers = (cast(nn.Linear, module) for module in modules if isinstance(module, _LAYERS))
    return {x.weight for x in layers if isinstance(x.weight, nn.Parameter) and min(x.weight.shape[:2]) > 1}
