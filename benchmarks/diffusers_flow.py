"""A flow-matching model of diffusers, in and out, on digits: section 8 of docs/numbers.md.

    python benchmarks/diffusers_flow.py

Trains a UNet2DModel by diffusers' own flow-matching loop (FlowMatchEulerDiscreteScheduler), distils its
folder, exports the student, and samples teacher and student by diffusers in processes without momatch.
Whatever exists under runs/diffusers/ already is kept. Writes a dated JSON into benchmarks/results/.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_digits import BATCH, FOLDER, NUM_SAMPLES, RESULTS, STEPS
from momatch.cli import main as momatch
from momatch.data.digits import load_digits
from momatch.evaluation import builtin
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics
from momatch.interop.load import load_any

SAMPLE = """
import json, sys
sys.modules["momatch"] = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folder, out, options, batches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
generator = torch.manual_seed(1)  # the global one: some pipelines draw the noise of their steps from it
pipe.set_progress_bar_config(disable=True)
call = lambda: pipe(**options, generator=generator, output_type="np").images
numpy.save(out, numpy.concatenate([call() for _ in range(batches)]))
"""
TRAINING_STEPS, DISTILLING_STEPS, CHUNK = 2500, 1500, 250
LOGSNR_MIN, SEEDS = -4.2, (1, 2, 3)  # where the student begins, and the draws of momatch's sampler


def train(folder: Path) -> None:
    """As diffusers' flow-matching scripts do it: AdamW, cosine rate, σ uniform, the target ε − x."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    images = load_digits().train.images
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noising: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, 200, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        noise, index = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        sigma = noising.sigmas[index].view(-1, 1, 1, 1)
        flow = unet((1 - sigma) * x + sigma * noise, noising.timesteps[index]).sample
        F.mse_loss(flow, noise - x).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    DDPMPipeline(unet, noising).save_pretrained(folder)  # it takes any scheduler


def by_diffusers(folder: Path, out: Path, **options: object) -> Tensor:
    """What a pipeline's folder makes where momatch cannot be imported: (NUM_SAMPLES, C, H, W) in [−1, 1]."""
    if not out.exists():
        given = [str(folder), str(out), json.dumps(options), str(NUM_SAMPLES // CHUNK)]
        subprocess.run([sys.executable, "-c", SAMPLE, *given], check=True)
    return torch.from_numpy(np.load(out)).permute(0, 3, 1, 2).float() * 2 - 1


def by_momatch(place: Path, steps: int) -> float:
    """The distance of what momatch's own sampler makes of a teacher or a student: mean of three draws."""
    model = load_any(str(place))
    found = [distance(model.sample(NUM_SAMPLES, steps, seed=seed)) for seed in SEEDS]
    print(place, steps, found, flush=True)
    return statistics.mean(found)


def distance(pictures: Tensor) -> float:
    """Fréchet distance of pictures (N, 1, 8, 8) to the held-out digits."""
    judge = builtin.digits_classifier()
    heldout = FeatureStatistics.from_features(extract(judge, load_digits().heldout.images[:]))
    return frechet_distance(FeatureStatistics.from_features(extract(judge, pictures)), heldout)


def record(name: str, found: dict[str, float], **more: object) -> None:
    """Write the dated JSON; print the table."""
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "num_samples": NUM_SAMPLES,
        "reference": "digits-heldout, 599 pictures",
        "features": builtin.digits_classifier().name,
        **more,
        "fd": found,
    }
    path = RESULTS / f"{date.today().isoformat()}-diffusers-{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(table(report), path, sep="\n")


def table(report: dict) -> str:
    """The table of docs/numbers.md."""
    lines = ["| samples | FD |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value:.2f} |" for name, value in report["fd"].items()])


def main() -> None:
    torch.set_num_threads(1)
    teacher, run, out = FOLDER / "flow", FOLDER / "flow-student", FOLDER / "flow-export"
    if not teacher.exists():
        train(teacher)
    arguments = ["--data", "digits", "--train.num-steps", str(DISTILLING_STEPS), "--monitor.every", "0"]
    arguments += ["--schedule.logsnr-min", str(LOGSNR_MIN)]
    assert momatch(["distill", "diffusers-8", "--teacher", str(teacher), "--out", str(run), *arguments]) == 0
    assert momatch(["export", str(run), str(out)]) == 0
    options = {"batch_size": CHUNK, "num_inference_steps": STEPS}
    found = teacher_distances(teacher)
    found["student, 8 steps"] = by_momatch(run, STEPS)
    found["the same student, by diffusers"] = distance(by_diffusers(out, run / "export.npy", **options))
    parameters = sum(p.numel() for p in load_any(str(run)).denoiser.parameters())
    record("flow", found, prediction="flow", parameters=parameters, distilling_steps=DISTILLING_STEPS)


def teacher_distances(teacher: Path) -> dict[str, float]:
    """By Algorithm 1, as a teacher of momatch samples, and by Euler's method, as diffusers does."""
    found = {}
    for steps in (8, 64):
        found[f"teacher, {steps} steps, ancestral"] = by_momatch(teacher, steps)
    for steps in (8, 64):
        options = {"batch_size": CHUNK, "num_inference_steps": steps}
        pictures = by_diffusers(teacher, FOLDER / f"flow-euler-{steps}.npy", **options)
        found[f"teacher, {steps} steps, diffusers' Euler"] = distance(pictures)
    return found


if __name__ == "__main__":
    main()
