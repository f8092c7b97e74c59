"""ONNX and torch.export against the network they were made of; a sampling loop in numpy against ours."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from momatch.diffusion import conventions, schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.interop.export.call import export_program
from momatch.interop.export.onnx import EXPORTER_LOG, export_onnx, quiet
from momatch.models.model import CHUNK, Student
from momatch.networks import registry
from momatch.networks.configs import DiffusersConfig, UNetConfig, UViTConfig
from momatch.networks.diffusers import DiffusersNetwork
from momatch.utils.errors import UsageError

BETAS = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64).tolist()


def own(config):
    denoiser = Denoiser(registry.build(config), "v", {"label": 3})
    return Student(denoiser, config, schedules.cosine(), (1, 8, 8), 4, 3, {"role": "student"})


def diffusers_student():
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    config = DiffusersConfig("UNet2DModel", json.loads(json.dumps(dict(network.config))))
    time = conventions.timesteps(BETAS)
    denoiser = Denoiser(DiffusersNetwork(config, network), "eps", time=time, clip=1.0)
    schedule = schedules.tabulated(BETAS)
    return Student(denoiser, config, schedule, (1, 8, 8), 4, 0, {"role": "student"})


MODELS = {
    "unet": lambda: own(UNetConfig(channels=(8, 32), attention_levels=(1,), num_classes=3, embedding_dim=16)),
    "uvit": lambda: own(UViTConfig(channels=(8,), width=16, depth=1, num_classes=3, embedding_dim=16)),
    "elastic": lambda: own(UNetConfig(channels=(8,), num_classes=3, embedding_dim=16, step_counts=(1, 4))),
    "diffusers": diffusers_student,
}


def filled(model):
    """Layers that start at zero would hide what comes before them."""
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.denoiser.eval()
    return model


def of_onnx(model, folder):
    """The network as onnxruntime runs it: arrays by name → x."""
    import onnxruntime

    export_onnx(model, folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda feed: session.run(["x"], feed)[0]


def of_torch(model, folder):
    """The network as torch.export left it."""
    export_program(model, folder)
    network = torch.export.load(folder / "model.pt2").module()
    names = json.loads((folder / "sampler.json").read_text())["inputs"]
    return lambda feed: network(*(torch.from_numpy(feed[name]) for name in names)).detach().numpy()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("exported", [of_onnx, of_torch])
def test_what_is_exported_says_what_the_network_says_and_samples_as_it_does(name, exported, tmp_path):
    torch.manual_seed(1)
    model = filled(MODELS[name]())
    run = exported(model, tmp_path)

    def call(z, logsnr, time, label):
        feed = {
            "z": z,
            "logsnr": np.full(len(z), logsnr, np.float32),
            "time": np.full(len(z), time, np.float32),
        }
        if len(model.step_counts) > 1:
            feed["steps"] = np.full(len(z), 4, np.float32)
        return run({**feed, "label": label} if model.num_classes else feed)

    for n, logsnr in ((1, 5.0), (5, -3.0), (3, 0.0), (2, -12.0)):
        z, label = torch.randn(n, 1, 8, 8), torch.arange(n) % 3
        with torch.no_grad():
            cond = {"label": label} if model.num_classes else None
            if len(model.step_counts) > 1:
                cond = {**(cond or {}), "steps": torch.full((n,), 4.0)}
            expected = model.denoiser(z, torch.full((n,), logsnr), cond)
        time = model.denoiser.time.to_time(torch.tensor([logsnr])).item()
        np.testing.assert_allclose(call(z.numpy(), logsnr, time, label.numpy()), expected.numpy(), atol=1e-4)

    known = json.loads((tmp_path / "sampler.json").read_text())
    generator = torch.Generator().manual_seed(2 * 1_000_003)  # Model.sample's for seed 2
    label = np.arange(3)
    z = torch.randn(CHUNK, 1, 8, 8, generator=generator)[:3].numpy()
    for i, (logsnr, time) in enumerate(zip(known["logsnr"], known["time"], strict=True)):
        x = call(z, logsnr, time, label)
        if i < len(known["between"]):
            step = known["between"][i]
            noise = torch.randn(3, 1, 8, 8, generator=generator).numpy()
            z = step["z_coefficient"] * z + step["x_coefficient"] * x + step["noise_std"] * noise
            z = z.astype(np.float32)
    cond = {"label": torch.from_numpy(label)} if model.num_classes else None
    np.testing.assert_allclose(x, model.sample(3, cond=cond, seed=2).numpy(), atol=1e-4)
    others = [grid["steps"] for grid in known.get("other_grids", [])]
    assert sorted([*others, 4]) == sorted(model.step_counts)
    assert known["steps"] == 4 == len(known["logsnr"]) == len(known["between"]) + 1


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"pip install 'momatch\[onnx\]'"):
        export_onnx(MODELS["uvit"](), tmp_path)


def test_the_command_says_nothing_but_what_it_wrote(tmp_path):
    """In a process of its own, where python prints warnings and torch its log."""
    MODELS["uvit"]().save(tmp_path / "student")
    command = [sys.executable, "-m", "momatch", "export", "student", "out", "--format", "onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "onnx folder of a student of 4 steps: out\n"


def test_only_known_remarks_of_the_exporter_are_left_out(caplog):
    log = logging.getLogger(EXPORTER_LOG)
    with pytest.warns(UserWarning, match="unheard of") as heard, quiet():
        warnings.warn("# The axis name: batch will not be used, since it shares constraints", stacklevel=1)
        warnings.warn("something unheard of", stacklevel=1)
        log.warning("torchvision is not installed. Skipping torchvision::nms")
        log.warning("something else")
    log.warning("torchvision is not installed, it says outside")
    assert len(heard) == 1
    assert [r.getMessage()[:24] for r in caplog.records] == ["something else", "torchvision is not insta"]


@pytest.mark.parametrize("exported", [of_onnx, of_torch])
def test_a_text_student_takes_tokens_and_leaves_its_null_condition_beside_it(exported, tmp_path):
    """What the file says where nothing is asked for is what the student itself says."""
    torch.manual_seed(1)
    config = UViTConfig(channels=(8,), width=16, depth=1, embedding_dim=16, text_dim=5)
    null = {"encoder_hidden_states": torch.randn(3, 5), "encoder_attention_mask": torch.tensor([1, 0, 0])}
    denoiser = Denoiser(registry.build(config), "v", null, clip=1.0)
    shapes = {"encoder_hidden_states": (3, 5), "encoder_attention_mask": (3,)}
    info = {"role": "student", "text_encoder": "minilm-l6"}
    model = filled(Student(denoiser, config, schedules.cosine(), (1, 8, 8), 4, 0, info, cond_shapes=shapes))
    run = exported(model, tmp_path)
    assert json.loads((tmp_path / "sampler.json").read_text())["text_encoder"] == "minilm-l6"
    kept = load_file(tmp_path / "null-condition.safetensors")
    z, logsnr = torch.randn(2, 1, 8, 8), torch.tensor([0.5, -2.0])
    times = model.denoiser.time.to_time(logsnr)
    for cond in (None, {name: torch.stack([row.flip(0), row]) for name, row in null.items()}):
        asked = cond or {name: torch.stack([row, row]) for name, row in kept.items()}
        feed = {"z": z, "logsnr": logsnr, "time": times.float(), **asked}
        found = run({name: value.numpy() for name, value in feed.items()})
        with torch.no_grad():
            wanted = model.denoiser(z, logsnr, cond)
        assert float(wanted.abs().max()) == 1
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
