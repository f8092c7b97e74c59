"""What is done with a teacher of every family, one function a stage; each raises where it does not hold."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path

import diffusers
import families
import torch
from families import LEVELS, N

import momatch
from momatch.config import InstantConfig
from momatch.config.schema import AdapterConfig, MonitorConfig, TrainConfig
from momatch.data.images import ImageSet, Split
from momatch.diffusion.sampling import ancestral
from momatch.interop.export.folder import export_folder
from momatch.models.model import load_model

SHORT = momatch.DistillConfig(
    steps=2, train=TrainConfig(num_steps=2, batch_size=2), monitor=MonitorConfig(every=0)
)


def in_single(cond):
    return cond and {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def noise(shape, count=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, *shape, generator=generator) for _ in range(count)]


def theirs_and_levels(case, name, model, cond):
    """(z, λ, diffusers' estimate of x) at every step of its pipeline, in double precision."""
    scheduler, network = case.scheduler(), model.denoiser.network.model
    table = getattr(scheduler, "alphas_cumprod", None)
    steps = run_theirs(case, name, model, cond, scheduler, network)
    found = []
    for step in steps:
        output, sample = step.output.double(), step.sample.double()
        if table is None:
            sigma = step.time / 1000
            one = diffusers.FlowMatchEulerDiscreteScheduler()
            one.set_timesteps(sigmas=[sigma])
            x = one.step(output, one.timesteps[0], sample).prev_sample.double()
            logsnr = 2 * math.log((1 - sigma) / sigma) if sigma < 1 else -80.0
            scale = 1.0 / math.hypot(sigma, 1 - sigma)
        else:
            output = output[:, : sample.shape[1]]
            x = scheduler.step(output, int(step.time), sample).pred_original_sample
            kept = float(table[int(step.time)].double())
            logsnr, scale = (math.log(kept / (1 - kept)) if kept else -80.0), 1.0
        found.append((case.back(sample) * scale, logsnr, case.back(x)))
    return found


def run_theirs(case, name, model, cond, scheduler, network):
    drawn = noise(model.sample_shape)
    network.double()
    if case.pipeline:
        options = families.asked(case, name, cond, model.sample_shape, torch.float64)
        if "sigmas" in pipeline_arguments(case) and not hasattr(scheduler, "alphas_cumprod"):
            options["sigmas"] = [1 - i / LEVELS for i in range(LEVELS)]
        pipe = families.around(case, network, scheduler)
        with torch.no_grad():
            return families.steps_of(pipe, case, options, LEVELS, drawn)
    scheduler.set_timesteps(LEVELS)
    found, z = [], drawn[0].double()
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = network(z, t).sample
        after = scheduler.step(output, t, z).prev_sample
        found.append(families.Step(output, float(t), z, after))
        z = after
    return found


def pipeline_arguments(case):
    return inspect.signature(getattr(diffusers, case.pipeline).__call__).parameters


def estimates(name, case, model):
    """x̂ at eight noise levels is what diffusers makes of what its pipeline asks the network for."""
    cond = families.condition(model)
    try:
        model.denoiser.double()
        levels = theirs_and_levels(case, name, model, cond)
        assert len({level for _, level, _ in levels}) == LEVELS
        for z, level, x in levels:
            logsnr = torch.full((N,), level, dtype=torch.float64)
            with torch.no_grad():
                close(model.denoiser(z, logsnr, cond), x)
    finally:
        model.denoiser.float()


def kept(name, case, model, folder: Path):
    """Samples have the shape that was asked for, and a saved model makes the same to the bit."""
    assert model.sample_shape[1:] == case.size
    cond = in_single(families.condition(model))
    samples = model.sample(N, 2, cond)
    assert samples.shape == (N, *model.sample_shape) and samples.isfinite().all()
    model.save(folder)
    assert torch.equal(samples, load_model(folder).sample(N, 2, cond))


def data(model) -> Split:
    """Noise as data, each row asked for something else."""
    cond = in_single(families.condition(model)) or {}
    labels = cond.pop("label", torch.zeros(N, dtype=torch.int64))
    x = torch.randn(N, *model.sample_shape, generator=torch.Generator().manual_seed(5))
    half = {name: rows for name, rows in cond.items() if name != "guidance"}
    rows = ImageSet(x, labels, max(model.num_classes, 1), "noise", None, half, space="latents")
    return Split(rows, rows)


def distilled(model, **changes):
    """A student of two steps of training; its teacher is as it was."""
    before = model.fingerprint()
    student = momatch.distill(model, data(model), dataclasses.replace(SHORT, **changes))
    assert model.fingerprint() == before != student.fingerprint()
    assert all(p.isfinite().all() for p in student.denoiser.parameters())
    return student


def whole(name, case, model):
    """Two steps of the alternating method, every weight trained."""
    return distilled(model)


def adapted(name, case, model):
    """The same with LoRA of rank 2."""
    return distilled(model, adapter=AdapterConfig(rank=2))


def instant(name, case, model):
    """Two steps of the instant method, which differentiates the teacher along its weights."""
    return distilled(model, method=InstantConfig(lambda_steps=2))


def our_samples(student, cond, noises):
    """Algorithm 1 with these draws: z_1, then the noise of each step."""
    left = iter(noises)
    draw, torch.randn = torch.randn, lambda *args, **kwargs: next(left)
    try:
        with torch.no_grad():
            return ancestral(student.denoiser, next(left), student.steps, student.schedule, cond)
    finally:
        torch.randn = draw


def exported(name, case, student, folder: Path):
    """Export, open with diffusers alone, and make the samples that momatch makes."""
    student.denoiser.eval()
    torch.manual_seed(1)
    cond = in_single(families.condition(student))
    noises = [torch.randn(N, *student.sample_shape) for _ in range(student.steps)]
    ours = our_samples(student, cond, noises)
    export_folder(student, folder, "student", None, None)
    options = {part: None for part in case.parts if part != "requires_safety_checker"}
    options = {k: v for k, v in options.items() if k in json.loads((folder / "model_index.json").read_text())}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    if case.pipeline:
        assert type(pipe).__name__ == case.pipeline
        called = families.asked(case, name, cond, student.sample_shape, torch.float32)
    else:
        called = {"batch_size": N}
    steps = families.steps_of(pipe, case, called, student.steps, noises)
    theirs = case.back(steps[-1].after)
    assert (theirs - ours).abs().max() <= 1e-4 * max(1.0, float(ours.abs().max()))
