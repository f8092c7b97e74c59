"""Several processes of one machine that work together by gloo, forked from this one: they start at once."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from momatch.cli import main as momatch
from momatch.training import distributed

# What takes seconds to import is imported here once, not in every process.
torch.optim.Adam([torch.zeros(1)])  # torch._dynamo
for module in ("torch.distributed.fsdp", "momatch.cli.train", "momatch.cli.evaluate"):
    importlib.import_module(module)


def in_processes(
    count: int, folder: Path, function: Callable[[], Any], per_machine: int | None = None
) -> list[Any]:
    """What `function` returns in each of `count` processes: tensors, numbers, collections of them."""
    port = free_port()
    os.environ["LOCAL_WORLD_SIZE"] = str(per_machine or count)
    children = [start(rank, count, port, folder, lambda: _joined(function)) for rank in range(count)]
    del os.environ["LOCAL_WORLD_SIZE"]
    codes = ended(children)
    wrong = [i for i, code in enumerate(codes) if code]
    assert not wrong, "\n".join((folder / f"{i}.txt").read_text() for i in wrong)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(count)]


def _joined(function: Callable[[], Any]) -> Any:
    if not distributed.launched():
        return function()
    with distributed.joined():
        return function()


def commands(count: int, folder: Path, arguments: list[str]) -> list[int]:
    """Run `momatch` in `count` processes; returns their ids. What each prints is in folder/RANK.txt."""
    port = free_port()
    return [start(rank, count, port, folder, lambda: _command(folder, arguments)) for rank in range(count)]


def _command(folder: Path, arguments: list[str]) -> None:
    out = os.open(folder / f"{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    code = momatch(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(children: list[int]) -> list[int]:
    """Exit codes; negative is a signal's number."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, count: int, port: int, folder: Path, function: Callable[[], Any]) -> int:
    """Fork one process, as torchrun would start it; returns its id."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        torch.save(function(), folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"process {rank} of {count}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)
