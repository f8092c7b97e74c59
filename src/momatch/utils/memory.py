"""Memory of tensors: what is alive while something runs, and what is free."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MEMINFO = Path("/proc/meminfo")  # of Linux


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors on this device can still have.

    On a GPU what its driver calls free, and what torch keeps of freed tensors; elsewhere main memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:  # free pages alone would leave out what files are cached in, which is most of a busy machine
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind all tensors, those that several share counted once."""
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())


def storage_id(tensor: Tensor) -> int:
    """What tells the memory behind this tensor from others, as long as it lives."""
    return tensor.untyped_storage()._cdata


class Live(TorchDispatchMode):
    """Inside `with Live() as live`, every storage that an operation touches is counted until it is freed.

    On any device. What operations use inside themselves it does not see.

    Args:
        aside: tensors not to count.

    Attributes:
        now: bytes alive at present, of storages seen so far.
        most: the most so far.
    """

    def __init__(self, aside: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = 0
        self._aside = {storage_id(tensor) for tensor in aside}
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        # Forward mode's zero tensors have no storage, and kernels called from here crash on them.
        if any(isinstance(value, Tensor) and value._is_zerotensor() for value in given):
            args, kwargs = tree_map_only(Tensor, _with_storage, (args, kwargs))
            given = tree_leaves((args, kwargs))
        self.add(*given)
        result = func(*args, **kwargs)
        self.add(*tree_leaves(result))
        return result

    def add(self, *values: Any) -> None:
        """Count these tensors from now on; what is no tensor is passed over."""
        for value in values:
            if isinstance(value, Tensor) and not value._is_zerotensor():
                self._watch(value.untyped_storage())
        self.most = max(self.most, self.now)

    def forget_most(self) -> None:
        """Begin the search for the most anew."""
        self.most = self.now

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched or key in self._aside:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, gone)
        self.now += size


def _with_storage(tensor: Tensor) -> Tensor:
    if not tensor._is_zerotensor():
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
