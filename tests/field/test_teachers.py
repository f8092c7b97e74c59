"""Teachers as other people's tools leave them on a disk, and what a student of them is exported as."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import momatch
from momatch.config.schema import MonitorConfig, TrainConfig
from momatch.interop.export.folder import export_folder
from momatch.interop.load import load_any
from momatch.models.model import ModelError, Student
from momatch.utils.errors import Notice, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def network(size=8, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )


def pipeline(folder, size=8, **scheduler):
    DDPMPipeline(network(size), DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def first_weight(model):
    return model.denoiser.network.model.conv_in.weight


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_weights_under_another_name_alone(tmp_path, variant):
    folder = pipeline(tmp_path / "pipe")
    part = folder / "unet"
    weights = load_file(part / WEIGHTS)
    save_file(
        {k: v.half() for k, v in weights.items()}, part / f"diffusion_pytorch_model.{variant}.safetensors"
    )
    (part / WEIGHTS).unlink()
    found = first_weight(momatch.load_teacher(folder))
    assert found.dtype == torch.float32 and torch.equal(found, weights["conv_in.weight"].half().float())


def test_weights_of_full_precision_come_first(tmp_path):
    folder = pipeline(tmp_path / "pipe")
    weights = load_file(folder / "unet" / WEIGHTS)
    half = {k: torch.zeros_like(v).half() for k, v in weights.items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(first_weight(momatch.load_teacher(folder)), weights["conv_in.weight"])


def checkpoint(folder, averaged=True, whole=True):
    """What diffusers' training scripts leave: the pipeline they end with, and a checkpoint in its folder."""
    if whole:
        pipeline(folder, beta_schedule="squaredcos_cap_v2")
    part = folder / "checkpoint-500" / "unet"
    network(seed=1).save_pretrained(part)
    if averaged:
        average = part.with_name("unet_ema")
        network(seed=2).save_pretrained(average)
        config = json.loads((average / "config.json").read_text())
        more = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 500, "power": 0.75, "min_decay": 0.0}
        (average / "config.json").write_text(json.dumps({**config, **more}))
    return folder / "checkpoint-500"


@pytest.mark.parametrize(("part", "seed"), [("unet", 1), ("unet_ema", 2), ("", 2)])
def test_a_checkpoint_of_training_has_the_noise_of_its_pipeline(tmp_path, part, seed):
    folder = checkpoint(tmp_path / "out") / part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        teacher = momatch.load_teacher(folder)
    assert torch.equal(first_weight(teacher), network(seed=seed).conv_in.weight)
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.double()
    torch.testing.assert_close(torch.tensor(teacher.schedule.options["betas"]).double(), betas)
    assert "decay" not in teacher.network.config and teacher.sample(1, 2).shape == (1, 1, 8, 8)
    teacher.save(tmp_path / "saved")
    assert torch.equal(first_weight(momatch.load_teacher(tmp_path / "saved")), first_weight(teacher))


def test_of_a_checkpoint_s_two_networks_the_average_is_taken_and_that_is_said(tmp_path):
    folder = checkpoint(tmp_path / "out")
    with pytest.warns(
        Notice, match="unet_ema is the teacher, the average .* name .*unet for the last weights"
    ):
        momatch.load_teacher(folder)
    shutil.rmtree(folder / "unet_ema")
    assert torch.equal(first_weight(momatch.load_teacher(folder)), network(seed=1).conv_in.weight)


def test_a_checkpoint_alone_asks_for_its_scheduler_and_takes_it(tmp_path):
    folder = checkpoint(tmp_path / "out", averaged=False, whole=False)
    with pytest.raises(ModelError, match="does not say with what noise .*scheduler=FOLDER"):
        momatch.load_teacher(folder)
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "noise" / "scheduler")
    for place in (tmp_path / "noise", tmp_path / "noise" / "scheduler"):
        teacher = momatch.load_teacher(folder, scheduler=place)
        assert len(teacher.schedule.options["betas"]) == 500
    with pytest.raises(ModelError, match="out has no scheduler_config.json; give"):
        momatch.load_teacher(folder, scheduler=tmp_path / "out")
    with pytest.raises(UsageError, match="are for teachers of diffusers"):
        momatch.load_teacher("digits", scheduler=tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short distillation's folder."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    config = momatch.DistillConfig(
        steps=2, train=TrainConfig(num_steps=2, batch_size=4), monitor=MonitorConfig(every=0)
    )
    momatch.distill(momatch.load_teacher("digits"), momatch.load_data("digits"), config, folder)
    return folder


def test_a_run_that_has_a_student_offers_it_as_teacher(run):
    with pytest.raises(ModelError, match="has a student and no teacher; give .*short/student"):
        momatch.load_teacher(run)
    assert momatch.load_teacher(run / "student").steps == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["diffusers", "own"])
def test_a_teacher_of_broken_numbers_is_refused_by_the_tensor_s_name(tmp_path, value, kind):
    if kind == "diffusers":
        folder, name = pipeline(tmp_path / "pipe"), "mid_block.resnets.0.conv1.weight"
        path = folder / "unet" / WEIGHTS
    else:
        folder = tmp_path / "own"
        momatch.load_teacher("digits").save(folder)
        path, name = folder / "model.safetensors", ""
    weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    name = name or sorted(weights)[3]
    weights[name].flatten()[2] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of the .* numbers of {name} are NaN or infinite; take") as error:
        momatch.load_teacher(folder)
    assert "\n" not in str(error.value)
    if kind == "own":
        with pytest.raises(ModelError, match="NaN or infinite"):
            load_any(folder)


@pytest.mark.parametrize("size", [(8, 16), (16, 8), 8])
def test_an_exported_student_makes_samples_of_its_own_shape(tmp_path, size):
    teacher = momatch.load_teacher(pipeline(tmp_path / "pipe", size))
    shape = (1, *size) if isinstance(size, tuple) else (1, size, size)
    assert teacher.sample_shape == shape
    info = {**teacher.info, "role": "student"}
    fields = dict(denoiser=teacher.denoiser, network=teacher.network, schedule=teacher.schedule)
    student = Student(**fields, sample_shape=shape, steps=2, provenance=info)
    export_folder(student, tmp_path / "export", "it", None, None)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "export")
    made = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert made.shape[1:3] == shape[1:]


def test_a_student_at_another_size_than_its_teacher_s_files_say(tmp_path):
    teacher = momatch.load_teacher(pipeline(tmp_path / "pipe"), size=16)
    fields = dict(denoiser=teacher.denoiser, network=teacher.network, schedule=teacher.schedule)
    student = Student(
        **fields, sample_shape=(1, 16, 16), steps=2, provenance={**teacher.info, "role": "student"}
    )
    export_folder(student, tmp_path / "export", "it", None, None)
    assert UNet2DModel.load_config(tmp_path / "export" / "unet")["sample_size"] == 16


def test_the_card_lists_the_classes_in_order(tmp_path):
    teacher = momatch.load_teacher(pipeline(tmp_path / "pipe"))
    info = {**teacher.info, "role": "student", "class_names": ["cat", "dog"]}
    fields = dict(denoiser=teacher.denoiser, network=teacher.network, schedule=teacher.schedule)
    export_folder(
        Student(**fields, sample_shape=(1, 8, 8), steps=2, provenance=info), tmp_path / "x", "it", None, None
    )
    assert "Its classes by `class_labels`: 0 cat, 1 dog." in (tmp_path / "x" / "README.md").read_text()


def test_weights_that_were_not_fetched_say_so(tmp_path):
    folder = pipeline(tmp_path / "pipe")
    (folder / "unet" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(
        ModelError, match=f"{WEIGHTS} is a pointer of Git LFS, not the weights; run git lfs pull"
    ):
        momatch.load_teacher(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5.ckpt", "flux.gguf"])
def test_a_single_file_of_weights_says_how_a_folder_is_made_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=f"{name} is a single file of weights; .*from_single_file") as error:
        momatch.load_teacher(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_config.json"])
def test_an_adapter_is_no_teacher(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelError, match=f"is an adapter .{name}., not a model; give its base model"):
        momatch.load_teacher(tmp_path)


@pytest.mark.parametrize("refs", [True, False])
def test_a_folder_of_the_hub_s_cache(tmp_path, refs):
    cache = tmp_path / "models--org--name"
    pipeline(cache / "snapshots" / "0a1b")
    (cache / "blobs").mkdir()
    if refs:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0a1b")
        (cache / "snapshots" / "older").mkdir()
    assert momatch.load_teacher(cache).sample_shape == (1, 8, 8)
