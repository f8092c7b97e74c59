"""What CUDA graphs do, on a CPU: operations are written down once, and run again on the same tensors.

As with a graph, Python does not run again: whatever it computed while recording stays as it was, and nothing
may look at a value. Two things are beyond it: operations that change a tensor's shape in place, which
torch.quantile has, and forward-mode differentiation, whose wrapped tensors make torch crash below a dispatch
mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Result = TypeVar("Result")
WAITING = {  # operations for which a GPU would have to be waited for
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.lift_fresh.default,  # a tensor made of Python's numbers, to be copied to the GPU
    torch.ops.aten._unique2.default,
}


class Waits(RuntimeError):
    """An operation waits for the device."""


class Tape(TorchDispatchMode):
    """Writes down every operation, and keeps what it overwrites as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            raise Waits(f"{func} waits for the device")
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_iter(value):
                    self.keep(tensor)
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.overwritten.setdefault(storage._cdata, (whole, whole.clone()))

    def undo(self) -> None:
        for now, before in self.overwritten.values():
            now.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            aliases = [r.alias_info for r in func._schema.returns]
            writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
            if any(a and not a.is_write for a in aliases):
                continue  # a view shows what lies beneath it
            made = func(*args, **kwargs)
            if not writes:
                for old, new in zip(tree_iter(out), tree_iter(made), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class TapeRecorder:
    """A `momatch.training.capture.Recorder` for a CPU."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record(
        self, work: Callable[[], Result], generator: torch.Generator
    ) -> tuple[Callable[[], None], Result]:
        default = torch.get_rng_state()  # dropout's, which recording does not advance on a GPU either
        with Tape() as tape:
            result = work()
        tape.undo()
        torch.set_rng_state(default)
        self.recorded += 1

        def replay() -> None:
            tape.replay()
            self.replayed += 1

        return replay, result


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, an operation that would make a GPU wait raises."""
    with Tape():
        yield
