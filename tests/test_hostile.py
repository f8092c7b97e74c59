"""Files that somebody sent: nothing in them is run, written outside, or taken for a part of a page."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import momatch
from field.small_files import png
from momatch.cli import main
from momatch.config.schema import DistillConfig, to_json
from momatch.data.sources import load_data, open_collection
from momatch.evaluation.report.html import write_report
from momatch.interop.export.folder import export_folder
from momatch.models.model import ModelError
from momatch.utils.errors import UsageError

DIGITS = Path(momatch.__file__).parent / "assets" / "digits-teacher"
SCRIPT = "`<script>alert(1)</script>"


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("arrays", [("images", "labels"), ("x", "obs"), ("arr_0",)])
def test_pickles_in_an_npz_are_not_opened(arrays, tmp_path):
    payload = np.empty(200, dtype=object)
    payload[:] = [Payload(tmp_path / "mark")] * 200
    np.savez(tmp_path / "a.npz", **dict.fromkeys(arrays, payload))
    with pytest.raises(UsageError):
        load_data(tmp_path / "a.npz")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_place_of_weights_is_not_opened(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DIGITS, model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    with pytest.raises(ModelError, match="is damaged"):
        momatch.load_teacher(model)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        momatch.load_teacher(model)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", ["network", "teacher"])
def test_a_model_cannot_name_what_is_to_be_called(where, tmp_path, monkeypatch):
    """Only a function that says it returns a Model is; os.mkdir's kind is not."""
    called = []
    monkeypatch.setattr(shutil, "hostile", lambda: called.append(1), raising=False)
    model = tmp_path / "student"
    shutil.copytree(DIGITS, model)
    description = json.loads((model / "model.json").read_text())
    if where == "network":
        description["network"] = {"type": "CustomConfig", "builder": "shutil:hostile"}
    description["info"] = {"role": "student", "teacher": "shutil:hostile"}
    (model / "model.json").write_text(json.dumps(description))
    (model / "evil.py").write_text("raise SystemExit('imported')")
    assert main(["evaluate", str(model), "--num", "100", "--teacher-steps", "2", "--data", "digits"]) == 2
    assert not called


def test_tars_and_zips_write_nothing_and_lead_nowhere(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(png(99))
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as shard:
        for name in ("../evil.png", "/tmp/evil-momatch.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(7))
            shard.addfile(member, io.BytesIO(png(7)))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            shard.addfile(member)
    with zipfile.ZipFile(tmp_path / "in" / "a.zip", "w") as archive:
        for name in ("../evil.png", "/tmp/evil-momatch.png", "good.png"):
            archive.writestr(name, png(7))
    before = sorted(tmp_path.rglob("*"))
    for source in ("a.tar", "a.zip"):
        try:
            found = open_collection(str(tmp_path / "in" / source))
            assert {int(found.item(i).pixels[0, 0]) for i in range(len(found))} == {7}
        except UsageError as error:
            assert "\n" not in str(error)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/evil-momatch.png").exists()


def hostile_run(folder: Path) -> Path:
    """A run whose classes, prompts, data and own name are a script."""
    run = folder / "<img src=x onerror=alert(1)>"
    config = {**to_json(DistillConfig(steps=2)), "data": SCRIPT, "teacher": SCRIPT}
    shutil.copytree(DIGITS, run / "student")
    description = json.loads((run / "student" / "model.json").read_text())
    names = [f"{SCRIPT}{i}" for i in range(10)]
    description["info"] = {
        "role": "student",
        "teacher": SCRIPT,
        "data": SCRIPT,
        "config": config,
        "class_names": names,
        "pipeline": SCRIPT,
    }
    description["steps"] = 2
    (run / "student" / "model.json").write_text(json.dumps(description))
    (run / "config.json").write_text(json.dumps(config))
    row = {"event": "alarm", "step": 1, "message": SCRIPT}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "gap": 0.1}) + "\n" + json.dumps(row) + "\n")
    return run


def test_words_of_a_run_are_text_on_its_pages(tmp_path):
    run = hostile_run(tmp_path)
    page = write_report(run).read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


def test_words_of_a_student_are_text_on_its_card(tmp_path):
    pytest.importorskip("diffusers")
    run = hostile_run(tmp_path)
    description = json.loads((run / "student" / "model.json").read_text())
    description["info"] |= {"pipeline": None}
    (run / "student" / "model.json").write_text(json.dumps(description))
    export_folder(momatch.load_student(run), tmp_path / "out", str(tmp_path / "out"), None, run)
    card = (tmp_path / "out" / "README.md").read_text()
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", card, flags=re.DOTALL)  # code is shown as it is
    assert "script alert(1)" in plain and "<script" not in plain and "<img src=x" not in plain


@pytest.mark.parametrize("word", [SCRIPT, "x" * 1_000_000, "\0", "\ud800", "‮", "../../etc/passwd"])
def test_any_word_is_a_prompt_or_a_sentence(word, tmp_path, capsys):
    """A model that takes no text says so, whatever the text; in one line of sensible length."""
    code = main(["sample", "digits", "--prompt", word, "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().err.encode(errors="replace").decode()
    assert code == 2 and said.count("\n") == 1 and len(said) < 2000


def test_headers_that_lie_about_sizes_are_refused(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DIGITS, model)
    path = model / "model.safetensors"
    contents = path.read_bytes()
    for size in (2**63 - 1, 2**40, 0, 1):
        path.write_bytes(size.to_bytes(8, "little") + contents[8:])
        with pytest.raises(ModelError, match="is damaged"):
            momatch.load_teacher(model)
    path.write_bytes(contents)
    assert load_file(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": "x"},
        {"clip": 0},
        {"clip": -1},
        {"num_classes": 1000},
        {"num_classes": -3},
        {"null_values": {"label": 99}},
        {"null_values": {"label": "x"}},
    ],
    ids=str,
)
def test_numbers_that_a_network_does_not_know_are_refused(wrong, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(DIGITS, folder)
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**description, **wrong}))
    assert main(["sample", str(folder), "--num", "2", "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and "Traceback" not in said and said.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_weights_of_another_kind_of_number_are_refused(dtype, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DIGITS, folder)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match="cannot be read .*its weights"):
        momatch.load_teacher(folder)
