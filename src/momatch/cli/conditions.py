"""From --labels, --prompt and --cond to what a model is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from momatch.cli.parsing import integers
from momatch.diffusion.interface import Cond
from momatch.interop.text_encoders import text_encoder_of
from momatch.models.model import Model
from momatch.utils.errors import Notice, UsageError
from momatch.utils.text import alternatives, counts_of, first_line

MOST_NAMES = 12  # that an error lists


def label_cond(labels: str | None, num: int, model: Model) -> Cond | None:
    """The condition for `num` samples: the given labels, numbers or names, in turn, or all in turn."""
    if labels is None:
        return {"label": torch.arange(num) % model.num_classes} if model.num_classes else None
    if not model.num_classes:
        what = "takes text; ask by --prompt" if model.cond_shapes else "is unconditional; leave labels out"
        raise UsageError(f"--labels {labels}: this model {what}")
    chosen = torch.tensor(_numbered(labels, model.provenance.class_names))
    wrong = chosen[(chosen < 0) | (chosen >= model.num_classes)]
    if len(wrong):
        raise UsageError(
            f"--labels {labels}: {int(wrong[0])} is out of range, "
            f"this model knows 0 to {model.num_classes - 1}"
        )
    return {"label": chosen[torch.arange(num) % len(chosen)]}


def _numbered(labels: str, names: Sequence[str]) -> tuple[int, ...]:
    """Labels as numbers; a name that is itself a number is one, since labels are shown as numbers, too."""
    if not names:
        return integers(labels, "--labels")
    words = [word.strip() for word in labels.split(",")]
    unknown = [word for word in words if word not in names and not word.lstrip("-").isdecimal()]
    if unknown:
        known = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
        raise UsageError(f"--labels {labels}: this model has no class {unknown[0]!r}; it has {known}")
    numbers = [word if word.lstrip("-").isdecimal() else str(names.index(word)) for word in words]
    return integers(",".join(numbers), "--labels")


def given_cond(given: Sequence[str], num: int, model: Model) -> Cond:
    """The condition for `num` samples from arrays: NAME=FILE.npy each, whose rows are taken in turn.

    Raises:
        UsageError: if a file cannot be read, or the model takes nothing of that name or shape.
    """
    found: Cond = {}
    for word in given:
        name, sign, path = word.partition("=")
        known = {**({"label": ()} if model.num_classes else {}), **model.cond_shapes}
        if not sign or name not in known:
            takes = f"takes {', '.join(known)}" if known else "is unconditional; leave --cond out"
            raise UsageError(f"--cond {word}: give NAME=FILE.npy; this model {takes}")
        try:
            rows = torch.from_numpy(np.atleast_1d(np.load(path, allow_pickle=False)))
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UsageError(f"--cond {word}: {path} cannot be read ({first_line(error)})") from None
        if rows.shape == known[name] or not len(rows):
            rows = rows[None]  # of one sample
        found[name] = (rows.long() if name == "label" else rows.float())[torch.arange(num) % len(rows)]
    return found


def prompt_cond(prompts: Sequence[str], labels: str | None, num: int, model: Model) -> Cond:
    """The condition for `num` samples: the given prompts in turn, encoded by the model's own encoder.

    Raises:
        UsageError: if the model takes no text, its encoder is not to be had, or labels are given too.
    """
    encoder = text_encoder_of(model)
    if encoder is None:
        other = "ask it by --labels" if model.num_classes else "leave prompts out"
        raise UsageError(f"--prompt {prompts[0]!r}: this model takes no text; {other}")
    if labels is not None:
        raise UsageError(f"--labels {labels} beside --prompt {prompts[0]!r}: ask by one of them")
    turn = torch.arange(num) % len(prompts)
    return {name: rows[turn] for name, rows in encoder.encode(prompts).items()}


def notice_other_steps(model: Model, steps: Sequence[int]) -> None:
    """Say so where a student is asked for numbers of steps that it was not made for."""
    others = [count for count in steps if count not in model.step_counts]
    if model.is_student and others:
        warnings.warn(
            f"this student was made for {counts_of(model.step_counts, 'step')}, not for "
            f"{alternatives(others)}; one distilled for that gives better results (momatch distill RECIPE "
            "--steps)",
            Notice,
            stacklevel=2,
        )
