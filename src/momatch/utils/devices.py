"""Where networks run: a GPU if there is one, or what the user names."""

from __future__ import annotations

import torch

from momatch.utils.errors import UsageError
from momatch.utils.text import first_line

AUTO = "auto"
LONGEST_REASON = 100  # of torch, in characters


def resolve(name: str = AUTO) -> torch.device:
    """The device of that name; "auto" is the first CUDA GPU, or the CPU where there is none.

    Args:
        name: "auto", or as torch names them: "cpu", "cuda", "cuda:1".

    Raises:
        UsageError: if there is no such device here, or it knows no float64, in which schedules are computed.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("it computes nothing" if device.type == "meta" else "there is one CPU")
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        reason = first_line(error)
        why = f" ({reason})" if len(reason) <= LONGEST_REASON else ""  # torch may list all its backends
        raise UsageError(
            f"device {name!r} cannot be used here{why}; use cpu, cuda, cuda:1 … or auto"
        ) from None
    return device
