"""What tells one of diffusers' network classes from another, as one record; and what records are made of.

A new class is one file beside this one that defines FAMILY; see `template`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from momatch.diffusion.interface import Cond

Config = dict[str, Any]  # a network's config.json
Sides = Sequence[int]
Prompted = dict[str, Tensor]  # (B, …) for each condition, on the CPU
Encode = Callable[[Any, list[str], bool, int], Prompted]  # (pipeline, prompts, nothing asked?, pixels)
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
UNIT = 1000.0  # timesteps to the clock that counts from 0 to 1


@dataclass(frozen=True)
class Asked:
    """What a network is asked with.

    Attributes:
        shapes: of one sample's part of each entry of cond but the label; −1 where any length will do.
        nulls: of the entries that a network knows: what stands for "nothing asked for", or a default.
        num_classes: labels that it knows; 0 if it takes none.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nulls: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 0


def _in_and_out(config: Config) -> tuple[int, int]:
    return config["in_channels"], config.get("out_channels") or config["in_channels"]


def _sample_size(config: Config) -> Sides | None:
    size = config.get("sample_size")
    return size if size is None or not isinstance(size, int) else (size, size)


def _square_patches(config: Config) -> Sides:
    return (config.get("patch_size") or 1,) * 2


@dataclass(frozen=True)
class Family:
    """One of diffusers' network classes, called our way.

    Attributes:
        class_name: in diffusers.
        call: (network, z (B, C, …), time (B,), cond) → (B, C, …); a learned variance may follow.
        asked: its config → its conditions. A `null_label` that was given stands in the config by that name.
        prompts: how each pipeline of diffusers, by the name of its class, encodes prompts.
        arguments: what the pipeline's call names each condition.
        sides: its config → sides of a sample unless told otherwise, (H, W), (T, H, W) or (T,); None: it
            does not say.
        dims: how many sides there are.
        channels: its config → channels that it takes and gives, as its config counts them.
        packed: so many of these are one channel of z: 4 where tokens are patches of 2×2 made outside.
        patch: its config → sides of a patch, where a shift of the noise depends on the number of tokens.
        tokens: instead: (config, shape of a sample) → what the pipeline takes for that number.
        mu: instead of the scheduler's line through base_shift and max_shift: (tokens, steps) → μ.
        time_unit: timesteps to one unit of the network's clock: 1, or 1000 where pipelines divide by it.
        negated: it gives x − ε where the scheduler wants ε − x.
        sized: pipelines make samples of the size that its config says.
        null_label: whether a label that means nothing has to be told.
    """

    class_name: str
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    asked: Callable[[Config], Asked]
    prompts: Mapping[str, Encode] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=lambda: {TEXT: "prompt_embeds"})
    sides: Callable[[Config], Sides | None] = _sample_size
    dims: int = 2
    channels: Callable[[Config], tuple[int, int]] = _in_and_out
    packed: int = 1
    patch: Callable[[Config], Sides] = _square_patches
    tokens: Callable[[Config, Sides], int] | None = None
    mu: Callable[[int, int], float] | None = None
    time_unit: float = 1.0
    negated: bool = False
    sized: bool = False
    null_label: bool = False

    def count_tokens(self, config: Config, shape: Sides) -> int:
        """Of a sample of that shape (C, …), as its pipeline counts them."""
        if self.tokens is not None:
            return self.tokens(config, shape)
        return math.prod(side // size for side, size in zip(shape[1:], self.patch(config), strict=True))


class Missing(Exception):
    """An entry of cond that the network cannot do without."""


def needed(cond: Cond, *names: str) -> list[Tensor]:
    """These entries of cond.

    Raises:
        Missing: naming those that are not there.
    """
    missing = [name for name in names if name not in cond]
    if missing:
        raise Missing(" and ".join(missing))
    return [cond[name] for name in names]


def text_of_width(name: str, length: int = -1) -> Callable[[Config], Asked]:
    """Text alone, as wide as that entry of the config says, of any number of tokens or of so many."""
    return lambda config: Asked({TEXT: (length, config[name])})


def masked_text(name: str) -> Callable[[Config], Asked]:
    """Text as wide as that entry of the config says, and which of its tokens count."""
    return lambda config: Asked({TEXT: (-1, config[name]), MASK: (-1,)})


def device(pipeline: Any) -> torch.device:
    """Where a pipeline's text encoder is."""
    encoder: nn.Module = pipeline.text_encoder or pipeline.text_encoder_2
    return next(encoder.parameters()).device


def default(pipeline: Any, name: str) -> Any:
    """What a pipeline's call takes for an argument that it is not given."""
    import inspect

    return inspect.signature(type(pipeline).__call__).parameters[name].default


def padded(rows: Sequence[Tensor], length: int) -> Prompted:
    """Texts (L_i, D) of several lengths as (B, length, D) and the mask (B, length) of their tokens."""
    text = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.int64, device=text.device)
    for i, row in enumerate(rows):
        count = min(length, len(row))
        text[i, :count], mask[i, :count] = row[:count], 1
    return {TEXT: text.cpu(), MASK: mask.cpu()}


def pack(z: Tensor) -> Tensor:
    """(B, C, 2h, 2w) → (B, h·w, 4C): tokens that are patches of 2×2, as Flux, Qwen-Image and Chroma take."""
    return nn.functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h·w, 4C) → (B, C, 2h, 2w), the inverse of `pack`."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def image_ids(z: Tensor, height: int, width: int) -> Tensor:
    """(h·w, 3): 0, row and column of each token of Flux."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=z.device), torch.arange(width, device=z.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(z)
