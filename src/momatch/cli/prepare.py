"""The command that encodes data once: prepare."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from momatch.cli.parsing import parse
from momatch.cli.progress import follow_preparation
from momatch.interop.prepare import PrepareConfig
from momatch.interop.prepare import prepare as encode


@dataclass(frozen=True)
class PrepareArguments:
    """Encode pictures and captions once, for latent and text-conditional models. Run again, it resumes.

    Attributes:
        source: a folder of pictures (with metadata.jsonl for captions), an .npz, a .tar or a folder of them,
            or hf:ORG/NAME[:SPLIT].
        out: the folder to write; give it as --data to distill.
        config: source, pipeline and settings.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    out: Path
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]


def prepare(arguments: list[str], console: Console) -> None:
    """`momatch prepare SOURCE --out DIR --teacher PIPELINE`, or with `--text-encoder`."""
    parsed = parse(PrepareArguments, arguments, "prepare")
    follow_preparation(encode(parsed.source, parsed.config, parsed.out), console)
    out = shlex.quote(str(parsed.out))
    following = f"momatch distill RECIPE --data {out}, with a teacher of that pipeline"
    if parsed.config.text_encoder:
        following = f"momatch train-teacher emoji16-teacher --data {out} --image-size 0 --out DIR"
    console.print(f"Data: {parsed.out}\nNext: {following}", soft_wrap=True)
