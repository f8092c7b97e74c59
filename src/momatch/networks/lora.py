"""A frozen network with a LoRA adapter of its own, by the peft library; the network's weights are shared.

Teacher, student and auxiliary are then three trees of modules over one set of weights, and student and
auxiliary add a few of their own to it. Nothing is ever switched on or off: the teacher's tree has no adapter
in it, so its names, its forward pass and its derivatives are what they were.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from momatch.diffusion.interface import Cond
from momatch.networks.diffusers import DiffusersNetwork
from momatch.utils.errors import UsageError

NAME = "default"  # what peft calls an adapter unless told otherwise
NAMED_IN_ERRORS = 4


class AdaptedNetwork(nn.Module):
    """`network` plus a trainable LoRA adapter. As a module it has the adapter's parameters and no others.

    So an optimizer, a checkpoint or a plan sees the adapter alone. Dropout is switched on and off by `train`
    and `eval` as usual; everything else in the network stays in evaluation mode. At first the adapter changes
    nothing: its second factor B is zero, its first is drawn from torch's global generator.

    Args:
        network: (z, time, cond) → tensor. Its weights are shared, and frozen; it is left as it is otherwise.
        rank: of the adapter's matrices.
        alpha: the adapter's output is multiplied by alpha / rank; 0 means rank.
        dropout: of the adapter's input.
        targets: the layers to adapt; see `target_layers`.

    Raises:
        UsageError: if peft is not installed, or there is no such layer.
    """

    whole: nn.Module
    adapter: nn.Module

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float = 0.0,
        dropout: float = 0.0,
        targets: Sequence[str] = (),
    ):
        super().__init__()
        lora_config, inject = _peft()
        whole = share(network).eval()
        names = target_layers(_inner(whole), targets)
        exactly = "|".join(re.escape(name) for name in names)
        settings = lora_config(
            r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=f"(?:{exactly})"
        )
        inject(settings, _inner(whole), NAME)
        # Past nn.Module, which would take the frozen weights for this module's own.
        self.__dict__["whole"] = whole
        self.adapter = nn.Module()
        for name, module in _inner(whole).named_modules():
            factor = ".lora_A." in name or ".lora_B." in name
            if isinstance(module, nn.Dropout) or (factor and not list(module.children())):
                _graft(self.adapter, name, module)
        self.train(network.training)

    def forward(self, z: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        """As the network, with the adapter."""
        return self.whole(z, time, cond)

    @property
    def layers(self) -> dict[str, Any]:
        """The layers that peft made, by the name of the one that each adapts."""
        from peft.tuners.lora import LoraLayer

        return {k: m for k, m in _inner(self.whole).named_modules() if isinstance(m, LoraLayer)}

    def merged(self) -> nn.Module:
        """A plain network with weights of its own, W + (alpha / rank) B A: the same function as this one."""
        whole = copy.deepcopy(self.whole)
        inner = _inner(whole)
        for name in self.layers:
            layer: Any = inner.get_submodule(name)
            layer.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(inner.get_submodule(parent), last, layer.get_base_layer())
        del inner.peft_config
        return whole

    def factors(self) -> dict[str, Tensor]:
        """LAYER.lora_A.weight and LAYER.lora_B.weight of every layer, to be used with a factor of 1.

        alpha / rank is multiplied into B, since not every reader of such files knows of alpha.
        """
        found = {}
        for name, layer in self.layers.items():
            found[f"{name}.lora_A.weight"] = layer.lora_A[NAME].weight.detach().clone()
            found[f"{name}.lora_B.weight"] = layer.lora_B[NAME].weight.detach() * layer.scaling[NAME]
        return found

    def settings(self) -> Any:
        """The LoraConfig of peft that belongs to `factors`."""
        settings = copy.deepcopy(_inner(self.whole).peft_config[NAME])
        settings.lora_alpha, settings.inference_mode = settings.r, True
        return settings

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedNetwork:
        self.whole._apply(fn, recurse)  # the adapter's own modules are part of it
        return self


def share(network: nn.Module) -> nn.Module:
    """Another tree of modules over the same parameters and buffers."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def target_layers(network: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Names of the layers that an adapter goes to.

    Args:
        network: it has to have them.
        targets: each the end of a name ("to_q", "ff.net.2"), or a regular expression for a whole name. None
            given means every linear layer and every convolution: few steps ask for large changes.

    Raises:
        UsageError: if a target fits no linear layer or convolution, or there is none.
    """
    layers = [name for name, module in network.named_modules() if name and _can_adapt(module)]
    if not layers:
        raise UsageError(
            "adapter.rank is above 0, but this network has no linear layer or convolution to adapt"
        )
    if not targets:
        return layers
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in layers if _fits(name, target)]
        if not found:
            some = ", ".join(layers[:: max(1, len(layers) // NAMED_IN_ERRORS)][:NAMED_IN_ERRORS])
            raise UsageError(
                f"adapter.targets has {target!r}, which fits no linear layer or convolution of this network; "
                f"its layers have names such as {some}"
            )
        chosen |= set(found)
    return [name for name in layers if name in chosen]


def _can_adapt(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1  # peft cannot merge others
    return isinstance(module, nn.Linear)


def _fits(name: str, target: str) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UsageError(f"adapter.targets has {target!r}, no regular expression ({error})") from None


def _inner(network: nn.Module) -> Any:
    """The module whose names count: diffusers' own network, where there is one."""
    return network.model if isinstance(network, DiffusersNetwork) else network


def _graft(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` part of `tree` under its path; the modules on the way there are empty ones."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in tree._modules:
            tree.add_module(name, nn.Module())
        tree = tree.get_submodule(name)
    tree.add_module(last, module)


def _peft() -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:  # peft itself, or what its version needs of transformers
        raise UsageError(
            f"adapter.rank is above 0, but peft cannot be imported ({error}); pip install -U "
            "'momatch[lora]', or use adapter.rank 0"
        ) from None
    return LoraConfig, inject_adapter_in_model
