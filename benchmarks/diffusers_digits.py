"""A model of diffusers, in and out, on digits: section 7 of docs/numbers.md.

    python benchmarks/diffusers_digits.py v_prediction
    python benchmarks/diffusers_digits.py epsilon

Trains a UNet2DModel by diffusers' own loop, distils its folder, exports the student, and samples it by
diffusers' DDPMPipeline in a process without momatch. Whatever exists under runs/diffusers/ already is kept.
Writes a dated JSON into benchmarks/results/.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from momatch.cli import main as momatch
from momatch.data.digits import load_digits
from momatch.evaluation import builtin
from momatch.evaluation.features import extract
from momatch.evaluation.frechet import frechet_distance
from momatch.evaluation.statistics import FeatureStatistics
from momatch.interop.load import load_any

FOLDER, RESULTS = Path("runs/diffusers"), Path(__file__).parent / "results"
TRAINING_STEPS, BATCH, STEPS, NUM_SAMPLES = 4000, 128, 8, 5000
RECIPE, LOGSNR_MIN = "diffusers-8", -4.2
SAMPLE = """
import sys
sys.modules["momatch"] = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe, generator = DiffusionPipeline.from_pretrained(sys.argv[1]), torch.Generator().manual_seed(1)
pipe.set_progress_bar_config(disable=True)
call = lambda: pipe(batch_size=250, num_inference_steps=8, generator=generator, output_type="np").images
numpy.save(sys.argv[2], numpy.concatenate([call() for _ in range(20)]))
"""


def train(kind: str, folder: Path) -> None:
    """As diffusers' unconditional tutorial does it: AdamW, cosine rate, uniform timesteps."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)
    images = load_digits().train.images
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, attention_head_dim=32, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noising = DDPMScheduler(num_train_timesteps=1000, prediction_type=kind)  # type: ignore (str for a Literal)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, 200, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        target = noise if kind == "epsilon" else noising.get_velocity(x, noise, t)  # type: ignore (int tensor)
        loss = F.mse_loss(unet(noising.add_noise(x, noise, t), t).sample, target)  # type: ignore
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    DDPMPipeline(unet, noising).save_pretrained(folder)


def main(kind: str) -> None:
    torch.set_num_threads(1)
    teacher, run, out = FOLDER / kind, FOLDER / f"{kind}-student", FOLDER / f"{kind}-export"
    if not teacher.exists():
        train(kind, teacher)
    arguments = ["--data", "digits", "--schedule.logsnr-min", str(LOGSNR_MIN), "--monitor.every", "0"]
    assert momatch(["distill", RECIPE, "--teacher", str(teacher), "--out", str(run), *arguments]) == 0
    assert momatch(["export", str(run), str(out)]) == 0
    subprocess.run([sys.executable, "-c", SAMPLE, str(out), str(run / "stock.npy")], check=True)
    judge = builtin.digits_classifier()
    reference = FeatureStatistics.from_features(extract(judge, load_digits().heldout.images[:]))

    def fd(images: torch.Tensor) -> float:
        return frechet_distance(FeatureStatistics.from_features(extract(judge, images)), reference)

    by_diffusers = torch.from_numpy(np.load(run / "stock.npy")).permute(0, 3, 1, 2).float() * 2 - 1
    measured = FOLDER / f"{kind}-teacher.json"
    if not measured.exists():
        model = load_any(str(teacher))
        values = {f"teacher, {k} steps": fd(model.sample(NUM_SAMPLES, k, seed=1)) for k in (8, 64)}
        measured.write_text(json.dumps(values))
    found = {
        **json.loads(measured.read_text()),
        "student, 8 steps": fd(load_any(str(run)).sample(NUM_SAMPLES, STEPS, seed=1)),
        "student, by diffusers": fd(by_diffusers),
    }
    report = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "prediction": kind,
        "recipe": RECIPE,
        "schedule.logsnr_min": LOGSNR_MIN,
        "num_samples": NUM_SAMPLES,
        "reference": "digits-heldout, 599 pictures",
        "features": judge.name,
        "fd": found,
    }
    path = RESULTS / f"{date.today().isoformat()}-diffusers-{kind}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(found, indent=1), path)


if __name__ == "__main__":
    main(sys.argv[1])
