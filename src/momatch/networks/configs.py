"""Shapes of the built-in networks: plain data, no torch, so that recipes and the command line load fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a `UNet`.

    Attributes:
        image_channels: channels of the image, 1 for grey.
        channels: width of each resolution level; every level after the first halves the resolution.
        blocks_per_level: residual blocks on the way down, and again on the way up, at each level.
        attention_levels: indices into `channels` of the levels that carry self-attention.
        num_classes: labels 0 … num_classes − 1, with num_classes itself as the null label; 0 for an
            unconditional network.
        embedding_dim: width of the embedding of (logSNR, label).
        dropout: dropout rate inside the residual blocks.
        step_counts: of an elastic student: the numbers of steps k that it is told apart by; () for a network
            that is told none.
    """

    image_channels: int = 1
    channels: tuple[int, ...] = (32, 64)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = ()
    num_classes: int = 0
    embedding_dim: int = 64
    dropout: float = 0.0
    step_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class UViTConfig:
    """Shape of a `UViT`.

    Attributes:
        image_channels: channels of the image, 1 for grey.
        channels: width of each convolutional level, each at half the resolution of the one before; none gives
            a plain DiT.
        blocks_per_level: residual blocks on the way down, and again on the way up, at each level.
        width: of the transformer, a multiple of 4, of 64 if above 64.
        depth: transformer blocks.
        patch_size: pixels of the bottom's feature map to a token, along each side.
        num_classes: labels 0 … num_classes − 1, with num_classes itself as the null label; 0 for an
            unconditional network.
        embedding_dim: width of the embedding of (logSNR, label).
        dropout: dropout rate inside the residual blocks and the transformer's MLPs.
        text_dim: width of the tokens of encoded text; 0 for a network that takes none.
        step_counts: of an elastic student: the numbers of steps k that it is told apart by; () for a network
            that is told none.
    """

    image_channels: int = 1
    channels: tuple[int, ...] = (32,)
    blocks_per_level: int = 1
    width: int = 64
    depth: int = 2
    patch_size: int = 1
    num_classes: int = 0
    embedding_dim: int = 64
    dropout: float = 0.0
    text_dim: int = 0
    step_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class MLPConfig:
    """Shape of an `MLP`.

    Attributes:
        dim: length of the vectors; of trajectories and the like, how many numbers a sample has.
        width: width of the residual stream.
        depth: residual blocks.
        num_classes: labels 0 … num_classes − 1, with num_classes itself as the null label; 0 for an
            unconditional network.
        embedding_dim: width of the embedding of (logSNR, label).
        step_counts: of an elastic student: the numbers of steps k that it is told apart by; () for a network
            that is told none.
        conditions: names of what it is asked with beside a label, in the order in which it takes them.
        cond_dim: how many numbers these are together.
    """

    dim: int = 2
    width: int = 128
    depth: int = 3
    num_classes: int = 0
    embedding_dim: int = 64
    step_counts: tuple[int, ...] = ()
    conditions: tuple[str, ...] = ()
    cond_dim: int = 0


@dataclass(frozen=True)
class TokenTransformerConfig:
    """Shape of a `TokenTransformer`.

    Attributes:
        num_tokens: C, the mask token included.
        length: positions.
        width: of the transformer, a multiple of 4, of 64 if above 64.
        depth: transformer blocks.
        num_classes: labels 0 … num_classes − 1, with num_classes itself as the null label; 0 for an
            unconditional network.
        embedding_dim: width of the embedding of (logSNR, label).
        dropout: dropout rate inside the MLPs.
        noise_dim: numbers of noise at each position, for students of masked diffusion; 0 for none.
        step_counts: of an elastic student: the numbers of steps k that it is told apart by; () for a network
            that is told none.
    """

    num_tokens: int = 2
    length: int = 64
    width: int = 64
    depth: int = 2
    num_classes: int = 0
    embedding_dim: int = 64
    dropout: float = 0.0
    noise_dim: int = 0
    step_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of the diffusers library.

    Attributes:
        class_name: of the model, e.g. "UNet2DModel".
        config: what that class's `from_config` takes; JSON types only.
        negated: its output is to be read with the other sign.
        score: its output is the score of x + σ ε, and it is told σ.
        record: where the record of its class is, "package.module:NAME", if momatch has none.
    """

    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    negated: bool = False
    score: bool = False
    record: str = ""


@dataclass(frozen=True)
class CustomConfig:
    """A network that somebody else's code makes.

    Attributes:
        builder: "package.module:function"; called without arguments it gives a `momatch.Model`, whose
            network is meant.
    """

    builder: str
