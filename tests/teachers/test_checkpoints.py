"""Checkpoints as they lie around: in shards, in half precision, with an adapter beside them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import momatch
from momatch.cli import main
from momatch.config.schema import DistillConfig, to_json
from momatch.interop.load import teacher_of_student
from momatch.models.provenance import Provenance
from momatch.training.build import teacher_of
from momatch.utils.errors import Notice, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import families  # noqa: E402
import folders  # noqa: E402
import stages  # noqa: E402


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    return folders.save(tmp_path / "sd", folders.text_unet(), families.ddim())


def estimate(model):
    cond = stages.in_single(families.condition(model))
    z = stages.noise(model.sample_shape)[0]
    with torch.no_grad():
        return model.denoiser(z, torch.zeros(len(z)), cond)


@pytest.mark.parametrize("shard", ["20KB", "10GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_in_shards_and_in_half_precision(shard, dtype, teacher, tmp_path):
    whole = momatch.load_teacher(teacher)
    network = diffusers.UNet2DConditionModel.from_pretrained(teacher / "unet").to(dtype)
    for path in (teacher / "unet").glob("*.safetensors"):
        path.unlink()
    network.save_pretrained(teacher / "unet", max_shard_size=shard)
    files = list((teacher / "unet").glob("*.safetensors"))
    assert (len(files) > 1) == (teacher / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert (len(files) > 1) == (shard == "20KB")
    again = momatch.load_teacher(teacher)
    assert {p.dtype for p in again.denoiser.parameters()} == {torch.float32}
    expected = whole.denoiser.network.model.to(dtype).float().state_dict()
    found = again.denoiser.network.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if len(files) > 1:
        files[0].unlink()
        with pytest.raises(UsageError, match="cannot load|lack"):
            momatch.load_teacher(teacher)


def adapted(teacher, seed=1):
    """The network with an adapter of rank 2 that does something."""
    from peft import LoraConfig

    network = diffusers.UNet2DConditionModel.from_pretrained(teacher / "unet")
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if "lora" in name:
            p.data.normal_(generator=generator)
    return network


def test_an_adapter_beside_a_pipeline_is_merged(teacher, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    network, plain = adapted(teacher), momatch.load_teacher(teacher)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    folder = tmp_path / "lora"
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    model = momatch.load_teacher(teacher, adapter=folder)
    names = set(plain.denoiser.state_dict())
    assert set(model.denoiser.state_dict()) == names and not any("lora" in name for name in names)
    cond = stages.in_single(families.condition(model))
    z = stages.noise(model.sample_shape)[0]
    with torch.no_grad():  # alpha / rank is 2, which diffusers' file leaves out: it loads them at 1
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.mul_(0.5)
        theirs = network(z, torch.full((2,), 500.0), cond["encoder_hidden_states"]).sample
        ours = model.denoiser.network(z, torch.full((2,), 500.0), cond)
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (estimate(model) - estimate(plain)).abs().max()
    config = replace(stages.SHORT, teacher=str(teacher), teacher_adapter=str(folder))
    student = momatch.distill(model, stages.data(model), config)
    assert torch.equal(estimate(teacher_of_student(student)), estimate(model))


def test_an_adapter_of_peft_is_merged(teacher, tmp_path):
    from peft import LoraConfig, get_peft_model

    network = diffusers.UNet2DConditionModel.from_pretrained(teacher / "unet")
    wrapped = get_peft_model(network, LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora" in name:
            p.data.normal_(generator=generator)
    wrapped.save_pretrained(tmp_path / "lora")
    model = momatch.load_teacher(teacher, adapter=tmp_path / "lora")
    cond = stages.in_single(families.condition(model))
    z, time = stages.noise(model.sample_shape)[0], torch.full((2,), 500.0)
    with torch.no_grad():
        theirs = wrapped(z, time, cond["encoder_hidden_states"]).sample
        assert (model.denoiser.network(z, time, cond) - theirs).abs().max() < 1e-5


def test_what_is_no_adapter_of_the_teacher_is_refused(teacher, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "lora"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no adapter; give a folder with pytorch_lora_weights"):
        momatch.load_teacher(teacher, adapter=folder)
    other = {"transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 4)}
    save_file(other, folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(UsageError, match="does not fit the UNet2DConditionModel|changes nothing"):
        momatch.load_teacher(teacher, adapter=folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="does not fit"):
        momatch.load_teacher(teacher, adapter=folder)
    with pytest.raises(UsageError, match=r"give its base model as the teacher.*--teacher-adapter"):
        momatch.load_teacher(folder)


def test_what_an_adapter_does_to_text_encoders_is_said_to_be_left_out(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    network = adapted(teacher)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {**load_file(path), "text_encoder.layer.lora_A.weight": torch.ones(2, 4)}
    save_file(weights, path)
    with pytest.warns(Notice, match="changes text_encoder too, which is left out"):
        momatch.load_teacher(teacher, adapter=tmp_path)


def in_original_layout(network):
    """The weights under the names of Stable Diffusion's own code, for two levels of one block each."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0": "output_blocks.1.2",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    found = {}
    for name, tensor in network.state_dict().items():
        known = next(old for old in names if name.startswith(old + "."))
        rest = name.removeprefix(known + ".")
        first, _, last = rest.partition(".")
        rest = f"{inside[first]}.{last}" if ".resnets." in known else rest
        found[f"model.diffusion_model.{names[known]}.{rest}"] = tensor
    return found


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_single_file_with_the_configs_of_a_pipeline_of_its_kind(layout, teacher, tmp_path, capsys):
    torch.manual_seed(1)  # other weights than the pipeline's
    network = folders.text_unet()
    file = tmp_path / "finetuned.safetensors"
    save_file(in_original_layout(network) if layout == "original" else network.state_dict(), file)
    model = momatch.load_teacher(file, scheduler=teacher)
    found = model.denoiser.network.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    plain = momatch.load_teacher(teacher)
    assert model.schedule.options == plain.schedule.options
    assert model.provenance.pipeline == plain.provenance.pipeline
    assert not torch.equal(estimate(model), estimate(plain))
    config = DistillConfig(teacher=str(file), scheduler=str(teacher))
    origin = Provenance("student", str(file), config=to_json(config))
    for again in (teacher_of(config), teacher_of_student(replace(model, provenance=origin))):
        assert torch.equal(estimate(again), estimate(model))
    assert main(["plan", "diffusers-8", "--teacher", str(file)]) == 2
    assert "name the folder of a diffusers pipeline of its kind" in capsys.readouterr().err


def test_a_single_file_of_another_kind_is_refused(teacher, tmp_path):
    file = tmp_path / "a.safetensors"
    weights = folders.text_unet().state_dict()
    save_file({name: tensor for name, tensor in weights.items() if "conv_out" not in name}, file)
    with pytest.raises(UsageError, match="a.safetensors.* name the folder of a pipeline of its kind"):
        momatch.load_teacher(file, scheduler=teacher)
    save_file({"x": torch.zeros(3)}, file)
    with pytest.raises(UsageError, match="name the folder of a pipeline of its kind"):
        momatch.load_teacher(file, scheduler=teacher)
    save_file(folders.text_unet(block_out_channels=(8, 8)).state_dict(), file)
    with pytest.raises(UsageError, match="name the folder of a pipeline of its kind"):
        momatch.load_teacher(file, scheduler=teacher)
    file.write_bytes(b"no weights at all")
    with pytest.raises(UsageError, match="a.safetensors"):
        momatch.load_teacher(file, scheduler=teacher)
    (tmp_path / "b.ckpt").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a single file of weights; make a pipeline's folder of it"):
        momatch.load_teacher(tmp_path / "b.ckpt", scheduler=teacher)
