"""What a model may be asked for: how many samples, in how many steps, on what condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from momatch.data.rows import Rows
from momatch.diffusion.interface import Cond
from momatch.utils.errors import UsageError
from momatch.utils.settings import shown
from momatch.utils.text import counts_of

if TYPE_CHECKING:
    from momatch.models.model import Model

MAX_STUDENT_STEPS = 16
MAX_TOKEN_STEPS = 64  # of a student that makes tokens
MAX_SEED = 2**32  # torch's generator on the CPU looks at no more bits
CHUNK = 256  # samples made at a time; part of what a seed means, since noise is drawn chunk by chunk
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_request(
    model: Model,
    n: object,
    steps: object,
    cond: Cond | None,
    seed: object = 0,
    batch_size: object = None,
    eta: object = None,
) -> None:
    """Refuse what a model cannot sample; for the arguments see `Model.sample`.

    Raises:
        UsageError: naming the value and what is allowed.
    """
    n, steps, seed = _whole(n, "n"), _whole(steps, "steps"), _whole(seed, "seed")
    if n < 1:
        raise UsageError(f"the number of samples must be at least 1, got {n}")
    if not 0 <= seed < MAX_SEED:
        raise UsageError(f"the seed must lie in 0 … {MAX_SEED - 1}, got {seed}")
    if batch_size is not None and not 1 <= _whole(batch_size, "batch_size") <= CHUNK:
        raise UsageError(f"the batch size of sampling must lie in 1 … {CHUNK}, got {batch_size}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    most = MAX_TOKEN_STEPS if model.of_tokens else MAX_STUDENT_STEPS
    if model.is_student and steps > most:
        raise UsageError(
            f"steps must be 1 to {most} for a student, got {steps}; "
            f"this one was trained for {counts_of(model.step_counts, 'step')}"
        )
    if eta is not None and not (isinstance(eta, Real) and (0 <= float(eta) <= 1 or eta == math.inf)):
        raise UsageError(
            f"eta is {shown(eta)}; give a number from 0 (DDIM) to 1 (ancestral), or infinity (all noise anew)"
        )
    if eta is not None and eta != 1 and model.of_tokens:
        raise UsageError(f"eta is {shown(eta)}, but tokens are sampled in one way alone; leave it out")
    _check_cond(model, n, cond)


def _whole(value: object, name: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}; give a whole number")
    return int(value)


def _check_cond(model: Model, n: int, cond: Cond | None) -> None:
    known = {**({"label": ()} if model.num_classes else {}), **model.cond_shapes}
    if cond is None:
        missing = sorted(set(known) - set(model.denoiser.null_values))
        if missing:
            raise UsageError(f"this model must be asked for something: give {', '.join(missing)}")
        return
    if not isinstance(cond, Mapping):
        raise UsageError(
            f"cond is a {type(cond).__name__}; give a dictionary, of prompts "
            "momatch.text_encoder_of(model).encode([…])"
        )
    if not known:
        raise UsageError("this model is unconditional; leave labels out")
    optional = {key for key, null in model.denoiser.null_values.items() if isinstance(null, float)}
    if not set(known) - optional <= set(cond) <= set(known):
        raise UsageError(
            f"this model takes {', '.join(known)} as condition, not {', '.join(map(str, cond)) or 'nothing'}"
        )
    for key, value in cond.items():
        _check_rows(key, value, n, known[key])
    if "label" in cond:
        _check_labels(model, cond["label"])


def _check_rows(key: str, value: Any, n: int, shape: tuple[int, ...]) -> None:
    size = tuple(getattr(value, "shape", ()))
    if not isinstance(value, Tensor | Rows) or not size:
        of = "whole numbers" if key == "label" else "numbers"
        raise UsageError(f"{key} is {shown(value)}; give a tensor of {of}, a row for each sample")
    if len(value) != n:
        what = "labels" if key == "label" else f"rows of {key}"
        raise UsageError(f"got {len(value)} {what} for {n} samples; give one for each")
    fits = len(size) == 1 + len(shape) and all(
        want in (-1, found) for want, found in zip(shape, size[1:], strict=True)
    )
    if not fits:
        raise UsageError(f"{key} has shape {size}; this model takes (n, *{shape})")


def _check_labels(model: Model, labels: Tensor) -> None:
    if labels.dtype not in WHOLE:
        raise UsageError(f"label holds {labels.dtype}; give whole numbers, such as labels.long()")
    # The null label may lie just behind the others.
    allowed = (labels >= 0) & (labels < model.num_classes)
    wrong = labels[~(allowed | (labels == model.denoiser.null_values.get("label", -1)))]
    if len(wrong):
        raise UsageError(
            f"label {int(wrong[0])} is out of range; this model knows 0 to {model.num_classes - 1}"
        )
