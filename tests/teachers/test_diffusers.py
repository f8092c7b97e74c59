"""Teachers of diffusers say what diffusers itself makes of their networks; all oracles are diffusers' own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import momatch
from momatch.models.model import load_model
from momatch.utils.errors import Notice, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import folders  # noqa: E402

BETAS = {
    "linear": dict(beta_schedule="linear"),
    "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
    "trained": dict(trained_betas=torch.linspace(1e-3, 0.05, 200).tolist(), num_train_timesteps=200),
}
INDICES = (0, 3, 60, 120, 180, 199)
N = 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def condition(model, seed=1):
    """Something for each entry of cond."""
    cond = {
        key: draw(N, *(5 if s == -1 else s for s in shape), seed=seed)
        for key, shape in model.cond_shapes.items()
    }
    if "encoder_attention_mask" in cond:
        cond["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]] * N, dtype=torch.float64)
    if model.num_classes:
        cond["label"] = torch.arange(N) + 1
    return cond


def ddpm(**options):
    return diffusers.DDPMScheduler(**{"clip_sample": False, **options})


def raw(model, z, time, cond):
    """The network's output, by diffusers' own call."""
    network, name = model.denoiser.network.model, model.network.class_name
    rest = {k: v for k, v in cond.items() if k not in ("label", "text_embeds", "time_ids")}
    if name.startswith("UNet2DCond"):
        added = {k: cond[k] for k in ("text_embeds", "time_ids") if k in cond}
        return network(z, time, cond["encoder_hidden_states"], added_cond_kwargs=added).sample
    if name == "PixArtTransformer2DModel":
        rest["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return network(z, timestep=time, **rest).sample.chunk(2, 1)[0]
    if name == "DiTTransformer2DModel":
        return network(z, timestep=time, class_labels=cond["label"]).sample.chunk(2, 1)[0]
    if name == "UNet2DModel":
        return network(z, time, class_labels=cond.get("label")).sample
    if name == "SD3Transformer2DModel":
        return network(z, timestep=time, **rest).sample
    pipe = diffusers.FluxPipeline
    ids = pipe._prepare_latent_image_ids(N, z.shape[2] // 2, z.shape[3] // 2, "cpu", z.dtype)
    packed = pipe._pack_latents(z, *z.shape)
    out = network(packed, timestep=time, img_ids=ids, txt_ids=torch.zeros(5, 3).to(z), **rest).sample
    return pipe._unpack_latents(out, z.shape[2] * 8, z.shape[3] * 8, 8)


def load(folder, *arguments, **options):
    model = momatch.load_teacher(folder, *arguments, **options)
    model.denoiser.double()
    return model


def close(ours, theirs):
    """To 1e-5, of 1 or of what is compared if that is larger."""
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


TABULATED = {
    "unet": (folders.unet, ddpm(**BETAS["linear"])),
    "classes": (lambda: folders.unet(num_class_embeds=5), ddpm(**BETAS["cosine"])),
    "sample": (folders.unet, ddpm(prediction_type="sample", **BETAS["trained"])),
    "zero-snr": (
        folders.unet,
        ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True, **BETAS["scaled"]),
    ),
    "sd": (folders.text_unet, diffusers.DDIMScheduler(clip_sample=False, **BETAS["scaled"])),
    "sdxl": (folders.sdxl, ddpm(prediction_type="v_prediction", **BETAS["scaled"])),
    "dit": (folders.dit, ddpm(**BETAS["linear"])),
    "pixart": (folders.pixart, ddpm(**BETAS["trained"])),
}


@pytest.mark.parametrize("name", TABULATED)
def test_estimates_and_steps_are_those_of_diffusers(name, tmp_path):
    make, scheduler = TABULATED[name]
    model = load(folders.save(tmp_path / "p", make(), scheduler))
    cond, z = condition(model), draw(N, *model.sample_shape)
    total, stock = len(scheduler.betas), diffusers.DDIMScheduler.from_config(scheduler.config)
    stock.set_timesteps(total)
    ancestral = diffusers.DDPMScheduler.from_config(scheduler.config)
    for index in (i * (total - 1) // 199 for i in INDICES):
        logsnr = model.schedule(torch.full((N,), (index + 1) / total, dtype=torch.float64))
        with torch.no_grad():
            ours = model.denoiser(z, logsnr, cond)
            output = raw(model, z, torch.full((N,), float(index)), cond)
        close(ours, stock.step(output, index, z).pred_original_sample)
        # Where ᾱ is 0, it is 1e-13 here, which tells in a step of 1/T (7e-4 of z); and DDIM takes √−1e-8.
        if index and scheduler.alphas_cumprod[index] > 0:
            before = model.schedule(torch.full((N,), index / total, dtype=torch.float64))
            mean, variance = momatch.process.posterior(z, ours, before, logsnr)
            noise = draw(*z.shape, seed=2)
            step = mean + variance.sqrt() * noise
            generator = torch.Generator().manual_seed(2)
            close(step, ancestral.step(output, index, z, generator=generator).prev_sample)
            close(step, stock.step(output, index, z, eta=1.0, variance_noise=noise).prev_sample)


SCHEDULERS = [
    diffusers.PNDMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
]


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("betas", BETAS)
def test_every_scheduler_with_betas_is_read(kind, betas):
    from momatch.interop import diffusers_scheduler as noise

    scheduler = kind(**BETAS[betas])
    found = noise.read({**scheduler.config, "_class_name": kind.__name__}, 16)
    t = torch.arange(1, len(scheduler.betas) + 1, dtype=torch.float64) / len(scheduler.betas)
    assert torch.allclose(torch.sigmoid(found.schedule(t)), scheduler.alphas_cumprod.double(), rtol=1e-4)
    assert found.prediction == "eps" and found.clip is None
    assert torch.allclose(found.time.to_time(found.schedule(t)), t * len(t) - 1, atol=1e-6)


def test_heun_dpm_and_ddpm_say_whether_they_clip():
    from momatch.interop import diffusers_scheduler as noise

    for scheduler, clip in [
        (diffusers.DDPMScheduler(), 1.0),
        (diffusers.DDIMScheduler(clip_sample_range=2.0), 2.0),
        (diffusers.DDPMScheduler(clip_sample=False), None),
        (diffusers.HeunDiscreteScheduler(clip_sample=True), 1.0),
        (diffusers.PNDMScheduler(), None),
    ]:
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        assert noise.read(config, 16).clip == clip


def test_thresholding_is_a_clip_or_is_said_to_be_left_out(recwarn):
    from momatch.interop import diffusers_scheduler as noise

    def clip(kind, **options):
        return noise.read({**kind(**options).config, "_class_name": kind.__name__}, 16).clip

    for kind in (diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler):
        assert clip(kind, thresholding=True) == 1.0
        assert not recwarn
        with pytest.warns(Notice, match="sample_max_value = 1.5.* guidance.percentile = 0.9$"):
            assert clip(kind, thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9) is None
    scheduler = diffusers.DDPMScheduler(thresholding=True)
    x = 3 * draw(2, 1, 8, 8)
    assert torch.equal(scheduler._threshold_sample(x), x.clamp(-1, 1))


CONTINUOUS = {
    "betas": ({}, (0.0292, 14.6)),
    "karras": (dict(use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0), (0.002, 700.0)),
    "exponential": (dict(use_exponential_sigmas=True, sigma_max=80.0), (0.0292, 80.0)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_euler_with_continuous_time_is_read_as_it_steps(name, tmp_path):
    options, (sigma_min, sigma_max) = CONTINUOUS[name]
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", **{**BETAS["scaled"], **options}
    )
    model = load(folders.save(tmp_path, folders.unet(), scheduler))
    scheduler.set_timesteps(12)
    z = draw(N, *model.sample_shape)
    for time, sigma in zip(scheduler.timesteps[1:], scheduler.sigmas.double()[1:-1], strict=True):
        logsnr = (-2 * sigma.log()).expand(N)
        noisy = z * torch.sqrt(1 + sigma**2)
        with torch.no_grad():
            output = raw(model, scheduler.scale_model_input(noisy, time), time.double().expand(N), {})
            close(model.denoiser(z, logsnr), scheduler.step(output, time, noisy).pred_original_sample)
    first = 1 / len(scheduler.betas) if name == "betas" else 0.0
    ends = model.schedule(torch.tensor([first, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, -2 * torch.tensor([sigma_min, sigma_max]).double().log(), atol=5e-3)


def test_a_continuous_time_that_diffusers_does_not_heed_is_not_heeded():
    from momatch.interop import diffusers_scheduler as noise

    scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous")
    assert (
        noise.read({**scheduler.config, "_class_name": "EulerDiscreteScheduler"}, 16).time.name == "timesteps"
    )
    assert scheduler.timesteps[0] == 999


EDM = [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler]


@pytest.mark.parametrize("kind", EDM, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditions_as_diffusers(kind, prediction, tmp_path):
    scheduler = kind(prediction_type=prediction, sigma_data=0.7, sigma_schedule="exponential")
    model = load(folders.save(tmp_path, folders.unet(), scheduler))
    z = draw(N, *model.sample_shape)
    for sigma in (0.002, 0.1, 0.7, 5.0, 80.0):
        logsnr = torch.full((N,), -2 * math.log(sigma), dtype=torch.float64)
        noisy = z * math.sqrt(1 + sigma**2)
        with torch.no_grad():
            seen = scheduler.precondition_inputs(noisy, torch.tensor(sigma, dtype=torch.float64))
            time = scheduler.precondition_noise(torch.tensor(sigma, dtype=torch.float64)).expand(N)
            theirs = scheduler.precondition_outputs(noisy, raw(model, seen, time, {}), sigma)
            close(model.denoiser(z, logsnr), theirs)
    ends = model.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, -2 * torch.tensor([0.002, 80.0], dtype=torch.float64).log())


FLOW = {
    "sd3": (folders.sd3, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1.0),
    "heun": (folders.sd3, diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0), 1.0),
    "flux": (folders.flux, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 1000.0),
    "schnell": (lambda: folders.flux(False), diffusers.FlowMatchEulerDiscreteScheduler(), 1000.0),
}


@pytest.mark.parametrize("name", FLOW)
def test_flow_is_the_sample_minus_sigma_velocity(name, tmp_path):
    make, scheduler, unit = FLOW[name]
    model = load(folders.save(tmp_path, make(), scheduler), size=8)
    cond, z = condition(model), draw(N, *model.sample_shape)
    for sigma in (0.01, 0.2, 0.5, 0.9, 0.999):
        logsnr = torch.full((N,), 2 * math.log((1 - sigma) / sigma), dtype=torch.float64)
        sample = z / (math.sqrt(1 / (sigma**2 + (1 - sigma) ** 2)))
        with torch.no_grad():
            velocity = raw(model, sample, torch.full((N,), sigma * 1000 / unit, dtype=torch.float64), cond)
            close(model.denoiser(z, logsnr, cond), sample - sigma * velocity)


def test_dynamic_shift_is_that_of_the_pipeline(tmp_path):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for kind in ("exponential", "linear"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        model = momatch.load_teacher(folders.save(tmp_path / kind, folders.flux(), scheduler), size=8)
        assert model.sample_shape == (4, 8, 8)
        t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        theirs = scheduler.time_shift(calculate_shift(4 * 4), 1.0, t)
        assert torch.allclose(torch.sigmoid(-model.schedule(t) / 2), theirs, atol=1e-3)


def test_flux_has_a_guidance_of_its_own_with_a_default(tmp_path):
    model = load(folders.save(tmp_path, folders.flux(), diffusers.FlowMatchEulerDiscreteScheduler()), size=8)
    cond = condition(model)
    told = {**cond, "guidance": torch.full((N,), 3.5, dtype=torch.float64)}
    del cond["guidance"]
    z, logsnr = draw(N, *model.sample_shape), torch.zeros(N, dtype=torch.float64)
    assert torch.equal(model.denoiser(z, logsnr, cond), model.denoiser(z, logsnr, told))
    told["guidance"] = told["guidance"] + 1
    assert not torch.equal(model.denoiser(z, logsnr, cond), model.denoiser(z, logsnr, told))
    model.denoiser.float()
    assert model.sample(N, 1, {k: v.float() for k, v in cond.items()}).shape == (N, *model.sample_shape)


FAMILIES = {
    **{name: TABULATED[name] for name in ("unet", "classes", "sd", "sdxl", "dit", "pixart")},
    **{name: FLOW[name][:2] for name in ("sd3", "flux")},
    "edm": (folders.unet, diffusers.EDMEulerScheduler(prediction_type="v_prediction")),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_the_same_to_the_bit(name, tmp_path):
    make, scheduler = FAMILIES[name]
    vae = {"scaling_factor": 1.5, "shift_factor": 0.1}
    folder = folders.save(tmp_path / "pipeline", make(), scheduler, vae=vae)
    model = momatch.load_teacher(folder, size=8)
    assert model.info["pipeline"] == str(folder.resolve()) and model.provenance.latent
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.cond_shapes == model.cond_shapes and again.num_classes == model.num_classes
    cond = {k: v if k == "label" else v.float() for k, v in condition(model).items()} or None
    assert torch.equal(model.sample(N, 2, cond), again.sample(N, 2, cond))


def test_pixart_of_1024_pixels_hears_its_size(tmp_path):
    network = folders.pixart(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=12)
    model = load(folders.save(tmp_path, network, ddpm()))
    cond, z = condition(model), draw(N, *model.sample_shape)
    sizes = {"resolution": torch.full((N, 2), 64.0).double(), "aspect_ratio": torch.ones(N, 1).double()}
    logsnr = torch.zeros(N, dtype=torch.float64)
    theirs = model.denoiser.network.model(
        z, timestep=model.denoiser.time.to_time(logsnr), added_cond_kwargs=sizes, **cond
    ).sample[:, :4]
    assert torch.equal(model.denoiser.network(z, model.denoiser.time.to_time(logsnr), cond), theirs)


def test_dit_drops_labels_nowhere_and_knows_its_null_class(tmp_path):
    model = momatch.load_teacher(folders.save(tmp_path, folders.dit(), ddpm()))
    assert model.num_classes == 10 and model.denoiser.null_values == {"label": 10}
    z, logsnr, cond = torch.randn(64, 4, 8, 8), torch.zeros(64), {"label": torch.arange(64) % 10}
    calm = model.denoiser(z, logsnr, cond)
    assert torch.equal(model.denoiser.train()(z, logsnr, cond), calm)


def test_null_label_of_an_unet(tmp_path):
    folder = folders.save(tmp_path, folders.unet(num_class_embeds=5), ddpm())
    model = momatch.load_teacher(folder)
    with pytest.raises(UsageError, match="must be asked for something: give label"):
        model.sample(2)
    with pytest.raises(UsageError, match="must be given label in cond"):
        model.denoiser(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(UsageError, match="null_label is 7"):
        momatch.load_teacher(folder, null_label=7)
    model = momatch.load_teacher(folder, null_label=4)
    assert model.num_classes == 4 and model.denoiser.null_values == {"label": 4}
    assert model.sample(2, 1).shape == (2, 1, 8, 8)


def test_a_bare_model_with_its_scheduler_in_it_or_beside_it(tmp_path):
    bare = folders.save(tmp_path / "bare", folders.unet(), ddpm(), pipeline=False)
    (bare / "scheduler" / "scheduler_config.json").rename(bare / "scheduler_config.json")
    assert momatch.load_teacher(bare).sample_shape == (1, 8, 8)
    whole = folders.save(tmp_path / "whole", folders.unet(), ddpm())
    model = momatch.load_teacher(whole / "unet")
    assert model.info["pipeline"] == str(whole.resolve())
    (bare / "scheduler_config.json").unlink()
    with pytest.raises(UsageError, match="put the scheduler_config.json of its training"):
        momatch.load_teacher(bare)


def test_the_layouts_of_the_first_pipelines(tmp_path):
    flat = folders.save(tmp_path / "flat", folders.unet(), ddpm(), pipeline=False)
    (flat / "scheduler" / "scheduler_config.json").rename(flat / "scheduler_config.json")
    (flat / "model_index.json").write_text("{}")
    assert momatch.load_teacher(flat).info["pipeline"] == str(flat.resolve())
    for make in (folders.dit, folders.pixart):
        folder = folders.save(tmp_path / make.__name__, make(), ddpm())
        name = momatch.load_teacher(folder).network.class_name
        change(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
        assert momatch.load_teacher(folder).network.class_name == name == type(make()).__name__


def test_the_autoencoder_of_latent_diffusion_is_called_vqvae(tmp_path):
    folder = folders.save(tmp_path, folders.unet(), ddpm(), vae={"scaling_factor": 0.5})
    (folder / "vae").rename(folder / "vqvae")
    assert momatch.load_teacher(folder).provenance.latent


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    folder = folders.save(tmp_path, folders.unet(), ddpm())
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = momatch.load_teacher("someone/ddpm-tiny")
    assert model.info["pipeline"] == asked["name"] == "someone/ddpm-tiny"
    assert all(
        pattern.endswith((".json", ".safetensors", ".safetensors*")) for pattern in asked["allow_patterns"]
    )

    def offline(name, **options):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=r"the hub does not give it \(OSError: no connection\)"):
        momatch.load_teacher("someone/else")
    with pytest.raises(UsageError, match="there is no folder runs/not-yet"):
        momatch.load_teacher("runs/not-yet")


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    folder = folders.save(tmp_path / "p", folders.unet(), ddpm())
    scheduler, network = folder / "scheduler" / "scheduler_config.json", folder / "unet" / "config.json"
    good, shape = scheduler.read_text(), network.read_text()
    for entries, sentence in [
        ({"_class_name": "NoSuchScheduler"}, "unknown scheduler 'NoSuchScheduler'"),
        ({"prediction_type": "wish"}, "unknown prediction_type 'wish'"),
        ({"rescale_betas_zero_snr": True}, "ends in pure noise"),
    ]:
        change(scheduler, **entries)
        with pytest.raises(UsageError, match=f"(?s){sentence}"):
            momatch.load_teacher(folder)
        scheduler.write_text(good)
    for entries, sentence in [
        (
            {"_class_name": "MochiTransformer3DModel"},
            "knows no MochiTransformer3DModel, only .*FAMILY = Family",
        ),
        ({"_class_name": "MomentMatchingNetwork"}, "a student that momatch has exported"),
        ({"sample_size": None}, "give their side"),
        ({"in_channels": 3}, "cannot load|takes 3 channels"),
        ({"num_class_embeds": 5}, "lack 1|keys are missing"),  # the latter is diffusers' own, before 0.35
    ]:
        change(network, **entries)
        with pytest.raises(UsageError, match=f"(?s){sentence}"):
            momatch.load_teacher(folder)
        network.write_text(shape)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="convert them: python -c .*use_safetensors=False"):
        momatch.load_teacher(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        momatch.load_teacher(folder)
    with pytest.raises(UsageError, match="holds no model"):
        momatch.load_teacher(tmp_path)


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch):
    folder = folders.save(tmp_path, folders.unet(), ddpm())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'momatch\[diffusers\]'"):
        momatch.load_teacher(folder)
