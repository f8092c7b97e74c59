"""A latent model of diffusers with labels, in and out, on digits: section 8 of docs/numbers.md.

    python benchmarks/diffusers_latent.py

Trains a tiny AutoencoderKL (16×16 pixels, the digits' own repeated, to 4×4×4 latents) and a
DiTTransformer2DModel on its latents by plain diffusers code, saves a DiTPipeline, prepares the latents,
distils, exports, and samples by diffusers in a process without momatch. Whatever exists under
runs/diffusers/ already is kept. Writes a dated JSON into benchmarks/results/.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_digits import BATCH, FOLDER, NUM_SAMPLES, STEPS
from diffusers_flow import CHUNK, by_diffusers, distance, record
from momatch.cli import main as momatch
from momatch.data.digits import load_digits
from momatch.interop.autoencoder import decoder_of, load_autoencoder
from momatch.interop.load import load_any

VAE_STEPS, TRAINING_STEPS, DISTILLING_STEPS, KL_WEIGHT = 1500, 2500, 1000, 5e-5


def pictures() -> tuple[Tensor, Tensor]:
    """The training digits (N, 1, 16, 16) in [−1, 1], each pixel four times, and their labels."""
    train = load_digits().train
    return train.images[:].repeat_interleave(2, 2).repeat_interleave(2, 3), train.labels


def train_autoencoder() -> Any:
    """Squared error and a little KL divergence; scaling_factor brings latents to deviation 1."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    images, _ = pictures()
    shape: dict[str, Any] = dict(
        in_channels=1, out_channels=1, latent_channels=4, sample_size=16, block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    vae: Any = AutoencoderKL(**shape)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, VAE_STEPS)
    for _ in range(VAE_STEPS):
        x = images[torch.randint(len(images), (64,))]
        said = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(said.sample()).sample, x) + KL_WEIGHT * said.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(images).latent_dist.sample().std()))
    return vae.eval()


def train(folder: Path) -> None:
    """The autoencoder, then v-prediction on its latents, a tenth of the labels dropped, as DiT does it."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    vae = train_autoencoder()
    images, labels = pictures()
    with torch.no_grad():
        said = vae.encode(images).latent_dist
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=4, out_channels=4,
        sample_size=4, patch_size=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    noising = DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction", clip_sample=False)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, 200, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        chosen, t = torch.randint(len(images), (BATCH,)), torch.randint(0, 1000, (BATCH,))
        x = (said.mean + said.std * torch.randn_like(said.mean))[chosen] * vae.config.scaling_factor
        noise = torch.randn_like(x)
        target = noising.get_velocity(x, noise, t)  # type: ignore (int tensor)
        given = noising.add_noise(x, noise, t)  # type: ignore
        F.mse_loss(dit(given, t, class_labels=labels[chosen]).sample, target).backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    DiTPipeline(dit.eval(), vae, noising).save_pretrained(folder)  # type: ignore (any scheduler will do)


def in_turn(n: int) -> list[int]:
    """So many labels, 0 to 9 over and over."""
    return list(islice(cycle(range(10)), n))


def averaged(decoded: Tensor) -> Tensor:
    """(N, 1, 16, 16) → (N, 1, 8, 8), where digits were before their pixels were repeated."""
    return F.avg_pool2d(decoded, 2)


def main() -> None:
    torch.set_num_threads(1)
    teacher, run, out = (FOLDER / f"latent{part}" for part in ("", "-student", "-export"))
    source, prepared = FOLDER / "digits16.npz", FOLDER / "latent-data"
    if not teacher.exists():
        train(teacher)
    images, labels = pictures()
    levels = ((images[:, 0] + 1) * 127.5).round().byte()
    np.savez(source, images=levels.numpy(), labels=labels.numpy())
    assert momatch(["prepare", str(source), "--teacher", str(teacher), "--out", str(prepared)]) == 0
    arguments = ["--data", str(prepared), "--train.num-steps", str(DISTILLING_STEPS), "--monitor.every", "0"]
    assert momatch(["distill", "digits-8", "--teacher", str(teacher), "--out", str(run), *arguments]) == 0
    assert momatch(["export", str(run), str(out)]) == 0

    autoencoder = load_autoencoder(teacher)
    assert autoencoder is not None
    index = torch.arange(NUM_SAMPLES) % len(images)
    again = autoencoder.decode(autoencoder.encode(images))
    found = {
        "training digits": distance(averaged(images[index])),
        "training digits, encoded and decoded": distance(averaged(again[index])),
    }
    asked = {"label": torch.tensor(in_turn(NUM_SAMPLES))}
    parameters = {"autoencoder": sum(p.numel() for p in autoencoder.vae.parameters())}
    for name, place, steps in (("teacher", teacher, 8), ("teacher", teacher, 64), ("student", run, STEPS)):
        model = load_any(str(place))
        decode = decoder_of(model)
        assert decode is not None
        made = decode(model.sample(NUM_SAMPLES, steps, cond=asked, seed=1))
        found[f"{name}, {steps} steps"] = distance(averaged(made))
        parameters["network"] = sum(p.numel() for p in model.denoiser.parameters())
    options = {"class_labels": in_turn(CHUNK), "guidance_scale": 1.0, "num_inference_steps": STEPS}
    made = by_diffusers(out, run / "export.npy", **options)
    found["the same student, by diffusers"] = distance(averaged(made))
    record(
        "latent", found, prediction="v_prediction", parameters=parameters, distilling_steps=DISTILLING_STEPS
    )


if __name__ == "__main__":
    main()
