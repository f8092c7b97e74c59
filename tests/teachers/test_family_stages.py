"""Every family through every stage, and the tables of docs/teachers.md that this makes.

MOMATCH_WRITE=1 writes the tables where they are out of date.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import momatch
from momatch.networks.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))
import families  # noqa: E402
import stages  # noqa: E402
from families import CASES  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "teachers.md"
YES = "yes"
TRAINED = {"all weights": stages.whole, "LoRA": stages.adapted, "instant": stages.instant}
COLUMNS = ["load", "x̂ as diffusers'", "sample, save", *TRAINED, "export", "opened without momatch"]


def table(name: str, header: list[str], rows: list[list[str]]) -> None:
    """Compare a table with that of the docs, or write it there."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    begin, end = f"<!-- {name}: made by tests/teachers -->", f"<!-- end of {name} -->"
    text = DOCS.read_text()
    before, _, rest = text.partition(begin)
    found, _, after = rest.partition(end)
    new = "\n\n" + "\n".join(lines) + "\n\n"
    if os.environ.get("MOMATCH_WRITE") and found != new:
        DOCS.write_text(before + begin + new + end + after)
        return
    assert found == new, f"docs/teachers.md is out of date; MOMATCH_WRITE=1 pytest {__file__}"


def test_the_table_of_conditions_is_current(tmp_path):
    rows = []
    for name, family in FAMILIES.items():
        case = CASES[name]
        model = momatch.load_teacher(families.save(case, tmp_path / name), size=case.size)
        asked = [*(["label"] if model.num_classes else []), *model.cond_shapes]
        sides = ("C, length", "C, H, W", "C, frames, H, W")[family.dims - 1]
        pipelines = ", ".join(f"`{kind}`" for kind in family.prompts) or "none"
        conditions = ", ".join(f"`{entry}`" for entry in asked) or "none"
        rows.append([f"`{name}`", f"({sides})", conditions, pipelines])
    table("conditions", ["class", "a sample", "entries of `cond`", "pipelines that encode prompts"], rows)


FRESH = """
import json, sys, torch, diffusers
for folder in sys.argv[1:]:
    given = torch.load(folder + "/given.pt", weights_only=True)
    empty = dict.fromkeys(given["empty"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder + "/student", trust_remote_code=True, **empty)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    made = pipe(**given["call"], num_inference_steps=given["steps"], return_dict=False)[0]
    assert torch.equal(torch.as_tensor(made), given["made"]), folder
assert not any(name.split(".")[0] == "momatch" for name in sys.modules)
"""


def without_patches(name, case, student, folder: Path) -> None:
    """What the folder makes here, for another process to make again."""
    import diffusers

    cond = stages.in_single(families.condition(student))
    index = json.loads((folder / "student" / "model_index.json").read_text())
    empty = [part for part in case.parts if part in index and part != "requires_safety_checker"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder / "student", trust_remote_code=True, **dict.fromkeys(empty)
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": families.N, "output_type": "latent"}
    if case.pipeline:
        call = families.asked(case, name, cond, student.sample_shape, torch.float32)
    torch.manual_seed(7)
    made = torch.as_tensor(pipe(**call, num_inference_steps=student.steps, return_dict=False)[0])
    torch.save({"call": call, "made": made, "steps": student.steps, "empty": empty}, folder / "given.pt")


@pytest.mark.slow
def test_every_family_passes_every_stage(tmp_path):
    rows, opened = [], []
    for name in FAMILIES:
        case, cells, students = CASES[name], {"load": YES}, {}
        model = momatch.load_teacher(families.save(case, tmp_path / name / "teacher"), size=case.size)
        stages.estimates(name, case, model)
        cells["x̂ as diffusers'"] = YES
        stages.kept(name, case, model, tmp_path / name / "saved")
        cells["sample, save"] = YES
        for stage, train in TRAINED.items():
            students[stage] = train(name, case, model)
            cells[stage] = YES
        for stage in ("LoRA", "all weights"):
            stages.exported(name, case, students[stage], tmp_path / name / "student")
        cells["export"] = YES
        reason = case.reasons.get("opened without momatch")
        cells["opened without momatch"] = reason or YES
        if reason is None:
            without_patches(name, case, students["all weights"], tmp_path / name)
            opened.append(str(tmp_path / name))
        rows.append([f"`{name}`", *(cells[column] for column in COLUMNS)])
    subprocess.run([sys.executable, "-c", FRESH, *opened], check=True, cwd=tmp_path)
    table("stages", ["class", *COLUMNS], rows)
