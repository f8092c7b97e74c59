"""What an earlier version wrote opens today: see tests/artifacts/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import momatch
from momatch.cli import main
from momatch.interop.load import load_any

ARTIFACTS = Path(__file__).parent / "artifacts"
EXPECTED = json.loads((ARTIFACTS / "expected.json").read_text())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the artifacts, which name each other by relative paths."""
    shutil.copytree(ARTIFACTS, tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path / "artifacts")


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_an_earlier_version_draw_what_they_drew_then(name, here):
    model = load_any(name)
    assert model.steps == EXPECTED[name]["steps"]
    found = model.sample(2, seed=3).flatten()[:4]
    torch.testing.assert_close(found, torch.tensor(EXPECTED[name]["samples"]), atol=2e-5, rtol=1e-4)


def test_a_run_that_an_earlier_version_began_goes_on_to_the_same_weights(here):
    """By its own config. Biases before a normalisation have a gradient of rounding errors alone, which are
    another processor's; of those few, Adam makes steps of full length whichever sign they have."""
    assert main(["distill", "--config", "unfinished/config.json", "--out", "unfinished"]) == 0
    found, unbroken = momatch.load_student("unfinished"), momatch.load_student("unbroken")
    pairs = zip(found.denoiser.parameters(), unbroken.denoiser.parameters(), strict=True)
    difference = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs])
    assert (difference > 1e-6).float().mean() < 0.01 and difference.max() < 4 * 3e-4  # steps 3 to 6, of 3e-4
    steps = [
        row["step"] for row in map(json.loads, Path("unfinished/metrics.jsonl").read_text().splitlines())
    ]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_a_run_of_an_earlier_version_is_evaluated_reported_and_exported(here, capsys):
    assert main(["evaluate", "alternating", "--num", "100", "--teacher-steps", "8"]) == 0
    assert main(["report", "alternating"]) == 0
    page = Path("alternating/report.html").read_text()
    assert "joint (Algorithm 2)" in page and "How far the auxiliary model" in page
    assert (
        main(["report", "instant"]) == 0
        and "instant (Algorithm 3)" in Path("instant/report.html").read_text()
    )
    assert main(["export", "alternating", "again"]) == 0
    made = [
        Path(folder, "unet", "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in ("exported", "again")
    ]
    assert made[0] == made[1]


def test_a_folder_exported_by_an_earlier_version_still_opens(here):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    images = pipeline(class_labels=[0, 1], output_type="np").images
    assert images.shape[0] == 2


def test_the_teacher_of_an_earlier_version_is_distilled_by_algorithm_3(here, tmp_path):
    short = "--train.num-steps 2 --train.batch-size 4 --monitor.every 0".split()
    assert main(["distill", "digits-instant-8", "--teacher", "teacher", *short, "--out", "new"]) == 0
