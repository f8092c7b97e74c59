"""Several processes of one machine that work together by gloo, forked from this one: they start at once."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from momatch.training import distributed

torch.optim.Adam([torch.zeros(1)])  # imports torch._dynamo, for seconds: here once, not in every process


def in_processes(
    count: int, folder: Path, function: Callable[[], Any], per_machine: int | None = None
) -> list[Any]:
    """What `function` returns in each of `count` processes: tensors, numbers, collections of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["LOCAL_WORLD_SIZE"] = str(per_machine or count)
    children = [start(rank, count, port, folder, function) for rank in range(count)]
    del os.environ["LOCAL_WORLD_SIZE"]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    wrong = [i for i, code in enumerate(codes) if code]
    assert not wrong, "\n".join((folder / f"{i}.txt").read_text() for i in wrong)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(count)]


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
        if count == 1:
            found = function()
        else:
            with distributed.joined():
                found = function()
        torch.save(found, folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"process {rank} of {count}:\n{traceback.format_exc()}")
    finally:
        os._exit(code)
