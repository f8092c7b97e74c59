"""Networks of the diffusers library, called our way: (z, time, cond) → tensor.

Which class takes what is said by its record in `families`. Entries of cond carry the names of diffusers' own
arguments, but for `label`, which is its `class_labels`, and for masks, which are those of the text alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from momatch.diffusion.interface import Cond
from momatch.diffusion.process import per_sample
from momatch.networks import custom
from momatch.networks.configs import DiffusersConfig
from momatch.networks.families import FAMILIES
from momatch.networks.families.family import Family, Missing
from momatch.utils.errors import UsageError


def library() -> Any:
    """The diffusers package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise UsageError(
            "this needs the diffusers package, which is not installed; pip install 'momatch[diffusers]'"
        ) from None
    return diffusers


def family_of(class_name: str, record: str = "") -> Family:
    """The record of a class.

    Args:
        class_name: one of diffusers'.
        record: where it is, "package.module:NAME", if it is not one of momatch's own.

    Raises:
        UsageError: if there is none; it shows the record to fill in.
    """
    if record:
        found = custom.named(record)
        if not isinstance(found, Family) or found.class_name != class_name:
            what = found.class_name if isinstance(found, Family) else type(found).__name__
            raise UsageError(f"{record} is of a {what}; the family of a {class_name} is needed")
        return found
    if class_name not in FAMILIES:
        raise UsageError(
            f"momatch knows no {class_name}, only {', '.join(FAMILIES)}; fill in its record below, and name "
            "it: --teacher-family my_family:FAMILY, or load_teacher(…, family=…) (docs/teachers.md)\n\n"
            + blank_record(class_name)
        )
    return FAMILIES[class_name]


def blank_record(class_name: str) -> str:
    """A file of Python with a record for that class, to be filled in: its arguments are there already."""
    kind = getattr(library(), class_name, None)
    forward = getattr(kind, "forward", None)
    known = ("self", "return_dict", "hidden_states", "sample", "timestep")
    names = [name for name in inspect.signature(forward).parameters if name not in known] if forward else []
    from momatch.networks.families import template

    return template.filled_in(class_name, names)


class DiffusersNetwork(nn.Module):
    """One of diffusers' networks, as `model`.

    Args:
        config: which, and of what shape.
        model: the network itself, if it is there already; freshly initialised if None.
    """

    def __init__(self, config: DiffusersConfig, model: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.family = family_of(config.class_name, config.record)
        if model is None:
            model = getattr(library(), config.class_name).from_config(config.config)
        assert isinstance(model, nn.Module)
        self.model = model
        for module in model.modules():
            # DiT's training mode replaces labels by the null label; here the training loop decides on that.
            if type(module).__name__ == "LabelEmbedding":
                module.__dict__["dropout_prob"] = 0.0

    def forward(self, z: Tensor, time: Tensor, cond: Cond | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, …), at the network's own scale.
            time: (B,), the network's own.
            cond: its conditions.

        Returns:
            (B, C, …); a learned variance beside the prediction is dropped, and of a score s made the noise
            that it means, −σ s.

        Raises:
            UsageError: if an entry of cond is missing.
        """
        try:
            output = self.family.call(self.model, z, time, cond or {})
        except Missing as missing:
            raise UsageError(f"this {self.config.class_name} must be given {missing} in cond") from None
        output = output[:, : z.shape[1]] if output.shape[1] == 2 * z.shape[1] else output
        if self.config.score:  # the clock of such networks is σ itself
            return -per_sample(time, output) * output
        return -output if self.config.negated else output
