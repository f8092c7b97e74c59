"""Students of momatch's own networks: their folder opens without momatch, and makes the same samples."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from momatch.cli import main
from momatch.diffusion import schedules
from momatch.diffusion.denoiser import Denoiser
from momatch.interop import autoencoder as latents
from momatch.interop.export import standalone
from momatch.interop.export.folder import export_folder
from momatch.interop.export.moment_matching_network import MomentMatchingNetwork
from momatch.interop.load import load_student
from momatch.models.model import CHUNK, Student
from momatch.networks import registry
from momatch.networks.configs import UNetConfig, UViTConfig

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
UNET = UNetConfig(channels=(8, 16), attention_levels=(1,), embedding_dim=16)
UVIT = UViTConfig(3, (8,), 1, 16, 1, 2, embedding_dim=16)
LABELS, PROMPTED = UNetConfig(channels=(8, 16), num_classes=3), UViTConfig(**{**vars(UVIT), "text_dim": 5})
BOTH = UViTConfig(**{**vars(PROMPTED), "num_classes": 3})
ELASTIC = dataclasses.replace(LABELS, step_counts=(1, 2, 3))


def student(shape, steps=3, nulls=True, clip=None, side=8):
    """A tiny network of random weights as a student."""
    torch.manual_seed(0)
    network = registry.build(shape)
    for parameter in network.parameters():
        if not parameter.detach().any():  # else its last layer says 0
            torch.nn.init.normal_(parameter, std=0.2)
    known, cond_shapes = {}, {}
    if shape.num_classes:
        known["label"] = shape.num_classes
    if getattr(shape, "text_dim", 0):
        cond_shapes = {TEXT: (4, shape.text_dim), MASK: (4,)}
        known |= {TEXT: torch.randn(4, shape.text_dim), MASK: torch.tensor([1, 1, 0, 0])}
    denoiser = Denoiser(network, null_values=known if nulls else {}, clip=clip).eval()
    info = {"role": "student", "data": "toy", "teacher": "somewhere", "config": {"method": "alternating"}}
    sample = (shape.image_channels, side, side)
    return Student(
        denoiser, shape, schedules.cosine(), sample, steps, shape.num_classes, info, cond_shapes=cond_shapes
    )


def asked(shape, n=3):
    """A condition of each kind that the network takes."""
    generator = torch.Generator().manual_seed(2)
    cond = {"label": torch.arange(n) % 3} if shape.num_classes else {}
    if getattr(shape, "text_dim", 0):
        cond[TEXT] = torch.randn(n, 4, shape.text_dim, generator=generator)
        cond[MASK] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    return cond


def noises(model, n, seed=5):
    """What `Model.sample` draws for n samples: the first z, then each step's."""
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    drawn = [torch.randn(CHUNK, *model.sample_shape, generator=generator)[:n]]
    return torch.stack(
        drawn + [torch.randn(n, *model.sample_shape, generator=generator) for _ in range(model.steps - 1)]
    )


def snippet(directory: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)
    return code


CHILD = """
import importlib, json, sys
sys.modules["momatch"] = None
import torch
from diffusers import DiffusionPipeline

for name, (folder, custom, code) in json.load(open("cases.json")).items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **custom)
    assert type(pipe).__name__ == "MomentMatchingPipeline"
    noise, wanted, cond = torch.load(f"{name}.pt", weights_only=True)
    if "label" in cond:
        cond["class_labels"] = cond.pop("label")
    module = importlib.import_module(type(pipe.scheduler).__module__)
    drawn, left = module.randn_tensor, iter(noise[1:])
    module.randn_tensor = lambda *args, **kwargs: next(left)
    z = pipe(latents=noise[0], output_type="latent", **cond).images
    module.randn_tensor = drawn
    far = (z - wanted).abs().max()
    assert far <= 1e-5 * max(1, wanted.abs().max()), (name, far)
    assert wanted.std() > 0.05, name
    exec(code, {})
    print(name)
"""


def run_elsewhere(cases, folder: Path) -> list[str]:
    """Where momatch cannot be imported: folders' samples against `Model.sample`'s, and the cards' snippets.

    Args:
        cases: by name, the exported folder, its student, what to ask for, and options of from_pretrained.
        folder: where to work.

    Returns:
        The names of those that passed.
    """
    plan = {}
    for name, (out, model, cond, options) in cases.items():
        torch.save(
            (noises(model, 3), model.sample(3, cond=cond or None, seed=5), cond), folder / f"{name}.pt"
        )
        plan[name] = str(out), options, snippet(out)
    (folder / "cases.json").write_text(json.dumps(plan))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_folders_make_the_students_samples_without_momatch(tmp_path):
    """Also that of the shipped digits teacher, from the command line; all in one process."""
    cases = {}
    shapes = {"unet": UNET, "uvit": UVIT, "labels": LABELS, "text": PROMPTED, "both": BOTH}
    for name, shape in {**shapes, "elastic": ELASTIC}.items():
        model, cond, out = student(shape, clip=0.9), asked(shape), tmp_path / name
        export_folder(model, out, str(out), None, None)
        cases[name] = out, model, cond, {"custom_pipeline": str(out)}
        if cond:
            assert (model.sample(3, cond=cond, seed=5) - model.sample(3, seed=5)).abs().max() > 1e-3
            cases[f"{name}-null"] = out, model, {}, {}
    run, out = tmp_path / "run", tmp_path / "digits"
    options = ["--steps", "2", "--train.num-steps", "2", "--train.batch-size", "8", "--monitor.every", "0"]
    assert main(["distill", "digits-8", "--out", str(run), *options]) == 0
    assert main(["export", str(run), str(out)]) == 0
    cases["digits"] = out, load_student(run), {"label": torch.tensor([3, 1, 4])}, {}
    assert run_elsewhere(cases, tmp_path) == list(cases)


def test_an_elastic_student_s_folder_takes_any_of_its_counts_and_no_other(tmp_path):
    """At one step no noise follows the first, so that samples can be compared as they are."""
    model, out = student(ELASTIC), tmp_path / "out"
    export_folder(model, out, str(out), None, None)
    pipe = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    cond, made = asked(ELASTIC), {}
    for k in (1, 2, 3):
        generator = torch.Generator().manual_seed(1)
        options = {"latents": noises(model, 3)[0], "output_type": "latent", "num_inference_steps": k}
        made[k] = pipe(class_labels=cond["label"], generator=generator, **options).images
        assert len(pipe.scheduler.timesteps) == k
    torch.testing.assert_close(made[1], model.sample(3, steps=1, cond=cond, seed=5), atol=1e-5, rtol=1e-5)
    assert float((made[2] - made[3]).abs().max()) > 1e-2
    with pytest.raises(ValueError, match="distilled for 1, 2 or 3 steps and was asked for 4 steps"):
        pipe(batch_size=1, num_inference_steps=4)
    card = (out / "README.md").read_text()
    assert "**1 to 3**, by `num_inference_steps`" in card and "an elastic student (1 to 3 steps)" in card


def test_the_file_is_the_package_s_own_source_and_needs_torch_and_diffusers_alone():
    text = standalone.source()
    tree, found, names = ast.parse(text), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found <= {"__future__", "math", "dataclasses", "typing", "torch", "diffusers"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [ast.unparse(target) for target in targets]
    assert len(names) == len(set(names)), "two modules share a name"
    assert {"UNet", "UViT", "MomentMatchingNetwork"} <= set(names)


@pytest.mark.parametrize(
    ("shape", "nulls", "given", "said"),
    [
        (UNET, True, {"class_labels": [1]}, "knows no classes"),
        (UNET, True, {TEXT: torch.zeros(1, 4, 5)}, "takes no text"),
        (LABELS, False, {}, "must be given class_labels, of 0 to 3"),
        (PROMPTED, False, {}, "must be given encoder_hidden_states"),
        (PROMPTED, True, {MASK: torch.ones(1, 4)}, "of no use without"),
        (PROMPTED, True, {TEXT: torch.zeros(2, 4, 5), MASK: torch.ones(1, 4)}, "as many rows"),
        (UNET, True, {"num_inference_steps": 7}, "distilled for 3 steps"),
    ],
)
def test_a_pipeline_refuses_what_the_student_does_not_take(shape, nulls, given, said, tmp_path):
    from diffusers import DiffusionPipeline

    export_folder(student(shape, nulls=nulls), tmp_path / "out", "name", None, None)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match=said):
        pipe(**given)


def test_a_pipeline_runs_in_half_the_precision(tmp_path):
    from diffusers import DiffusionPipeline

    model = student(BOTH)
    export_folder(model, tmp_path / "out", "name", None, None)
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "out", trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    images = pipe(batch_size=2, output_type="pt").images
    assert images.dtype == torch.bfloat16 and bool(images.isfinite().all())


def test_a_loaded_network_keeps_its_layout_in_memory(tmp_path):
    export_folder(student(UNET), tmp_path / "out", "name", None, None)
    network = MomentMatchingNetwork.from_pretrained(tmp_path / "out" / "unet")
    weight = network.network.down_levels[0][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_latents_are_decoded_by_the_autoencoder_that_they_come_from(tmp_path):
    from diffusers import DiffusionPipeline

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.1,
    )  # fmt: skip
    source = tmp_path / "source"
    network = UNet2DModel(
        8, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(source)
    autoencoder.save_pretrained(source / "vae")
    index = json.loads((source / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (source / "model_index.json").write_text(json.dumps(index))

    model = student(UViTConfig(**{**vars(UVIT), "image_channels": 4}), side=8)
    model = dataclasses.replace(model, provenance={**model.info, "pipeline": str(source)})
    out = tmp_path / "out"
    export_folder(model, out, str(out), None, None)
    assert " (latent) |" in (out / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    ask = {"latents": torch.randn(2, 4, 8, 8)}
    made, pictures = (
        pipe(**ask, output_type=kind, generator=torch.Generator().manual_seed(1)).images
        for kind in ("latent", "pt")
    )
    decoder = latents.decoder_of(model)
    assert decoder is not None
    torch.testing.assert_close(pictures, decoder(made) / 2 + 0.5, rtol=1e-5, atol=1e-5)
    exec(snippet(out), {})
