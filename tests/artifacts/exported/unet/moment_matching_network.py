"""The networks of momatch's students, called as diffusers calls its own.

Put together by momatch 0.1.0 from its own source files; it needs torch and diffusers alone.
"""

from __future__ import annotations

import math
import torch
import torch.nn.functional as F
from dataclasses import dataclass, field
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from torch import Tensor, nn
from typing import Any
from typing import TypeVar
from typing import cast

# configs.py: Shapes of the built-in networks: plain data, no torch, so that recipes and the command line load fast.

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
    """

    image_channels: int = 1
    channels: tuple[int, ...] = (32, 64)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = ()
    num_classes: int = 0
    embedding_dim: int = 64
    dropout: float = 0.0


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


@dataclass(frozen=True)
class MLPConfig:
    """Shape of an `MLP`.

    Attributes:
        dim: length of the vectors.
        width: width of the residual stream.
        depth: residual blocks.
        num_classes: labels 0 … num_classes − 1, with num_classes itself as the null label; 0 for an
            unconditional network.
        embedding_dim: width of the embedding of (logSNR, label).
    """

    dim: int = 2
    width: int = 128
    depth: int = 3
    num_classes: int = 0
    embedding_dim: int = 64


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of the diffusers library.

    Attributes:
        class_name: of the model, e.g. "UNet2DModel".
        config: what that class's `from_config` takes; JSON types only.
        negated: its output is to be read with the other sign.
    """

    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    negated: bool = False


@dataclass(frozen=True)
class CustomConfig:
    """A network that somebody else's code makes.

    Attributes:
        builder: "package.module:function"; called without arguments it gives a `momatch.Model`, whose
            network is meant.
    """

    builder: str


# embedding.py: What every network here shares: the embedding of (logSNR, label), and layers that start at zero.

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Conditioning(nn.Module):
    """Embeds (logSNR, label) into one activated vector of width `dim` per sample.

    Label `num_classes` is the null label; a call without `cond` means the null label for the whole batch.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        # Half-periods from about 60 (wider than any range of logSNR in use) down to about 0.5.
        self.register_buffer(
            "frequencies", torch.logspace(math.log10(0.05), math.log10(6.0), dim // 2), persistent=False
        )
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, logsnr: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """(logsnr (B,), cond {"label": (B,)} or None) → (B, dim)."""
        angles = logsnr[:, None] * self.frequencies
        h = self.linear2(F.silu(self.linear1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        if self.label is not None:
            label = (
                cond["label"] if cond else torch.full(logsnr.shape, self.num_classes, device=logsnr.device)
            )
            h = h + self.label(label)
        return F.silu(h)


def zero_init(layer: Layer) -> Layer:
    """Zero a layer's weights and bias, so that its branch starts as a no-op."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


# unet.py: A small convolutional U-Net for images, conditioned on logSNR and on a class label.

class UNet(nn.Module):
    """(z, logsnr, cond) → tensor of z's shape. The output convolution starts at zero."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, n = config.channels, config.blocks_per_level
        self.conditioning = Conditioning(config.embedding_dim, config.num_classes)
        self.stem = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)

        def level(index: int, width_in: int) -> nn.ModuleList:
            width = widths[index]
            blocks: list[nn.Module] = []
            for i in range(n):
                blocks.append(
                    ResidualBlock(width_in if i == 0 else width, width, config.embedding_dim, config.dropout)
                )
            if index in config.attention_levels:
                blocks.append(SelfAttention(width))
            return nn.ModuleList(blocks)

        last = len(widths) - 1
        self.down_levels = nn.ModuleList(level(i, widths[max(i - 1, 0)]) for i in range(last + 1))
        # Going up, each level sees its own skip beside what comes from below (the lowest: its skip alone).
        self.up_levels = nn.ModuleList(level(i, widths[i] + widths[i + 1]) for i in range(last))
        self.norm_out = nn.GroupNorm(8, widths[0])
        self.conv_out = zero_init(nn.Conv2d(widths[0], config.image_channels, 3, padding=1))
        for parameter in self.parameters():  # a tenth faster on a CPU, more on a GPU
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, H, W), H and W divisible by 2 ** (levels − 1).
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network; None means the null label.
        """
        embedding = self.conditioning(logsnr, cond)
        h = self.stem(z)
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down_levels):
            h = F.avg_pool2d(h, 2) if i > 0 else h
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
            skips.append(h)
        skips.pop()
        for blocks in reversed(self.up_levels):
            h = torch.cat([skips.pop(), F.interpolate(h, scale_factor=2.0, mode="nearest")], dim=1)
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


class ResidualBlock(nn.Module):
    """GroupNorm–SiLU–convolution twice, the second norm scaled and shifted by the embedding."""

    def __init__(self, width_in: int, width: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * width)
        self.norm2 = nn.GroupNorm(8, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(x (B, width_in, H, W), embedding (B, embedding_dim)) → (B, width, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over pixels, heads of 32 channels."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = max(width // 32, 1)
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.project = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(x (B, width, H, W), embedding) → x's shape. The embedding is not used."""
        batch, width, height, breadth = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.num_heads, -1, height * breadth).transpose(-1, -2)
        h = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x + self.project(h.transpose(-1, -2).reshape(batch, width, height, breadth))


# uvit.py: U-ViT: convolutions where the picture is large, a transformer at the bottom; without the former, a DiT.

HEAD_DIM = 64


class UViT(nn.Module):
    """(z, logsnr, cond) → tensor of z's shape. The output convolution starts at zero."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        widths, n, dim = config.channels, config.blocks_per_level, config.embedding_dim
        self.conditioning = Conditioning(dim, config.num_classes)
        self.text = TextInput(config.text_dim, config.width, dim) if config.text_dim else None
        top = widths[0] if widths else config.width

        def level(width_in: int, width: int) -> nn.ModuleList:
            inputs = [width_in] + [width] * (n - 1)
            return nn.ModuleList(ResidualBlock(w, width, dim, config.dropout) for w in inputs)

        self.stem = nn.Conv2d(config.image_channels, top, 3, padding=1)
        self.down_levels = nn.ModuleList(
            level(widths[max(i - 1, 0)], width) for i, width in enumerate(widths)
        )
        bottom_in = widths[-1] if widths else top
        self.to_tokens = nn.Conv2d(bottom_in, config.width, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, dim, config.dropout) for _ in range(config.depth)
        )
        self.norm_tokens = nn.LayerNorm(config.width)
        self.from_tokens = nn.ConvTranspose2d(
            config.width, bottom_in, config.patch_size, stride=config.patch_size
        )
        below = (*widths[1:], bottom_in)
        self.up_levels = nn.ModuleList(
            level(width + width_below, width) for width, width_below in zip(widths, below, strict=False)
        )
        self.norm_out = nn.GroupNorm(8, top)
        self.conv_out = zero_init(nn.Conv2d(top, config.image_channels, 3, padding=1))
        for parameter in self.parameters():  # faster convolutions, as in UNet
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Run the network.

        Args:
            z: (B, C, H, W), H and W divisible by patch_size · 2 ** len(channels).
            logsnr: (B,).
            cond: {"label": (B,) int64} for a class-conditional network, {"encoder_hidden_states":
                (B, L, text_dim), "encoder_attention_mask": (B, L), 1 for a token and 0 for padding, or no
                mask} for one that takes text, all of them for both; None means the null label, and no text.
        """
        embedding = self.conditioning(logsnr, cond)
        text = seen = None
        if self.text is not None and cond is not None:
            encoded = cond["encoder_hidden_states"]
            seen = cond.get("encoder_attention_mask", encoded.new_ones(encoded.shape[:2])).bool()
            text, summary = self.text(encoded, seen)
            embedding = embedding + summary
        h = self.stem(z)
        skips: list[Tensor] = []
        for blocks in self.down_levels:
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
            skips.append(h)
            h = F.avg_pool2d(h, 2)

        tokens = self.to_tokens(h)
        batch, width, height, breadth = tokens.shape
        x = tokens.flatten(2).transpose(1, 2) + positions(height, breadth, width, tokens)
        if text is not None and seen is not None:
            x = torch.cat([x, text], dim=1)
            seen = F.pad(seen, (height * breadth, 0), value=True)
        for block in self.blocks:
            x = block(x, embedding, seen)
        x = self.norm_tokens(x[:, : height * breadth]).transpose(1, 2).reshape(batch, width, height, breadth)
        h = h + self.from_tokens(x)

        for blocks in reversed(self.up_levels):
            h = torch.cat([skips.pop(), F.interpolate(h, scale_factor=2.0, mode="nearest")], dim=1)
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


class TextInput(nn.Module):
    """Brings tokens of text to the transformer's width, and their mean to the embedding's."""

    def __init__(self, text_dim: int, width: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.to_tokens = nn.Linear(text_dim, width)
        self.to_summary = nn.Linear(text_dim, embedding_dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, text_dim), (B, L) → (B, L, width), (B, embedding_dim); no token at all gives a zero mean."""
        tokens = self.norm(tokens)
        present = mask.to(tokens.dtype)[:, :, None]
        mean = (tokens * present).sum(1) / present.sum(1).clamp(min=1)
        return self.to_tokens(tokens), self.to_summary(mean)


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each scaled, shifted and gated by the embedding; starts as the identity."""

    def __init__(self, width: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.num_heads = max(width // HEAD_DIM, 1)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_q = nn.LayerNorm(width // self.num_heads)  # normed queries and keys keep attention stable
        self.norm_k = nn.LayerNorm(width // self.num_heads)
        self.modulation = zero_init(nn.Linear(embedding_dim, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor, seen: Tensor | None = None) -> Tensor:
        """(x (B, N, width), embedding (B, embedding_dim), tokens to attend to (B, N) bool) → x's shape."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), seen)
        h = F.gelu(self.mlp_in(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))
        return x + gate2 * self.mlp_out(self.dropout(h))

    def attention(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Multi-head self-attention over tokens (B, N, width); `seen` (B, N) says to which, all if None."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mask = None if seen is None else seen[:, None, None]
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, mask)
        return self.project(h.transpose(1, 2).reshape(batch, count, width))


def positions(height: int, breadth: int, width: int, like: Tensor) -> Tensor:
    """(height·breadth, width) sines and cosines of row and column, in `like`'s dtype and device."""
    quarter = width // 4
    frequencies = 10_000 ** (-torch.arange(quarter, device=like.device, dtype=like.dtype) / quarter)
    rows, columns = (
        torch.arange(n, device=like.device, dtype=like.dtype)[:, None] * frequencies
        for n in (height, breadth)
    )
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in (rows, columns))
    shape = (height, breadth, 2 * quarter)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=2).flatten(0, 1)


# moment_matching_network.py: A network of momatch's own, called as diffusers calls its own.

FAMILIES: dict[str, tuple[Any, Any]] = {"unet": (UNetConfig, UNet), "uvit": (UViTConfig, UViT)}
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"


class MomentMatchingNetwork(ModelMixin, ConfigMixin):
    """A U-Net or U-ViT, told the noise level as logSNR.

    Args:
        family: "unet" or "uvit".
        shape: the fields of its `UNetConfig` or `UViTConfig`.
        in_channels: of one sample.
        sample_size: its side in pixels, or height and width.
        null_shapes: of one sample's part of the text conditions that ask for nothing, which are saved beside
            the weights: {"encoder_hidden_states": [L, D], "encoder_attention_mask": [L]}; none if unknown.
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        shape: dict[str, Any],
        in_channels: int,
        sample_size: int | list[int],
        null_shapes: dict[str, list[int]] | None = None,
    ):
        super().__init__()
        shape_type, network_type = FAMILIES[family]
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}
        self.network = network_type(shape_type(**fields))
        for name, size in (null_shapes or {}).items():
            self.register_buffer(f"null_{name}", torch.zeros(size))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved one; see `ModelMixin.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.to(memory_format=torch.channels_last)  # as the networks are made; files know no such thing
        return loaded

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Run the network.

        Args:
            sample: (B, C, H, W).
            timestep: logSNR, one number or (B,).
            class_labels: (B,) int64, for a network with classes.
            encoder_hidden_states: (B, L, D) tokens of encoded text, for a network that takes any; None means
                the saved ones that ask for nothing.
            encoder_attention_mask: (B, L), 1 for a token and 0 for padding; None means no padding.
            return_dict: an object with `sample`, or else a tuple of it.

        Raises:
            ValueError: if it is given a condition that it does not take, or lacks one.
        """
        logsnr = torch.as_tensor(timestep, device=sample.device).to(sample.dtype).expand(len(sample))
        label = self._label(class_labels)
        text = self._text(sample, encoder_hidden_states, encoder_attention_mask)
        output = self.network(sample, logsnr, {**label, **text} or None)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _label(self, labels: Tensor | None) -> dict[str, Tensor]:
        classes = self.network.config.num_classes
        if labels is None and classes:
            raise ValueError(f"this network must be given class_labels, of 0 to {classes}")
        if labels is not None and not classes:
            raise ValueError("this network knows no classes; leave class_labels out")
        return {} if labels is None else {"label": labels}

    def _text(self, sample: Tensor, text: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        width = getattr(self.network.config, "text_dim", 0)
        if not width:
            if text is not None or mask is not None:
                raise ValueError(f"this network takes no text; leave {TEXT} and {MASK} out")
            return {}
        if text is None:
            if mask is not None:
                raise ValueError(f"{MASK} is of no use without {TEXT}; give both")
            nulls: dict[str, Any] = {name: getattr(self, f"null_{name}", None) for name in (TEXT, MASK)}
            if nulls[TEXT] is None:
                raise ValueError(f"this network must be given {TEXT}, (B, L, {width})")
            text, mask = (
                null if null is None else null.expand(len(sample), *null.shape) for null in nulls.values()
            )
        assert text is not None
        given = {TEXT: text.to(sample.dtype)}
        return given if mask is None else {**given, MASK: mask}
