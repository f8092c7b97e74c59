"""The command that gives a student away: export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from momatch.cli.parsing import OptionalText, RunPath, parse
from momatch.interop.load import load_student
from momatch.models.model import Model
from momatch.utils.errors import RunError, UsageError
from momatch.utils.text import counts_of, first_line

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class ExportArguments:
    """Write a student as others open it.

    Attributes:
        run: folder of a distillation run, or of a student.
        directory: the folder to write.
        format: "diffusers", a folder for DiffusionPipeline.from_pretrained; or one network call, as "onnx" or
            as a program of PyTorch's own, "torch" (torch.export), for which momatch is not needed.
        license: of the student, for its card; the teacher's, if left out.
        push_to_hub: also upload the folder to the Hugging Face hub, under this name: organisation/name.
    """

    run: RunPath
    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    format: Literal["diffusers", "onnx", "torch"] = "diffusers"
    license: OptionalText = None
    push_to_hub: OptionalText = None


def export(arguments: list[str], console: Console) -> None:
    """`momatch export RUN DIR`."""
    parsed = parse(ExportArguments, arguments, "export")
    hub = parsed.push_to_hub
    if hub is not None and not HUB_NAME.fullmatch(hub):
        raise UsageError(f"--push-to-hub {hub} is no name on the hub; give organisation/name")
    model = load_student(parsed.run)
    with console.status(f"writing {parsed.directory}"):
        _write(model, parsed, hub or str(parsed.directory))
    console.print(
        f"{parsed.format} folder of a student of {counts_of(model.step_counts, 'step')}: {parsed.directory}",
        soft_wrap=True,
    )
    if hub:
        console.print(f"uploaded: {push(parsed.directory, hub)}", soft_wrap=True)


def _write(model: Model, parsed: ExportArguments, name: str) -> None:
    from momatch.interop.export.folder import check_sampler, claim, export_folder, mark

    check_sampler(model)
    if parsed.format != "diffusers":
        from momatch.interop.export.call import export_program
        from momatch.interop.export.onnx import export_onnx

        claim(parsed.directory)
        (export_onnx if parsed.format == "onnx" else export_program)(model, parsed.directory)
        mark(parsed.directory)
    else:
        export_folder(model, parsed.directory, name, parsed.license, parsed.run)


def push(directory: Path, name: str) -> str:
    """Upload a folder to the hub; returns its address.

    Raises:
        RunError: if the hub does not take it.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UsageError("huggingface_hub is not installed; pip install 'momatch[diffusers]'") from None
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(directory)))
    except Exception as error:
        reason = first_line(error)
        raise RunError(
            f"the hub does not take {name} ({type(error).__name__}: {reason}); the folder {directory} is "
            "complete: log in (hf auth login) and run the same command again"
        ) from None
