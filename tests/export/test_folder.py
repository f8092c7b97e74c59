"""Exported students: diffusers opens them without momatch, and they make the same samples."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from momatch.cli import main
from momatch.cli.export import push
from momatch.diffusion import conventions, schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.diffusion.sampling import ancestral, time_grid
from momatch.interop.export import noise
from momatch.interop.export.folder import export_folder
from momatch.interop.export.moment_matching_scheduler import MomentMatchingScheduler
from momatch.models.model import CHUNK, Student
from momatch.networks.configs import DiffusersConfig, MLPConfig
from momatch.networks.diffusers import DiffusersNetwork
from momatch.networks.mlp import MLP
from momatch.utils.errors import RunError, UsageError

TABLES = {
    "linear": DDPMScheduler(1000).betas.double().tolist(),
    "zero terminal": DDPMScheduler(1000, rescale_betas_zero_snr=True).betas.double().tolist(),
    "cosine": DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").betas.double().tolist(),
}
SHAPE = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
    "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def student(steps=8, betas=None, prediction="v", classes=0, kind="table", clip=None, schedule=None):
    """A tiny UNet2DModel of random weights as a student."""
    torch.manual_seed(0)
    network = UNet2DModel(**SHAPE, num_class_embeds=classes or None)
    config = DiffusersConfig("UNet2DModel", json.loads(json.dumps(dict(network.config))))
    betas = betas or TABLES["linear"]
    time, own = {
        "table": (conventions.timesteps(betas), schedules.tabulated(betas)),
        "flow": (conventions.flow(), schedules.rectified_flow(1.5, schedules.TABLE_LOGSNR_MIN)),
        "edm": (conventions.edm(), schedules.edm()),
    }[kind]
    denoiser = Denoiser(DiffusersNetwork(config, network), prediction, time=time, clip=clip)
    info = {"role": "student", "data": "digits", "teacher": "somewhere", "config": {"method": "alternating"}}
    shape = (1, 8, 8)
    return Student(denoiser.eval(), config, schedule or own, shape, steps, classes, info)


def noises(model, n):
    """All that `ancestral` draws for n samples: the first z, then each step's."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, *model.sample_shape, generator=generator) for _ in range(model.steps)]


def drive(model, scheduler, drawn, monkeypatch):
    """The loop of diffusers' pipelines, its noise replaced by ours."""
    left = iter(drawn)
    give = lambda *args, **kwargs: next(left)  # noqa: E731
    for module in (sys.modules[type(scheduler).__module__], sys.modules["diffusers.utils.torch_utils"]):
        monkeypatch.setattr(module, "randn_tensor", give)
    z = give() * scheduler.init_noise_sigma
    scheduler.set_timesteps(model.steps)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = model.denoiser.network.model(scheduler.scale_model_input(z, t), t).sample
        drawn_all = t == scheduler.timesteps[-1]
        if drawn_all:
            left = iter([torch.zeros_like(z)])
        z = scheduler.step(output, t, z).prev_sample
    return z


def ours(model, drawn, monkeypatch):
    left = iter(drawn[1:])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *args, **kwargs: next(left))
        return ancestral(model.denoiser, drawn[0], model.steps, model.schedule)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(
    ("table", "prediction", "clip"),
    [("linear", "v", None), ("linear", "eps", 1.0), ("zero terminal", "v", None), ("cosine", "v", 0.8)],
)
def test_the_stock_sampler_takes_the_student_s_steps(steps, table, prediction, clip, monkeypatch):
    model = student(steps, TABLES[table], prediction, clip=clip)
    scheduler = noise.sampler(model)
    assert type(scheduler) is DDPMScheduler
    drawn = noises(model, 3)
    expected = ours(model, drawn, monkeypatch)
    torch.testing.assert_close(drive(model, scheduler, drawn, monkeypatch), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("prediction", "clip"), [("eps", 1.0), ("v", None)])
def test_the_stock_sampler_takes_the_steps_on_a_table_that_was_cut(prediction, clip, monkeypatch):
    cut = schedules.cut(schedules.tabulated(TABLES["linear"]), -6.0, 8)
    model = student(8, TABLES["linear"], prediction, clip=clip, schedule=cut)
    scheduler = noise.sampler(model)
    assert type(scheduler) is DDPMScheduler
    drawn = noises(model, 3)
    expected = ours(model, drawn, monkeypatch)
    torch.testing.assert_close(drive(model, scheduler, drawn, monkeypatch), expected, rtol=1e-5, atol=2e-5)
    assert scheduler.timesteps[0] < 800 and len(scheduler.betas) == 768


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("table", "eps"), ("table", "v"), ("table", "x"), ("flow", "flow"), ("edm", "edm"), ("edm", "-edm")],
)
def test_our_sampler_takes_the_student_s_steps(steps, kind, prediction, monkeypatch):
    model = student(steps, prediction=prediction.removeprefix("-"), kind=kind, clip=1.0)
    if prediction == "-edm":
        object.__setattr__(model, "network", DiffusersConfig("UNet2DModel", model.network.config, True))
        object.__setattr__(model.denoiser.network, "config", model.network)
    scheduler = noise.moment_matching(model)
    drawn = noises(model, 3)
    expected = ours(model, drawn, monkeypatch)
    torch.testing.assert_close(drive(model, scheduler, drawn, monkeypatch), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{"steps": 3}, {"kind": "flow", "prediction": "flow"}, {"schedule": schedules.cosine()}],
    ids=("k does not divide T", "flow", "another schedule"),
)
def test_where_stock_parts_are_not_exact_our_sampler_travels(options):
    assert noise.stock_ddpm(student(**options)) is None
    assert isinstance(noise.sampler(student(**options)), MomentMatchingScheduler)


def test_our_sampler_refuses_other_step_counts_and_survives_its_config():
    scheduler = noise.moment_matching(student(4))
    for asked in ({"num_inference_steps": 50}, {"sigmas": [1.0, 0.5]}, {"timesteps": [999, 500, 250, 0]}):
        with pytest.raises(ValueError, match="distilled for 4 steps.*num_inference_steps=4"):
            scheduler.set_timesteps(**asked)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.5, 0.2], mu=1.0)
    again = MomentMatchingScheduler.from_config(scheduler.config)
    assert again.timesteps.tolist() == scheduler.timesteps.tolist()


def test_our_sampler_s_file_needs_torch_and_diffusers_alone():
    found = set()
    for node in ast.walk(ast.parse(noise.OURS.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found <= {"__future__", "math", "dataclasses", "typing", "torch", "diffusers"}


def snippet(directory: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)
    return code


def elsewhere(code: str, folder: Path) -> None:
    """Run code where momatch cannot be imported."""
    code = f"import sys; sys.modules['momatch'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "options",
    [{}, {"classes": 3}, {"kind": "flow", "prediction": "flow"}, {"kind": "edm", "prediction": "edm"}],
    ids=("stock", "labels", "flow", "edm"),
)
def test_a_folder_opens_without_momatch_and_makes_the_same_samples(options, tmp_path):
    """The card's own snippet runs; and the folder's parts, given our noise, make our samples."""
    model = student(4, **options)
    out = tmp_path / "student"
    export_folder(model, out, str(out), None, None)
    cond = {"label": torch.arange(3)} if options.get("classes") else None
    generator = torch.Generator().manual_seed(5 * 1_000_003)  # Model.sample's for seed 5
    drawn = [torch.randn(CHUNK, 1, 8, 8, generator=generator)[:3]]
    drawn += [torch.randn(3, 1, 8, 8, generator=generator) for _ in range(3)]
    torch.save(torch.stack(drawn), tmp_path / "noise.pt")
    torch.save(model.sample(3, cond=cond, seed=5), tmp_path / "wanted.pt")
    trusted = ", trust_remote_code=True" if options else ""
    check = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(out)!r}{trusted})
noise, wanted = (torch.load(f"{{name}}.pt", weights_only=True) for name in ("noise", "wanted"))
import importlib
module = importlib.import_module(type(pipe.scheduler).__module__)
left = iter([*noise[1:], torch.zeros_like(noise[0])])
module.randn_tensor = lambda *args, **kwargs: next(left)
pipe.scheduler.set_timesteps(4)
z = noise[0] * pipe.scheduler.init_noise_sigma
labels = torch.arange(3) if {bool(cond)} else None
for t in pipe.scheduler.timesteps:
    with torch.no_grad():
        output = pipe.unet(pipe.scheduler.scale_model_input(z, t), t, class_labels=labels).sample
    z = pipe.scheduler.step(output, t, z).prev_sample
if {bool(options)}:  # our own pipeline: its call itself, given our noise
    left = iter([*noise[1:], torch.zeros_like(noise[0])])
    z = pipe(class_labels=labels, latents=noise[0], output_type="latent").images
assert (z - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()), (z - wanted).abs().max()
"""
    elsewhere(snippet(out) + check, tmp_path)


def test_a_former_export_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    export_folder(student(classes=3), out, "name", "mit", None)
    assert (out / "moment_matching_pipeline.py").is_file()
    export_folder(student(), out, "name", "mit", None)
    assert not (out / "moment_matching_pipeline.py").exists()
    assert "license: mit" in (out / "README.md").read_text()
    (out / ".git").mkdir()
    (out / ".git" / "history").write_text("precious")
    with pytest.raises(UsageError, match="holds .git, which no export wrote"):
        export_folder(student(), out, "name", "mit", None)
    assert (out / ".git" / "history").read_text() == "precious" and (out / "unet").is_dir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty and no former export"):
        export_folder(student(), other, "name", None, None)
    assert (other / "thesis.txt").read_text() == "precious"


def test_students_that_make_no_pictures_are_told_where_to_go(tmp_path):
    config = MLPConfig(dim=2)
    model = Student(Denoiser(MLP(config)), config, schedules.cosine(), (2,), 4, 0, {"role": "student"})
    with pytest.raises(UsageError, match="--format onnx"):
        export_folder(model, tmp_path / "out", "name", None, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "digits-nowhere", "out"], "there is no folder"),
        (["export", "digits-nowhere", "out", "--push-to-hub", "name"], "organisation/name"),
        (["export", "digits-nowhere", "out", "--format", "pickle"], "pickle"),
    ],
)
def test_mistakes_get_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_a_folder_goes_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, folder_path))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(tmp_path, "me/student") == "address"
    assert calls == [("create", "me/student", True), ("upload", "me/student", str(tmp_path))]
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(RunError, match="me/student.*complete"):
        push(tmp_path, "me/student")


def test_the_grid_is_the_student_s_own():
    model = student(5)
    scheduler = noise.moment_matching(model)
    expected = model.schedule(time_grid(5))[:-1]
    torch.testing.assert_close(torch.tensor(scheduler.config["logsnrs"]), expected.float())


def test_a_label_without_meaning_is_refused():
    with pytest.raises(UsageError, match="label 3 is out of range"):
        student(classes=3).sample(1, cond={"label": torch.tensor([3])})


def test_a_learned_variance_is_left_out_and_the_size_is_the_student_s(tmp_path):
    torch.manual_seed(0)
    network = UNet2DModel(**{**SHAPE, "out_channels": 2, "sample_size": 32})
    config = DiffusersConfig("UNet2DModel", json.loads(json.dumps(dict(network.config))))
    base = student(4)
    denoiser = Denoiser(DiffusersNetwork(config, network), "v", time=base.denoiser.time).eval()
    model = Student(denoiser, config, base.schedule, (1, 8, 8), 4, 0, base.info)
    assert noise.stock_ddpm(model) is None
    export_folder(model, tmp_path / "out", "name", None, None)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] == 8
    scheduler, z = noise.moment_matching(model), torch.randn(2, 1, 8, 8)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        found = scheduler.step(network(z, t).sample, t, z).pred_original_sample
        expected = model.denoiser(z, torch.full((2,), scheduler.config["logsnrs"][0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
