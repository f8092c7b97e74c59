"""The command line's front door. Imports nothing heavy, so that `momatch --help` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from momatch import __version__

COMMANDS = {
    "demo": "distil the built-in digits teacher into an 8-step student, evaluate, write a report",
    "train-teacher": "train a many-step model by denoising: momatch train-teacher RECIPE --out DIR",
    "distill": "distil a teacher by moment matching: momatch distill RECIPE --out DIR",
    "reward": "fine-tune a run's student by a reward: momatch reward RUN --reward classifier:7 --out DIR",
    "sample": "draw images from a run: momatch sample RUN --steps 4 --num 64 --out grid.png",
    "evaluate": "measure a run's model against held-out data: momatch evaluate RUN --steps 1,2,4,8",
    "compare": "one table of several evaluated runs: momatch compare RUN RUN --out table.html",
    "guidance": "what guidance gives and costs: momatch guidance RUN --scales 0,0.5,1,2 --out curve.png",
    "export": "write a student for diffusers, or as ONNX: momatch export RUN DIR",
    "report": "write a run's report.html: momatch report RUN",
    "runs": "list the runs in a folder, how far and how good: momatch runs runs/",
    "watch": "follow a run from another terminal: momatch watch RUN",
    "plan": "parameters, memory and time of a recipe, before anything is trained: momatch plan RECIPE",
    "inspect": "say what would be read of your data, and what left out: momatch inspect DATA",
    "prepare": "encode images and captions once: momatch prepare SOURCE --out DIR --text-encoder minilm-l6",
    "recipes": "list the recipes",
    "serve": "a page in the browser, a student beside its teacher: momatch serve RUN",
}
LONGEST_MESSAGE = 1500  # characters
SHARED = "train-teacher", "distill", "sample", "evaluate"  # what several processes can do together
_HOMES = {  # where in momatch.cli each is
    "demo": "train:demo",
    "train-teacher": "train:train_teacher",
    "distill": "train:distill",
    "reward": "train:reward",
    "sample": "sample:sample",
    "evaluate": "evaluate:evaluate",
    "compare": "compare:compare",
    "guidance": "evaluate:guidance",
    "export": "export:export",
    "report": "evaluate:report",
    "runs": "runs:runs",
    "watch": "runs:watch",
    "plan": "plan:plan",
    "inspect": "inspect:inspect",
    "prepare": "prepare:prepare",
    "recipes": "plan:recipes",
    "serve": "serve.page:serve",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 failed, 2 wrong usage, 75 stopped by SIGTERM and to be run again, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"momatch {__version__}")
        return 0
    debug = "--debug" in arguments
    name, rest = arguments[0], [a for a in arguments[1:] if a != "--debug"]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}", 2)

    from rich.console import Console

    from momatch.utils.errors import Interrupted, RunError, UsageError

    try:
        with _notices_as_sentences(), _with_others(name) as speaks:
            _command(name)(rest, Console(highlight=False, quiet=not speaks))
        return 0
    except Interrupted as interrupted:
        print(interrupted)
        return interrupted.exit_code
    except UsageError as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except BrokenPipeError:  # whoever read our output has left
        sys.stdout = None
        return 1
    except (RunError, OSError) as error:
        if debug:
            raise
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if debug or not ("memory" in str(error) or isinstance(error, MemoryError)):
            raise
        remedy = "sample with a smaller --batch-size, or train with a smaller --train.batch-size or network"
        return _fail(f"out of memory; {remedy}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


@contextmanager
def _with_others(name: str) -> Iterator[bool]:
    """Inside, the processes that torchrun started work together; gives whether this one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return

    from momatch.training import distributed
    from momatch.utils.errors import UsageError

    if name not in SHARED:
        raise UsageError(f"momatch {name} runs in one process; call it without torchrun")
    with distributed.joined():
        yield distributed.is_main()


def _command(name: str) -> Callable[[list[str], Any], None]:
    """The function behind a command; its module, and whatever heavy it needs, is imported only now."""
    module, _, function = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"momatch.cli.{module}"), function)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "momatch: distil diffusion and flow models into samplers of 1 to 16 steps by moment matching",
            "",
            "usage: momatch COMMAND ...",
            "",
            *lines,
            "",
            "momatch COMMAND --help explains a command; --debug shows the traceback of an error.",
        ]
    )


@contextmanager
def _notices_as_sentences() -> Iterator[None]:
    """What is to be noticed goes to stderr like an error, in one line; other warnings as usual."""
    from momatch.utils.errors import Notice

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any) -> None:
            if issubclass(category, Notice):
                print(f"momatch: {message}", file=sys.stderr)
            else:
                usual(message, category, *where)

        warnings.showwarning = show
        yield


def _fail(message: str, code: int) -> int:
    if len(message) > LONGEST_MESSAGE:  # somebody's prompt, or what a file holds
        half = LONGEST_MESSAGE // 2
        message = f"{message[:half]} … {message[-half:]}"
    print(f"momatch: {message}", file=sys.stderr)
    return code
